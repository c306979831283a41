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
# Of a look at which the server owes nothing.
NOTHING = -1


class Looks:
    """At a server, by one Silence. Times are in ms since START_MS."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.silence = Silence(Reporter(Records("swap0", run=folder), Notifier({})))
        self._capfd = capfd

    def look(self, heard_ms: int, owed_since_ms: int, now_ms: int) -> list[str]:
        """What it says, without the name."""
        owed = START_MS + owed_since_ms if owed_since_ms != NOTHING else 0
        self.silence.look(START_MS + heard_ms, owed, START_MS + now_ms)
        return [line.removeprefix("nbdnfs: swap0: ") for line in self._capfd.readouterr().err.splitlines()]


@pytest.fixture
def looks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Looks:
    return Looks(tmp_path, capfd)


def test_a_silence_and_its_end(looks: Looks) -> None:
    """Said once each."""
    assert looks.look(0, 500, 1_000) == []
    assert looks.look(0, 500, 500 + REPORTED_AFTER_MS - 1) == []
    assert not looks.silence.is_on
    line = "the server has not answered for 25 s: look at it, and at the network to it"
    assert looks.look(0, 500, 500 + REPORTED_AFTER_MS) == [line]
    assert looks.silence.is_on
    assert looks.look(0, 500, 90_000) == []
    assert looks.look(61_900, 61_900, 91_000) == ["the server answers again, after 61 s"]
    assert not looks.silence.is_on


def test_a_server_that_is_busy(looks: Looks) -> None:
    """It always owes something, and is heard."""
    for second in range(100):
        assert looks.look(1000 * second, 1000 * second, 1000 * second + 900) == []
    assert looks.look(99_000, 99_000, 99_000 + REPORTED_AFTER_MS) != []


def test_an_idle_server_is_not_silent(looks: Looks) -> None:
    """However long ago it was heard: it owes nothing."""
    assert looks.look(0, NOTHING, 10 * REPORTED_AFTER_MS) == []


def test_the_time_without_a_connection_does_not_count(looks: Looks) -> None:
    """What waits may have waited long when there is one again. That counts as heard: region_waits."""
    looks.look(0, 0, 1_000)
    assert looks.look(0, NOTHING, 50_000) == []
    assert looks.look(50_000, 50_000, 51_000) == []
    assert looks.look(50_000, 50_000, 50_000 + REPORTED_AFTER_MS) != []


def test_a_keeper_that_comes_late(looks: Looks) -> None:
    """The last one was killed meanwhile: the silence began before the first look."""
    assert looks.look(0, 0, 60_000) == ["the server has not answered for 60 s: look at it, and at the network to it"]


def test_requests_that_fail_are_no_answer(looks: Looks) -> None:
    """Of a soft file, or one that is gone too long: nothing is owed any more, and the server is as silent."""
    looks.look(0, 0, 1)
    looks.look(0, 0, 1 + REPORTED_AFTER_MS)
    assert looks.look(0, NOTHING, 70_000) == []
    assert looks.silence.is_on
    assert looks.look(80_001, NOTHING, 81_000) == ["the server answers again, after 80 s"]


def test_the_next_silence_is_said(looks: Looks) -> None:
    """It is another one, however soon it comes."""
    looks.look(0, 0, 1)
    assert len(looks.look(0, 0, 1 + REPORTED_AFTER_MS)) == 1
    assert len(looks.look(30_000, 30_000, 31_000)) == 1
    assert len(looks.look(30_000, 30_000, 31_000 + REPORTED_AFTER_MS)) == 1
