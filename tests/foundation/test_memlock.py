# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which parts of a mapping are locked: all but what only the dynamic linker reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdnfs import _memlock, memlock

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("holes", "parts"),
    [
        ([], [(100, 50)]),
        ([(0, 100), (150, 10)], [(100, 50)]),
        ([(100, 50)], []),
        ([(90, 100)], []),
        ([(90, 20)], [(110, 40)]),
        ([(140, 20)], [(100, 40)]),
        ([(110, 10), (120, 5), (140, 3)], [(100, 10), (125, 15), (143, 7)]),
    ],
)
def test_parts(holes: list[tuple[int, int]], parts: list[tuple[int, int]]) -> None:
    """What is left of 100 to 150, in order."""
    assert list(memlock._without(100, 50, holes)) == parts


def test_tables_of_the_linker() -> None:
    """Whole pages of mappings that are read and not written, none of them twice, and libpython's or the interpreter's
    among them where it is relocated at all."""
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        mappings.append((int(start, 16), int(end, 16), line.split()[1]))
    found = sorted(_memlock.linker_tables())
    assert found
    previous_end = 0
    for start, length in found:
        assert start % PAGE == length % PAGE == 0
        assert start >= previous_end
        previous_end = start + length
        (permissions,) = (kind for begins, ends, kind in mappings if begins <= start and previous_end <= ends)
        assert permissions in ("r--p", "r-xp")  # on ARM the linker puts them beside the code
