# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper under fire: workers and keepers die and are restarted while a program swaps and checks every page."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.nfs_server import Ganesha
from vmtest import host, kept, more_settings, swap
from vmtest.guest import Guest, GuestJob, seen_from_guest
from vmtest.image import Image
from vmtest.journal import refuse_tracebacks
from vmtest.outcome import GuestFailedError
from vmtest.verdict import Verdict
from vmtest.wheels import wheel

_NAME = "swap0"
_CGROUP = "/sys/fs/cgroup/nbdnfs-hog"
_KILLER = "/root/killer.py"
_DEVICE_MIB = 128
_NEXT_VERSION = "99.0"
# As many as the hog takes: a file appears after the last kill. A random pass takes an emulated CPU minutes.
_PASSES = ",".join(["fill", *[*["sequential"] * 3, "random"] * 15])
_SEQUENTIAL = ",".join(["fill", *["sequential"] * 63])
_ENOUGH = "/run/enough"

# "Receive control failed" and "Possible stuck request" are what a kill looks like to the kernel's driver; an I/O
# error, which is a kind of its own, would be a page lost.
_EXPECTED = {"nbd", "slow"}


@contextlib.contextmanager
def swapping(
    boot: Callable[..., Guest], server: Ganesha, *, device_mib: int = _DEVICE_MIB, **options: object
) -> Iterator[Guest]:
    """A guest whose nbdnfs@swap0 is up; its memory figures are printed. At the end all is well, and the journal has no
    traceback."""
    url = server.url("swap0.swap")
    host.nbdnfs_create(url, device_mib, timeout_s=120)
    # with a signature there the guest need not read all of it, which an emulated CPU takes minutes for
    host.run(["/sbin/mkswap", server.export_path / "swap0.swap"], what="mkswap", timeout_s=30)
    with boot(project=True, allow=_EXPECTED, **options) as guest:
        guest.settle()
        guest.push(Path(__file__).parent / "inside/killer.py", _KILLER)
        kept.configure(guest, _NAME, f'url = "{seen_from_guest(url)}"\npriority = 100\n{more_settings.lines()}')
        try:
            kept.start(guest, _NAME)
            print(guest.run(f"nbdnfs status {_NAME}", 120).stdout)
            print(memory_of(guest))
            yield guest
            status = guest.run(f"nbdnfs status {_NAME}", 60)
            print(status.stdout)
            print(memory_of(guest))
            refuse_tracebacks(guest)
        finally:
            with contextlib.suppress(Exception):
                print(guest.run(f"journalctl -u nbdnfs@{_NAME} --no-pager -o short-monotonic | tail -n 150").stdout)


def memory_of(guest: Guest) -> str:
    """Resident and locked memory of keeper, heir, worker and standby in KiB (swap.memory_of; Pss has a share of what is
    mapped more than once; the heir's memory is the keeper's), and the size of a page."""
    return guest.run(
        "echo pages of $(getconf PAGESIZE) bytes;"
        f" for p in $(cat /sys/fs/cgroup/nbdnfs.slice/nbdnfs@{_NAME}.service/cgroup.procs"
        f" || cat /sys/fs/cgroup/*/*/nbdnfs@{_NAME}.service/cgroup.procs); do cd /run/nbdnfs/{_NAME};"
        ' echo $(grep -lsE "^$p( |$)" keeper worker standby) $(cat /proc/$p/comm)'
        " $(grep -hE '^(Rss|Pss|Locked):' /proc/$p/smaps_rollup) $(grep -hE '^Vm(RSS|Lck):' /proc/$p/status); done",
        check=False,
    ).stdout


def start_hog(guest: Guest, size_mib: int, limit_mib: int | None, timeout_s: float, passes: str = _PASSES) -> GuestJob:
    """The stress program, in a cgroup of `limit_mib` where there is one; it ends when it is done, or killed."""
    cgroup = ""
    if limit_mib is not None:
        guest.run(
            "grep -qw memory /sys/fs/cgroup/cgroup.subtree_control"
            " || echo +memory > /sys/fs/cgroup/cgroup.subtree_control;"
            f" mkdir -p {_CGROUP} && echo {limit_mib}M > {_CGROUP}/memory.max"
        )
        cgroup = f"--cgroup {_CGROUP}"
    guest.run(f"rm -f {_ENOUGH}")
    return guest.start(
        f"exec hog --size {size_mib} --passes {passes} --until {_ENOUGH} {cgroup} --report {guest.verdict_target}",
        timeout_s,
    )


def finish(guest: Guest, hog: GuestJob, timeout_s: float) -> Verdict:
    """Have the hog check every page once more, and no wrong one. GuestFailedError for whatever is lost."""
    assert hog.running, "the hog was done too early: give it more passes"
    # without a cgroup, a shell waits for memory as long as everything else does
    guest.run(f"touch {_ENOUGH}", 600)
    verdict = guest.wait_verdict(hog, timeout_s).check()
    hog.wait()
    guest.check_kernel_log()
    return verdict


def kill_under_load(
    guest: Guest,
    what: str,
    count: int,
    every_s: float,
    *,
    size_mib: int,
    limit_mib: int | None,
    timeout_s: float,
    passes: str = _PASSES,
) -> None:
    """Kill `count` times while the hog runs, and print how long swap stood still: how fast it goes on is up to the
    machine. GuestFailedError for a page that is lost, or swap that does not move again."""
    killer = guest.start(f"exec python3 {_KILLER} {_NAME} {what} {count} {every_s}", timeout_s)
    guest.wait_until(lambda: "ready" in killer.stdout, 120, "the killer")
    hog = start_hog(guest, size_mib, limit_mib, timeout_s, passes)
    done = killer.wait()
    print(done.stdout)
    assert done.status == 0, done.stderr
    verdict = finish(guest, hog, timeout_s)
    kills = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(kills) == count
    lost = [kill for kill in kills if kill["resumed_s"] is None]
    if lost:
        raise GuestFailedError(f"swap did not move again after {lost}")
    resumed_s = sorted(float(kill["resumed_s"]) for kill in kills)
    print(
        f"{count} kills of {what}: swap moves again after {statistics.median(resumed_s):.2f} s (median),"
        f" {resumed_s[0]:.2f} to {resumed_s[-1]:.2f} s; {verdict.checked} pages checked, {verdict.wrong} wrong"
    )


def swapped_out(guest: Guest) -> int:
    """Pages since boot."""
    return int(guest.run("awk '/^pswpout/ {print $2}' /proc/vmstat").stdout)


def systemctl(guest: Guest, command: str, timeout_s: float = 120) -> None:
    """Some seconds into the load, and swap is on afterwards but for a stop."""
    time.sleep(5)
    guest.run(f"systemctl {command} nbdnfs@{_NAME}", timeout_s)
    if command != "stop":
        assert "/dev/nbd" in guest.run("cat /proc/swaps").stdout


@dataclass(frozen=True)
class Running:
    """The worker that serves: by its record, and whether its engine is the file that is installed now."""

    pid: int
    version: str
    is_installed: bool


def worker_of(guest: Guest) -> Running:
    """Pid 0 while there is none."""
    found = guest.run(
        f"read -r pid started version < /run/nbdnfs/{_NAME}/worker && echo $pid $version"
        " && grep -m1 /engine/_engine /proc/$pid/maps"
        " && stat -c %i /usr/local/lib/python3*/dist-packages/nbdnfs/engine/_engine*.so",
        check=False,
    )
    if found.status != 0:
        return Running(0, "", False)
    record, mapping, inode = found.stdout.splitlines()
    pid, version = record.split()
    return Running(int(pid), version, mapping.split()[4] == inode)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("loop", ["false", "true"])
def test_memory_with_a_large_device(
    boot: Callable[..., Guest], ganesha: Ganesha, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    """A worker with an encrypted device of 2 GiB has at most 38 MiB resident, with pages of 4 KiB."""
    monkeypatch.setenv("NBDNFS_TEST_SETTINGS", f"loop = {loop}")
    with swapping(boot, ganesha, device_mib=2048) as guest:
        hog = start_hog(guest, 48, 16, 600, "fill,random,sequential")
        guest.wait_verdict(hog, 600).check()
        hog.wait()
        assert "pages    encrypted" in guest.run(f"nbdnfs status {_NAME}", 60).stdout
        _, resident_kib = swap.memory_of(guest, worker_of(guest).pid)
        if guest.run("getconf PAGESIZE").stdout == "4096\n":  # larger ones: a mapping ends with one
            assert resident_kib <= 38 * 1024


@pytest.mark.timeout(1800)
def test_kill_the_worker(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """Twenty times, every eight seconds: no wrong page, no I/O error, and swap moves again each time."""
    with swapping(boot, ganesha) as guest:
        kill_under_load(guest, "worker", 20, 8, size_mib=40, limit_mib=16, timeout_s=1200)


@pytest.mark.timeout(2400)
def test_kill_the_keeper(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """Alone: nothing stands still. With its worker: systemd brings one, and that brings the other. Ten times each."""
    with swapping(boot, ganesha) as guest:
        for what, every_s in (("keeper", 5), ("both", 8)):
            kill_under_load(guest, what, 10, every_s, size_mib=40, limit_mib=16, timeout_s=1200)


@pytest.mark.timeout(2400)
def test_restart_and_upgrade(boot: Callable[..., Guest], ganesha: Ganesha, image: Image) -> None:
    """Under load: restarts and a reload, then another version installed over the running one, and a restart. The worker
    is of that version then, and a reload brings another one. A stop takes all down, a start brings all back."""
    new = wheel(image, _NEXT_VERSION)
    with swapping(boot, ganesha) as guest:
        hog = start_hog(guest, 40, 16, 1800)
        guest.wait_until(lambda: swapped_out(guest) > 1000, 120, "the first pages to go out")
        first = worker_of(guest)
        systemctl(guest, "restart")
        assert worker_of(guest).pid == first.pid, "a restart is none of the worker's business"
        systemctl(guest, "reload")
        guest.wait_until(lambda: worker_of(guest).pid not in (0, first.pid), 120, "another worker")
        systemctl(guest, "restart")
        guest.push(new, f"/root/{new.name}")
        guest.run(f"pip install --quiet --no-index --no-deps --break-system-packages /root/{new.name}", 300)
        assert guest.run("nbdnfs --version").stdout == f"nbdnfs {_NEXT_VERSION}\n"
        old = worker_of(guest)
        assert not old.is_installed
        systemctl(guest, "restart")
        guest.wait_until(lambda: worker_of(guest).is_installed, 120, "a worker of the new version")
        upgraded = worker_of(guest)
        assert (old.version, upgraded.version) == (first.version, _NEXT_VERSION)
        systemctl(guest, "reload")
        guest.wait_until(lambda: worker_of(guest).pid not in (0, upgraded.pid), 120, "another worker")
        moved = swapped_out(guest)
        # a random pass on a busy machine takes out ten pages a second, or fewer
        guest.wait_until(lambda: swapped_out(guest) > moved + 500, 480, "pages that go out to the new version")
        verdict = finish(guest, hog, 900)
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")
        systemctl(guest, "stop", 300)
        assert "/dev/nbd" not in guest.run("cat /proc/swaps").stdout
        assert guest.run(f"nbdnfs status {_NAME}", check=False).stdout.startswith(f"{_NAME}: not up")
        systemctl(guest, "start", 240)


@pytest.mark.timeout(1200)
def test_down_refuses_what_a_cgroup_cannot_take_back(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """16 MiB and more swapped out from a cgroup of 10 MiB, on a machine with room for all of it: `down` and a stop of
    the unit refuse with its name and its figures, nothing is killed, and every page is right. A larger limit mends
    it."""
    with swapping(boot, ganesha) as guest:
        hog = start_hog(guest, 28, 10, 900)
        guest.wait_until(lambda: swapped_out_of_cgroup(guest) >= 16 << 20, 240, "16 MiB to be swapped out")
        down = guest.run(f"nbdnfs down {_NAME}", 240, check=False)
        assert down.status == 75, down.stderr
        assert down.stderr.startswith("nbdnfs: the cgroup /nbdnfs-hog has ")
        assert "its memory.max of 10 MiB leaves room for " in down.stderr
        print(down.stderr)
        guest.run(f"systemctl stop nbdnfs@{_NAME}", 240, check=False)
        guest.wait_until(
            lambda: guest.run(f"nbdnfs status {_NAME}", 120, check=False).status == 0, 240, "the keeper to be back"
        )
        assert "/dev/nbd" in guest.run("cat /proc/swaps").stdout
        verdict = finish(guest, hog, 600)
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")
        hog = start_hog(guest, 28, 10, 900)
        guest.wait_until(lambda: swapped_out_of_cgroup(guest) >= 16 << 20, 240, "16 MiB to be swapped out")
        guest.run(f"echo 64M > {_CGROUP}/memory.max; nbdnfs down {_NAME}", 240)
        assert "/dev/nbd" not in guest.run("cat /proc/swaps").stdout
        guest.run(f"touch {_ENOUGH}")
        guest.wait_verdict(hog, 600).check()  # with all in memory it may be done already
        hog.wait()
        systemctl(guest, "start", 240)


def swapped_out_of_cgroup(guest: Guest) -> int:
    """Bytes of the stress program's cgroup that are swapped out now."""
    return int(guest.run(f"cat {_CGROUP}/memory.swap.current").stdout)


@pytest.mark.timeout(1800)
def test_kill_the_worker_under_global_pressure(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """256 MiB, and a program of more than all of it, without a cgroup: recovery needs no memory that only swap-out
    could free. Five kills."""
    with swapping(boot, ganesha, device_mib=288, memory_mib=256) as guest:
        kill_under_load(
            guest, "worker", 5, 10, size_mib=224, limit_mib=None, timeout_s=1500, passes=_SEQUENTIAL
        )  # a random pass over that many pages takes an emulated CPU half an hour
