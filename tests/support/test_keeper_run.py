# SPDX-License-Identifier: LGPL-2.1-or-later
"""A scenario beside a keeper: it ends the keeper, and its exception is raised."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from nbdnfs.keeper.keeper import Keeper
from support.keeper_run import run_keeper
from support.waiting import DEADLINE_S


class StandIn:
    """A keeper that does nothing until SIGTERM. The signal is only counted: it must reach the main thread."""

    def __init__(self, *, ends_by_itself: bool = False) -> None:
        self.terminated = threading.Event()
        self._ends_by_itself = ends_by_itself

    def run(self) -> int:
        if self._ends_by_itself:
            return 3
        while not self.terminated.wait(0.01):
            pass
        return 0


def keeper(stand_in: StandIn) -> Keeper:
    return cast(Any, stand_in)  # type: ignore[no-any-return]


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    made = StandIn()
    before = signal.signal(signal.SIGTERM, lambda number, frame: made.terminated.set())
    yield made
    signal.signal(signal.SIGTERM, before)


def test_the_end_of_the_scenario_ends_the_keeper(stand_in: StandIn) -> None:
    """With SIGTERM; the result is the keeper's status."""
    over, played = threading.Event(), threading.Event()
    assert run_keeper(keeper(stand_in), lambda keeper: played.set(), over, join_s=DEADLINE_S) == 0
    assert stand_in.terminated.is_set()
    assert played.is_set()
    assert over.is_set()


def test_the_scenarios_exception_is_raised(stand_in: StandIn) -> None:
    """The keeper is ended all the same."""

    def fail(_: Keeper) -> None:
        raise AssertionError("not what was promised")

    with pytest.raises(AssertionError, match="not what was promised"):
        run_keeper(keeper(stand_in), fail, threading.Event(), join_s=DEADLINE_S)
    assert stand_in.terminated.is_set()


def test_a_keeper_that_ends_by_itself_is_not_signalled(stand_in: StandIn) -> None:
    """The scenario sees it by `over`, and ends nothing then."""
    over = threading.Event()
    ended = StandIn(ends_by_itself=True)
    assert run_keeper(keeper(ended), lambda keeper: _wait(over), over, join_s=DEADLINE_S) == 3
    assert not stand_in.terminated.is_set()


def _wait(over: threading.Event) -> None:
    assert over.wait(DEADLINE_S)
