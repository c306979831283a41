# SPDX-License-Identifier: LGPL-2.1-or-later
"""A keeper that is killed at one of its calls, or of which one fails: the next one has swap go on. `make prove` does
that with every call; here it is a part of them, another one each time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.keeper_steps import SCENES, Stage, Template, Wanted, everywhere, failing_at, killed_at, play

# One step of so many.
EVERY = 40

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("name", SCENES)
def test_a_scene_goes_well(name: str) -> None:
    """With nothing in its way, the keeper ends as it is told, and all of its calls are counted."""
    with Template() as template:
        result = play(template, name, Wanted())
    assert result["status"] == 0
    assert result["points"] > 100
    assert result["calls"] > 50


def test_a_step_is_where_the_keeper_is_killed() -> None:
    """At that point; another thread of it may be at the next one by then."""
    with Template() as template:
        result = play(template, "attach", Wanted(kill_at=200))
    assert result["status"] == -signal.SIGKILL
    assert result["points"] in (200, 201)


def test_a_call_fails_in_each_way() -> None:
    """Once, and the keeper's end is one that it can explain."""
    with Template() as template:
        results = [play(template, "attach", Wanted(fail_at=20, way=way)) for way in range(8)]
    assert results[0]["failed"]
    assert not results[-1]["failed"]


def test_a_keeper_that_does_not_end(tmp_path: Path) -> None:
    """It is killed, and its template has the next one begin at once."""
    with Template() as template:
        stage = Stage(template, tmp_path)
        stage.start(Wanted())
        stage.signal(signal.SIGSTOP)
        template.patience_s = 0.1
        with pytest.raises(AssertionError, match="it does not end"):
            stage.wait()
        stage.end()
        assert play(template, "attach", Wanted())["status"] == 0


def test_killed_at_a_part_of_its_steps() -> None:
    found = everywhere(killed_at, every=EVERY)
    assert found.wrong == []
    assert found.tried > 50


def test_a_part_of_its_calls_fails() -> None:
    found = everywhere(failing_at, every=EVERY)
    assert found.wrong == []
    assert found.tried > 50
