# SPDX-License-Identifier: LGPL-2.1-or-later
"""An administrator who does the wrong thing at the wrong time, while a program swaps and checks every page."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from support.nfs_server import Ganesha
from test_keeper import finish, start_hog, swapped_out, swapping, worker_of
from vmtest import host
from vmtest.guest import Guest, seen_from_guest
from vmtest.machine import Result

_UNIT = "nbdnfs@swap0"
_TRAP = "/root/trap"
_DM = "/dev/mapper/crypt0"
# dm-crypt's own self-test is the kernel's business: any key will do
_TABLE = "crypt aes-cbc-plain64 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f 0 /dev/nbd0 0"


def main_pid(guest: Guest) -> int:
    return int(guest.run(f"systemctl show -p MainPID --value {_UNIT}", 60).stdout)


def state_of(guest: Guest) -> str:
    """The unit's, in systemd's words."""
    return guest.run(f"systemctl is-active {_UNIT}", 60, check=False).stdout.strip()


def devices(guest: Guest) -> list[str]:
    """The devices with swap0's backend."""
    return guest.run("grep -lx nbdnfs:swap0 /sys/block/nbd*/backend", 60).stdout.split()


def refused(result: Result, *words: str) -> None:
    """The command has ended with EX_TEMPFAIL, and has said why."""
    print(result.stderr)
    assert result.status == os.EX_TEMPFAIL, result.stderr
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.timeout(2400)
def test_two_keepers(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """`nbdnfs run` by hand beside the unit, also while the unit's keeper is stopped; another name for the same file;
    both keepers started at the same moment. There is one keeper and one device, and no page is wrong. What lies in the
    current directory does not run."""
    with swapping(boot, ganesha) as guest:
        guest.run(f"mkdir -p {_TRAP}/nbdnfs && echo 'import os; os._exit(99)' > {_TRAP}/nbdnfs/__init__.py")
        hog = start_hog(guest, 40, 16, 1800)
        guest.wait_until(lambda: swapped_out(guest) > 1000, 120, "the first pages to go out")
        pid = main_pid(guest)
        by_hand = f"cd {_TRAP} && nbdnfs run swap0"
        refused(
            guest.run(by_hand, 120, check=False), f"swap0 already has a keeper, or is being taken down: process {pid}"
        )
        guest.run(f"kill -STOP {pid}")
        refused(guest.run(by_hand, 120, check=False), f"process {pid}")
        guest.run(f"kill -CONT {pid}")

        guest.run("cp /etc/nbdnfs/swap0.toml /etc/nbdnfs/other.toml && echo 'owner = false' >> /etc/nbdnfs/other.toml")
        other = guest.run(f"cd {_TRAP} && nbdnfs run other", 120, check=False)
        refused(other, "is the file of swap0 on this machine", "nbdnfs down swap0")
        assert len(devices(guest)) == 1

        for _ in range(3):
            guest.run(f"kill -KILL $(systemctl show -p MainPID --value {_UNIT})")
            job = guest.start(f"cd {_TRAP} && exec nbdnfs run swap0", 600)
            guest.wait_until(
                lambda: state_of(guest) in ("active", "failed"), 240, "a keeper of the unit, or by hand in its place"
            )
            if state_of(guest) == "active":
                refused(job.wait(), "already has a keeper")
            else:  # the one by hand was faster
                job.kill()
                job.wait()
                guest.run(f"systemctl start {_UNIT}", 240)
            assert len(devices(guest)) == 1
        moved = swapped_out(guest)
        guest.wait_until(lambda: swapped_out(guest) > moved + 1000, 120, "pages that go out")
        verdict = finish(guest, hog, 900)
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")
        journal = guest.run(f"journalctl -b -u {_UNIT} --no-pager", 60).stdout
        assert "Traceback" not in journal


@pytest.mark.timeout(2400)
def test_dm_crypt_on_top(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """Swap on dm-crypt on the device, with pages in it. `down`, a stop, a restart, SIGTERM for the keeper and a dead
    worker leave it alone; what refuses says what is on top, and has changed nothing."""
    with swapping(boot, ganesha) as guest:
        guest.run("swapoff /dev/nbd0 && modprobe dm-crypt")
        guest.run(f'dmsetup create crypt0 --table "0 $(blockdev --getsz /dev/nbd0) {_TABLE}"', 120)
        guest.run(f"mkswap {_DM} && swapon --priority 100 {_DM}", 240)
        hog = start_hog(guest, 40, 16, 1800)
        guest.wait_until(lambda: swapped_out(guest) > 1000, 120, "the first pages to go out")
        first = worker_of(guest)
        for command in ("nbdnfs down swap0", "nbdnfs up swap0"):
            refused(
                guest.run(command, 120, check=False),
                "/dev/nbd0 is in use by dm-0, which is swapped on",
                "swapoff /dev/",
            )
        guest.run(f"systemctl restart {_UNIT}", 240)
        guest.run(f"systemctl stop {_UNIT}", 240, check=False)
        guest.wait_until(
            lambda: state_of(guest) == "active",
            240,
            "the keeper to return",
        )
        guest.run(f"kill -TERM {main_pid(guest)}")
        guest.wait_until(lambda: state_of(guest) == "active", 240, "the next keeper")
        assert worker_of(guest).pid == first.pid
        guest.run(f"kill -KILL {first.pid}")
        moved = swapped_out(guest)
        guest.wait_until(lambda: swapped_out(guest) > moved + 1000, 240, "pages that go out")
        assert worker_of(guest).pid != first.pid
        verdict = finish(guest, hog, 900)
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")

        guest.run(f"swapoff {_DM}", 240)
        refused(guest.run("nbdnfs down swap0", 120, check=False), "/dev/nbd0 is in use by dm-0", "dm-0 down first")
        guest.run("dmsetup remove crypt0", 120)
        guest.run("nbdnfs down swap0", 240)
        host.run(["/sbin/mkswap", ganesha.export_path / "swap0.swap"], what="mkswap", timeout_s=30)
        guest.run(f"systemctl start {_UNIT}", 240)
        journal = guest.run(f"journalctl -b -u {_UNIT} --no-pager", 60).stdout
        assert "Traceback" not in journal


@pytest.mark.timeout(1800)
def test_up(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """Without systemd: `up` lets a pipe go, shows progress, and turns swap on again after `swapoff -a`. With systemd,
    where the start takes longer than systemd waits: status 75, and the start goes on until the server is there."""
    url = ganesha.url("swap0.swap")
    with boot(project=True, allow={"nbd", "slow"}) as guest:
        guest.settle()
        guest.run(
            f"mkdir -p /etc/nbdnfs && printf '%s\\n' 'url = \"{seen_from_guest(url)}\"' 'size = \"16M\"'"
            " > /etc/nbdnfs/swap0.toml",
            240,
        )
        up = guest.run("nbdnfs up swap0 2>&1 | cat", 400)
        print(up.stdout)
        assert "nbdnfs: swap0: creating the backing file: " in up.stdout
        assert "nbdnfs: swap0: swap is on: /dev/nbd0" in guest.run("dmesg").stdout
        assert swaps(guest) == ["/dev/nbd0"]
        refused(guest.run("nbdnfs up swap0", 240, check=False), "swap0 is already up: its keeper is process")
        guest.run("swapoff -a", 240)
        guest.run("nbdnfs up swap0", 240)
        assert swaps(guest) == ["/dev/nbd0"]
        guest.run("nbdnfs down swap0", 240)
        assert swaps(guest) == []

        guest.run(
            "nbdnfs install-units && mkdir -p /run/systemd/system/nbdnfs@.service.d"
            " && printf '[Unit]\\nJobRunningTimeoutSec=20\\n' > /run/systemd/system/nbdnfs@.service.d/soon.conf"
            " && systemctl daemon-reload",
            240,
        )
        ganesha.kill()
        refused(guest.run("nbdnfs up swap0", 240, check=False), "swap0 is still starting, and goes on: ")
        ganesha.start()
        guest.wait_until(lambda: swaps(guest) == ["/dev/nbd0"], 240, "swap, once the server is back")
        guest.run("swapoff -a", 240)
        guest.run("nbdnfs up swap0", 240)
        assert swaps(guest) == ["/dev/nbd0"]
        guest.run("nbdnfs down swap0", 240)


def swaps(guest: Guest) -> list[str]:
    return guest.run("tail -n +2 /proc/swaps | cut -d' ' -f1").stdout.split()
