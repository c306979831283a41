# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory pressure in a real kernel: the worker never needs memory in order to give memory back.

`--memory-rounds 3` runs the pressure three times in a row, `--negative-control` also without each of the measures;
`--memory-hog 160` is less of it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from support.nfs_server import Ganesha
from vmtest import allocations, faulttrace, host, swap
from vmtest.guest import Guest, seen_from_guest
from vmtest.outcome import GuestFailedError, LostGuestError
from vmtest.verdict import Progress, Verdict

from nbdnfs import memlock, proc_stat

_GUEST_MIB = 256
_PROCESSES = 4
_FILE_MIB = 512
_STRESS_TIMEOUT_S = 2700.0
_BUDGET_KIB = {4096: 36 * 1024, 16384: 38 * 1024}  # by the size of a page: a mapping ends with one
_NAS_HANGS_S = 20.0

# Without a measure a guest may hang for good: this long is enough to tell.
_CONTROL_TIMEOUT_S = 600.0
_CONTROL_SILENCE_S = 150.0


@dataclass(frozen=True)
class Faults:
    """Of all threads of a process since it began: fields 10 and 12 of proc_pid_stat(5)."""

    minor: int
    major: int

    def __sub__(self, other: Faults) -> Faults:
        return Faults(self.minor - other.minor, self.major - other.major)


@dataclass(frozen=True)
class Pressure:
    """One run. `worker` and `server` are the faults of nbdkit and of `nbdnfs serve` between swapon and the end."""

    verdict: Verdict
    worker: Faults
    server: Faults
    locked_kib: int
    resident_kib: int
    pages_out: int
    pages_in: int
    oom_kills: int
    dropped_packets: int
    allocations: allocations.Histogram
    fault_trace: str

    def summary(self) -> str:
        passes = ", ".join(f"{one.order} {one.seconds:.0f}" for one in self.verdict.passes)
        return (
            f"{self.verdict.seconds:.0f} s ({passes}); {self.pages_out:,} pages out, {self.pages_in:,} in;"
            f" wrong pages {self.verdict.wrong}; OOM kills {self.oom_kills};"
            f" packets dropped {self.dropped_packets}; worker: {self.worker.major} major and"
            f" {self.worker.minor} minor faults, {self.locked_kib} KiB locked, {self.resident_kib} KiB resident"
        )


def faults(guest: Guest, pid: int) -> Faults:
    """Up to now."""
    fields = proc_stat.fields(guest.run(f"cat /proc/{pid}/stat").stdout)
    return Faults(int(fields[proc_stat.MINOR_FAULTS]), int(fields[proc_stat.MAJOR_FAULTS]))


def dropped_packets(guest: Guest) -> int:
    """Packets that the reserve was too short for, all sockets: sk_filter_trim_cap in net/core/filter.c."""
    names, values = (line.split() for line in guest.run("grep ^TcpExt: /proc/net/netstat").stdout.splitlines())
    return int(values[names.index("PFMemallocDrop")])


def threads(guest: Guest, pid: int) -> list[int]:
    """The threads that a process has now."""
    return [int(name) for name in guest.run(f"ls /proc/{pid}/task").stdout.split()]


def backing_file(ganesha: Ganesha) -> str:
    """A backing file's URL, as seen from a guest."""
    url = ganesha.url("memory.swap")
    host.nbdnfs_create(url, _FILE_MIB, timeout_s=300)
    return seen_from_guest(url)


def press(
    guest: Guest, url: str, *, hog_mib: int, timeout_s: float = _STRESS_TIMEOUT_S, settings: Sequence[str] = ()
) -> Pressure:
    """Swap with nothing but the machine's memory as the limit. The verdict is unchecked."""
    # as the units set it: touching a locked page while compaction moves it is a page fault
    guest.run("sysctl -q vm.compact_unevictable_allowed=0 vm.watermark_boost_factor=0")
    with swap.serving(guest, url, settings=settings) as worker, swap.swapping(guest, worker):
        pids = worker.nbdkit_pid, worker.serve_pid
        before = [faults(guest, pid) for pid in pids]
        counted, dropped = swap.counters(guest), dropped_packets(guest)
        tids = threads(guest, worker.nbdkit_pid)
        faulttrace.start(guest, tids)
        allocations.start(guest, tids)
        verdict = swap.stress(guest, size_mib=hog_mib, processes=_PROCESSES, timeout_s=timeout_s)
        histogram, fault_trace = allocations.read(guest), faulttrace.read(guest, worker.nbdkit_pid)
        after = [faults(guest, pid) for pid in pids]
        assert threads(guest, worker.nbdkit_pid) == tids, "the worker's threads are not those that were traced"
        now = swap.counters(guest)
        locked_kib, resident_kib = swap.memory_of(guest, worker.nbdkit_pid)
    return Pressure(
        verdict=verdict,
        worker=after[0] - before[0],
        server=after[1] - before[1],
        locked_kib=locked_kib,
        resident_kib=resident_kib,
        pages_out=now["pswpout"] - counted["pswpout"],
        pages_in=now["pswpin"] - counted["pswpin"],
        oom_kills=now["oom_kill"] - counted["oom_kill"],
        dropped_packets=dropped_packets(guest) - dropped,
        allocations=histogram,
        fault_trace=fault_trace,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many rounds as the command line asks for."""
    if "memory_round" in metafunc.fixturenames:
        metafunc.parametrize("memory_round", range(1, metafunc.config.option.memory_rounds + 1))


@pytest.fixture
def hog_mib(request: pytest.FixtureRequest) -> int:
    """How much the stress program touches."""
    size: int = request.config.option.memory_hog
    return size


@pytest.mark.timeout(3600)
def test_pressure(boot: Callable[..., Guest], ganesha: Ganesha, memory_round: int, hog_mib: int) -> None:
    """384 MiB of verified pages in 256 MiB: nothing wrong, killed or hung, no fault of the worker's, and none of its
    allocations may enter I/O or a file system.
    """
    url = backing_file(ganesha)
    # whether a request takes longer than queue/io_timeout depends on the host's speed, which is not what is tested
    with boot(project=True, memory_mib=_GUEST_MIB, allow={"slow"}) as guest:
        guest.settle()
        pressure = press(guest, url, hog_mib=hog_mib)
        print(f"{guest.run('uname -r').stdout.strip()}: {pressure.summary()}\n{pressure.allocations.table()}")
        pressure.verdict.check()
        assert pressure.oom_kills == 0
        assert pressure.pages_out > pressure.verdict.pages // 4
        assert pressure.worker == Faults(0, 0), pressure.fault_trace
        assert pressure.resident_kib <= _BUDGET_KIB[int(guest.run("getconf PAGESIZE").stdout)]
        assert pressure.allocations.sites, "nothing was traced"
        assert pressure.allocations.dropped == 0
        entering = [site for site in pressure.allocations.sites if site.may_enter_io]
        assert not entering, "\n".join(f"{site.flags:#x} {site.hits} {' < '.join(site.functions)}" for site in entering)
        guest.shutdown()


@pytest.mark.timeout(1200)
def test_cgroup_limit(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """A process four times its memory.max swaps and lives: the cgroup reaches its limit and nothing is killed.

    The case of the 2012 thread: "the cgroup controller is killing my processes instead of using the swapfile". The
    doctor finds nothing wrong with the worker, which runs as root and so has all of its measures.
    """
    limit_mib = 8
    url = backing_file(ganesha)
    with boot(project=True, allow={"slow"}) as guest:
        guest.settle()
        with (
            swap.serving(guest, url) as worker,
            swap.swapping(guest, worker),
            swap.limited(guest, limit_mib) as cgroup,
        ):
            for pid in (worker.serve_pid, worker.nbdkit_pid):
                assert guest.run(f"cat /proc/{pid}/oom_score_adj").stdout == "-1000\n"
            verdict = swap.stress(guest, size_mib=4 * limit_mib, cgroup=cgroup, timeout_s=900).check()
            events = swap.memory_events(guest, cgroup)
            print(f"{verdict.seconds:.0f} s, memory.events {events}")
            found = json.loads(guest.run("nbdnfs doctor --json", check=False).stdout)
            print("\n".join(f"{one['good']} {one['subject']}: {one['found']}" for one in found))
            assert events["max"] > 0
            assert events["oom_kill"] == 0
            assert [one for one in found if one["subject"].startswith("worker") and not one["good"]] == []
        guest.shutdown()


@pytest.mark.timeout(1200)
def test_cgroup_limit_and_a_nas_that_hangs(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """The same, and in the middle of it the NAS answers nothing for 20 s: the process waits, and lives.

    The region is full long before: all that can be written is being written, and nothing of the cgroup can be had.
    """
    limit_mib = 8
    url = backing_file(ganesha)
    resumption = threading.Timer(_NAS_HANGS_S, ganesha.resume)

    def hang_once(progress: Progress) -> None:
        if progress.order == "fill" and resumption.ident is None:
            ganesha.pause()
            resumption.start()

    with boot(project=True, allow={"slow"}) as guest:
        guest.settle()
        with (
            swap.serving(guest, url) as worker,
            swap.swapping(guest, worker),
            swap.limited(guest, limit_mib) as cgroup,
        ):
            # twice the region
            hog = 8 * limit_mib
            verdict = swap.stress(guest, size_mib=hog, cgroup=cgroup, timeout_s=900, on_progress=hang_once).check()
            events = swap.memory_events(guest, cgroup)
            print(f"{verdict.seconds:.0f} s, fill {verdict.passes[0].seconds:.0f} s, memory.events {events}")
            assert resumption.finished.is_set()
            assert verdict.passes[0].seconds > _NAS_HANGS_S
            assert events["oom_kill"] == 0
        guest.shutdown()


@pytest.mark.negative_control
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("without", ["", *memlock.NAMES, "everything"])
def test_without(boot: Callable[..., Guest], ganesha: Ganesha, without: str, hog_mib: int) -> None:
    """The same pressure without one of the measures: a line of the table in docs/memory-pressure.md."""
    names = memlock.NAMES if without == "everything" else [without]
    url = backing_file(ganesha)
    try:
        # what goes wrong in there is the result
        with boot(
            project=True,
            memory_mib=_GUEST_MIB,
            silence_s=_CONTROL_SILENCE_S,
            allow={"slow", "hung", "oom", "stall", "nomem"},
        ) as guest:
            guest.settle()
            settings = ["without=" + ",".join(names)] if without else []
            pressure = press(guest, url, hog_mib=hog_mib, timeout_s=_CONTROL_TIMEOUT_S, settings=settings)
            entering = sum(site.hits for site in pressure.allocations.sites if site.may_enter_io)
            hung = len(re.findall(r"blocked for more than \d+ seconds", guest.kernel_log))
            outcome = f"{pressure.summary()}; {entering} pages with IO or FS; hung-task reports: {hung}"
    except LostGuestError as error:
        outcome = f"lost: {error}"
    except GuestFailedError as error:
        lines = str(error).splitlines()  # of a run that timed out: how far it had come, second by second
        outcome = "failed: " + "; ".join(dict.fromkeys((lines[0], lines[-1])))
    print(f"| without {without or 'nothing (all measures)'} | {' '.join(outcome.split())} |")
