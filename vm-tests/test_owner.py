# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ownership of the backing file, with systemd and a real kernel: boots, a crash, a stop, and a theft under load."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable

import pytest
from support.nfs_server import Ganesha
from vmtest import host
from vmtest.guest import Guest, seen_from_guest

from nbdnfs.nas import owner_record, ownership
from nbdnfs.nas.owner_record import Identity

_NAME = "swap0"
_UNIT = f"nbdnfs@{_NAME}"
_CGROUP = "/sys/fs/cgroup/nbdnfs-hog"
_THIEF = Identity("d" * 31 + "1", "e" * 31 + "1", "-", "thief")

# The end of a device that is in use: its pages are gone, and the programs that had them end.
_EXPECTED = {"nbd", "io", "slow", "oom"}


def record_of(server: Ganesha) -> owner_record.Record | None:
    """The record beside the file, None where there is none."""
    path = server.export_path / owner_record.name_of("swap0.swap")
    return owner_record.parse(path.read_bytes()) if path.exists() else None


def up(guest: Guest) -> None:
    guest.run(f"systemctl start {_UNIT}", 240)
    assert "/dev/nbd" in guest.run("cat /proc/swaps").stdout


def property_of(guest: Guest, key: str) -> str:
    return guest.run(f"systemctl show --value -p {key} {_UNIT}").stdout.strip()


def digest_of(server: Ganesha) -> bytes:
    return hashlib.sha256((server.export_path / "swap0.swap").read_bytes()).digest()


@pytest.mark.timeout(1800)
def test_boots_and_a_theft(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """A stop gives the file up. A crash does not, and the next boot takes it over unasked. Another machine takes it
    under load: this one writes no more, its requests fail instead of waiting, the unit ends and stays so, and says why;
    it does not get the file back by itself."""
    url = ganesha.url("swap0.swap")
    host.nbdnfs_create(url, 96, timeout_s=120)
    with boot(project=True, allow=_EXPECTED) as guest:
        guest.settle()
        guest.run(
            f"nbdnfs install-units && systemctl daemon-reload && mkdir -p /etc/nbdnfs"
            f" && echo 'url = \"{seen_from_guest(url)}\"' > /etc/nbdnfs/{_NAME}.toml && sync"
        )
        try:
            _stop_and_crash(guest, ganesha)
            swap_under_load(guest)
            ownership.claim(url, f"keeper:{_NAME}", _THIEF, steal=True)
            after = digest_of(ganesha)
            _the_device_ends(guest)
            assert digest_of(ganesha) == after
            _the_file_does_not_come_back(guest)
            assert digest_of(ganesha) == after
        finally:
            with contextlib.suppress(Exception):
                print(guest.run(f"journalctl -u {_UNIT} --no-pager -o short-monotonic | tail -n 80").stdout)


def _stop_and_crash(guest: Guest, server: Ganesha) -> None:
    """The record while the device is up, after a stop, and after a crash and the next boot."""
    up(guest)
    first = record_of(server)
    assert first is not None
    assert (first.holder, first.generation) == (f"keeper:{_NAME}", 1)
    guest.run(f"systemctl stop {_UNIT}", 240)
    assert record_of(server) is None

    up(guest)
    guest.wait_until(lambda: (record_of(server) or first).refreshed > 0, 60, "a refreshed record")
    print(guest.run("grep -E 'VmLck|VmRSS' /proc/$(cut -d' ' -f1 /run/nbdnfs/swap0/keeper)/status").stdout)
    guest.crash()
    guest.boot()
    guest.settle()
    started_s = time.monotonic()
    up(guest)
    print(f"up again {time.monotonic() - started_s:.0f} s after the crash's boot")
    again = record_of(server)
    assert again is not None
    assert (again.machine, again.generation) == (first.machine, 2)
    assert again.boot != first.boot


def swap_under_load(guest: Guest) -> None:
    """Start a hog in a small cgroup, and wait until it swaps."""
    guest.run(
        "grep -qw memory /sys/fs/cgroup/cgroup.subtree_control"
        " || echo +memory > /sys/fs/cgroup/cgroup.subtree_control;"
        f" mkdir -p {_CGROUP} && echo 16M > {_CGROUP}/memory.max"
    )
    guest.start(
        f"exec hog --size 48 --passes fill,random,random,random --cgroup {_CGROUP} --report {guest.verdict_target}",
        900,
    )
    guest.wait_until(lambda: int(guest.run("awk '/^pswpout/ {print $2}' /proc/vmstat").stdout) > 1000, 120, "swap-out")


def _the_device_ends(guest: Guest) -> None:
    """The unit fails for good and says why; a request fails instead of waiting."""
    guest.wait_until(lambda: property_of(guest, "ActiveState") == "failed", 60, "the unit ends")
    assert property_of(guest, "ExecMainStatus") == "77"
    assert property_of(guest, "NRestarts") == "0"
    said = guest.run(f"nbdnfs status {_NAME}", check=False).stdout
    print(said)
    assert "another machine has stolen the backing file" in said
    read = guest.run("timeout 20 dd if=/dev/nbd0 of=/dev/null bs=4096 count=1 iflag=direct", 60, check=False)
    assert read.status != 124, "a request waits for a device that is gone"


def _the_file_does_not_come_back(guest: Guest) -> None:
    """The dead device stays for as long as it is swap; the next boot does not get the file either."""
    for words in ("reboot this machine", "thief (since"):
        assert guest.run(f"systemctl start {_UNIT}", 120, check=False).status != 0
        assert property_of(guest, "ExecMainStatus") == "77"
        assert words in guest.run(f"journalctl -b -u {_UNIT} --no-pager | tail -n 8").stdout
        if words != "thief (since":
            guest.crash()
            guest.boot()
            guest.settle()
    assert "thief (since" in guest.run(f"nbdnfs status {_NAME}", check=False).stdout
