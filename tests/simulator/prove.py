# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make prove`: what the simulator shows of the data path, on one page, which docs/proof.md keeps."""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.keeper_steps import fail_everywhere as fail_everywhere_in_keeper
from support.keeper_steps import stop_everywhere as stop_everywhere_in_keeper

from simulator import coverage
from simulator.build import ENGINE, PROJECT, build
from simulator.mutants import KNOWN, SEEDED, Mutant
from simulator.page import Proof, page_of, put_page, seed_rows
from simulator.runs import shrink, simulate

# Each of these is stopped at every point, and each of its calls fails.
BOUNDED: tuple[tuple[int, dict[str, object]], ...] = (
    (1, {"requests": 20, "threads": 3, "only": ""}),
    (3, {"requests": 20, "threads": 3, "only": ""}),
    (5, {"requests": 20, "threads": 2, "only": "short_transfer,stability,nas_restart"}),
)
# A mutant is looked for first with all faults, then with a kill at each store to the region.
STORES_FAULTS = "worker_crash,nas_crash"


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


def step_keepers(proof: Proof, every: int, jobs: int) -> None:
    """The keeper is killed before and after each of its calls, and each of them fails."""
    proof.keeper_points = stop_everywhere_in_keeper(jobs=jobs, every=every)
    proof.keeper_calls = fail_everywhere_in_keeper(jobs=jobs, every=every)
    for found in (proof.keeper_points, proof.keeper_calls):
        proof.failures += [{"keeper": text} for text in found.wrong]


def measure_coverage(proof: Proof, seconds: int) -> None:
    coverage.forget()
    coverage.run_simulator(seconds)
    for name, status in (("engine", coverage.run_engine_tests()), ("keeper and kernel", coverage.run_python())):
        if status != 0:
            proof.notes.append(f"Some tests failed while the coverage of {name} was measured (pytest: {status}).")
    proof.coverage = coverage.page_of(coverage.read_engine(), coverage.read_python())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="of the processor's time for each job")
    parser.add_argument("--jobs", type=int, default=2, help="seeds are run in so many processes")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--mutant-seconds", type=int, default=20, help="for each fault that is put in; 0: none is")
    parser.add_argument("--keeper-every", type=int, default=1, help="only one of so many steps of the keeper; 0: none")
    parser.add_argument("--coverage-seconds", type=int, default=30, help="0: it is not measured")
    parser.add_argument("--shrink", type=int, metavar="SEED", help="only make this failing seed smaller")
    parser.add_argument("--only-seeds", action="store_true", help="run seeds, and print what was seen")
    parser.add_argument("--write", action="store_true", help="write docs/proof.md")
    options = parser.parse_args()
    program = build()
    if options.shrink is not None:
        words = shrink(program, options.shrink)
        print(program, options.shrink, *(f"{name}={value}" for name, value in words.items()), "verbose=1")
        return 0
    proof = Proof()
    run_seeds(proof, program, options.first_seed, options.seconds, options.jobs)
    if options.only_seeds:
        print(*proof.failures, *seed_rows(proof), sep="\n")
        return 1 if proof.failures else 0
    stop_everywhere(proof, build("stores"))
    fail_everything(proof, program)
    if options.keeper_every > 0:
        step_keepers(proof, options.keeper_every, options.jobs)
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
