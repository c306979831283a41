# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests that wait are woken as soon as their wait is over, whatever other requests do meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.engines import PAGE, OpenEngine, read_pages, write_pages
from support.fake_nfs import FILE_SYNC, NFS3ERR_JUKEBOX, UNSTABLE, FakeNfsServer
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs.engine import Engine

BLOCK = Path(__file__).resolve().parents[2] / "nbdnfs" / "engine" / "block"
PAGES = 1024
SLOTS = 256
ONE_WORD = b"word" * (PAGE // 4)


@pytest.fixture
def fake() -> Iterator[FakeNfsServer]:
    """A server with 1024 pages."""
    with FakeNfsServer(bytes(PAGES * PAGE)) as server:
        yield server


def start_flush(engine: Engine, data: bytes) -> Callable[[], None]:
    """Writes page 0 and waits for the NAS with FLUSH."""

    def run() -> None:
        write_pages(engine, 0, data)
        engine.flush()

    return run


def start_fua(engine: Engine, data: bytes) -> Callable[[], None]:
    """Writes page 0 and waits for the NAS with FUA."""
    return lambda: engine.pwrite(data, 0, True)


@pytest.mark.parametrize("start", [start_flush, start_fua])
@pytest.mark.parametrize("newer", [ONE_WORD, bytes(PAGE), os.urandom(PAGE)], ids=["one word", "zeros", "random"])
def test_a_page_that_is_written_again_while_a_request_waits_for_it(
    open_engine: OpenEngine, fake: FakeNfsServer, start: Callable[[Engine, bytes], Callable[[], None]], newer: bytes
) -> None:
    """The request ends, and by then the server has the page stably: with its bytes or the newer ones."""
    engine, data = open_engine(fake.url()), os.urandom(PAGE)
    fake.hold("WRITE")
    waiting = in_background(start(engine, data))
    fake.wait_for(1, DEADLINE_S)
    write_pages(engine, 0, newer)
    fake.release()
    waiting.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] in (data, newer)
    assert read_pages(engine, 0) == newer
    engine.flush()
    assert fake.on_disk[:PAGE] == newer


@pytest.mark.parametrize("start", [start_flush, start_fua])
def test_a_page_that_is_trimmed_while_a_request_waits_for_it(
    open_engine: OpenEngine, fake: FakeNfsServer, start: Callable[[Engine, bytes], Callable[[], None]]
) -> None:
    """The request need not wait any more: the page has no bytes that could be lost."""
    engine = open_engine(fake.url())
    fake.hold("WRITE")
    waiting = in_background(start(engine, os.urandom(PAGE)))
    fake.wait_for(1, DEADLINE_S)
    engine.trim(PAGE, 0)
    waiting.result(DEADLINE_S)
    fake.release()


def test_a_page_that_is_written_again_all_the_time(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """Each WRITE of it is overtaken: the second is FILE_SYNC, so that a FLUSH ends, and loses nothing."""
    engine, versions = open_engine(fake.url()), [os.urandom(PAGE)]
    fake.hold("WRITE", after=True)
    write_pages(engine, 0, versions[0])
    flushed = in_background(engine.flush)
    for _ in range(2):
        fake.wait_for(1, DEADLINE_S)
        versions.append(os.urandom(PAGE))
        write_pages(engine, 0, versions[-1])
        fake.answer_held()
    flushed.result(DEADLINE_S)
    assert [call.stable for call in fake.calls("WRITE")][:2] == [UNSTABLE, FILE_SYNC]
    assert fake.on_disk[:PAGE] in versions
    fake.release()
    engine.flush()


def test_a_server_that_cannot_write_it_stably(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """It answers FILE_SYNC with UNSTABLE, which RFC 1813 forbids: COMMITs do as well."""
    engine, newest = open_engine(fake.url()), os.urandom(PAGE)
    fake.claim_stable(UNSTABLE)
    fake.hold("WRITE")
    write_pages(engine, 0, os.urandom(PAGE))
    flushed = in_background(engine.flush)
    fake.wait_for(1, DEADLINE_S)
    write_pages(engine, 0, newest)
    fake.release()
    flushed.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == newest


@pytest.mark.parametrize("free", ["one word", "trim"])
def test_a_writer_without_a_slot(open_engine: OpenEngine, fake: FakeNfsServer, free: str) -> None:
    """It takes the slot of a page that another request makes free, although no WRITE is answered."""
    engine, data = open_engine(fake.url(), region_pages=SLOTS), os.urandom(PAGE)
    fake.hold("WRITE")
    for page in range(SLOTS):  # every second page: no run has neighbours
        write_pages(engine, 2 * page, os.urandom(PAGE))
    waiting = in_background(write_pages, engine, 1, data)
    wait_until(lambda: engine.counters()["stalls"] > 0, "the writer finds no slot")
    for page in range(SLOTS):  # those that are under way keep theirs
        if free == "trim":
            engine.trim(PAGE, 2 * page * PAGE)
        else:
            write_pages(engine, 2 * page, ONE_WORD)
    waiting.result(DEADLINE_S)
    assert read_pages(engine, 1) == data
    fake.release()


def test_a_reader_of_a_page_that_is_being_fetched(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """A write to that page answers it, although the READ is not answered."""
    engine = open_engine(fake.url(), read_ahead_pages=64)
    fake.content = content = os.urandom(PAGES * PAGE)
    for page in range(5):
        assert read_pages(engine, page) == content[page * PAGE : (page + 1) * PAGE]
    wait_until(lambda: engine.counters()["nfs_in_flight"] == 0, "the first read-ahead is done")
    fake.hold("READ")
    fetched = int(engine.counters()["read_ahead_pages"])  # type: ignore[arg-type]
    page = 5
    while engine.counters()["nfs_in_flight"] == 0:
        assert read_pages(engine, page) == content[page * PAGE : (page + 1) * PAGE]
        page += 1
    fake.wait_for(1, DEADLINE_S)
    first = next(call.offset for call in reversed(fake.calls("READ"))) // PAGE
    assert first >= fetched
    waiting, data = in_background(read_pages, engine, first), os.urandom(PAGE)
    write_pages(engine, first, data)
    assert waiting.result(DEADLINE_S) in (data, content[first * PAGE : (first + 1) * PAGE])
    fake.release()


def test_many_filled_pages_and_other_requests(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """A FLUSH gives them slots a few at a time, and waits for slots as often as it takes."""
    engine = open_engine(fake.url(), region_pages=SLOTS)
    fake.fail("WRITE", NFS3ERR_JUKEBOX, times=1)
    for page in range(PAGES):
        write_pages(engine, page, ONE_WORD)
    flushed = in_background(engine.flush)
    for page in range(0, PAGES, 7):
        assert read_pages(engine, page) == ONE_WORD
    flushed.result(DEADLINE_S)
    assert fake.on_disk == ONE_WORD * PAGES


def test_one_file_knows_how_to_wait() -> None:
    """No other part of the engine drops its lock, waits under it or wakes requests: a wake-up cannot be forgotten."""
    uses = re.compile(r"pthread_(mutex|cond)_(un|time|timed)?(lock|wait|broadcast)|cond_signal\(&engine->progress")
    found = {path.name for path in BLOCK.glob("*.c") if uses.search(path.read_text())}
    assert found == {"progress.c"}
