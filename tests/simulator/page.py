# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make prove` has seen, as the page that docs/proof.md keeps."""

from __future__ import annotations

import collections
import datetime
from dataclasses import dataclass, field
from typing import Any

from support.keeper_steps import Enumeration

from simulator.build import PROJECT
from simulator.mutants import SEEDED, Mutant

PAGE = PROJECT / "docs" / "proof.md"


@dataclass
class Proof:
    """What was seen."""

    seconds: float = 0
    seeds: list[tuple[int, int]] = field(default_factory=list)
    sums: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    points: tuple[int, int] = (0, 0)
    calls: tuple[int, int] = (0, 0)
    caught: list[tuple[Mutant, float]] = field(default_factory=list)
    survived: list[Mutant] = field(default_factory=list)
    known: list[tuple[Mutant, float]] = field(default_factory=list)
    keeper_points: Enumeration | None = None
    keeper_calls: Enumeration | None = None
    coverage: list[str] = field(default_factory=list)  # lines of Markdown
    notes: list[str] = field(default_factory=list)


def bound(count: int) -> str:
    """0 in `count` gives at most 3 in `count` at 95%."""
    return f"{3 / count:.1e}" if count else "-"


def keeper_rows(proof: Proof) -> list[str]:
    points, calls = proof.keeper_points, proof.keeper_calls
    if points is None or calls is None:
        return []
    return [
        f"| keepers killed before or after a call | {points.tried - len(points.wrong):,} of {points.tried:,} |",
        f"| calls of a keeper that failed once, in each way | {calls.tried - len(calls.wrong):,} of {calls.tried:,};"
        f" {calls.ended:,} ended it |",
    ]


def seed_rows(proof: Proof) -> list[str]:
    """What seeds alone show."""
    sums = proof.sums
    return [
        f"| simulated time | {sums['simulated_s'] / 3600:,.0f} h |",
        f"| seeds | {sum(count for _, count in proof.seeds):,}: "
        + ", ".join(f"{first} to {first + count - 1}" for first, count in proof.seeds)
        + " |",
        f"| requests | {sums['requests']:,} |",
        f"| page operations | {sums['page_ops']:,} |",
        f"| workers killed | {sums['worker_crashes']:,} |",
        f"| times that the NAS lost its cache | {sums['nas_crashes']:,} |",
        f"| connections made | {sums['connections']:,} |",
        f"| the processor's time | {proof.seconds:,.0f} s, {sums['page_ops'] / max(proof.seconds, 1):,.0f} page"
        " operations a second |",
        f"| wrong, lost or hung | {len(proof.failures)} |",
        f"| at most, at 95%: for a page operation | {bound(sums['page_ops'])} |",
        f"| for a kill of the worker | {bound(sums['worker_crashes'])} |",
    ]


def page_of(proof: Proof, commit: str) -> str:
    """The page, in Markdown."""
    promises = collections.Counter(mutant.promise for mutant, _ in proof.caught)
    missed = collections.Counter(mutant.promise for mutant in proof.survived)
    seeded = len(proof.caught) + sum(mutant in SEEDED for mutant in proof.survived)
    lines = [
        f"Printed by `make prove` on {datetime.date.today().isoformat()}, commit {commit}.",
        "",
        "| | |",
        "| --- | ---: |",
        *seed_rows(proof),
        f"| killed at a store or call, and taken over | {proof.points[0]:,} of {proof.points[1]:,} |",
        f"| calls that failed once, in each way | {proof.calls[0]:,} of {proof.calls[1]:,} |",
        *keeper_rows(proof),
        f"| faults put in on purpose that were found | {len(proof.caught)} of {seeded} |",
        "",
        *proof.notes,
    ]
    if proof.failures:
        lines += ["Failures:", "", *(f"- `{failure}`" for failure in proof.failures[:20]), ""]
    lines += ["| faults put in: promise | found | not found |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {promises[name]} | {missed[name]} |" for name in sorted({*promises, *missed})]
    lines += ["", "| a fault that the engine had | found after, s of the processor's time |", "| --- | ---: |"]
    lines += [f"| {mutant.name} | {used:.2f} |" for mutant, used in proof.known]
    if proof.survived:
        lines += ["", "Not found:", "", *(f"- {mutant.name} ({mutant.promise})" for mutant in proof.survived)]
    if proof.coverage:
        lines += ["", *proof.coverage]
    return "\n".join(lines) + "\n"


def put_page(text: str) -> None:
    """In docs/proof.md, between the two marks."""
    before, _, rest = PAGE.read_text().partition("<!-- begin: make prove -->\n")
    _, end, after = rest.partition("<!-- end: make prove -->")
    PAGE.write_text(f"{before}<!-- begin: make prove -->\n{text}{end}{after}")
