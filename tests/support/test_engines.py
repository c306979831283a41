# SPDX-License-Identifier: LGPL-2.1-or-later
"""Engines for tests: their defaults, their end, and which of the writes flushes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import cast

import pytest

from nbdnfs.engine import Engine
from support.engines import PAGE, OpenEngine, opening, read_pages, results, write_pages, write_pages_and_flush
from support.fake_nfs import FakeNfsServer
from support.waiting import in_background

MIB = 1 << 20


@pytest.fixture
def fake() -> Iterator[FakeNfsServer]:
    with FakeNfsServer(os.urandom(MIB)) as server:
        yield server


def test_pages_in_and_out(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """By page number and count. `open_engine` stands before the server here, and still closes before it."""
    engine = open_engine(fake.url())
    data = os.urandom(2 * PAGE)
    write_pages(engine, 3, data)
    assert read_pages(engine, 3, 2) == data
    assert read_pages(engine, 0) == fake.content[:PAGE]


def test_only_one_of_them_flushes(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """A write returns while the server has not answered; the one that flushes waits for it."""
    engine = open_engine(fake.url())
    fake.hold("WRITE")
    write_pages(engine, 0, data := os.urandom(PAGE))
    flushing = in_background(write_pages_and_flush, engine, 7, data)
    fake.wait_for(1, timeout_s=10)
    assert not flushing.done()
    fake.release()
    results([flushing])
    assert fake.on_disk[:PAGE] == fake.on_disk[7 * PAGE : 8 * PAGE] == data


def test_defaults_and_the_end(fake: FakeNfsServer) -> None:
    """Options of the call go before those of all; no read-ahead by default; at the end they are closed."""
    with opening(region_pages=256) as open_engine:
        engines = [open_engine(fake.url()), open_engine(fake.url(), region_pages=512, read_ahead_pages=8)]
        for engine in engines:
            for page in range(8):
                read_pages(engine, page)
        assert [engine.counters()["read_ahead_pages"] != 0 for engine in engines] == [False, True]
    for engine in engines:
        with pytest.raises(ValueError, match="closed"):
            read_pages(engine, 0)


class Overwriting:
    """An engine that writes behind the buffer."""

    def pread(self, buffer: memoryview, offset: int) -> None:
        whole = cast(bytearray, buffer.obj)
        whole[-1] ^= 1


def test_bytes_beside_the_buffer_are_watched() -> None:
    """One bit behind the last page is seen."""
    with pytest.raises(AssertionError, match="beside the buffer"):
        read_pages(cast(Engine, Overwriting()), 0)


def test_results_raise_what_was_raised() -> None:
    """In the order of the futures."""
    futures: list[Future[int]] = [in_background(lambda: 1), in_background(lambda: 1 // 0)]
    with pytest.raises(ZeroDivisionError):
        results(futures)
    assert results(futures[:1]) == [1]
