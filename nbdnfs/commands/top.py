# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs top`: what the workers do just now, from the counters in their regions. Reads only, and takes no lock."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import region
from nbdnfs.commands import status
from nbdnfs.errors import NoInputError
from nbdnfs.keeper.records import Records
from nbdnfs.sizes import SLOT_BYTES

_MIB = 1 << 20
_CLEAR = "\x1b[H\x1b[2J"

Counters = Mapping[str, int | list[int]]


@dataclass(frozen=True)
class Frame:
    """What a worker did in `seconds`: `before` and `after` are its region's counters."""

    name: str
    seconds: float
    before: Counters
    after: Counters

    def rate(self, key: str) -> float:
        """A second."""
        return (_number(self.after, key) - _number(self.before, key)) / self.seconds

    def ratio(self, key: str, of: str) -> float:
        """Of what happened in this time; 0 when nothing did."""
        total = self.rate(of)
        return self.rate(key) / total if total else 0.0

    def median_us(self, key: str) -> int:
        """The upper end of the bucket of a log2 histogram that has the median of this time; 0: nothing happened."""
        before, after = self.before.get(key), self.after.get(key)
        if not isinstance(after, list):
            return 0
        earlier = before if isinstance(before, list) else [0] * len(after)
        counts = [now - then for now, then in zip(after, earlier, strict=True)]
        passed = 0
        for bucket, count in enumerate(counts):
            passed += count
            if count and 2 * passed >= sum(counts):
                return 1 << bucket
        return 0

    def text(self) -> str:
        """A few lines for people."""
        hits, misses = self.rate("hit_pages"), self.rate("missed_pages")
        share = 100 * hits / (hits + misses) if hits + misses else 0.0
        waits = _number(self.after, "unstable_pages") * SLOT_BYTES / _MIB
        away = "" if not _number(self.after, "disconnected") else "   THE SERVER DOES NOT ANSWER"
        read_ahead = 100 * self.ratio("read_ahead_hits", "read_ahead_pages")
        each_kib = self.ratio("nfs_written_bytes", "nfs_writes") / 1024
        rows = [
            f"{self.name}: {waits:.1f} MiB not on the NAS yet, {_number(self.after, 'nfs_in_flight')} under way{away}",
            f"  swap-in   {self._flow('reads', 'read_bytes', 'read_us')}   {share:.0f}% from the region",
            f"  swap-out  {self._flow('writes', 'written_bytes', 'write_us')}   {self.rate('stalls'):.0f} had to wait",
            f"  NFS read  {self._flow('nfs_reads', 'nfs_read_bytes', 'nfs_read_us')}"
            f"   {read_ahead:.0f}% of what was read ahead was used",
            f"  NFS write {self._flow('nfs_writes', 'nfs_written_bytes', 'nfs_write_us')}"
            f"   {each_kib:.0f} KiB each, {self.rate('nfs_commits'):.1f} commits/s",
        ]
        return "\n".join(rows)

    def _flow(self, count: str, size: str, duration: str) -> str:
        return (
            f"{self.rate(count):>8,.0f}/s {self.rate(size) / _MIB:>8.1f} MiB/s"
            f"   median below {self.median_us(duration):>7,} us"
        )


def watch(
    names: Sequence[str],
    *,
    interval_s: float = 1.0,
    root: Path = Path("/"),
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Frame]]:
    """Frames of those devices, again and again. NoInputError when none of them has a worker, now or later on.

    A worker that was replaced meanwhile goes on with its predecessor's counters: they are the region's.
    """
    before, then = _read(names, root), clock()
    while True:
        sleep(interval_s)
        after, now = _read(names, root), clock()
        yield [
            Frame(name, max(now - then, 1e-6), before[name], counters)
            for name, counters in after.items()
            if name in before
        ]
        before, then = after, now


def show(names: Sequence[str], *, interval_s: float, count: int | None, root: Path = Path("/")) -> None:
    """Print frames until Ctrl-C, or `count` of them; on a terminal each in the place of the last one."""
    wanted = names or status.names(root)
    on_terminal = sys.stdout.isatty()
    for number, frames in enumerate(watch(wanted, interval_s=interval_s, root=root), 1):
        text = "\n".join(frame.text() for frame in frames)
        print(_CLEAR + text if on_terminal and count != 1 else text, flush=True)
        if number == count:
            return


def _read(names: Sequence[str], root: Path) -> dict[str, Counters]:
    found: dict[str, Counters] = {}
    for name in names:
        worker = Records(name, root).living(Records.WORKER)
        descriptor = region.take_from(worker.pid, root) if worker is not None else None
        if descriptor is None:
            continue
        try:
            if region.is_made(descriptor):
                found[name] = region.read_counters(descriptor)
        finally:
            os.close(descriptor)
    if not found:
        which = f"of {', '.join(names)} " if names else ""
        raise NoInputError(f"no worker {which}is running, or it is not ours to look into", "see: nbdnfs status")
    return found


def _number(counters: Counters, key: str) -> int:
    value = counters.get(key, 0)
    return value if isinstance(value, int) else 0
