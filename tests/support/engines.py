# SPDX-License-Identifier: LGPL-2.1-or-later
"""Engines for tests: opened with one set of defaults, closed before their servers end; whole pages in and out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from nbdnfs.engine import Engine
from support.nfs_server import LOOPBACK
from support.waiting import DEADLINE_S, in_background

PAGE = 4096

T = TypeVar("T")


class OpenEngine(Protocol):
    """`open_engine(url, **options)`: an engine that is closed when the test ends; options as `Engine`."""

    def __call__(self, url: str, **options: Any) -> Engine: ...


@contextlib.contextmanager
def opening(**defaults: Any) -> Iterator[OpenEngine]:
    """Yields an `open_engine` with these options for each engine, and no read-ahead unless they say so.

    At the end the engines are closed, the last one first. The test fails when that takes longer than DEADLINE_S.
    """
    with contextlib.ExitStack() as engines:

        def open_engine(url: str, **options: Any) -> Engine:
            engine = Engine(url, LOOPBACK, **{"read_ahead_pages": 0, **defaults, **options})
            engines.callback(lambda: in_background(engine.close).result(DEADLINE_S))
            return engine

        yield open_engine


def read_pages(engine: Engine, first_page: int, count: int = 1) -> bytes:
    """AssertionError when the engine writes beside the buffer."""
    length = count * PAGE
    guard = os.urandom(PAGE)
    memory = bytearray(guard + bytes(length) + guard)
    try:
        engine.pread(memoryview(memory)[PAGE : PAGE + length], first_page * PAGE)
    finally:
        assert memory[:PAGE] == memory[PAGE + length :] == guard, "bytes beside the buffer have changed"
    return bytes(memory[PAGE : PAGE + length])


def write_pages(engine: Engine, first_page: int, data: bytes) -> None:
    """Acknowledged when it returns: in the region, and perhaps not on the server yet."""
    engine.pwrite(data, first_page * PAGE)


def write_pages_and_flush(engine: Engine, first_page: int, data: bytes) -> None:
    """Stable on the server when it returns, as is all that was written before."""
    write_pages(engine, first_page, data)
    engine.flush()


def results(futures: Sequence[Future[T]]) -> list[T]:
    """What each returned, in their order. TimeoutError when they are not all done within DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
