# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thread that waits for its only request receives the answer itself: no other thread has to wake it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import PAGE, OpenEngine, read_pages, write_pages
from support.fake_nfs import FakeNfsServer

PAGES = 512


@pytest.fixture
def fake() -> Iterator[FakeNfsServer]:
    """A server with 512 random pages."""
    with FakeNfsServer(os.urandom(PAGES * PAGE)) as server:
        yield server


def waits_of_engine_threads() -> int:
    """How often they have waited for something until now. They block all signals, others none. proc_pid_status(5)."""
    texts = [(task / "status").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(
        int(found[1])
        for text in texts
        if re.search(r"^SigBlk:\tf", text, re.MULTILINE)
        and (found := re.search(r"^voluntary_ctxt_switches:\t(\d+)", text, re.MULTILINE))
    )


def test_the_io_thread_sleeps_while_a_reader_receives(open_engine: OpenEngine, fake: FakeNfsServer) -> None:
    """Also after reads that found their page in the region, and so waited for nothing."""
    engine, content = open_engine(fake.url()), fake.content
    write_pages(engine, 0, os.urandom(PAGE))
    for _ in range(10):
        read_pages(engine, 0)
    before = waits_of_engine_threads()
    assert before > 0
    for page in range(1, PAGES):
        assert read_pages(engine, page) == content[page * PAGE : (page + 1) * PAGE]
    assert waits_of_engine_threads() - before < PAGES // 2
