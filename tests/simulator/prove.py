# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make prove`: what the simulator shows of the data path, on one page, which docs/proof.md keeps."""

from __future__ import annotations

import argparse
import collections
import datetime
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator.build import BUILD, ENGINE, PROJECT, ROOMS, build, engine_sources
from simulator.mutants import KNOWN, SEEDED, Mutant
from simulator.runs import shrink, simulate

PAGE = PROJECT / "docs" / "proof.md"
# Each of these is stopped at every point, and each of its calls fails.
BOUNDED: tuple[tuple[int, dict[str, object]], ...] = (
    (1, {"requests": 20, "threads": 3, "only": ""}),
    (3, {"requests": 20, "threads": 3, "only": ""}),
    (5, {"requests": 20, "threads": 2, "only": "short_transfer,stability,nas_restart"}),
)
# A mutant is looked for first with all faults, then with a kill at each store to the region.
STORES_FAULTS = "worker_crash,nas_crash"


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
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)


def run_seeds(proof: Proof, program: Path, first: int, seconds: int, jobs: int) -> None:
    """`seconds` of the processor's time for each job, each from a first seed of its own."""
    firsts = [first + job * 10**9 for job in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(lambda seed: simulate(program, seed, seconds=seconds, keep=1), firsts))
    for outcome in outcomes:
        proof.failures += outcome.failures
        summary = outcome.summary
        proof.seeds.append((summary["first_seed"], summary["seeds"]))
        proof.seconds += summary["seconds"]
        for name in ("simulated_s", "page_ops", "requests", "worker_crashes", "nas_crashes", "connections"):
            proof.sums[name] += int(summary[name])


def stop_everywhere(proof: Proof, program: Path) -> None:
    """The worker is killed at every point of the bounded runs."""
    for seed, words in BOUNDED:
        points = simulate(program, seed, **words).summary["points"]
        outcome = simulate(program, seed, crash_at=1, crash_end=points, keep=1, **words)
        proof.failures += outcome.failures
        right = points - len(outcome.failures)
        proof.points = (proof.points[0] + right, proof.points[1] + points)


def fail_everything(proof: Proof, program: Path) -> None:
    """Every call of the bounded runs fails in every way."""
    for seed, words in BOUNDED:
        calls = simulate(program, seed, **words).summary["failable"]
        outcome = simulate(program, seed, fail_at=1, fail_end=calls, keep=1, **words)
        proof.failures += outcome.failures
        ways = outcome.summary["failed_calls"]
        proof.calls = (proof.calls[0] + ways - len(outcome.failures), proof.calls[1] + ways)


def find_mutant(mutant: Mutant, seconds: int) -> float | None:
    """The processor's seconds that it took, None where it was not found."""
    changed = mutant.apply(ENGINE)
    used = 0.0
    for variant, words in (("plain", mutant.words), ("stores", {"only": STORES_FAULTS})):
        program = build(variant, changed, name=f"mutant-{variant}")
        outcome = simulate(program, 1, seconds=seconds, **words)
        used += float(outcome.summary.get("seconds", 0))
        if outcome.failures:
            return used
    return None


def find_mutants(proof: Proof, seconds: int) -> None:
    for mutant in KNOWN:
        used = find_mutant(mutant, 600)
        if used is None:
            proof.survived.append(mutant)
        else:
            proof.known.append((mutant, used))
    for mutant in SEEDED:
        used = find_mutant(mutant, seconds)
        print(f"{'survived' if used is None else f'{used:.2f} s':>9}  {mutant.name}", flush=True)
        if used is None:
            proof.survived.append(mutant)
        else:
            proof.caught.append((mutant, used))


def measure_coverage(proof: Proof, seconds: int) -> None:
    """Branches of each room that a few seeds take, by gcov(1)."""
    program = build("coverage")
    for notes in BUILD.glob("objects/coverage/**/*.gcda"):
        notes.unlink()
    proof.failures += simulate(program, 1, seconds=seconds).failures
    for name in engine_sources():
        room = name.partition("/")[0]
        stem = name.replace("/", "_")[:-2]
        data = max(BUILD.glob(f"objects/coverage/*/{stem}.gcda"), default=None, key=lambda path: path.stat().st_mtime)
        taken, branches = branches_of(data) if data else (0, 0)
        before = proof.coverage.get(room, (0, 0))
        proof.coverage[room] = (before[0] + taken, before[1] + branches)


def branches_of(data: Path) -> tuple[int, int]:
    """Taken at least once, and all of them."""
    text = subprocess.run(
        ["gcov", "-b", "-c", "-n", data.name], cwd=data.parent, capture_output=True, text=True, check=True
    ).stdout
    for part in text.split("\n\n"):
        head = part.splitlines()[0] if part.strip() else ""
        if head.startswith("File") and ".h'" not in head:
            found = re.search(r"Taken at least once:([\d.]+)% of (\d+)", part)
            if found:
                return round(float(found[1]) * int(found[2]) / 100), int(found[2])
    return 0, 0


def bound(count: int) -> str:
    """0 in `count` gives at most 3 in `count` at 95%."""
    return f"{3 / count:.1e}" if count else "-"


def page_of(proof: Proof, commit: str) -> str:
    """The page, in Markdown."""
    sums = proof.sums
    promises = collections.Counter(mutant.promise for mutant, _ in proof.caught)
    missed = collections.Counter(mutant.promise for mutant in proof.survived)
    seeded = len(proof.caught) + sum(mutant in SEEDED for mutant in proof.survived)
    lines = [
        f"Printed by `make prove` on {datetime.date.today().isoformat()}, commit {commit}.",
        "",
        "| | |",
        "| --- | ---: |",
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
        f"| killed at a store or call, and taken over | {proof.points[0]:,} of {proof.points[1]:,} |",
        f"| calls that failed once, in each way | {proof.calls[0]:,} of {proof.calls[1]:,} |",
        f"| faults put in on purpose that were found | {len(proof.caught)} of {seeded} |",
        "",
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
        lines += ["", "| room | branches taken | of |", "| --- | ---: | ---: |"]
        lines += [
            f"| {room} | {taken} | {of} ({100 * taken / max(of, 1):.0f}%) |"
            for room, (taken, of) in sorted(proof.coverage.items())
            if room in ROOMS
        ]
    return "\n".join(lines) + "\n"


def put_page(text: str) -> None:
    """In docs/proof.md, between the two marks."""
    before, _, rest = PAGE.read_text().partition("<!-- begin: make prove -->\n")
    _, end, after = rest.partition("<!-- end: make prove -->")
    PAGE.write_text(f"{before}<!-- begin: make prove -->\n{text}{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="of the processor's time for each job")
    parser.add_argument("--jobs", type=int, default=2, help="seeds are run in so many processes")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--mutant-seconds", type=int, default=20, help="for each fault that is put in; 0: none is")
    parser.add_argument("--coverage-seconds", type=int, default=30, help="0: it is not measured")
    parser.add_argument("--shrink", type=int, metavar="SEED", help="only make this failing seed smaller")
    parser.add_argument("--write", action="store_true", help="write docs/proof.md")
    options = parser.parse_args()
    program = build()
    if options.shrink is not None:
        words = shrink(program, options.shrink)
        print(program, options.shrink, *(f"{name}={value}" for name, value in words.items()), "verbose=1")
        return 0
    proof = Proof()
    run_seeds(proof, program, options.first_seed, options.seconds, options.jobs)
    stop_everywhere(proof, build("stores"))
    fail_everything(proof, program)
    if options.mutant_seconds > 0:
        find_mutants(proof, options.mutant_seconds)
    if options.coverage_seconds > 0:
        measure_coverage(proof, options.coverage_seconds)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, text=True).strip()
    text = page_of(proof, commit)
    print(text)
    if options.write:
        put_page(text)
    return 1 if proof.failures else 0


if __name__ == "__main__":
    sys.exit(main())
