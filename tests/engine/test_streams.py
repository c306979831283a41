# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which readers are recognised, and what is read ahead for them: streams.c alone, with a NAS that answers at once."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_int64, c_uint, c_uint8, c_uint32, c_uint64
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "nbdnfs/engine"
DEVICE_PAGES = 1 << 16
WINDOW = 64


class Streams(Structure):
    """The beginning of struct streams, and room for the rest."""

    _fields_ = (
        ("window_max", c_uint32),
        ("window_limit", c_uint32),
        ("rest", c_uint8 * (32 << 10)),
    )


class Prefetch(Structure):
    """struct prefetch"""

    _fields_ = (
        ("first", c_uint64),
        ("count", c_uint32),
        ("step", c_int64),
        ("times", c_uint32),
        ("stream", c_uint),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """streams.c as a shared library."""
    path = tmp_path_factory.mktemp("streams") / "streams.so"
    source = ENGINE / "block/streams.c"
    trap = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]  # which makes branches of its own
    flags = os.environ.get("NBDNFS_TEST_CFLAGS", "").split() or trap  # simulator/coverage.py
    subprocess.run(["cc", "-std=c11", "-O1", *flags, "-shared", "-fPIC", f"-I{ENGINE}", source, "-o", path], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.streams_init.argtypes = (POINTER(Streams), c_uint32)
    loaded.streams_note.argtypes = (POINTER(Streams), c_uint64, c_uint32, c_uint64, POINTER(Prefetch))
    loaded.streams_note.restype = c_bool
    loaded.streams_not_fetched.argtypes = (POINTER(Streams), POINTER(Prefetch), c_uint32)
    loaded.streams_judge.argtypes = (POINTER(Streams), c_uint32, c_uint32)
    return loaded


class Reader:
    """A device: which reads found their page read ahead."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.streams = Streams()
        library.streams_init(byref(self.streams), WINDOW)
        self._ahead: set[int] = set()
        self.fetched = 0
        self.most_at_once = 0

    def fetches(self, page: int) -> list[tuple[int, int]]:
        """The first page and the number of pages of each fetch that a read of this page brings."""
        prefetch = Prefetch.from_buffer_copy(b"\xff" * ctypes.sizeof(Prefetch))
        if not self._library.streams_note(byref(self.streams), page, 1, DEVICE_PAGES, byref(prefetch)):
            return []
        self.most_at_once = max(self.most_at_once, prefetch.count * prefetch.times)
        return [(prefetch.first + prefetch.step * turn, prefetch.count) for turn in range(prefetch.times)]

    def hits(self, pages: Sequence[int], room: int = 1 << 20) -> float:
        """The share of these reads, one page each, that hits. At most `room` pages are fetched at once."""
        hits = 0
        for page in pages:
            hits += page in self._ahead
            prefetch = Prefetch.from_buffer_copy(b"\xff" * ctypes.sizeof(Prefetch))  # as uninitialised memory may be
            if self._library.streams_note(byref(self.streams), page, 1, DEVICE_PAGES, byref(prefetch)):
                assert 0 < prefetch.count <= WINDOW
                for turn in range(prefetch.times):
                    first = prefetch.first + prefetch.step * turn
                    assert first >= 0
                    assert first + prefetch.count <= DEVICE_PAGES
                    count = min(prefetch.count, room)
                    self._ahead.update(range(first, first + count))
                    self.fetched += count
                    if count < prefetch.count:
                        self._library.streams_not_fetched(byref(self.streams), byref(prefetch), prefetch.count - count)
        return hits / len(pages)


@pytest.fixture
def reader(library: ctypes.CDLL) -> Reader:
    """Of whose device nothing has been read."""
    return Reader(library)


def walks(starts: Sequence[int], length: int, step: int = 1) -> list[int]:
    """Walkers that take turns, page by page."""
    return [start + at * step for at in range(length) for start in starts]


@pytest.mark.parametrize(
    "starts",
    [
        [0],
        [0, 8192],
        [0, 700],
        [0, 40],
        [0, 1024, 2048],
        [*range(0, 8000, 2000)],
        [*range(0, 16_000, 1000)],
        [*range(0, 40_000, 1000)],
    ],
    ids=lambda starts: f"{len(starts)} at {starts[-1]}",
)
def test_walkers(reader: Reader, starts: list[int]) -> None:
    """Each walker has its own stream, wherever the others are: nineteen of twenty reads hit, and little is fetched in
    vain."""
    assert reader.hits(walks(starts, 400)) >= 0.95
    assert reader.fetched <= len(starts) * (400 + WINDOW)


def test_more_walkers_than_streams(reader: Reader) -> None:
    """They take each other's places, and little is fetched; with fewer again, all is as before."""
    reader.hits(walks([*range(0, 40_000, 1000)], 40))
    fetched = reader.fetched
    reader.hits(walks([*range(40, 60_000, 1000)], 20))
    assert reader.fetched - fetched <= 60 * (20 + WINDOW)
    assert reader.hits(walks([*range(500, 40_000, 1000)], 400)) >= 0.9


def test_walkers_that_meet(reader: Reader) -> None:
    """One that begins where another is later."""
    assert reader.hits(walks([0, 300], 700)) >= 0.95


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_walkers_among_random_reads(reader: Reader, share: float) -> None:
    """A walker that was recognised is not forgotten because of others: nine of ten of its reads hit."""
    draw = random.Random(1)
    at, pages, hits, steps = [0, 20_000], [], 0.0, 0
    for _ in range(4000):
        if draw.random() < share:
            pages.append(draw.randrange(DEVICE_PAGES))
            reader.hits(pages[-1:])
        else:
            walker = draw.randrange(2)
            hits += reader.hits([at[walker]])
            at[walker] += 1
            steps += 1
    assert hits / steps >= 0.9


def test_random_reads(reader: Reader) -> None:
    """Nothing is read ahead for them."""
    draw = random.Random(2)
    reader.hits([draw.randrange(DEVICE_PAGES) for _ in range(5000)])
    assert reader.fetched <= 250


@pytest.mark.parametrize("stride", [2, 16, 33, 100, 700, -2, -50])
def test_strides(reader: Reader, stride: int) -> None:
    """A reader that leaves out as many pages each time, and two of them."""
    assert reader.hits([30_000 + at * stride for at in range(40)]) >= 0.8
    assert reader.hits(walks([0 if stride > 0 else 8000, 36_000], 30, stride)) >= 0.5


@pytest.mark.parametrize("stride", [33, 700, -50, -700])
def test_strides_to_the_end_of_the_device(reader: Reader, stride: int) -> None:
    """The last reads hit as those before, and nothing is fetched beyond it, at either end (Reader looks)."""
    start = DEVICE_PAGES - 1 if stride < 0 else 0
    reads = [start + at * stride for at in range(DEVICE_PAGES // abs(stride))]
    reader.hits(reads[:-3])
    assert reader.hits(reads[-3:]) == 1


@pytest.mark.parametrize(
    "reads", [range(410, 0, -100), range(510, 100, -100), range(DEVICE_PAGES - 750, DEVICE_PAGES - 300, 100)]
)
def test_strides_that_begin_before_the_end_of_the_device(reader: Reader, reads: range) -> None:
    """What they would lead to lies beyond it, wholly or in part, at either end: nothing is fetched."""
    reader.hits(reads)
    assert reader.fetched == 0


@pytest.mark.parametrize("stride", [3, 16, 33])
def test_of_strides_only_what_is_read(reader: Reader, stride: int) -> None:
    """The pages between are not fetched, however short the stride is."""
    assert reader.hits(range(0, 400 * stride, stride)) >= 0.9
    assert reader.fetched <= 420


def test_a_walk_with_gaps(reader: Reader) -> None:
    """One that leaves out most of what it passes, here and there, has nothing read ahead but by chance; one that
    leaves out little has."""
    draw = random.Random(4)
    sparse = [at for at in range(6000) if draw.random() < 0.15]
    assert reader.hits(sparse) <= 0.2
    assert reader.fetched <= len(sparse) // 4
    assert reader.hits([at for at in range(20_000, 22_000) if draw.random() < 0.85]) >= 0.8


def test_runs_of_several_walkers(reader: Reader) -> None:
    """What is read in turn from many runs, a few pages from each, as swap slots of several processes lie."""
    draw = random.Random(5)
    at = [start * 1000 for start in range(40)]
    reads = []
    for _ in range(1500):
        run = draw.randrange(len(at))
        reads += range(at[run], at[run] + 4)
        at[run] += 4
    assert reader.hits(reads) >= 0.75


@pytest.mark.parametrize("length", [8, 16, 32])
def test_short_runs(library: ctypes.CDLL, reader: Reader, length: int) -> None:
    """At random places, as objects of some pages are read: all but the first two reads of each hit, although most of
    what is fetched for the short ones is in vain."""
    draw = random.Random(6)
    starts = draw.sample(range(0, DEVICE_PAGES - 100, 100), 300)
    hits = 0.0
    for start in starts:
        before, found = reader.fetched, reader.hits(range(start, start + length))
        hits += found / len(starts)
        used = round(found * length)
        library.streams_judge(byref(reader.streams), used, reader.fetched - before - used)
    assert hits >= (length - 2) / length - 0.05
    assert reader.fetched <= 4 * len(starts) * length


def test_striders_in_turn(reader: Reader) -> None:
    """A dozen of them, with large strides."""
    assert reader.hits(walks([j * 5000 for j in range(12)], 40, 100)) >= 0.85


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("wasted", [0, 3])
@pytest.mark.parametrize("pages", [range(1000), range(1000, 60_000, 100)], ids=["walk", "stride"])
def test_a_small_window(library: ctypes.CDLL, reader: Reader, window: int, wasted: int, pages: range) -> None:
    """No more is fetched at once than is configured, also after another chance."""
    library.streams_init(byref(reader.streams), window)
    most = 0
    for page in pages:
        library.streams_judge(byref(reader.streams), 0, wasted)
        most = max(most, *(count for _, count in reader.fetches(page)), 0)
    assert most == (window if len(pages) == 1000 else 1)
    assert reader.most_at_once == window


def test_windows_of_a_walk(reader: Reader) -> None:
    """The second request has the first window fetched; each time that half of the last one is read, one of twice as
    many pages follows it, up to the largest."""
    found = {page: reader.fetches(page) for page in range(140)}
    assert {page: pages for page, pages in found.items() if pages} == {
        1: [(2, 8)],
        5: [(10, 16)],
        17: [(26, 32)],
        41: [(58, 64)],
        89: [(122, 64)],
    }
    reader.fetches(40_000)
    reader.fetches(40_001)
    assert reader.fetches(40_005) == [(40_010, 16)]


def test_strides_that_are_given_up(library: ctypes.CDLL, reader: Reader) -> None:
    """Nothing is fetched for them either, before the next chance."""
    for _ in range(40):
        library.streams_judge(byref(reader.streams), 0, 16)
    assert reader.hits(range(0, 20_000, 100)) == 0
    assert reader.fetched == 0


def test_a_chance_is_not_judged_by_what_was_before(library: ctypes.CDLL, reader: Reader) -> None:
    """Pages that were read ahead long ago are dropped while it is given up."""
    for _ in range(40):
        library.streams_judge(byref(reader.streams), 0, 16)
    library.streams_judge(byref(reader.streams), 0, 40)
    reader.hits(range(256))
    library.streams_judge(byref(reader.streams), 2, 1)
    assert reader.streams.window_limit == 8
    assert reader.hits(range(256, 300)) > 0.5


def test_a_chance_that_is_taken(library: ctypes.CDLL, reader: Reader) -> None:
    """After it, read-ahead is judged by as many pages as before."""
    for _ in range(40):
        library.streams_judge(byref(reader.streams), 0, 16)
    reader.hits(range(300))
    library.streams_judge(byref(reader.streams), 16, 0)
    limit = reader.streams.window_limit
    assert limit > 8
    library.streams_judge(byref(reader.streams), 0, 63)
    assert reader.streams.window_limit == limit


def test_strides_of_long_requests(library: ctypes.CDLL, reader: Reader) -> None:
    """No more of them is fetched at once than the window has room for."""
    prefetch = Prefetch()
    found = set()
    for page in range(0, 8000, 200):
        if library.streams_note(byref(reader.streams), page, 32, DEVICE_PAGES, byref(prefetch)):
            found.add((prefetch.count, prefetch.times))
    assert found == {(32, WINDOW // 32), (32, 1)}


def test_another_chance(library: ctypes.CDLL, reader: Reader) -> None:
    """One in vain costs few pages."""
    draw = random.Random(7)
    for _ in range(40):
        library.streams_judge(byref(reader.streams), 0, 16)
    for _ in range(2000):
        before = reader.fetched
        page = draw.randrange(DEVICE_PAGES - 2)
        reader.hits([page, page + 1])
        library.streams_judge(byref(reader.streams), 0, reader.fetched - before)
    assert 0 < reader.fetched <= 4000 // 256 * 3 * 8


def test_read_ahead_in_vain(library: ctypes.CDLL, reader: Reader) -> None:
    """Where most of it is dropped unread it stops, is tried again now and then, and comes back where it is used. A few
    pages that are used do not make up for many that are not."""
    streams = reader.streams
    for _ in range(40):
        library.streams_judge(byref(streams), 1, 15)
    assert streams.window_limit == 0
    assert reader.hits(range(200)) == 0
    assert reader.hits(range(200, 400)) > 0
    for _ in range(100):
        library.streams_judge(byref(streams), 15, 1)
    assert streams.window_limit == WINDOW


def test_what_could_not_be_fetched(reader: Reader) -> None:
    """There is room for some of it only: the rest is named again, and no walker loses pages for good."""
    assert reader.hits(walks([0, 9000, 18_000, 27_000], 400), room=8) >= 0.85


def test_strides_that_cannot_be_fetched(reader: Reader) -> None:
    """They are left out: only what lies in a row is named again."""
    assert reader.hits([30_000 + at * 100 for at in range(40)], room=0) == 0


def test_many_threads(reader: Reader) -> None:
    """Requests of one reader that come a little out of order."""
    draw = random.Random(3)
    pages = [page for at in range(0, 800, 8) for page in draw.sample(range(at, at + 8), 8)]
    assert reader.hits(pages) >= 0.9
