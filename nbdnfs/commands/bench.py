# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs bench`: how fast this machine can write and read pages on a NAS. Every page is checked.

The file is created, must not exist before, and is removed at the end, also after Ctrl-C and SIGTERM: a file in use is
never the target. The work runs in a thread of its own, because a server that hangs keeps it waiting. The pages go
through the engine alone; `make bench` measures it under nbdkit, and `make bench-vm` under the kernel's swap.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from nbdnfs import nfs_url, quantities
from nbdnfs.commands import claiming, json_output
from nbdnfs.engine import Engine, NfsFile, libnfs_version
from nbdnfs.errors import EndedBySignal, IOFailureError, UsageError
from nbdnfs.nas import backing_file, explain, patience
from nbdnfs.sizes import SLOT_BYTES

log = logging.getLogger(__name__)

MIN_SIZE_BYTES = 1 << 20
# The engine's own region. A file has to be several times as large: else it is the region that is measured.
REGION_PAGES = 16 * (1 << 20) // SLOT_BYTES
_REGIONS_MIN = 4
READERS = 8
CONNECTIONS = 4

# How long a call that a signal has ended may take to remove its file.
_GRACE_S = 5.0

_NAME = struct.Struct(">QQ")
_STEP = 64

# Engines of interrupted loads. They are not closed: that would wait until the server has all of their pages.
_abandoned: list[Engine] = []


@dataclass(frozen=True)
class Row:
    """The result of one kind of load: `pages` took `seconds` in all; `median_us` and `p99_us` are times of one page."""

    title: str
    pages: int
    seconds: float
    median_us: float
    p99_us: float

    @property
    def pages_per_second(self) -> float:
        """The throughput."""
        return self.pages / self.seconds

    def text(self) -> str:
        """One line for a terminal."""
        mib = self.pages_per_second * SLOT_BYTES / (1 << 20)
        return (
            f"{self.title:34} {self.pages_per_second:>9,.0f} pages/s {mib:>8.1f} MiB/s"
            f"   median {self.median_us:>7,.0f} us, 99%: {self.p99_us:>9,.0f}"
        )

    def to_json(self) -> dict[str, object]:
        """The fields, and "pages_per_second"."""
        return {**asdict(self), "pages_per_second": self.pages_per_second}


class _Device:
    """An engine, and what each page of it must hold. The caller uses a page in one thread at a time.

    Once `stop` is set, each step raises patience.Interrupted.
    """

    def __init__(self, engine: Engine, stop: threading.Event) -> None:
        self.engine = engine
        self._stop = stop
        self.generations = [0] * (engine.size_bytes // SLOT_BYTES)
        self._noise = os.urandom(SLOT_BYTES + _STEP * 1021)

    def write(self, page: int) -> None:
        """Write the page's next content."""
        self._go_on()
        self.generations[page] += 1
        self.engine.pwrite(self._content(page), page * SLOT_BYTES)

    def check(self, page: int) -> None:
        """Read the page. IOFailureError: it does not hold what was written last."""
        self._go_on()
        found = bytearray(SLOT_BYTES)
        self.engine.pread(found, page * SLOT_BYTES)
        if found != self._content(page):
            raise IOFailureError(f"page {page} does not hold what was written to it", "do not use this server for swap")

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise patience.Interrupted

    def _content(self, page: int) -> bytes:
        """What the page must hold: zeros at first, as the file was created, and then bytes that do not compress."""
        generation = self.generations[page]
        if generation == 0:
            return bytes(SLOT_BYTES)
        at = (page * 7 + generation) % 1021 * _STEP
        return _NAME.pack(page, generation) + self._noise[at : at + SLOT_BYTES - _NAME.size]


def run(args: argparse.Namespace) -> int:
    """Print a row for each kind of load as it ends. Errors as `measure`."""
    size_bytes, seconds = quantities.parse_size_bytes(args.size), quantities.parse_duration_s(args.time)
    has_file = threading.Event()

    def show(row: Row) -> None:
        if not args.json:
            print(row.text(), flush=True)

    def work(stop: threading.Event) -> list[Row]:
        encrypt = not args.no_encrypt
        return measure(args.url, size_bytes, seconds, show, encrypt=encrypt, stop=stop, has_file=has_file)

    try:
        rows = claiming.run_until_signal(work, grace_s=_GRACE_S)
    except EndedBySignal:
        if has_file.is_set():
            log.warning("%s stays: the server has not removed it in time", args.url.partition("?")[0])
        raise
    if args.json:
        json_output.print_list([row.to_json() for row in rows])
    return 0


def measure(
    url: str,
    size_bytes: int,
    seconds: float,
    report: Callable[[Row], None] = lambda row: None,
    *,
    encrypt: bool = True,
    stop: threading.Event | None = None,
    has_file: threading.Event | None = None,
) -> list[Row]:
    """Run each load for about `seconds`, on a new file of `size_bytes` that is removed at the end. Pages are encrypted,
    as a device's are by default, unless that is not wanted.

    A smaller file than four times the region is made that large, which is reported on stderr.

    `report` gets each row when its load ends. `stop` ends it early; `has_file` is set while there may be the file.
    UsageError: the size is too small or not a multiple of 4096. IOFailureError: a page is wrong. patience.Interrupted:
    `stop` was set. Others as `backing_file.create`.
    """
    if size_bytes < MIN_SIZE_BYTES or size_bytes % SLOT_BYTES:
        raise UsageError(
            f"--size must be a multiple of {SLOT_BYTES} bytes, and at least 1 MiB", "for example --size 64M"
        )
    least_bytes = _REGIONS_MIN * REGION_PAGES * SLOT_BYTES
    if size_bytes < least_bytes:
        size, least = quantities.format_size(size_bytes), quantities.format_size(least_bytes)
        print(f"nbdnfs: {size} would measure this machine's memory: the file is {least} large", file=sys.stderr)
        size_bytes = least_bytes
    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    stop, has_file = stop or threading.Event(), has_file or threading.Event()

    def note(done_bytes: int, total_bytes: int) -> None:
        if done_bytes == total_bytes:  # it gets its name now
            has_file.set()

    with patience.interruptible(stop):
        backing_file.create(url, size_bytes, progress=note)
    address = target.resolve()
    rows = []
    with _removed_at_the_end(target, address, has_file), _opened(target, address, encrypt) as engine:
        for row in _loads(_Device(engine, stop), seconds):
            report(row)
            rows.append(row)
    return rows


@contextlib.contextmanager
def _opened(target: nfs_url.NfsUrl, address: str, encrypt: bool) -> Iterator[Engine]:
    """An engine. It is closed at the end, unless a signal has ended the command: closing may take long."""
    engine = _open(target, address, encrypt)
    try:
        yield engine
    except patience.Interrupted:
        _abandoned.append(engine)
        raise
    except BaseException:
        engine.close()
        raise
    engine.close()


def _open(target: nfs_url.NfsUrl, address: str, encrypt: bool) -> Engine:
    try:
        return Engine(target.text, address, connections=CONNECTIONS, region_pages=REGION_PAGES, encrypt=encrypt)
    except OSError as error:
        raise explain.open_error(error, target, address) from None


@contextlib.contextmanager
def _removed_at_the_end(target: nfs_url.NfsUrl, address: str, has_file: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.closing(NfsFile(target.text, address)) as file:
            file.unlink(f"/{target.name}")
        has_file.clear()


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
    """Time `step` on one page after the other, each once at most, and then `end`, for about `seconds`."""
    started = time.monotonic()
    durations = _walk(pages, step, started + seconds)
    if end is not None:
        end()
    return _row(title, durations, time.monotonic() - started)


def _side_by_side(title: str, pages: list[int], step: Callable[[int], None], seconds: float) -> Row:
    """The same in READERS threads, each with its share of the pages."""
    started = time.monotonic()
    shares = [pages[number::READERS] for number in range(READERS)]
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda share: _walk(share, step, started + seconds), shares))
    return _row(title, [duration for part in parts for duration in part], time.monotonic() - started)


def _walk(pages: list[int], step: Callable[[int], None], until: float) -> list[float]:
    """How long each page took, in seconds. Stops at `until` (time.monotonic()), but takes one page at least."""
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
