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
ANSWERS, TRIES = (30_000, 60) if VARIABLE in os.environ else (10_000, 30)


@pytest.mark.fake
@pytest.mark.timeout(400)
def test_a_hostile_server() -> None:
    """With another seed each time; it is printed, and `make hostile ARGS="--only SEED"` replays one client."""
    seed = random.SystemRandom().randrange(1 << 32)
    begun_s = time.monotonic()
    report = run.run(seed=seed, answers=ANSWERS, minutes=4, tries=TRIES)
    print(f"seed {seed}", *report.lines(time.monotonic() - begun_s), sep="\n")
    assert report.failures == []
