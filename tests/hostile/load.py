# SPDX-License-Identifier: LGPL-2.1-or-later
"""A verified load straight on an engine: each page has a known content for each of its versions."""

from __future__ import annotations

import collections
import collections.abc
import functools
import random
import struct
import threading
import time

from nbdnfs.engine import Engine

PAGE = 4096
EXTENT_PAGES = 8
_HEAD = struct.Struct(">QII")


def page_content(seed: int, page: int, version: int) -> bytes:
    """Every sixteenth version repeats one word, and so lives in the region's page table."""
    if version == 0:
        return bytes(PAGE)
    if version % 16 == 0:
        return struct.pack(">I", (seed ^ page * 2654435761 ^ version) & 0xFFFF_FFFF) * (PAGE // 4)
    return _HEAD.pack(seed, page, version) * (PAGE // _HEAD.size)


class EngineLoad:
    """Threads that read, write and flush, each in its own extents, from `start` to `stop`. One thread may use it.

    wrong    pages that were read with other bytes than were written last
    errors   what requests failed with, counted
    hung     what threads did not end
    """

    def __init__(self, engine: Engine, *, seed: int, threads: int = 3) -> None:
        self._engine = engine
        self._seed = seed
        self._count = threads
        self._pages = engine.size_bytes // PAGE
        self._extents = self._pages // EXTENT_PAGES
        self._stop = threading.Event()
        # each entry is touched by the thread that owns its page alone
        self.versions = [0] * self._pages
        self._unknown: set[int] = set()
        self._done = [0] * threads
        self._longest_s = [0.0] * threads
        self.wrong: list[int] = []
        self.errors: collections.Counter[str] = collections.Counter()
        self.hung: list[str] = []
        self._doing = [""] * threads
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(threads)]

    @property
    def requests(self) -> int:
        return sum(self._done)

    @property
    def longest_s(self) -> float:
        """Of the requests that have ended."""
        return max(self._longest_s)

    def fill(self) -> None:
        """Write every page once, and flush: from then on each has a checksum."""
        for page in range(self._pages):
            self.versions[page] = 1
            self._engine.pwrite(page_content(self._seed, page, 1), page * PAGE)
        self._engine.flush()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, deadline_s: float) -> None:
        """End after the requests under way; a request that does not end within `deadline_s` is `hung`."""
        self._stop.set()
        deadline = time.monotonic() + deadline_s
        for number, thread in enumerate(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.hung.append(self._doing[number])

    def flush(self, deadline_s: float) -> bool:
        """Flush; False, and `hung`, when that takes longer."""
        thread = threading.Thread(target=self._try, args=("flush", self._engine.flush), daemon=True)
        thread.start()
        thread.join(deadline_s)
        if thread.is_alive():
            self.hung.append("the last flush")
        return not thread.is_alive()

    def verify(self, deadline_s: float) -> None:
        """Read all of the device."""
        thread = threading.Thread(target=self._read_all, daemon=True)
        thread.start()
        thread.join(deadline_s)
        if thread.is_alive():
            self.hung.append("the last reads")

    def wrong_pages(self, content: bytes) -> list[int]:
        """The pages that are wrong in the file."""
        return [
            page
            for page in range(self._pages)
            if page not in self._unknown and content[page * PAGE : (page + 1) * PAGE] != self._expected(page)
        ]

    def _expected(self, page: int) -> bytes:
        return page_content(self._seed, page, self.versions[page])

    def _read_all(self) -> None:
        for first in range(0, self._pages, EXTENT_PAGES):
            self._try("read", functools.partial(self._read, first, EXTENT_PAGES))

    def _read(self, first: int, count: int) -> None:
        buffer = bytearray(count * PAGE)
        self._engine.pread(buffer, first * PAGE)
        self.wrong += [
            page
            for page in range(first, first + count)
            if page not in self._unknown
            and buffer[(page - first) * PAGE : (page - first + 1) * PAGE] != self._expected(page)
        ]

    def _write(self, first: int, count: int, fua: bool) -> None:
        pages = range(first, first + count)
        for page in pages:
            self.versions[page] += 1
        try:
            self._engine.pwrite(b"".join(map(self._expected, pages)), first * PAGE, fua)
        except OSError:
            self._unknown.update(pages)  # it may have been written or not
            raise

    # A thread

    def _run(self, number: int) -> None:
        draw = random.Random(f"{self._seed}/{number}")
        while not self._stop.is_set():
            extent = draw.randrange(number, self._extents, self._count)
            count = draw.choice((1, 1, 1, 2, 4, 8))
            first = extent * EXTENT_PAGES + draw.randrange(EXTENT_PAGES - count + 1)
            kind = draw.choices(("read", "write", "fua", "flush"), (52, 40, 5, 3))[0]
            self._doing[number] = f"{kind} of {count} pages from {first}"
            begun_s = time.monotonic()
            if kind == "flush":
                self._try(kind, self._engine.flush)
            elif kind == "read":
                self._try(kind, functools.partial(self._read, first, count))
            else:
                self._try(kind, functools.partial(self._write, first, count, kind == "fua"))
            self._longest_s[number] = max(self._longest_s[number], time.monotonic() - begun_s)
            self._done[number] += 1

    def _try(self, kind: str, request: collections.abc.Callable[[], None]) -> None:
        try:
            request()
        except OSError as error:
            self.errors[f"{kind}: {error.strerror or error}"] += 1
