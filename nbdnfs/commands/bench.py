# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fast a machine can swap to a NAS: `nbdnfs bench URL`. Pages through the engine alone, every page checked.

It makes a file of its own, which must not exist, and removes it again: nobody's swap is ever its target. There is
neither nbdkit nor the kernel in it; `make bench` and `make bench-vm` measure those.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from nbdnfs import nfs_url
from nbdnfs.engine import Engine, NfsFile, libnfs_version
from nbdnfs.errors import IOFailureError, UsageError
from nbdnfs.nas import backing_file, explain
from nbdnfs.sizes import SLOT_BYTES

MIN_SIZE_BYTES = 1 << 20
READERS = 8
CONNECTIONS = 4

_NAME = struct.Struct(">QQ")
_STEP = 64


@dataclass(frozen=True)
class Row:
    """One kind of load: pages a second, and how long one page took, in microseconds."""

    title: str
    pages: int
    seconds: float
    median_us: float
    p99_us: float

    @property
    def pages_per_second(self) -> float:
        return self.pages / self.seconds

    def text(self) -> str:
        """A line for people."""
        mib = self.pages_per_second * SLOT_BYTES / (1 << 20)
        return (
            f"{self.title:34} {self.pages_per_second:>9,.0f} pages/s {mib:>8.1f} MiB/s"
            f"   median {self.median_us:>7,.0f} us, 99%: {self.p99_us:>9,.0f}"
        )

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "pages_per_second": self.pages_per_second}


class _Device:
    """The engine, and what each page must have. A page is used by one thread at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.generations = [0] * (engine.size_bytes // SLOT_BYTES)
        self._noise = os.urandom(SLOT_BYTES + _STEP * 1021)

    def write(self, page: int) -> None:
        self.generations[page] += 1
        self.engine.pwrite(self._content(page), page * SLOT_BYTES)

    def check(self, page: int) -> None:
        """IOFailureError when what comes back is not what was written last."""
        found = bytearray(SLOT_BYTES)
        self.engine.pread(found, page * SLOT_BYTES)
        if found != self._content(page):
            raise IOFailureError(f"page {page} came back with other content", "do not swap to this server")

    def _content(self, page: int) -> bytes:
        """Of its newest generation; the file was made of zeros. Nothing that could be compressed."""
        generation = self.generations[page]
        if generation == 0:
            return bytes(SLOT_BYTES)
        at = (page * 7 + generation) % 1021 * _STEP
        return _NAME.pack(page, generation) + self._noise[at : at + SLOT_BYTES - _NAME.size]


def run(url: str, size_bytes: int, seconds: float, tell: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """All loads, about `seconds` each, on a new file of `size_bytes`, which is removed at the end.

    UsageError: too small. IOFailureError: a wrong page. Others as `provision.create`.
    """
    if size_bytes < MIN_SIZE_BYTES or size_bytes % SLOT_BYTES:
        raise UsageError("the file is to have 1 MiB or more, in whole pages", "for example --size 64M")
    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    backing_file.create(url, size_bytes)
    address = target.resolve()
    rows = []
    with _removed_at_the_end(target, address), contextlib.closing(_open(target, address)) as engine:
        for row in _loads(_Device(engine), seconds):
            tell(row)
            rows.append(row)
    return rows


def _open(target: nfs_url.NfsUrl, address: str) -> Engine:
    try:
        return Engine(target.text, address, connections=CONNECTIONS)
    except OSError as error:
        raise explain.explain(error, target, address) from None


@contextlib.contextmanager
def _removed_at_the_end(target: nfs_url.NfsUrl, address: str) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.closing(NfsFile(target.text, address)) as file:
            file.unlink(f"/{target.name}")


def _loads(device: _Device, seconds: float) -> Iterator[Row]:
    pages = list(range(len(device.generations)))
    yield _timed("sequential writes, with a flush", pages, device.write, seconds, end=device.engine.flush)
    yield _timed("sequential reads", pages, device.check, seconds)
    random.shuffle(pages)
    yield _timed("random writes, with a flush", pages, device.write, seconds, end=device.engine.flush)
    yield _timed("random reads", pages, device.check, seconds)
    yield _side_by_side(f"random reads, {READERS} at once", pages, device.check, seconds)


def _timed(
    title: str, pages: list[int], step: Callable[[int], None], seconds: float, end: Callable[[], None] | None = None
) -> Row:
    """`step` for page after page, all of them at most. `end` counts into the time."""
    started = time.monotonic()
    durations = _walk(pages, step, started + seconds)
    if end is not None:
        end()
    return _row(title, durations, time.monotonic() - started)


def _side_by_side(title: str, pages: list[int], step: Callable[[int], None], seconds: float) -> Row:
    """By READERS threads, each with its share of the pages."""
    started = time.monotonic()
    shares = [pages[number::READERS] for number in range(READERS)]
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda share: _walk(share, step, started + seconds), shares))
    return _row(title, [duration for part in parts for duration in part], time.monotonic() - started)


def _walk(pages: list[int], step: Callable[[int], None], until: float) -> list[float]:
    """How long each page took, in seconds; at least one."""
    durations: list[float] = []
    for page in pages:
        before = time.monotonic()
        if durations and before >= until:
            break
        step(page)
        durations.append(time.monotonic() - before)
    return durations


def _row(title: str, durations: list[float], seconds: float) -> Row:
    durations.sort()
    return Row(
        title=title,
        pages=len(durations),
        seconds=seconds,
        median_us=statistics.median(durations) * 1e6,
        p99_us=durations[len(durations) * 99 // 100] * 1e6,
    )
