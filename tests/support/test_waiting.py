# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits end with a result, with the exception, or with a text that names what did not happen."""

from __future__ import annotations

import os
import threading
import time

import pytest

from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until


def test_in_background_returns_and_raises() -> None:
    """The result and the exception are the function's; its thread is another one."""
    assert in_background(lambda one, two: (one, two), 1, 2).result(DEADLINE_S) == (1, 2)
    assert in_background(threading.get_ident).result(DEADLINE_S) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0).result(DEADLINE_S)


def test_in_background_can_be_left() -> None:
    """A wait that takes too long is a TimeoutError; the thread does not keep the process."""
    ended = threading.Event()
    future = in_background(ended.wait, DEADLINE_S)
    with pytest.raises(TimeoutError):
        future.result(0.05)
    ended.set()
    assert future.result(DEADLINE_S)


def test_wait_until() -> None:
    """It checks until the condition holds; at the end of its time it names the condition."""
    looks = iter([False, False, True])
    wait_until(lambda: next(looks), "the third look")
    started_s = time.monotonic()
    with pytest.raises(AssertionError, match=r"not within 0.1 s: pigs fly"):
        wait_until(lambda: False, "pigs fly", timeout_s=0.1)
    assert 0.1 <= time.monotonic() - started_s < 5


def test_said_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """Lines that were written to the descriptor after it was made, those of the past not."""
    os.write(2, b"before\n")
    said = SaidOnStderr(capfd)
    os.write(2, b"one line\n")
    said.wait_for("one")
    os.write(2, b"another\n")
    assert said.lines == ["one line", "another"]


def test_no_line_on_stderr_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """However often it looks while another thread writes, all lines are there, and in their order."""
    said = SaidOnStderr(capfd)
    lines = [f"line {number}" for number in range(20_000)]
    # twenty at a time: after each call the writer may wait 5 ms for the interpreter, which the other thread has
    texts = ["".join(f"{line}\n" for line in lines[at : at + 20]).encode() for at in range(0, len(lines), 20)]
    writing = in_background(lambda: [os.write(2, text) for text in texts])
    while not writing.done():
        seen = said.lines
        assert seen == lines[: len(seen)]
    writing.result(DEADLINE_S)
    assert said.lines == lines


def test_said_on_stderr_shows_what_was_said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the words do not come, the failure has the lines that did."""
    monkeypatch.setattr("support.waiting.wait_until", lambda is_so, what: wait_until(is_so, what, timeout_s=0.05))
    said = SaidOnStderr(capfd)
    os.write(2, b"something else\n")
    with pytest.raises(AssertionError) as caught:
        said.wait_for("the words")
    assert any("something else" in note for note in caught.value.__notes__)
