# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian package in a guest: one line of configuration, boot, an upgrade under load, removal, and what is left.

`make check-deb` builds the packages and runs this; it is not among the tests of `make vm-test`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.nfs_server import Ganesha
from vmtest import host
from vmtest.guest import Guest, seen_from_guest
from vmtest.image import Image

_PACKAGES = Path(__file__).parents[1] / "build/deb"
_NAME = "swap0"
_DEVICE_MIB = 128
_CGROUP = "/sys/fs/cgroup/nbdnfs-hog"
_ENOUGH = "/run/enough"
_PASSES = ",".join(["fill", *["sequential"] * 63])
# What a running system changes by itself is no remainder of the package.
_NOT_LISTED = ("/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/var/lib/dpkg", "/var/cache", "/var/log")

pytestmark = pytest.mark.long


def package(folder: Path) -> Path:
    found = sorted(folder.glob("nbdnfs_*.deb"))
    assert len(found) == 1, f"{folder} has no package: run make check-deb"
    return found[0]


def files(guest: Guest) -> set[str]:
    """All files, less those that belong to the running system."""
    pruned = " -o ".join(f"-path {path}" for path in _NOT_LISTED)
    return set(
        guest.run(f"find / -xdev \\( {pruned} \\) -prune -o -type f -print -o -type l -print").stdout.split("\n")
    )


def wait_for_swap(guest: Guest) -> None:
    unit = f"nbdnfs@{_NAME}"
    guest.run(f"until systemctl -q is-active {unit} || systemctl -q is-failed {unit}; do sleep 1; done", 600)
    assert "/dev/nbd" in guest.run("cat /proc/swaps").stdout
    print(guest.run(f"nbdnfs status {_NAME}").stdout)


def worker(guest: Guest) -> tuple[str, str]:
    """The pid and the version of the worker."""
    pid, _, version = guest.run(f"cat /run/nbdnfs/{_NAME}/worker").stdout.split()
    return pid, version


def swapped_out(guest: Guest) -> int:
    """Pages since boot."""
    return int(guest.run("awk '/^pswpout/ {print $2}' /proc/vmstat").stdout)


@pytest.mark.timeout(3600)
def test_install_boot_upgrade_remove(boot: Callable[..., Guest], ganesha: Ganesha, image: Image) -> None:
    """One line of configuration and a reboot turn swap on, and doctor has no complaint. An upgrade under load replaces
    keeper and worker, with no wrong page. Removal is refused while swap is on; a purge leaves nothing."""
    built = _PACKAGES / f"{image.suite}-{image.architecture.name}"
    first, following = package(built), package(built / "next")
    url = ganesha.url("swap0.swap")
    host.nbdnfs_create(url, _DEVICE_MIB, timeout_s=120)
    # with a signature there the guest need not read all of it, which an emulated CPU takes minutes for
    host.run(["/sbin/mkswap", ganesha.export_path / "swap0.swap"], what="mkswap", timeout_s=30)
    with boot(allow={"nbd", "slow"}) as guest:
        guest.settle()
        before = files(guest)
        guest.push(first, "/root/first.deb")
        guest.push(following, "/root/next.deb")
        guest.run("dpkg --install /root/first.deb", 300)
        guest.run(f"echo 'url = \"{seen_from_guest(url)}\"' > /etc/nbdnfs/{_NAME}.toml")
        guest.run(f"systemctl enable nbdnfs@{_NAME}")
        guest.reboot(150)
        guest.settle()
        wait_for_swap(guest)
        doctor = guest.run(f"nbdnfs doctor {_NAME}").stdout
        print(doctor)
        assert f"ok   {_NAME}: pages: encrypted on the NAS\n" in doctor
        guest.run(
            "grep -qw memory /sys/fs/cgroup/cgroup.subtree_control"
            " || echo +memory > /sys/fs/cgroup/cgroup.subtree_control;"
            f" mkdir -p {_CGROUP} && echo 16M > {_CGROUP}/memory.max"
        )
        hog = guest.start(
            f"exec hog --size 40 --passes {_PASSES} --until {_ENOUGH} --cgroup {_CGROUP}"
            f" --report {guest.verdict_target}",
            1800,
        )
        guest.wait_until(lambda: swapped_out(guest) > 1000, 120, "the first pages to go out")
        old_pid, old_version = worker(guest)
        guest.run("dpkg --install /root/next.deb", 400)
        guest.wait_until(lambda: worker(guest)[1] == "99", 120, "a worker of the next version")
        assert (worker(guest)[0] != old_pid, old_version != "99") == (True, True)
        moved = swapped_out(guest)
        guest.wait_until(lambda: swapped_out(guest) > moved + 1000, 240, "pages that go out to the next version")
        guest.run(f"touch {_ENOUGH}")
        verdict = guest.wait_verdict(hog, 900).check()
        hog.wait()
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")
        refused = guest.run("dpkg --remove nbdnfs 2>&1", 120, check=False)
        assert refused.status != 0
        assert f"nbdnfs down {_NAME}" in refused.stdout
        assert guest.run(f"nbdnfs status {_NAME}").status == 0
        guest.run(f"nbdnfs down {_NAME}", 300)
        guest.run("dpkg --purge nbdnfs", 120)
        assert sorted(path for path in files(guest) - before if "nbdnfs" in path) == []
