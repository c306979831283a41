# SPDX-License-Identifier: LGPL-2.1-or-later
"""Claims a backing file in a thread of its own, so that a signal ends the claim at once, whatever it waits for.

A call of the engine may wait for the server for as long as connecting takes, and Python runs signal handlers only after
it. What the claim has left on the server by then is removed, if the server answers in time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from nbdnfs.errors import EndedBySignal, NbdnfsError, UnavailableError
from nbdnfs.nas import patience
from nbdnfs.nas.patience import Interrupted

# How long an interrupted claim may take to remove what it has left.
_GRACE_S = 1.5
_POLL_S = 0.1

T = TypeVar("T")


def run(work: Callable[[], T], stop: threading.Event, *, grace_s: float = _GRACE_S, limit_s: float | None = None) -> T:
    """What `work` returns or raises. Interrupted: `stop` was set, and the work did not end well in `grace_s`.

    UnavailableError: it has not ended after `limit_s`; then `stop` is set.
    """
    future = patience.in_thread(work)
    until_s = None if limit_s is None else time.monotonic() + limit_s
    while not stop.is_set():
        if until_s is not None and time.monotonic() >= until_s:
            stop.set()
            with contextlib.suppress(concurrent.futures.TimeoutError, Interrupted):
                return future.result(grace_s)
            raise UnavailableError(f"the server has not answered for {limit_s:g} s", "see whether it is up; try again")
        try:
            return future.result(_POLL_S)  # short: signal handlers run in between
        except concurrent.futures.TimeoutError:
            if future.done():  # the work raised it
                raise
    try:
        return future.result(grace_s)
    except concurrent.futures.TimeoutError:
        raise Interrupted from None


def run_until_signal(
    work: Callable[[threading.Event], T], *, grace_s: float = _GRACE_S, limit_s: float | None = None
) -> T:
    """As `run`, for a command: SIGINT and SIGTERM set the event. EndedBySignal once the work has ended, well or not:
    nothing more is begun."""
    stop = threading.Event()
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = run(lambda: work(stop), stop, grace_s=grace_s, limit_s=limit_s)
    except (Interrupted, NbdnfsError):
        if received:
            raise EndedBySignal(received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise EndedBySignal(received[0])
    return result


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """SIGINT and SIGTERM raise EndedBySignal meanwhile, wherever the main thread is: for what must not be left half
    done."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise EndedBySignal(number)

    before = {number: signal.signal(number, unwind) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
