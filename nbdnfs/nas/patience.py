# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting that a signal can end, and trying again what the server asks to do later."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

# How long to go on with a call that the server puts off (NFS3ERR_JUKEBOX, NFS4ERR_DELAY): long enough to bring a file
# back from tape or to end a grace period, which lasts 90 s by default on Linux.
PUT_OFF_LIMIT_S = 120.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_POLL_S = 0.1

T = TypeVar("T")

_stop: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("stop", default=None)
_limit_s: contextvars.ContextVar[float | None] = contextvars.ContextVar("limit_s", default=None)


class Interrupted(Exception):
    """The wait ended early, because the event of `interruptible` was set."""


class TimeLimitError(Exception):
    """The work of `within` has not ended in time."""


@contextlib.contextmanager
def interruptible(stop: threading.Event | None) -> Iterator[None]:
    """Pauses of this thread raise Interrupted meanwhile, as soon as `stop` is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


@contextlib.contextmanager
def limited(limit_s: float) -> Iterator[None]:
    """`until_done` of this thread goes on for so long at most meanwhile, for each call."""
    token = _limit_s.set(limit_s)
    try:
        yield
    finally:
        _limit_s.reset(token)


def check() -> None:
    """Interrupted: see `interruptible`."""
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise Interrupted


def pause(seconds: float) -> None:
    """Sleep. Interrupted: see `interruptible`."""
    stop = _stop.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Interrupted


def in_thread(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """What `work` returns or raises, in a thread of its own: a transfer waits for its server for as long as it takes,
    and Python runs signal handlers only after it. Wait for the result in short steps, and handlers run in between."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # a daemon: it may wait in the engine when this process ends
    threading.Thread(target=call, name="transfer", daemon=True).start()
    return future


def within(limit_s: float, work: Callable[[], T], stop: threading.Event | None = None) -> T:
    """What `work` returns or raises, `in_thread`.

    TimeLimitError: it has not ended after `limit_s`. Interrupted: `stop` was set. It is left alone then.
    """
    future = in_thread(work)
    until_s = time.monotonic() + limit_s
    while not future.done():
        if stop is not None and stop.is_set():
            raise Interrupted
        if time.monotonic() >= until_s:
            raise TimeLimitError
        concurrent.futures.wait([future], _POLL_S)  # short: signal handlers run in between
    return future.result()


def until_done(operation: Callable[[], T], what: str) -> T:
    """The result of `operation`, which is repeated with growing pauses while the server puts it off (EAGAIN).

    `what` is named in the one line that is logged. OSError: anything else, or EAGAIN after PUT_OFF_LIMIT_S, or
    what `limited` says.
    """
    began_s, pause_s, limit_s = time.monotonic(), _FIRST_PAUSE_S, _limit_s.get() or PUT_OFF_LIMIT_S
    while True:
        try:
            return operation()
        except OSError as error:
            left_s = began_s + limit_s - time.monotonic()
            if error.errno != errno.EAGAIN or left_s <= 0:
                raise
        if pause_s == _FIRST_PAUSE_S:
            log.warning("the server asks to try again later (%s); trying for %.0f s", what, limit_s)
        pause(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
