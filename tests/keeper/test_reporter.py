# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said once, also by the keepers that follow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nbdnfs.keeper import reporter as reporter_module
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier


@pytest.fixture
def records(tmp_path: Path) -> Records:
    made = Records("swap0", run=tmp_path)
    made.reserve()
    return made


def reporter(records: Records) -> Reporter:
    return Reporter(records, Notifier({}))


def test_once_across_keepers(records: Records, capfd: pytest.CaptureFixture[str]) -> None:
    """The same complaint of the next keeper is not said; another one is; after `all_is_well` it is said again. That
    a failed keeper has removed its records does not matter."""
    for _ in range(3):
        reporter(records).complain("away", "the server is away")
        reporter(records).pass_on(["nbdnfs: there is no file", "nbdnfs: create it"])
        records.remove(keep_said=True)
    assert capfd.readouterr().err.splitlines() == [
        "nbdnfs: swap0: the server is away",
        "nbdnfs: there is no file",
        "nbdnfs: create it",
    ]
    reporter(records).all_is_well()
    assert reporter(records).complain("away", "the server is away")
    records.remove()
    assert reporter(records).complain("away", "the server is away")


def test_it_is_said_again_after_a_while(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """What still holds after ten minutes is repeated."""
    first = reporter(records)
    assert first.complain("away", "away")
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: now_s + reporter_module.REPEAT_AFTER_S - 2)
    assert not reporter(records).complain("away", "away")
    monkeypatch.setattr(time, "clock_gettime", lambda clock: now_s + reporter_module.REPEAT_AFTER_S + 1)
    assert first.complain("away", "away")


def test_two_reasons_in_turns(records: Records) -> None:
    """Each is said once."""
    one = reporter(records)
    assert [one.complain(kind, kind) for kind in ("a", "b", "a", "b")] == [True, True, False, False]


@pytest.mark.parametrize("data", [b"\xff\xff", b"x", b"1e9 away", b"9" * 5000 + b" away", b"-5 away", b"99999999 away"])
def test_a_damaged_record(records: Records, data: bytes) -> None:
    """It holds nothing back, also where it says that something was said in the future."""
    (records.path.parent / ".swap0.said").write_bytes(data)
    assert reporter(records).complain("away", "away")


def test_a_complaint_that_changes_all_the_time(records: Records, capfd: pytest.CaptureFixture[str]) -> None:
    """What is remembered has a bound: the oldest is forgotten first, and said again."""
    one = reporter(records)
    kinds = [f"kind {number}" for number in range(reporter_module._REMEMBERED + 1)]
    assert all(one.complain(kind, kind) for kind in kinds)
    assert not one.complain(kinds[-1], "said")
    assert not one.complain(kinds[1], "said")
    assert one.complain(kinds[0], "forgotten")
    assert "said" not in capfd.readouterr().err.splitlines()
