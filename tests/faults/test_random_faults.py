# SPDX-License-Identifier: LGPL-2.1-or-later
"""A minute of the fault-injection run (run.py): no wrong byte, no error, and no request that hangs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import run

SECONDS = 60
MIB = 1 << 20


@pytest.mark.timeout(400)
@pytest.mark.parametrize("loop", [False, True], ids=["threads", "loop"])
def test_a_minute_of_faults(tmp_path: Path, loop: bool) -> None:
    """With another seed each time; it is printed, and `make faults ARGS="--seed N"` replays it, with --loop."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    failures, said = run.run(
        seconds=SECONDS, seed=seed, device_bytes=128 * MIB, connections=1 + loop, loop=loop, workdir=tmp_path
    )
    assert not failures, "\n".join([f"seed {seed}", *failures, *said[-40:]])
