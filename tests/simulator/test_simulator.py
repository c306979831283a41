# SPDX-License-Identifier: LGPL-2.1-or-later
"""The data path on a simulated machine: seeds, every point of a crash, every call that fails, and known faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator.build import ENGINE, build
from simulator.mutants import EQUIVALENT, KNOWN, SEEDED, Mutant
from simulator.runs import FAULTS, shrink, simulate

# `make prove` runs more.
SEEDS = 220
# Of the processor's time.
KNOWN_FAULT_S = 600

# Small enough to be stopped everywhere: an encrypted region, a plain one with four connections, and the loop.
BOUNDED = (
    {"seed": 1, "requests": 4, "threads": 2, "loop": 0},
    {"seed": 3, "requests": 8, "threads": 3, "loop": 0},
    {"seed": 2, "requests": 6, "threads": 3, "loop": 1},
)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def program() -> Path:
    return build()


@pytest.fixture(scope="session")
def program_with_stores() -> Path:
    return build("stores")


def test_a_seed_replays(program: Path) -> None:
    """Alone and after others in one process, it is the same run."""
    together = [line["trace"] for line in simulate(program, 1, seeds=8, each=1).each]
    alone = [simulate(program, seed).summary for seed in range(1, 9)]
    assert together == [simulate(program, seed, each=1).each[0]["trace"] for seed in range(1, 9)]
    assert len(set(together)) == 8
    assert all(run["page_ops"] > 0 for run in alone)


def test_every_fault_strikes(program: Path) -> None:
    """In a few hundred seeds each kind of fault happens."""
    summary = simulate(program, 1, seeds=300, requests=60).summary
    assert set(summary["faults"]) == set(FAULTS)
    assert [name for name, times in summary["faults"].items() if times == 0] == []
    assert summary["worker_crashes"] > 0
    assert summary["nas_crashes"] > 0
    assert summary["hang_ups"] > 0


def test_a_part_of_the_seeds_has_the_loop(program: Path) -> None:
    """One of four, or as the command line says; without it, no request goes over the socket."""
    runs = simulate(program, 1, seeds=100, requests=20, threads=2, only="", each=1).each
    assert 10 < sum(run["loop_requests"] > 0 for run in runs) < 40
    words: dict[str, object] = {"requests": 20, "threads": 2, "only": ""}
    without, through = (simulate(program, 1, seeds=5, loop=loop, **words).summary for loop in (0, 1))
    assert without["loop_requests"] == 0
    assert through["loop_requests"] >= 5 * 20


def test_seeds(program: Path) -> None:
    """No page is lost or wrong, and nothing hangs. A seed that fails: tests/README.md says how it is replayed."""
    outcome = simulate(program, 1, seeds=SEEDS)
    assert outcome.failures == []


@pytest.mark.parametrize("words", BOUNDED)
def test_killed_at_every_store_and_call(program_with_stores: Path, words: dict[str, int]) -> None:
    """The worker is killed before each store to the region, and at each call; the next one takes over."""
    seed, rest = words["seed"], {name: value for name, value in words.items() if name != "seed"}
    whole = simulate(program_with_stores, seed, only="", **rest)
    assert whole.failures == []
    points, killed = whole.summary["points"], whole.summary["worker_crashes"]
    assert whole.summary["stores"] > 100
    outcome = simulate(program_with_stores, seed, only="", crash_at=1, crash_end=points, **rest)
    assert outcome.failures == []
    assert outcome.summary["worker_crashes"] >= points
    assert killed <= 1


@pytest.mark.parametrize("words", BOUNDED)
def test_every_call_fails_once(program: Path, words: dict[str, int]) -> None:
    """Each call and allocation of the run fails, in each way that it can: no wrong page, no hang, no leak."""
    seed, rest = words["seed"], {name: value for name, value in words.items() if name != "seed"}
    calls = simulate(program, seed, only="", **rest).summary["failable"]
    outcome = simulate(program, seed, only="", fail_at=1, fail_end=calls, **rest)
    assert outcome.failures == []
    assert outcome.summary["failed_calls"] >= calls


@pytest.mark.parametrize("mutant", KNOWN, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_known_faults_are_found(mutant: Mutant) -> None:
    """A fault that the engine had, put back in, is found within ten minutes; a rare one from its own seed on."""
    first = mutant.bounded[0] if mutant.bounded is not None else 1
    program = build(changed=mutant.apply(ENGINE), name="known")
    outcome = simulate(program, first, seconds=KNOWN_FAULT_S, **mutant.words)
    assert outcome.failures != []


def test_mutants_fit_the_code() -> None:
    """Each of the others still has its place in the engine."""
    assert all(mutant.apply(ENGINE) for mutant in (*SEEDED, *EQUIVALENT))
    names = [mutant.name for mutant in (*KNOWN, *SEEDED, *EQUIVALENT)]
    assert len(names) == len(set(names))


def test_a_failing_seed_is_shrunk() -> None:
    """What remains fails as well, with fewer requests and without most faults."""
    mutant = next(mutant for mutant in SEEDED if mutant.name == "COMMIT's verifier is not compared")
    broken = build(changed=mutant.apply(ENGINE), name="shrunk")
    failure = simulate(broken, 1, seconds=60).failures[0]
    words = shrink(broken, failure["seed"])
    assert simulate(broken, failure["seed"], **words).failures != []
    assert int(str(words.get("requests", failure["requests"]))) <= failure["requests"]
    without = set(str(words["without"]).split(","))
    assert {"nas_crash", "nas_restart", "verifier_flutter"} - without  # what changes a verifier
    assert "partition" in without
