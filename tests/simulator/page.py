# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the parts of `make prove` have seen, as the page that docs/proof.md keeps."""

from __future__ import annotations

import collections
import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from simulator import coverage
from simulator.build import PROJECT
from simulator.coverage import Branches
from simulator.mutants import EQUIVALENT, KNOWN, SEEDED
from simulator.parts import Part

PAGE = PROJECT / "docs" / "proof.md"
# Of the summary of some seeds, what is added up.
_SUMS = ("simulated_s", "seconds", "page_ops", "requests", "worker_crashes", "nas_crashes", "connections")
_TITLES = {
    "seeds": "seeds",
    "points": "the worker killed at each store and call",
    "calls": "each call of the worker failing",
    "keeper-points": "the keeper killed at each call",
    "keeper-calls": "each call of the keeper failing",
    "mutants": "faults put in",
    "coverage": "branches",
}


def bound(count: int) -> str:
    """0 in `count` gives at most 3 in `count` at 95%."""
    return f"{3 / count:.1e}" if count else "-"


def ranges_of(pieces: Sequence[dict[str, Any]]) -> str:
    """The seeds, as "1 to 4,000, 9,001 to 9,500"."""
    ranges: list[list[int]] = []
    for first, seeds in sorted((piece["first_seed"], piece["seeds"]) for piece in pieces):
        if ranges and ranges[-1][1] == first:
            ranges[-1][1] = first + seeds
        else:
            ranges.append([first, first + seeds])
    return ", ".join(f"{first:,} to {end - 1:,}" for first, end in ranges)


def seed_rows(pieces: Sequence[dict[str, Any]]) -> list[str]:
    """What seeds alone show."""
    sums = collections.Counter(dict.fromkeys(_SUMS, 0.0))
    for piece in pieces:
        sums.update({name: piece[name] for name in _SUMS})
    operations, kills = int(sums["page_ops"]), int(sums["worker_crashes"])
    failures = sum(len(piece["failures"]) for piece in pieces)
    rows = [
        f"| simulated time | {sums['simulated_s'] / 3600:,.0f} h |",
        f"| seeds | {sum(piece['seeds'] for piece in pieces):,}: {ranges_of(pieces)} |",
        f"| requests | {int(sums['requests']):,} |",
        f"| page operations | {operations:,} |",
        f"| workers killed | {kills:,} |",
        f"| times that the NAS lost its cache | {int(sums['nas_crashes']):,} |",
        f"| connections made | {int(sums['connections']):,} |",
        f"| the processor's time | {sums['seconds']:,.0f} s, {operations / max(sums['seconds'], 1):,.0f} page"
        " operations a second |",
        f"| wrong, lost or hung | {failures} |",
    ]
    if failures == 0:
        rows.append(f"| at most, at 95%: for a page operation | {bound(operations)} |")
        rows.append(f"| for a kill of the worker | {bound(kills)} |")
    return rows


def worker_row(title: str, found: dict[str, Any]) -> list[str]:
    """Of the bounded runs."""
    if not found:
        return []
    of, wrong = sum(run["of"] for run in found.values()), sum(len(run["failures"]) for run in found.values())
    return [f"| {title} | {of - wrong:,} of {of:,} |"]


def keeper_row(title: str, found: dict[str, Any]) -> list[str]:
    """What was tried, and in how many of the steps that there are."""
    if not found:
        return []
    scenes = found.values()
    tried, ended, steps = (sum(scene[what] for scene in scenes) for what in ("tried", "ended", "there_are"))
    wrong, done = (sum(len(scene[what]) for scene in scenes) for what in ("wrong", "done"))
    some = "" if done >= steps else f"; {done:,} of {steps:,} steps have been tried"
    return [f"| {title} | {tried - wrong:,} of {tried:,}{f'; {ended:,} ended it' if ended else ''}{some} |"]


def mutant_row(found: dict[str, Any]) -> list[str]:
    tried = [mutant for mutant in SEEDED if mutant.name in found]
    if not tried:
        return []
    caught = sum(found[mutant.name]["found_s"] is not None for mutant in tried)
    some = "" if len(tried) == len(SEEDED) else f"; {len(SEEDED) - len(tried)} have not been tried"
    return [f"| faults put in on purpose that were found | {caught} of {len(tried)}{some} |"]


def coverage_row(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    taken, of = (sum(file[what] for file in found["engine"].values()) for what in ("taken", "of"))
    return [f"| branches of the engine that are taken | {taken:,} of {of:,}, {100 * taken / of:.1f}% |"]


def mutant_tables(found: dict[str, Any]) -> list[str]:
    """By promise, those that the engine had, and those that survive."""
    caught: collections.Counter[str] = collections.Counter()
    missed: collections.Counter[str] = collections.Counter()
    for mutant in SEEDED:
        if mutant.name in found:
            (missed if found[mutant.name]["found_s"] is None else caught)[mutant.promise] += 1
    if not caught and not missed:
        return []
    lines = ["", "| faults put in: promise | found | not found |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {caught[name]} | {missed[name]} |" for name in sorted({*caught, *missed})]
    lines += ["", "| a fault that the engine had | found after, s of the processor's time |", "| --- | ---: |"]
    for mutant in KNOWN:
        if mutant.name in found:
            used = found[mutant.name]["found_s"]
            lines.append(f"| {mutant.name} | {'not found' if used is None else f'{used:.2f}'} |")
    survivors = [mutant for mutant in SEEDED if found.get(mutant.name, {"found_s": 0})["found_s"] is None]
    if survivors:
        lines += ["", "Not found:", "", *(f"- {mutant.name} ({mutant.promise})" for mutant in survivors)]
    if EQUIVALENT:
        lines += ["", "Changes that break no promise, and do not count:", ""]
        lines += [f"- {mutant.name} ({mutant.promise}): {mutant.why}" for mutant in EQUIVALENT]
    return lines


def coverage_tables(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    failed = [name for name, status in found["statuses"].items() if status != 0]
    notes = [f"Some tests failed while the branches of {name} were counted." for name in failed]
    engine, python = (
        {name: Branches(**file) for name, file in files.items()} for files in (found["engine"], found["python"])
    )
    return ["", *notes, *coverage.page_of(engine, python)]


def failures_of(parts: Iterable[Part]) -> list[str]:
    """Whatever went wrong in one of them."""
    lines: list[str] = []
    for part in parts:
        for piece in part.found.get("pieces", []) if part.name == "seeds" else part.found.values():
            if isinstance(piece, dict):
                lines += [f"- `{failure}`" for failure in (*piece.get("failures", ()), *piece.get("wrong", ()))]
    return lines


def runs_table(parts: Iterable[Part]) -> list[str]:
    """When each part was run, and of which commits."""
    lines = ["", "| part | sources | run on, commit |", "| --- | --- | --- |"]
    for part in parts:
        runs = "; ".join(f"{date}, {commit}" for date, commit in part.runs)
        lines.append(f"| {_TITLES[part.name]} | {part.sources} | {runs or 'not run with these sources'} |")
    return lines


def page_of(parts: dict[str, Part]) -> tuple[str, bool]:
    """The page, in Markdown, and whether nothing went wrong. The parts are all of the sources that there are now."""
    found = {name: part.found for name, part in parts.items()}
    failures = failures_of(parts.values())
    pieces = found["seeds"].get("pieces", [])
    lines = [
        f"Put together by `make prove` on {datetime.date.today().isoformat()}, of parts of the same sources. The last",
        "table says when each was run.",
        "",
        "| | |",
        "| --- | ---: |",
        *(seed_rows(pieces) if pieces else []),
        *worker_row("killed at a store or call, and taken over", found["points"]),
        *worker_row("calls that failed once, in each way", found["calls"]),
        *keeper_row("keepers killed before or after a call", found["keeper-points"]),
        *keeper_row("calls of a keeper that failed once, in each way", found["keeper-calls"]),
        *mutant_row(found["mutants"]),
        *coverage_row(found["coverage"]),
        *(["", "Failures:", "", *failures] if failures else []),
        *mutant_tables(found["mutants"]),
        *coverage_tables(found["coverage"]),
        *runs_table(parts.values()),
    ]
    return "\n".join(lines) + "\n", not failures


def put_page(text: str) -> None:
    """In docs/proof.md, between the two marks."""
    before, _, rest = PAGE.read_text().partition("<!-- begin: make prove -->\n")
    _, end, after = rest.partition("<!-- end: make prove -->")
    PAGE.write_text(f"{before}<!-- begin: make prove -->\n{text}{end}{after}")
