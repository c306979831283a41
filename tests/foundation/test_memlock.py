# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which parts of a mapping are locked: all but what only the dynamic linker reads."""

from __future__ import annotations

import ctypes
import mmap
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


def resident_kib(file: Path) -> int:
    """Of a file that is mapped once."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    header = next(number for number, line in enumerate(lines) if line.endswith(str(file)))
    return next(int(line.split()[1]) for line in lines[header:] if line.startswith("Rss:"))


def test_locked_pages_are_dropped(tmp_path: Path) -> None:
    """They are read again when touched. Kernels before 5.18 leave them where they are."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 16 * PAGE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with file.open("rb") as opened:
        at = libc.mmap(None, ctypes.c_size_t(16 * PAGE), mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), 0)
    try:
        assert libc.mlock(ctypes.c_void_p(at), ctypes.c_size_t(16 * PAGE)) == 0, os.strerror(ctypes.get_errno())
        assert resident_kib(file) == 16 * PAGE // 1024
        _memlock.drop(at, 16 * PAGE)
        release = tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])
        assert resident_kib(file) == (0 if release >= (5, 18) else 16 * PAGE // 1024)
        assert ctypes.string_at(at, 16 * PAGE) == b"x" * 16 * PAGE
    finally:
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(16 * PAGE))
