# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verifiers that change between a write's pieces, or before its COMMIT: after a FLUSH all of it is on the disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
from support.engines import PAGE, OpenEngine, read_pages, write_pages, write_pages_and_flush
from support.fake_nfs import DATA_SYNC, FILE_SYNC, UNSTABLE, FakeNfsServer, WriteStep
from support.sunrpc import record
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

PAGES = 3


@pytest.fixture
def fake() -> Iterator[FakeNfsServer]:
    """A server with 64 pages."""
    with FakeNfsServer(bytes(64 * PAGE)) as server:
        yield server


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_every_mix_of_pieces(open_engine: OpenEngine, fake: FakeNfsServer, transport: str) -> None:
    """Three pieces, each of one page or the rest, each UNSTABLE, DATA_SYNC or FILE_SYNC, each before or after a
    restart that forgets what was not FILE_SYNC: what a FLUSH covers is on the disk."""
    engine = open_engine(fake.url(), transport=transport)
    steps = [
        WriteStep(count_bytes, stable, restarts)
        for count_bytes in (PAGE, None)
        for stable in (UNSTABLE, DATA_SYNC, FILE_SYNC)
        for restarts in (False, True)
    ]
    mixes = list(itertools.product(steps, repeat=3))
    for mix in mixes if transport == "wire" else mixes[::7]:
        data = os.urandom(PAGES * PAGE)
        fake.script_writes(mix)
        write_pages_and_flush(engine, 0, data)
        assert fake.on_disk[: len(data)] == data, mix


def test_a_first_piece_that_a_restart_has_lost(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """UNSTABLE under one verifier, then FILE_SYNC under the next: all of it is sent again."""
    engine, data = open_engine(fake.url()), os.urandom(2 * PAGE)
    fake.script_writes([WriteStep(PAGE), WriteStep(stable=FILE_SYNC, restarts=True)])
    write_pages_and_flush(engine, 0, data)
    assert [(call.offset, call.count) for call in fake.calls("WRITE")] == [(0, 2 * PAGE), (PAGE, PAGE), (0, 2 * PAGE)]
    assert fake.on_disk[: len(data)] == data


def test_a_first_piece_that_is_stable(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """No restart can lose it: the rest is not sent twice, and the COMMIT is about the rest."""
    engine, data = open_engine(fake.url()), os.urandom(2 * PAGE)
    fake.script_writes([WriteStep(PAGE, FILE_SYNC), WriteStep(restarts=True)])
    write_pages_and_flush(engine, 0, data)
    assert [(call.offset, call.count) for call in fake.calls("WRITE")] == [(0, 2 * PAGE), (PAGE, PAGE)]
    assert len(fake.calls("COMMIT")) == 1
    assert fake.on_disk[: len(data)] == data


def test_a_connection_that_breaks_between_the_pieces(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """With the power: the first piece, UNSTABLE, went with it, and the second is sent over the new connection."""
    engine, data = open_engine(fake.url()), os.urandom(2 * PAGE)
    fake.script_writes([WriteStep(PAGE)])
    fake.hold("WRITE", after=True)
    write_pages(engine, 0, data)
    flushed = in_background(engine.flush)
    fake.wait_for(1, DEADLINE_S)
    fake.delay("WRITE", 3600)
    fake.release()
    wait_until(lambda: len(fake.calls("WRITE")) == 2, "the second piece arrives")
    fake.delay("WRITE", 0)
    fake.script_writes([WriteStep(stable=FILE_SYNC)])
    fake.crash()
    flushed.result(DEADLINE_S)
    assert fake.on_disk[: len(data)] == data
    assert read_pages(engine, 0, 2) == data


def _another_verifier(message: bytes) -> bytes:
    """It is the last thing in the answer to a WRITE or a COMMIT."""
    return record(message[:-8] + os.urandom(8))


@pytest.mark.parametrize("ops", [("WRITE",), ("COMMIT",), ("WRITE", "COMMIT")])
@pytest.mark.parametrize("limit_bytes", [None, PAGE])
@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_verifier_that_changes_with_each_answer(
    open_engine: OpenEngine,
    fake: FakeNfsServer,
    capfd: pytest.CaptureFixture[str],
    ops: tuple[str, ...],
    limit_bytes: int | None,
    transport: str,
) -> None:
    """Two servers behind one address: what no COMMIT confirms is written with FILE_SYNC in the end, which needs none.

    With and without writes that are carried out in pieces. The number of calls is bounded.
    """
    engine, said = open_engine(fake.url(), transport=transport), SaidOnStderr(capfd)
    for op in ops:
        fake.rewrite(op, _another_verifier)
    fake.limit("WRITE", limit_bytes)
    for _ in range(2):
        data = os.urandom(4 * PAGE)
        in_background(write_pages_and_flush, engine, 0, data).result(DEADLINE_S)
        assert fake.on_disk[: len(data)] == data
    assert len(fake.calls("COMMIT")) <= 5
    assert len(fake.calls("WRITE")) <= 40
    assert fake.calls("WRITE")[-1].stable == FILE_SYNC
    # a write in pieces asks for FILE_SYNC by itself, before there is a COMMIT
    assert len([line for line in said.lines if "FILE_SYNC" in line]) == (0 if limit_bytes and "WRITE" in ops else 1)


def test_no_file_sync_and_a_verifier_that_changes(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """Nothing makes a write stable then: it is refused, with pauses, until the server mends its ways."""
    engine, data = open_engine(fake.url()), os.urandom(PAGE)
    fake.rewrite("COMMIT", _another_verifier)
    fake.claim_stable(UNSTABLE)
    write_pages(engine, 0, data)
    flushed = in_background(engine.flush)
    wait_until(lambda: engine.counters()["write_errors"] >= 2, "it is refused")
    assert not flushed.done()
    assert len(fake.calls("WRITE")) < 20
    fake.rewrite("COMMIT", None)
    fake.claim_stable(None)
    flushed.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == data
