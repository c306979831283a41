# SPDX-License-Identifier: LGPL-2.1-or-later
"""How large the writes are that reach the server, and what is there when a FUA write returns."""

from __future__ import annotations

import os

import pytest
from support.engines import PAGE, opening
from support.fake_nfs import FakeNfsServer
from support.waiting import DEADLINE_S, in_background, wait_until

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


def test_fua_of_a_page_that_is_filled_meanwhile() -> None:
    """It waits for a slot for its second page, and another client fills the first with zeros, which are kept without a
    slot. When it returns, the server has these bytes or newer ones."""
    slots = 256
    with FakeNfsServer(os.urandom(4 * MIB)) as server, opening(region_pages=slots) as open_engine:
        engine = open_engine(server.url())
        server.hold("WRITE")
        for i in range(slots - 1):  # no neighbours: write-backs of several pages need slots too
            engine.pwrite(os.urandom(PAGE), (100 + 2 * i) * PAGE)
        first, second = os.urandom(PAGE), os.urandom(PAGE)
        fua = in_background(engine.pwrite, first + second, 0, True)
        wait_until(lambda: engine.counters()["stalls"] == 1, "the FUA write waits for a slot")
        engine.pwrite(bytes(PAGE), 0)
        server.release()
        fua.result(DEADLINE_S)
        on_disk = server.on_disk
    assert on_disk[:PAGE] in (first, bytes(PAGE))
    assert on_disk[PAGE : 2 * PAGE] == second
