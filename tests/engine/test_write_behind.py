# SPDX-License-Identifier: LGPL-2.1-or-later
"""How large the writes are that reach the server."""

from __future__ import annotations

import os

import pytest
from support.engines import PAGE, opening
from support.fake_nfs import FakeNfsServer

MIB = 1 << 20
SLOTS = 4096
# More than half of the region, so that pages are written back while others still come.
PAGES = 3072


@pytest.mark.parametrize("turn_pages", [1, 32])
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_writers_that_take_turns(writers: int, turn_pages: int) -> None:
    """Processes that are swapped out at the same time, each in sequence: at least 64 KiB for each write."""
    each = PAGES // writers
    with (
        FakeNfsServer(bytes(64 * MIB)) as server,
        opening(region_pages=SLOTS, connections=2) as open_engine,
    ):
        engine = open_engine(server.url())
        content = bytearray(server.content)
        for at in range(0, each, turn_pages):
            for writer in range(writers):
                first = (writer * 4000 + at) * PAGE
                data = os.urandom(PAGE) * turn_pages
                content[first : first + len(data)] = data
                engine.pwrite(data, first)
        engine.flush()
        counted = engine.counters()
        assert server.on_disk == content
    written_bytes, writes = counted["nfs_written_bytes"], counted["nfs_writes"]
    assert isinstance(written_bytes, int)
    assert isinstance(writes, int)
    assert written_bytes == PAGES * PAGE
    assert written_bytes / writes >= 64 * 1024
