# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines without a disk: the root is on one NFS server, swap on another, and each of the two may go away alone.

`--memory-rounds 10` applies the pressure ten times in a row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.nfs_server import Ganesha
from test_keeper import finish, kill_under_load, start_hog, swapping, worker_of
from test_memory import faults
from vmtest import diskless, host, swap
from vmtest.guest import Guest, machine_id, seen_from_guest

_GUEST_MIB = 256
_PROCESSES = 4
# A quarter more than there is.
_HOG_MIB = _GUEST_MIB * 5 // 4
_DEVICE_MIB = 512
_STRESS_TIMEOUT_S = 2700.0
# As in test_systemd.py: 30 s is the figure for a machine, and is printed.
_POWER_OFF_TIMEOUT_S = 150.0
_AWAY_S = 60.0
_WATCHER = "/run/away.py"
_SEQUENTIAL = ",".join(["fill", *["sequential"] * 63])

# Which units stop, and when, in the kernel's log: the journal of such a machine ends with it.
_TELL = ("systemd.log_level=info", "systemd.log_target=kmsg", "printk.devkmsg=on")

# What keeper and worker say is in the kernel's log, which survives the guest.
_FORWARD = (
    "systemd.journald.forward_to_kmsg=1",
    "systemd.journald.max_level_kmsg=info",
    "printk.devkmsg=on",
)

# The initramfs has set up the card, and no other hardware is needed: an emulated CPU loads drivers from an NFS
# root for minutes.
_LEAN = tuple(
    f"systemd.mask=systemd-{unit}.service"
    for unit in ("networkd", "networkd-wait-online", "udev-trigger", "binfmt", "random-seed")
)

BootDiskless = Callable[..., Guest]


def boot_arguments(server: Ganesha, mib: int) -> list[str]:
    """All that such a machine is given: nbdnfs.url and nbdnfs.size. The file is there already, with a swap area: an
    emulated CPU takes minutes to read all of an empty one."""
    name = f"{machine_id('guest')}.swap"
    host.nbdnfs_create(server.url(name), mib, timeout_s=120)
    host.run(["/sbin/mkswap", server.export_path / name], what="mkswap", timeout_s=30)
    url = seen_from_guest(server.url("X")).replace("/X?", "/%m.swap?")
    return [f"nbdnfs.url={url}", f"nbdnfs.size={mib}M", *_TELL]


def wait_for_swap(guest: Guest, name: str = "cmdline") -> None:
    """Until the unit that the boot starts is up, or has failed."""
    unit = f"nbdnfs@{name}"
    guest.run(f"until systemctl -q is-active {unit} || systemctl -q is-failed {unit}; do sleep 1; done", 600)
    guest.run(f"nbdnfs status {name} || {{ journalctl -b --no-pager -n 40 -u {unit}; exit 1; }}", 60)


def pid_of(guest: Guest, what: str, name: str = "swap0") -> int:
    """Of the keeper, the worker or the standby, by its record."""
    return int(guest.run(f"cut -d ' ' -f 1 /run/nbdnfs/{name}/{what}").stdout)


def files_on(server: Ganesha) -> set[str]:
    """What is in a server's folder, without owner records."""
    return {path.name for path in server.export_path.iterdir() if not path.name.startswith(".")}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", diskless.KINDS)
def test_boot_swap_reboot(boot_diskless: BootDiskless, ganesha: Ganesha, kind: str) -> None:
    """The kernel command line is all. Pages are verified; a second boot swaps to the same file; and it goes off with
    swapped-out pages: swap, worker and keeper end before the root's server is needed for the last time."""
    arguments = boot_arguments(ganesha, 256)
    with boot_diskless(kind, arguments=arguments, allow={"slow"}) as guest:
        for boot in (1, 2):
            guest.settle()
            wait_for_swap(guest)
            root = guest.run("findmnt -no FSTYPE,SOURCE /; ls /dev/vd* 2>/dev/null", check=False).stdout
            assert root.split()[0] == {"nfs": "nfs", "squashfs": "overlay"}[kind]
            assert "/dev/vd" not in root
            print(f"boot {boot}: {guest.boot_seconds:.0f} s to the agent; {' '.join(root.split())}")
            assert len(files_on(ganesha)) == 1
            with swap.limited(guest, 16) as cgroup:
                verdict = swap.stress(guest, size_mib=64, cgroup=cgroup, timeout_s=900).check()
            print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")
            if boot == 1:
                guest.reboot(_POWER_OFF_TIMEOUT_S)
        swap_out(guest, 200)
        print(guest.run("cat /proc/swaps; free -m").stdout)
        print(f"{kind}: power-off with 200 MiB swapped out: {guest.shutdown(_POWER_OFF_TIMEOUT_S):.1f} s")
        assert len(files_on(ganesha)) == 1


def swap_out(guest: Guest, mib: int) -> None:
    """A service that has so much swapped out, and holds it until systemd ends it."""
    program = (
        f"import os,time; some = os.urandom(1 << 20); data = [bytearray(some) for _ in range({mib + 60})];"
        " time.sleep(9999)"
    )
    guest.run(f"systemd-run --unit=eater -p MemoryMax=40M -p OOMPolicy=continue python3 -c '{program}'")
    guest.run(
        f"until [ $(awk '/nbd/ {{print $4}}' /proc/swaps) -ge {mib << 10} ]; do"
        " systemctl -q is-active eater || exit 1; sleep 0.5; done",
        400,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many rounds as the command line asks for."""
    if "memory_round" in metafunc.fixturenames:
        metafunc.parametrize("memory_round", range(1, metafunc.config.option.memory_rounds + 1))


@pytest.fixture
def boot_nfs(boot_diskless: BootDiskless) -> BootDiskless:
    """As the fixture `boot`, for test_keeper.swapping: a guest of 256 MiB whose root is on NFS."""

    def boot(*, project: bool, allow: set[str], **options: object) -> Guest:
        assert project
        return boot_diskless(
            "nfs", memory_mib=_GUEST_MIB, allow={*allow, "hung"}, arguments=(*_LEAN, *_FORWARD), **options
        )

    return boot


@pytest.mark.timeout(3600)
def test_pressure(boot_nfs: BootDiskless, ganesha: Ganesha, memory_round: int) -> None:
    """More pages than memory, no cgroup: none is wrong, nothing is killed, and neither keeper nor worker reads
    anything from the root between swapon and the end."""
    with swapping(boot_nfs, ganesha, device_mib=_DEVICE_MIB) as guest:
        pids = {what: pid_of(guest, what) for what in ("keeper", "worker", "standby")}
        before = {what: faults(guest, pid) for what, pid in pids.items()}
        counted = swap.counters(guest)
        verdict = swap.stress(guest, size_mib=_HOG_MIB, processes=_PROCESSES, timeout_s=_STRESS_TIMEOUT_S)
        found = {what: faults(guest, pid) - before[what] for what, pid in pids.items()}
        now = swap.counters(guest)
        changed = {name: now[name] - counted[name] for name in now}
        pages = f"{verdict.wrong} wrong of {verdict.checked}"
        print(f"round {memory_round}: {verdict.seconds:.0f} s, {pages}, {changed}, {found}")
        verdict.check()
        assert changed["oom_kill"] == 0
        assert changed["pswpout"] > verdict.pages // 4
        assert {what: pid_of(guest, what) for what in pids} == pids
        assert {what: one.major for what, one in found.items()} == dict.fromkeys(pids, 0)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("what", "count", "every_s"), [("worker", 20, 8), ("keeper", 10, 8), ("both", 5, 12)])
def test_kills(boot_nfs: BootDiskless, ganesha: Ganesha, what: str, count: int, every_s: float) -> None:
    """Under that load: no page is lost, and swap moves again, although all that is started is read from an NFS root."""
    with swapping(boot_nfs, ganesha, device_mib=288) as guest:
        load = {"size_mib": 224, "limit_mib": None, "timeout_s": 3000, "passes": _SEQUENTIAL}
        kill_under_load(guest, what, count, every_s, **load)  # type: ignore[arg-type]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("which", ["root", "swap"])
def test_one_server_is_away(boot_nfs: BootDiskless, ganesha: Ganesha, root_server: Ganesha, which: str) -> None:
    """For a minute, under load, and in the middle of it the worker is killed: nothing is lost, and all goes on."""
    server = root_server if which == "root" else ganesha
    with swapping(boot_nfs, ganesha, device_mib=288) as guest:
        guest.push(Path(__file__).parent / "inside/away.py", _WATCHER)
        watcher = guest.start(f"exec python3 {_WATCHER} swap0 {_AWAY_S:g}", 1800)
        guest.wait_until(lambda: "ready" in watcher.stdout, 120, "the watcher")
        hog = start_hog(guest, 224, None, 3000, _SEQUENTIAL)
        guest.wait_until(lambda: "now" in watcher.stdout, 600, "the first pages to go out")
        server.kill()
        away_since_s = time.monotonic()
        time.sleep(_AWAY_S)
        server.start()
        print(f"{which}: away for {time.monotonic() - away_since_s:.0f} s")
        found = json.loads(watcher.wait().stdout.splitlines()[-1])
        print(f"{which}: {found}")
        verdict = finish(guest, hog, 2700)
        print(f"{which}: {verdict.checked} pages checked, {verdict.wrong} wrong")
        guest.wait_until(lambda: worker_of(guest).pid != 0, 120, "a worker")
        assert found["keeper_turns"] >= _AWAY_S / 3, "the keeper does not wait for the start of the next standby"
        if which == "root":
            assert found["resumed_s"] is not None, "a standby takes over without the root"
