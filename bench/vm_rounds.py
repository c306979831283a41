# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rounds of the same verified stress run on each peer of vm_peers.py, in one guest; the samples, and their JSON."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from vm_peers import OURS_ALL, PEERS, Files
from vm_time import RealTime, VirtualTime
from vm_trace import recorded
from vmtest import swap, verdict
from vmtest.counters import Counters
from vmtest.guest import Guest
from vmtest.outcome import GuestFailedError, HarnessError

# inside/hog.c
_HOG_WAS_KILLED = 3


class NotFinishedError(GuestFailedError):
    """No page was wrong, but something was killed before the end."""


@dataclass(frozen=True)
class Load:
    """What is run: `size_mib` of pages, a cgroup of `limit_mib`; by so many processes at once, one after the other.

    `limit_mib` None: no cgroup. What the peer itself needs of the guest's `memory_mib` is missing for the pages then.
    `passes` are the stress program's, after filling; its pages do not compress, or to a third. `time_shift` is of
    virtual time; None: in real time.
    """

    size_mib: int
    limit_mib: int | None
    timeout_s: float
    processes: tuple[int, ...] = (1, 4)
    time_shift: int | None = None
    memory_mib: int = 512
    passes: tuple[str, ...] = ("sequential", "random", "sequential", "zipf", "strided")
    is_compressible: bool = False

    @property
    def device_mib(self) -> int:
        """What is swapped to: with much less of it, the kernel soon finds no free slots side by side."""
        return 4 * self.size_mib


@dataclass(frozen=True)
class Sample:
    """One verified run. `passes` are the seconds of each, fill first.
    `host_was_busy`: other programs kept all CPUs of the host busy meanwhile.

    `counters` are what the region counted during the run; peers that are not ours have none. `swap_out` is what it
    counted in a run before that, which does nothing but fill: swap-out in sequence, and no swap-in.
    """

    peer: str
    delay_ms: float
    processes: int
    seconds: float
    passes: tuple[float, ...]
    pages_out: int
    pages_in: int
    counters: Mapping[str, int] = field(default_factory=dict)
    swap_out: Mapping[str, int] = field(default_factory=dict)
    host_was_busy: bool = False


@dataclass(frozen=True)
class Results:
    """All samples of one `load`."""

    load: Load
    samples: tuple[Sample, ...]

    def of(self, peer: str, delay_ms: float, processes: int, *, host_was_busy: bool = False) -> list[Sample]:
        """Those of one cell of the table."""
        wanted = (peer, delay_ms, processes, host_was_busy)
        return [one for one in self.samples if (one.peer, one.delay_ms, one.processes, one.host_was_busy) == wanted]

    def median(self, peer: str, delay_ms: float, processes: int, value: Callable[[Sample], float]) -> float | None:
        """None where there is no sample."""
        values = [value(sample) for sample in self.of(peer, delay_ms, processes)]
        return statistics.median(values) if values else None

    def save(self, path: Path) -> None:
        """As JSON, every sample."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load_from(cls, path: Path, load: Load) -> Results:
        """What `save` wrote. HarnessError when that was another load."""
        data = json.loads(path.read_text())
        # an earlier version's may lack a list, or have a number in its place: another load
        lists = {name: data["load"].get(name) for name in ("passes", "processes")}
        tuples = {name: tuple(value) if isinstance(value, list) else () for name, value in lists.items()}
        there = Load(**{**data["load"], **tuples})
        if there != load:
            raise HarnessError(f"{path} is about another load: {there}", "name another file, or give the same sizes")
        samples = [Sample(**{**sample, "passes": tuple(sample["passes"])}) for sample in data["samples"]]
        return cls(load, tuple(samples))


def one_round(
    guest: Guest,
    files: Files,
    load: Load,
    *,
    peers: Sequence[str],
    delays_ms: Sequence[float],
    clock: RealTime | VirtualTime,
    tell: Callable[[str], None],
    traces: Path | None = None,
) -> list[Sample]:
    """Each peer in that order, with each delay, by one process and by several. With `traces`, what each run asks an nbd
    device for is kept in that folder; there is nothing of peers that have none.

    GuestFailedError for a wrong page, and when something is killed that swaps to ours. Others may fail (a small cgroup
    that swaps to the kernel's NFS runs out of memory now and then): that is reported, and there is no sample of it.
    """
    samples = []
    for delay_ms in delays_ms:
        for peer in peers:
            with (
                clock.line(guest, files, delay_ms) as seen,
                PEERS[peer](guest, seen, load.device_mib) as swapping,
            ):
                for processes in load.processes:
                    name = f"{peer}-{load.size_mib}-{processes}-{delay_ms:g}.gz"
                    trace = contextlib.nullcontext() if traces is None else recorded(guest, traces / name)
                    try:
                        sample = _run(guest, load, peer, delay_ms, processes, swapping.counters, trace)
                        sample = in_model_time(sample, clock.scale)
                    except NotFinishedError as error:
                        if peer in OURS_ALL:
                            raise
                        tell(f"{peer}, {delay_ms:g} ms, {processes} process(es): no sample: {error}")
                        continue
                    passes = " ".join(f"{seconds:.1f}" for seconds in sample.passes)
                    tell(f"{peer}, {delay_ms:g} ms, {processes} process(es): {sample.seconds:.1f} s ({passes})")
                    samples.append(sample)
    return samples


def in_model_time(sample: Sample, scale: int) -> Sample:
    """With the seconds of the model, where the guest counts `scale` times as many."""
    counters = {**sample.counters, "cpu_ms": sample.counters.get("cpu_ms", 0) // scale} if sample.counters else {}
    passes = tuple(seconds / scale for seconds in sample.passes)
    return replace(sample, seconds=sample.seconds / scale, passes=passes, counters=counters)


def _run(
    guest: Guest,
    load: Load,
    peer: str,
    delay_ms: float,
    processes: int,
    read: Callable[[], Counters],
    trace: AbstractContextManager[None],
) -> Sample:
    guest.run("sync; echo 3 > /proc/sys/vm/drop_caches", 120)
    swap_out = {}
    if counted := read():
        with _memory_for(guest, load) as cgroup:
            _stress(guest, load, processes, cgroup, ["fill"])
        swap_out = _difference(counted, read())
    before, counted = swap.counters(guest), read()
    with trace, _memory_for(guest, load) as cgroup:
        found = _stress(guest, load, processes, cgroup, ["fill", *load.passes]).check()
    now, after = read(), swap.counters(guest)
    pages_out, pages_in = after["pswpout"] - before["pswpout"], after["pswpin"] - before["pswpin"]
    if after["oom_kill"] != before["oom_kill"]:
        raise NotFinishedError(f"{peer}: something was killed for want of memory")
    if not pages_out or not pages_in:
        raise GuestFailedError(f"{peer}: nothing was swapped: {pages_out} pages out, {pages_in} in")
    return Sample(
        peer=peer,
        delay_ms=delay_ms,
        processes=processes,
        seconds=found.seconds,
        passes=tuple(one.seconds for one in found.passes),
        pages_out=pages_out,
        pages_in=pages_in,
        counters=_difference(counted, now),
        swap_out=swap_out,
    )


def _memory_for(guest: Guest, load: Load) -> AbstractContextManager[str | None]:
    """The cgroup that the pages are to be in, where there is one."""
    return contextlib.nullcontext() if load.limit_mib is None else swap.limited(guest, load.limit_mib)


def _stress(guest: Guest, load: Load, processes: int, cgroup: str | None, passes: Sequence[str]) -> verdict.Verdict:
    """The stress program's verdict, from its stdout: the verdict port has the verdicts of earlier runs as well."""
    command = f"exec hog --size {load.size_mib} --processes {processes} --passes {','.join(passes)}"
    command += " --compressible" if load.is_compressible else ""
    command += f" --cgroup {cgroup}" if cgroup is not None else ""
    result = guest.start(command, load.timeout_s).wait()
    if result.status == _HOG_WAS_KILLED:
        raise NotFinishedError("one of the stress program's processes was killed")
    _, found = verdict.parse(result.stdout)
    if found is None:
        raise GuestFailedError(f"no verdict: the stress program ended with {result.status}\n{result.stderr}")
    return found


_SIZES = ("locked_kib", "resident_kib", "all_resident_kib", "all_locked_kib")


def _difference(before: Counters, after: Counters) -> dict[str, int]:
    """What was counted meanwhile; sizes as they are at the end. Histograms are left out."""
    found = {}
    for name, value in after.items():
        earlier = before.get(name, 0)
        if isinstance(value, int) and isinstance(earlier, int):
            found[name] = value if name in _SIZES else value - earlier
    return found
