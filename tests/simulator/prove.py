# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make prove`: what the simulator shows of the data path, on one page, which docs/proof.md keeps.

It is done in parts, each of which adds to what it saw before (parts.py): a run can be ended and begun again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support.keeper_steps import Enumeration, Steps, everywhere, failing_at, killed_at

from simulator import coverage
from simulator.build import ENGINE, build
from simulator.coverage import Branches
from simulator.mutants import KNOWN, SEEDED, Mutant
from simulator.page import page_of, put_page, seed_rows
from simulator.parts import PARTS, Part, alone, load
from simulator.runs import Outcome, shrink, simulate

# Seeds are kept in pieces of so many.
SEEDS_A_PIECE = 2000
# Each of these is stopped at every point, and each of its calls fails.
BOUNDED: tuple[tuple[int, dict[str, object]], ...] = (
    (1, {"requests": 20, "threads": 3, "only": "", "loop": 0}),
    (3, {"requests": 20, "threads": 3, "only": "", "loop": 0}),
    (5, {"requests": 20, "threads": 2, "only": "short_transfer,stability,nas_restart", "loop": 0}),
    (2, {"requests": 20, "threads": 3, "only": "", "loop": 1}),
    (4, {"requests": 20, "threads": 3, "only": "corrupt_read", "loop": 1}),
)
# A fault that the engine had must be found within ten minutes; how long one that is made up is looked for is an option.
KNOWN_FAULT_S = 600
# A mutant is looked for first with all faults, then with a kill at each store to the region.
STORES_FAULTS = "worker_crash,nas_crash"


def piece_of(outcome: Outcome) -> dict[str, Any]:
    """What is kept of these seeds."""
    return {**outcome.summary, "failures": outcome.failures}


def run_seeds(part: Part, options: argparse.Namespace) -> None:
    """Pieces, from the first seed that was not tried, until the processor's time has been used for each job."""
    program = build()
    pieces = part.found.setdefault("pieces", [])
    tried = max((piece["first_seed"] + piece["seeds"] for piece in pieces), default=1)
    first, used = max(tried, options.first_seed), 0.0
    with ThreadPoolExecutor(options.jobs) as pool:
        while used < options.seconds * options.jobs:
            firsts = range(first, first + options.jobs * SEEDS_A_PIECE, SEEDS_A_PIECE)
            for outcome in pool.map(lambda seed: simulate(program, seed, seeds=SEEDS_A_PIECE, keep=1), firsts):
                pieces.append(piece_of(outcome))
                used += outcome.summary["seconds"]
            part.save()
            first = firsts.stop


def stop_everywhere(part: Part, _: argparse.Namespace) -> None:
    """The worker is killed at every point of the bounded runs."""
    program = build("stores")
    for seed, words in BOUNDED:
        points = simulate(program, seed, **words).summary["points"]
        outcome = simulate(program, seed, crash_at=1, crash_end=points, keep=1, **words)
        part.found[f"{seed} {words}"] = {"tried": points, "of": points, "failures": outcome.failures}
        part.save()


def fail_everything(part: Part, _: argparse.Namespace) -> None:
    """Every call of the bounded runs fails in every way."""
    program = build()
    for seed, words in BOUNDED:
        calls = simulate(program, seed, **words).summary["failable"]
        outcome = simulate(program, seed, fail_at=1, fail_end=calls, keep=1, **words)
        ways = outcome.summary["failed_calls"]
        part.found[f"{seed} {words}"] = {"tried": ways, "of": ways, "failures": outcome.failures}
        part.save()


def find_mutant(mutant: Mutant, seconds: float) -> float | None:
    """The processor's seconds that it took, None where it was not found."""
    changed = mutant.apply(ENGINE)
    used = 0.0

    def survives(variant: str, seed: int, words: dict[str, object]) -> dict[str, Any]:
        """What was seen; empty: it was found."""
        nonlocal used
        outcome = simulate(build(variant, changed, name=f"mutant-{variant}"), seed, **words)
        used += float(outcome.summary.get("seconds", 0))
        return {} if outcome.failures else outcome.summary

    if mutant.bounded is not None:
        seed, words = mutant.bounded
        whole = survives("stores", seed, dict(words))
        if not whole or not survives("stores", seed, {**words, "crash_at": 1, "crash_end": whole["points"]}):
            return used
    is_missed = survives("plain", 1, {"seconds": seconds, **mutant.words}) and survives(
        "stores", 1, {"seconds": seconds, "only": STORES_FAULTS, **mutant.words}
    )
    return None if is_missed else used


def find_mutants(part: Part, options: argparse.Namespace) -> None:
    """Those that were not found yet, or have changed since."""
    for mutant in (*KNOWN, *SEEDED):
        key = hashlib.sha256(repr(mutant).encode()).hexdigest()[:12]
        kept = part.found.get(mutant.name, {})
        is_wanted = options.mutants in f"{mutant.promise}: {mutant.name}"
        if not is_wanted or (kept.get("key") == key and kept.get("found_s") is not None):
            continue
        used = find_mutant(mutant, KNOWN_FAULT_S if mutant in KNOWN else options.mutant_seconds)
        print(f"{'survived' if used is None else f'{used:.2f} s':>9}  {mutant.name}", flush=True)
        part.found[mutant.name] = {"key": key, "found_s": used}
        part.save()


def step_keepers(part: Part, options: argparse.Namespace) -> None:
    """The keeper is killed before and after each of its calls, or each of them fails; those that were not tried."""
    found = Enumeration({name: Steps(**scene) for name, scene in part.found.items()})

    def keep() -> None:
        part.found = asdict(found)["scenes"]
        part.save()

    wanted = killed_at if part.name == "keeper-points" else failing_at
    everywhere(wanted, jobs=options.keeper_jobs, every=options.keeper_every, found=found, keep=keep)


def counted(
    seconds: int, statuses: dict[str, int], engine: dict[str, Branches], python: dict[str, Branches]
) -> dict[str, Any]:
    """What is kept of the branches."""
    files = {"engine": engine, "python": python}
    return {
        "seconds": seconds,
        "statuses": statuses,
        **{name: {path: asdict(file) for path, file in found.items()} for name, found in files.items()},
    }


def measure_coverage(part: Part, options: argparse.Namespace) -> None:
    """All of it anew."""
    coverage.forget()
    coverage.run_simulator(options.coverage_seconds)
    statuses = {"engine": coverage.run_engine_tests(), "keeper and kernel": coverage.run_python()}
    part.found = counted(options.coverage_seconds, statuses, coverage.read_engine(), coverage.read_python())
    part.save()


RUNNERS: dict[str, Callable[[Part, argparse.Namespace], None]] = {
    "seeds": run_seeds,
    "points": stop_everywhere,
    "calls": fail_everything,
    "keeper-points": step_keepers,
    "keeper-calls": step_keepers,
    "mutants": find_mutants,
    "coverage": measure_coverage,
}


def try_seeds(program: Path, options: argparse.Namespace) -> int:
    """For `make test`: a number of seeds alone, of which nothing is kept."""
    pieces = [piece_of(simulate(program, options.first_seed, seeds=options.seeds, keep=1))]
    failures = [failure for piece in pieces for failure in piece["failures"]]
    print(*failures, *seed_rows(pieces), sep="\n")
    return 1 if failures else 0


def parts_of(text: str) -> list[str]:
    names = text.split(",") if text else []
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no part; there are {', '.join(PARTS)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--parts", type=parts_of, default=list(PARTS), help=f"of {','.join(PARTS)}; empty: only the page"
    )
    parser.add_argument("--seconds", type=int, default=300, help="of the processor's time for each job of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="seeds are run in so many processes")
    parser.add_argument("--first-seed", type=int, default=1, help="or the one after the last that was tried")
    parser.add_argument("--mutant-seconds", type=int, default=20, help="for each fault that is put in")
    parser.add_argument("--mutants", default="", help="only faults with this in their promise or name")
    parser.add_argument("--keeper-every", type=int, default=1, help="only one of so many steps of the keeper")
    parser.add_argument("--keeper-jobs", type=int, default=4, help="keepers at once; most of them wait")
    parser.add_argument("--coverage-seconds", type=int, default=30, help="of seeds")
    parser.add_argument("--shrink", type=int, metavar="SEED", help="only make this failing seed smaller")
    parser.add_argument("--only-seeds", action="store_true", help="run seeds, print what was seen, and keep nothing")
    parser.add_argument("--seeds", type=int, default=1000, help="with --only-seeds: how many")
    parser.add_argument("--write", action="store_true", help="write docs/proof.md")
    options = parser.parse_args()
    if options.shrink is not None:
        words = shrink(build(), options.shrink)
        print(build(), options.shrink, *(f"{name}={value}" for name, value in words.items()), "verbose=1")
        return 0
    if options.only_seeds:
        return try_seeds(build(), options)
    for name in options.parts:
        with alone(name):
            RUNNERS[name](load(name), options)
    text, is_right = page_of({name: load(name) for name in PARTS})
    print(text)
    if options.write:
        put_page(text)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
