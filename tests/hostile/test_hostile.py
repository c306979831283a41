# SPDX-License-Identifier: LGPL-2.1-or-later
"""Some of the run against a hostile server (run.py): no wrong byte, no error, no crash, and no request that hangs."""

from __future__ import annotations

import os
import random
import time

import pytest
from support.sanitizer_reports import VARIABLE

from hostile import run

# Under AddressSanitizer it is most of a minute, otherwise a look.
ANSWERS, TRIES, OF_A_LIFE = (30_000, 60, 3000) if VARIABLE in os.environ else (10_000, 30, 1500)


@pytest.mark.fake
@pytest.mark.timeout(400)
def test_a_hostile_server() -> None:
    """With another seed each time; `make hostile ARGS="--only SEED"` replays one client, for longer."""
    seed = random.SystemRandom().randrange(1 << 32)
    begun_s = time.monotonic()
    report = run.run(seed=seed, answers=ANSWERS, minutes=4, tries=TRIES, of_a_life=OF_A_LIFE)
    print(f"seed {seed}", *report.lines(time.monotonic() - begun_s), sep="\n")
    assert report.failures == []
