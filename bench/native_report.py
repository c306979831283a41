# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make bench` measured: rows and samples, as a table, as JSON, as a picture; and the goals that were missed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from svg import Group, bars

OURS, LOOP, QEMU, NBDKIT_NFS, LIMIT = "nbdnfs", "nbdnfs-loop", "qemu-nbd", "nbdkit-nfs", "limit"


@dataclass(frozen=True)
class Row:
    """One kind of load."""

    op: str
    pattern: str
    block_bytes: int
    depth: int

    @property
    def title(self) -> str:
        return f"{self.pattern} {self.op} {self.block_bytes // 1024} KiB, depth {self.depth}"

    def argv(self, seconds: float) -> list[str]:
        return [self.op, self.pattern, str(self.block_bytes), str(self.depth), str(seconds)]


@dataclass
class Sample:
    """One run: the output of bench/load.c, and what the server process used meanwhile."""

    load: dict[str, float]
    cpu_s_per_gb: float | None
    resident_kib: int | None
    locked_kib: int | None


@dataclass
class Result:
    """All runs of one row by one peer."""

    samples: list[Sample] = field(default_factory=list)

    def median(self, key: str) -> float:
        return statistics.median(sample.load[key] for sample in self.samples)

    def median_cpu(self) -> float | None:
        values = [sample.cpu_s_per_gb for sample in self.samples if sample.cpu_s_per_gb is not None]
        return statistics.median(values) if values else None

    def largest_kib(self, key: str) -> int:
        """The most that `resident_kib` or `locked_kib` was; 0 where there is no server process."""
        return max((getattr(sample, key) or 0 for sample in self.samples), default=0)


def table(title: str, results: dict[Row, dict[str, Result]]) -> str:
    """Requests a second of each peer, and ours as a multiple; CPU seconds for a gigabyte; the size."""
    peers = list(next(iter(results.values())))
    lines = [title, "", f"{'requests/s':38}" + "".join(f"{peer:>16}" for peer in peers) + "     ours / each other"]
    lines[-1] += "; the loop's / each other" if LOOP in peers else ""
    for row, by_peer in results.items():
        lines.append(
            f"{row.title:38}"
            + "".join(f"{by_peer[peer].median('per_second'):>16,.0f}" for peer in peers)
            + "".join("     " + "  ".join(_ratios(by_peer, ours)) for ours in (OURS, LOOP) if ours in peers)
        )
    lines += ["", f"{'CPU seconds/GB':38}" + "".join(f"{peer:>16}" for peer in peers)]
    for row, by_peer in results.items():
        cells = [by_peer[peer].median_cpu() for peer in peers]
        lines.append(f"{row.title:38}" + "".join(f"{'-' if cell is None else f'{cell:.1f}':>16}" for cell in cells))
    lines.append("")
    for title, key in (("resident KiB", "resident_kib"), ("locked KiB", "locked_kib")):
        sizes = [max((by_peer[peer].largest_kib(key) for by_peer in results.values()), default=0) for peer in peers]
        lines.append(f"{title:38}" + "".join(f"{size or '-':>16}" for size in sizes))
    return "\n".join(lines)


def _ratios(by_peer: Mapping[str, Result], ours: str) -> list[str]:
    """Of `ours` to each peer that is not ours."""
    mine = by_peer[ours].median("per_second")
    return [f"{mine / result.median('per_second'):.2f}" for peer, result in by_peer.items() if peer not in (OURS, LOOP)]


def as_json(results: dict[Row, dict[str, Result]]) -> list[dict[str, object]]:
    """Every sample."""
    return [
        {
            "row": row.title,
            "peer": peer,
            "samples": [
                {
                    **sample.load,
                    "cpu_s_per_gb": sample.cpu_s_per_gb,
                    "resident_kib": sample.resident_kib,
                    "locked_kib": sample.locked_kib,
                }
                for sample in result.samples
            ],
        }
        for row, by_peer in results.items()
        for peer, result in by_peer.items()
    ]


def picture(parts: Mapping[str, dict[Row, dict[str, Result]]]) -> str:
    """Requests a second. The rows differ too much for one scale: each has its own."""
    groups = [
        Group(
            f"{row.title}{'' if number == 0 else ', far'}",
            {peer: result.median("per_second") for peer, result in by_peer.items()},
        )
        for number, results in enumerate(parts.values())
        for row, by_peer in results.items()
    ]
    far = "".join(f"; far: {title}" for title in list(parts)[1:])
    return bars(f"Requests a second, each row on its own scale{far}", "more is better", groups)


def missed_goals(parts: Mapping[str, dict[Row, dict[str, Result]]]) -> list[str]:
    """The goals, beside qemu-nbd and nbdkit's NFS plugin: as many requests a second in every row, and no more CPU for a
    gigabyte. Near the server also three times as many where a 4 KiB request waits for the one before, random reads
    excepted; and of random reads at depth 16, 1.3 times as many and 0.7 of the limit.
    """
    missed = []
    for number, (title, results) in enumerate(parts.items()):
        for row, by_peer in results.items():
            if OURS not in by_peer:
                continue
            for peer, factor in _wanted(row, is_near=number == 0).items():
                if peer not in by_peer:
                    continue
                found = by_peer[OURS].median("per_second") / by_peer[peer].median("per_second")
                if found < factor:
                    missed.append(f"missed: {row.title}, {title}: {found:.2f} of {peer}, wanted {factor:g}")
                mine, theirs = by_peer[OURS].median_cpu(), by_peer[peer].median_cpu()
                if mine is not None and theirs is not None and mine > theirs:
                    missed.append(f"missed: {row.title}, {title}: {mine / theirs:.2f} of {peer}'s CPU, wanted 1")
    return missed or ["no goal is missed"]


def _wanted(row: Row, *, is_near: bool) -> dict[str, float]:
    """How many requests a second there should be, as a multiple of a peer's."""
    is_random_read = (row.op, row.pattern) == ("read", "random")
    if is_near and row.depth == 1 and not is_random_read:
        return {QEMU: 3.0, NBDKIT_NFS: 3.0}
    if is_near and is_random_read and row.depth == 16:
        return {QEMU: 1.3, NBDKIT_NFS: 1.3, LIMIT: 0.7}
    return {QEMU: 1.0, NBDKIT_NFS: 1.0}
