# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thread that waits for its only request receives the answer itself: no other thread has to wake it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from support.fake_nfs import FakeNfsServer

from nbdnfs.engine import Engine

PAGE = 4096
PAGES = 512


def waits_of_engine_threads() -> int:
    """How often they have waited for something until now. They block all signals, others none. proc_pid_status(5)."""
    texts = [(task / "status").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(
        int(found[1])
        for text in texts
        if re.search(r"^SigBlk:\tf", text, re.MULTILINE)
        and (found := re.search(r"^voluntary_ctxt_switches:\t(\d+)", text, re.MULTILINE))
    )


def test_the_io_thread_sleeps_while_a_reader_receives() -> None:
    """Also after reads that found their page in the region, and so waited for nothing."""
    content = os.urandom(PAGES * PAGE)
    with FakeNfsServer(content) as fake:
        engine = Engine(fake.url(), "127.0.0.1", read_ahead_pages=0)
        try:
            buffer = bytearray(PAGE)
            engine.pwrite(os.urandom(PAGE), 0)
            for _ in range(10):
                engine.pread(buffer, 0)
            before = waits_of_engine_threads()
            assert before > 0
            for page in range(1, PAGES):
                engine.pread(buffer, page * PAGE)
                assert buffer == content[page * PAGE : (page + 1) * PAGE]
            assert waits_of_engine_threads() - before < PAGES // 2
        finally:
            engine.close()
