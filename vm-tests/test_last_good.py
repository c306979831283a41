# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read or cannot be written, with swap in use and at boot: a wrong configuration, a full /run, a program that
is gone, a NAS that answers before its disks are mounted."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.nfs_server import Ganesha
from test_keeper import finish, start_hog, swapped_out, swapping, worker_of
from vmtest import host
from vmtest.guest import Guest, seen_from_guest
from vmtest.journal import keep_on_disk, refuse_tracebacks

_NAME = "swap0"
_UNIT = f"nbdnfs@{_NAME}"
_CONFIG = f"/etc/nbdnfs/{_NAME}.toml"
_RECORDS = f"/run/nbdnfs/{_NAME}"
_PROGRAM = "/usr/local/bin/nbdnfs"
# What is promised is 15 s; an emulated CPU takes longer to start four programs in Python, above all on a busy host.
_BACK_WITHIN_S = 60.0
# Between two starts of a program that is gone: systemd/pace. The first follows a kill, which is at once.
_PACE_S = 10.0


def main_pid(guest: Guest) -> int:
    return int(guest.run(f"systemctl show -p MainPID --value {_UNIT}", 240).stdout)


def restarts(guest: Guest) -> int:
    return int(guest.run(f"systemctl show -p NRestarts --value {_UNIT}", 240).stdout)


def uptime_s(guest: Guest) -> float:
    return float(guest.run("cut -d' ' -f1 /proc/uptime", 240).stdout)


def record(guest: Guest, key: str) -> str:
    return guest.run(f"cat {_RECORDS}/{key}", 240, check=False).stdout.strip()


def journal(guest: Guest) -> list[str]:
    """Of keepers, helpers and workers; without systemd's own lines."""
    return guest.run(f"journalctl -b -o cat --no-pager _SYSTEMD_UNIT={_UNIT}.service", 240).stdout.splitlines()


def kill_worker(guest: Guest) -> None:
    """And wait until pages go out to another one."""
    pid = worker_of(guest).pid
    guest.run(f"kill -KILL {pid}")
    guest.wait_until(lambda: worker_of(guest).pid not in (0, pid), 600, "another worker")
    before = swapped_out(guest)
    guest.wait_until(lambda: swapped_out(guest) > before + 200, 600, "pages that go out to it")


def kill_keeper(guest: Guest) -> None:
    """And wait until another one watches."""
    pid = main_pid(guest)
    guest.run(f"kill -KILL {pid}")
    guest.wait_until(lambda: main_pid(guest) not in (0, pid), 600, "another keeper")
    guest.wait_until(lambda: is_active(guest), 600, "a keeper that watches")


def is_active(guest: Guest) -> bool:
    return guest.run(f"systemctl -q is-active {_UNIT}", 240, check=False).status == 0


@pytest.mark.timeout(3600)
def test_mistakes_while_swap_is_in_use(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """A typo, and no configuration at all; /run full; no program. Keepers and workers die meanwhile, and are replaced:
    no page is wrong, nothing is restarted ten times a second, and nothing ends in a traceback."""
    with swapping(boot, ganesha) as guest:
        hog = start_hog(guest, 40, 16, 3000)
        guest.wait_until(lambda: swapped_out(guest) > 1000, 600, "the first pages to go out")

        guest.run(f"cp {_CONFIG} /root/good.toml && echo 'siez = \"1M\"' >> {_CONFIG}")
        guest.run(f"systemctl restart {_UNIT}", 600)
        assert record(guest, "config_error").startswith(f"the configuration file is wrong: {_CONFIG}:3: ")
        kill_worker(guest)
        guest.run(f"rm {_CONFIG}")
        kill_keeper(guest)
        kill_worker(guest)
        assert f"{_CONFIG} does not exist" in record(guest, "config_error")
        guest.run(f"cp /root/good.toml {_CONFIG}")
        guest.run(f"systemctl restart {_UNIT}", 600)
        assert record(guest, "config_error") == ""

        keep_on_disk(guest)
        guest.run("head -c 1G /dev/zero > /run/filler; ! head -c 8192 /dev/zero > /run/more")
        kill_keeper(guest)
        kill_worker(guest)
        guest.run(f"kill -KILL {main_pid(guest)} {worker_of(guest).pid}")
        guest.wait_until(lambda: is_active(guest), 600, "a keeper")
        kill_worker(guest)
        guest.run("rm -f /run/filler /run/more")

        before = restarts(guest)
        guest.run(f"mv {_PROGRAM} {_PROGRAM}.away")
        killed_s = uptime_s(guest)
        guest.run(f"kill -KILL {main_pid(guest)}")
        guest.wait_until(lambda: restarts(guest) >= before + 3, 600, "the third start without the program")
        # in this order, so that a start between the two makes the time longer, not the number larger
        happened, took_s = restarts(guest) - before, uptime_s(guest) - killed_s
        guest.run(f"mv {_PROGRAM}.away {_PROGRAM}")
        print(f"without the program: {happened} restarts in {took_s:.1f} s")
        assert took_s >= _PACE_S * (happened - 1)
        guest.wait_until(lambda: is_active(guest), 600, "the keeper with its program back")

        verdict = finish(guest, hog, 1500)
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")
        print("\n".join(journal(guest)))


@pytest.mark.timeout(3600)
def test_a_nas_without_its_file(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """The NAS answers at boot, but has no file yet. No new one is made, although the configuration has a size; the
    reason is shown, and said once; swap is on soon after the file is back."""
    url = ganesha.url("swap0.swap")
    path = ganesha.export_path / "swap0.swap"
    host.nbdnfs_create(url, 64, timeout_s=120)
    host.run(["/sbin/mkswap", path], what="mkswap", timeout_s=30)
    away = path.rename(path.parent.parent / "away.swap")
    with boot(project=True, allow={"slow"}) as guest:
        guest.settle()
        keep_on_disk(guest)
        guest.run("nbdnfs install-units && mkdir -p /etc/nbdnfs", 120)
        guest.run(f'cat > {_CONFIG} <<\'.\'\nurl = "{seen_from_guest(url)}"\nsize = "64M"\n.')
        guest.run(f"systemctl enable {_UNIT}", 240)
        guest.reboot(300)
        guest.wait_until(lambda: "there is no file" in record(guest, "waiting"), 1200, "a keeper that waits")
        time.sleep(120)  # the span in which nothing may happen
        print(record(guest, "waiting"), guest.run(f"systemctl status --no-pager {_UNIT}", 240, check=False).stdout)
        assert record(guest, "waiting").endswith("(a typo, or the server's disks are not mounted yet)")
        assert list(ganesha.export_path.iterdir()) == []
        assert restarts(guest) == 0
        busy_s = guest.cpu_s
        away.rename(path)
        returned_s = time.monotonic()
        guest.wait_until(lambda: "/dev/nbd" in guest.run("cat /proc/swaps").stdout, 300, "swap")
        took_s, cpu_s = time.monotonic() - returned_s, guest.cpu_s - busy_s
        print(f"swap is on {took_s:.1f} s after the file's return, {cpu_s:.1f} s of the host's CPU time")
        print(guest.run(f"journalctl -b -o short-precise --no-pager -u {_UNIT}", 240).stdout)
        lines = journal(guest)
        assert len([line for line in lines if "there is no file" in line]) == 1
        refuse_tracebacks(guest)
        assert took_s < _BACK_WITHIN_S
        assert record(guest, "waiting") == ""
        guest.shutdown(300)
