# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs top`: the activity of each device, from the counters in its region. Changes nothing and takes no lock."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import config, quantities, region
from nbdnfs.commands import counters, status
from nbdnfs.commands.counters import Counters, number
from nbdnfs.errors import NoInputError, UsageError
from nbdnfs.keeper.records import Records
from nbdnfs.sizes import SLOT_BYTES

_MIB = 1 << 20
# Of the JSON, as status.SCHEMA.
SCHEMA = 1
# The counters that it has: those that grow, and those that say "now".
_NOW = (
    *("unstable_pages", "nfs_in_flight", "write_back_error", "disconnected", "file_state", "owner_state"),
    *("generation", "slots"),
)
_RATES = tuple(key for key in region.COUNTERS if key not in (*_NOW, "twins_until_ms"))

_CLEAR = "\x1b[H\x1b[2J"


@dataclass(frozen=True)
class Frame:
    """The activity of one device during `seconds`: its counters `before` and `after`."""

    name: str
    seconds: float
    before: Counters
    after: Counters

    def rate(self, key: str) -> float:
        """How much the counter grew, per second."""
        return (number(self.after, key) - number(self.before, key)) / self.seconds

    def ratio(self, key: str, of: str) -> float:
        """The growth of the counter `key` for each unit that `of` grew; 0.0 when `of` did not grow."""
        total = self.rate(of)
        return self.rate(key) / total if total else 0.0

    def median_us(self, key: str) -> int:
        """The upper bound, in microseconds, of the histogram bucket that holds the median of this time span.

        `key` names a log2 histogram. 0 when nothing was counted.
        """
        before, after = self.before.get(key), self.after.get(key)
        if not isinstance(after, list):
            return 0
        earlier = before if isinstance(before, list) else [0] * len(after)
        counts = [now - then for now, then in zip(after, earlier, strict=True)]
        below = 0
        for bucket, count in enumerate(counts):
            below += count
            if count and 2 * below >= sum(counts):
                return 1 << bucket
        return 0

    def text(self) -> str:
        """A few lines for a terminal."""
        hits, misses = self.rate("hit_pages"), self.rate("missed_pages")
        share = 100 * hits / (hits + misses) if hits + misses else 0.0
        unstable_mib = number(self.after, "unstable_pages") * SLOT_BYTES / _MIB
        away = "" if not number(self.after, "disconnected") else "   THE SERVER DOES NOT ANSWER"
        read_ahead = 100 * self.ratio("read_ahead_hits", "read_ahead_pages")
        each_kib = self.ratio("nfs_written_bytes", "nfs_writes") / 1024
        in_flight = number(self.after, "nfs_in_flight")
        rows = [
            f"{self.name}: {unstable_mib:.1f} MiB not on the NAS yet, {in_flight} requests in flight{away}",
            f"  swap-in   {self._flow('reads', 'read_bytes', 'read_us')}   {share:.0f}% from the region",
            f"  swap-out  {self._flow('writes', 'written_bytes', 'write_us')}"
            f"   {self.rate('stalls'):.0f}/s had to wait",
            f"  NFS read  {self._flow('nfs_reads', 'nfs_read_bytes', 'nfs_read_us')}"
            f"   {read_ahead:.0f}% of the read-ahead was used",
            f"  NFS write {self._flow('nfs_writes', 'nfs_written_bytes', 'nfs_write_us')}"
            f"   {each_kib:.0f} KiB each, {self.rate('nfs_commits'):.1f} commits/s",
        ]
        return "\n".join(rows)

    def to_json(self) -> dict[str, object]:
        """As docs/monitoring.md has it: what grew, per second; the medians; and what there is now."""
        rates = {f"{key}_per_s": round(self.rate(key), 3) for key in _RATES}
        medians = {f"{key.removesuffix('_us')}_median_us": self.median_us(key) for key in region.HISTOGRAMS}
        now = {key: number(self.after, key) for key in _NOW}
        return {"name": self.name, "seconds": round(self.seconds, 3), **rates, **medians, **now}

    def _flow(self, count: str, size: str, duration: str) -> str:
        return (
            f"{self.rate(count):>8,.0f}/s {self.rate(size) / _MIB:>8.1f} MiB/s"
            f"   median below {self.median_us(duration):>7,} us"
        )


def run(args: argparse.Namespace) -> int:
    """Show the activity until Ctrl-C, or `--count` times. UsageError: an option is out of range; others as `watch`."""
    interval_s = quantities.parse_duration_s(args.interval)
    if interval_s <= 0 or (args.count is not None and args.count < 1):
        raise UsageError("--interval and --count must be greater than zero", "for example --interval 2s --count 5")
    if args.name is not None:
        config.check_name(args.name)
    show([args.name] if args.name else [], interval_s=interval_s, count=args.count, as_json=args.json)
    return 0


def watch(
    names: Sequence[str],
    *,
    interval_s: float = 1.0,
    root: Path = Path("/"),
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Frame]]:
    """Yield the activity of the devices `names` every `interval_s` seconds, without end.

    The counters belong to the region, so that they go on when a worker is replaced. NoInputError: none of the devices
    has a worker whose region can be read, at the start or later.
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


def show(
    names: Sequence[str], *, interval_s: float, count: int | None, root: Path = Path("/"), as_json: bool = False
) -> None:
    """Print the activity until Ctrl-C, or `count` times; on a terminal each time in the place of the last one.

    Without `names`, of all devices. `as_json`: an object on a line of its own each time. Errors as `watch`.
    """
    wanted = names or status.names(root)
    on_terminal = sys.stdout.isatty()
    for shown, frames in enumerate(watch(wanted, interval_s=interval_s, root=root), 1):
        if as_json:
            print(json.dumps({"schema": SCHEMA, "devices": [frame.to_json() for frame in frames]}), flush=True)
        else:
            text = "\n".join(frame.text() for frame in frames)
            print(_CLEAR + text if on_terminal and count != 1 else text, flush=True)
        if shown == count:
            return


def _read(names: Sequence[str], root: Path) -> dict[str, Counters]:
    found: dict[str, Counters] = {}
    for name in names:
        worker = Records(name, root).living(Records.WORKER)
        if worker is not None and (read := counters.of_worker(worker.pid, root)) is not None:
            found[name] = read.counters
    if not found:
        which = f" of {', '.join(names)}" if names else ""
        raise NoInputError(
            f"no worker{which} is running, or its region cannot be read", "run this as root; see: nbdnfs status"
        )
    return found
