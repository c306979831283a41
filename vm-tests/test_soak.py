# SPDX-License-Identifier: LGPL-2.1-or-later
"""The soak without a guest: faults end, rounds alternate, and the report hides nothing."""

from __future__ import annotations

import argparse
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import soak
from support.nfs_server import ServerError
from vmtest.outcome import GuestFailedError

pytestmark = pytest.mark.meta


class FakeStrikes:
    """Counts its strikes and mends; `enough` is set at the third mend."""

    def __init__(self, error: Exception | None = None) -> None:
        self.struck = self.mended = 0
        self.enough = threading.Event()
        self._error = error

    def strike(self) -> tuple[str, Callable[[], None]]:
        self.struck += 1
        return "cut", self._mend

    def _mend(self) -> None:
        self.mended += 1
        if self.mended >= 3 or self._error:
            self.enough.set()
        if self._error:
            raise self._error


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pauses."""
    monkeypatch.setattr(soak, "_QUIET_S", (0.0, 0.0))
    monkeypatch.setattr(soak, "_FAULT_S", (0.0, 0.0))


def test_each_fault_is_mended() -> None:
    """The one in force at the end, too."""
    strikes, counted = FakeStrikes(), Counter[str]()
    with soak.striking(strikes, random.Random(1), counted):  # type: ignore[arg-type]
        assert strikes.enough.wait(30)
    assert strikes.mended == strikes.struck == counted["cut"]


def test_a_server_that_is_not_back_ends_the_round() -> None:
    """It is not taken for a guest that hangs."""
    strikes = FakeStrikes(ServerError("it does not start"))
    draw = random.Random(1)
    with (
        pytest.raises(ServerError, match="does not start"),
        soak.striking(strikes, draw, Counter()),  # type: ignore[arg-type]
    ):
        assert strikes.enough.wait(30)


def test_what_cannot_be_struck_is_not_the_guests_failure() -> None:
    """Whatever it is, and although the guest fails because of it."""
    strikes = FakeStrikes(OSError("no descriptors"))

    def fail() -> None:
        with soak.striking(strikes, random.Random(1), Counter()):  # type: ignore[arg-type]
            assert strikes.enough.wait(30)
            raise GuestFailedError("it hangs")

    with pytest.raises(OSError, match="no descriptors"):
        fail()


def test_a_round_that_checked_nothing_is_not_good() -> None:
    assert not soak.Round(1, "trixie", 3).is_good
    assert soak.Round(1, "trixie", 3, checked=1).is_good


def test_rounds_alternate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each has another Debian and the next seed, and the last one ends with the time. What is good leaves no logs."""
    monkeypatch.setattr(soak, "REPORT", tmp_path / "build/soak.md")
    clock = [0.0]
    monkeypatch.setattr(soak, "monotonic", lambda: clock[0])
    lengths = []

    def run_round(one: soak.Round, folder: Path, minutes: float) -> soak.Round:
        folder.mkdir()
        lengths.append(minutes)
        clock[0] += 60 * minutes
        one.minutes, one.checked = minutes, 7
        if one.number == 2:
            one.failures.append("3 kill: no keeper")
        return one

    monkeypatch.setattr(soak, "run_round", run_round)
    options = argparse.Namespace(hours=2.0, minutes=45.0, guests=1, seed=7)
    rounds = soak.soak(tmp_path, ["bookworm", "trixie"], options)
    assert [(one.suite, one.seed) for one in rounds] == [("bookworm", 7), ("trixie", 8), ("bookworm", 9)]
    assert lengths == [45.0, 45.0, 30.0]
    assert not (tmp_path / "1").exists()
    assert (tmp_path / "2").exists()
    text = (tmp_path / "build/soak.md").read_text()
    assert "3 rounds, 1 of them not as they must be" in text
    assert "| 2 | trixie | 8 | 45 | 0 | 0 | 7 | 1 failures |" in text
    assert "--seed 8 --suites trixie" in text
    assert "3 kill: no keeper" in text


def test_a_round_that_broke_off_is_not_good() -> None:
    """The report says why, in one row."""
    one = soak.Round(1, "trixie", 3, broke_off="guest died:\n[panic]", faults=Counter({"cut": 2}))
    text = soak.report([one], 1.0)
    assert not one.is_good
    assert "| 1 | trixie | 3 | 0 | 0 | 2 | 0 | guest died: [panic] |" in text
    assert "| cut | 2 |" in text
