# SPDX-License-Identifier: LGPL-2.1-or-later
"""The activity of one device between two readings of its counters: rates, shares, times, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from nbdnfs import region
from nbdnfs.commands.counters import Counters, number
from nbdnfs.sizes import SLOT_BYTES

MIB = 1 << 20
# The counters that it has: those that grow, and those that say "now".
_NOW = (
    *("unstable_pages", "nfs_in_flight", "write_back_error", "disconnected", "file_state", "owner_state"),
    *("generation", "slots"),
)
_RATES = tuple(key for key in region.COUNTERS if key not in (*_NOW, "twins_until_ms"))


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
        """`percentile_us` of one half."""
        return self.percentile_us(key, 0.5)

    def percentile_us(self, key: str, share: float) -> int:
        """The upper bound, in microseconds, of the histogram bucket in which the fastest `share` ends.

        Of what was counted in this time span; `key` names a log2 histogram. 0 when nothing was.
        """
        before, after = self.before.get(key), self.after.get(key)
        if not isinstance(after, list):
            return 0
        earlier = before if isinstance(before, list) else [0] * len(after)
        counts = [now - then for now, then in zip(after, earlier, strict=True)]
        below = 0
        for bucket, count in enumerate(counts):
            below += count
            if count and below >= share * sum(counts):
                return 1 << bucket
        return 0

    def text(self) -> str:
        """A few lines for a terminal."""
        hits, misses = self.rate("hit_pages"), self.rate("missed_pages")
        share = 100 * hits / (hits + misses) if hits + misses else 0.0
        unstable_mib = number(self.after, "unstable_pages") * SLOT_BYTES / MIB
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
            f"{self.rate(count):>8,.0f}/s {self.rate(size) / MIB:>8.1f} MiB/s"
            f"   median below {self.median_us(duration):>7,} us"
        )
