# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the simulator, and makes a run that fails smaller."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The names on the simulator's command line, in the order in which the shrinker tries to do without them.
FAULTS = (
    "hang_up",
    "replaced",
    "thief",
    "suspend",
    "owner_refused",
    "fragments",
    "limits",
    "corrupt_read",
    "stale",
    "verifier_flutter",
    "stability",
    "short_transfer",
    "refuse",
    "jukebox",
    "drop_request",
    "drop_answer",
    "slow",
    "blackhole",
    "reset",
    "partition",
    "nas_restart",
    "nas_crash",
    "worker_crash",
)


@dataclass(frozen=True)
class Outcome:
    """What one call of the program printed."""

    failures: list[dict[str, Any]]
    each: list[dict[str, Any]]
    summary: dict[str, Any]


def simulate(program: Path, seed: int, **words: object) -> Outcome:
    """One call; the words are the program's own. RuntimeError where it does not understand them."""
    command = [str(program), str(seed), *(f"{name}={value}" for name, value in words.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    failures = [line for line in lines if "failed" in line]
    if done.returncode not in (0, 1, 3) or (done.returncode != 0) != bool(failures):
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stdout}")
    others = [line for line in lines if "failed" not in line]
    return Outcome(failures, others[:-1], others[-1] if others else {})


def shrink(program: Path, seed: int, **words: object) -> dict[str, object]:
    """Words with which the seed still fails: fewer requests, no fault that is not needed, fewer threads."""
    best = dict(words)
    failures = simulate(program, seed, **best).failures
    assert failures, f"seed {seed} does not fail"
    requests = int(failures[0].get("requests", 1500))
    while requests > 1 and simulate(program, seed, **{**best, "requests": requests // 2}).failures:
        requests //= 2
        best["requests"] = requests
    without: list[str] = []
    for fault in FAULTS:
        tried = {**best, "without": ",".join([*without, fault])}
        if simulate(program, seed, **tried).failures:
            without.append(fault)
            best = tried
    for threads in (1, 2, 3):
        if simulate(program, seed, **{**best, "threads": threads}).failures:
            return {**best, "threads": threads}
    return best
