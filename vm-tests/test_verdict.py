# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness on verdicts: what passes, what fails, and what is not one yet."""

from __future__ import annotations

import json

import pytest
from vmtest import verdict
from vmtest.outcome import GuestFailedError

pytestmark = pytest.mark.meta

_PROGRESS = '{"event": "progress", "pass": "fill", "done": 7, "pages": 10, "wrong": 0, "seconds": 1.5}\n'


def _line(**changes: object) -> str:
    passes = [{"order": "fill", "seconds": 1}, {"order": "random", "seconds": 2.5}]
    counts = {"pages": 10, "checked": 10, "wrong": 0, "seconds": 4}
    return json.dumps({"event": "verdict", "complete": True, **counts, "passes": passes, **changes}) + "\n"


def test_a_good_verdict() -> None:
    """It holds what the hog counted, and `check` hands it on."""
    progress, found = verdict.parse(_PROGRESS + _line())
    assert progress == verdict.Progress("fill", 7, 10, 0, 1.5)
    assert found is not None
    assert found.check() is found
    assert found.passes[1] == verdict.Pass("random", 2.5)


def test_half_a_line_is_no_verdict() -> None:
    """The port is read while the guest writes."""
    assert verdict.parse(_PROGRESS + _line().rstrip("\n")) == (verdict.Progress("fill", 7, 10, 0, 1.5), None)
    assert verdict.parse("") == (None, None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"wrong": 1}, "1 wrong pages"),
        ({"checked": 9}, "only 9 of 10 checks"),
        ({"checked": 0, "passes": []}, "only 0 of 0 checks"),
    ],
)
def test_a_bad_verdict(changes: dict[str, object], complaint: str) -> None:
    """A wrong page fails, and so does a hog that looked at fewer pages than it had, or at none."""
    _, found = verdict.parse(_line(**changes))
    assert found is not None
    with pytest.raises(GuestFailedError, match=complaint):
        found.check()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"event": "verdict", "complete": false, "reason": "process 7 ended with signal 9"}\n', "signal 9"),
        ("Killed\n", "not a line of the stress program"),
        ('{"event": "verdict"}\n', "not a line of the stress program"),
    ],
)
def test_no_verdict(text: str, complaint: str) -> None:
    """A hog that could not finish, and noise on the port, are failures."""
    with pytest.raises(GuestFailedError, match=complaint):
        verdict.parse(text)
