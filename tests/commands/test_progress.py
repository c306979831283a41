# SPDX-License-Identifier: LGPL-2.1-or-later
"""Progress on stderr: a bar on a terminal, a line for every tenth part in a log."""

from __future__ import annotations

import sys

import pytest

from nbdnfs import programs
from nbdnfs.commands import progress

MIB = 1 << 20


def test_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for every tenth part, however often it is called; nothing on stdout."""
    report = progress.reporter()
    for done in range(101):
        report(done * MIB, 100 * MIB)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.partition("%")[0] for line in lines] == [f"nbdnfs: {percent}" for percent in range(0, 101, 10)]
    assert "50 MiB of 100 MiB, " in lines[5]


def test_for_a_keeper(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper's lines for each percent, on stdout."""
    monkeypatch.setenv(programs.STATUS_VARIABLE, "creating the backing file")
    report = progress.reporter()
    for done in (0, 1, 40, 40, 100):
        report(done, 100)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"creating the backing file: {percent}%" for percent in (0, 1, 40, 100)]


def test_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that is drawn again in the same line, which ends at 100 percent."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = progress.reporter()
    report(50, 100)
    report(100, 100)
    first, second = capsys.readouterr().err.removeprefix("\r").split("\r")
    assert first.startswith(f"[{'#' * 20}{' ' * 20}] 50 B of 100 B")
    assert "\n" not in first
    assert second.startswith(f"[{'#' * 40}]")
    assert second.endswith("\n")


def test_nothing_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A total of 0 bytes prints nothing: "0 B of 0 B" is no information. A keeper's status is 100 percent."""
    progress.reporter()(0, 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress.reporter()(0, 0)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv(programs.STATUS_VARIABLE, "x")
    progress.reporter()(0, 0)
    assert capsys.readouterr() == ("x: 100%\n", "")
