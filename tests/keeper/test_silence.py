# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a server's silence is reported, and when its end is (nbdnfs/keeper/silence.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from nbdnfs.keeper.silence import REPORTED_AFTER_MS, Silence

START_MS = 1_000_000


class Heard:
    """A Silence, and what a keeper would have looked at."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.silence = Silence(Reporter(Records("swap0", run=folder), Notifier({})))
        self._capfd = capfd

    def look(self, heard_ms: int, owed_since_ms: int, now_ms: int) -> list[str]:
        """What it says, without the name. Times since START_MS."""
        owed = START_MS + owed_since_ms if owed_since_ms >= 0 else 0
        self.silence.look(START_MS + heard_ms, owed, START_MS + now_ms)
        return [line.removeprefix("nbdnfs: swap0: ") for line in self._capfd.readouterr().err.splitlines()]


@pytest.fixture
def heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Heard:
    return Heard(tmp_path, capfd)


NOTHING = -1


def test_a_silence_and_its_end(heard: Heard) -> None:
    """Said once each. The times are those of the server, not of the looks."""
    assert heard.look(0, 500, 500 + REPORTED_AFTER_MS - 1) == []
    assert not heard.silence.is_on
    line = "the server has not answered for 25 s: requests that need it wait"
    assert heard.look(0, 500, 500 + REPORTED_AFTER_MS) == [line]
    assert heard.silence.is_on
    assert heard.look(0, 500, 90_000) == []
    assert heard.look(60_900, 60_900, 91_000) == ["the server answers again, after 60 s"]
    assert not heard.silence.is_on


def test_an_idle_server_is_not_silent(heard: Heard) -> None:
    """However long ago it was heard: it owes nothing."""
    assert heard.look(0, NOTHING, 10 * REPORTED_AFTER_MS) == []


def test_requests_that_fail_are_no_answer(heard: Heard) -> None:
    """Of a soft file, or one that is gone too long: nothing is owed any more, and the server is as silent."""
    heard.look(0, 0, REPORTED_AFTER_MS)
    assert heard.look(0, NOTHING, 70_000) == []
    assert heard.silence.is_on
    assert heard.look(80_000, NOTHING, 81_000) == ["the server answers again, after 80 s"]


def test_the_next_silence_is_said(heard: Heard) -> None:
    """It is another one, however soon it comes."""
    assert len(heard.look(0, 0, REPORTED_AFTER_MS)) == 1
    assert len(heard.look(30_000, 30_000, 31_000)) == 1
    assert len(heard.look(30_000, 30_000, 30_000 + REPORTED_AFTER_MS)) == 1
