# SPDX-License-Identifier: LGPL-2.1-or-later
"""Concurrency in tests, with deadlines: a request that never ends fails its own test and no other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import pytest

T = TypeVar("T")

# Nothing is promised to take less than this: it only ends what hangs.
DEADLINE_S = 30.0


def in_background(function: Callable[..., T], *arguments: object) -> Future[T]:
    """Call it in a new daemon thread. Wait with `.result(DEADLINE_S)`."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_until(is_so: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Check every 5 ms. AssertionError with `what` at the end of `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)


class SaidOnStderr:
    """What was written to descriptor 2 since this object was made, by C code or by other processes as well.

    capfd.readouterr() reads a file and empties it then: what is written between the two is lost, so a test that calls
    it again and again may miss what it waits for. This reads the same file and leaves it as it is. A test that calls
    readouterr() beside it begins anew there.
    """

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()  # it shows that descriptor 2 is captured

    @property
    def lines(self) -> list[str]:
        return os.pread(2, os.fstat(2).st_size, 0).decode(errors="replace").splitlines()

    def wait_for(self, words: str) -> None:
        try:
            wait_until(lambda: any(words in line for line in self.lines), f"a line with '{words}'")
        except AssertionError as error:
            error.add_note(f"these lines were logged: {self.lines}")
            raise
