# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes zeros to a file on a server, several chunks at a time, and checks that the server set room aside for them."""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future

from nbdnfs import quantities
from nbdnfs.engine import NfsFile
from nbdnfs.errors import CannotCreateError, IOFailureError
from nbdnfs.nas import explain, patience, remote_file
from nbdnfs.nfs_url import NfsUrl
from nbdnfs.sizes import SLOT_BYTES

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
# Chunks in flight at a time. Chunk n is written only when chunk n - WINDOW_CHUNKS is on the NAS, so that an interrupted
# file has no gap up to its length less the window.
WINDOW_CHUNKS = 8
# How long an interrupted call waits for writes that are in flight.
_INTERRUPTED_GRACE_S = 1.0
# File systems that allocate late (ZFS: once for each transaction group) report the blocks of a file after seconds only.
_ALLOCATION_SETTLES_S = 8.0
_POLL_S = 0.2

# Called with the bytes done and the bytes in total.
Progress = Callable[[int, int], None]


def find_other(file: NfsFile, start: int = 0, end: int | None = None) -> int | None:
    """The first page's offset that has other bytes than zeros; None where there is none. Reads all of it, or what lies
    from `start` up to `end`; pages are counted from `start`. OSError."""
    room_bytes = CHUNK_BYTES if end is None else min(CHUNK_BYTES, max(end - start, 0))
    chunk, nothing = memoryview(bytearray(room_bytes)), memoryview(bytes(room_bytes))
    offset = start
    while end is None or offset < end:
        count = file.pread(chunk[: None if end is None else end - offset], offset)
        if not count:
            break
        if chunk[:count] != nothing[:count]:
            return offset + next(
                at for at in range(0, count, SLOT_BYTES) if any(chunk[at : min(at + SLOT_BYTES, count)])
            )
        offset += count
    return None


def write_zeros(file: NfsFile, start: int, end: int, target: NfsUrl, report: Progress) -> None:
    """Write zeros to the bytes from `start` up to `end`, in order but for the window.

    `report` gets the length up to which the file is on the NAS without gaps, and `end`. CannotCreateError: the server
    has no room. IOFailureError: the server failed to write for another reason. KeyboardInterrupt and
    patience.Interrupted are logged and raised.
    """
    zeros = memoryview(bytes(CHUNK_BYTES))
    window: collections.deque[tuple[int, Future[int]]] = collections.deque()
    done, following = start, start
    writers = _Writers(WINDOW_CHUNKS)
    report(done, end)
    try:
        while done < end:
            while following < end and len(window) < WINDOW_CHUNKS:
                chunk, offset = zeros[: end - following], following
                following += len(chunk)
                window.append((following, writers.submit(functools.partial(file.pwrite, chunk, offset))))
            reached, write = window.popleft()
            _wait_for(write)
            done = reached
            report(done, end)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(error, target, done) from None
        raise IOFailureError(
            f"{target.host} failed to write {target.path} at {quantities.format_size(done)}: {explain.words(error)}",
            "fix that on the server, then run this again",
        ) from None
    except (KeyboardInterrupt, patience.Interrupted):
        log.warning("interrupted at %s of %s", quantities.format_size(done), quantities.format_size(end))
        raise
    finally:
        writers.end(_INTERRUPTED_GRACE_S)


def _wait_for(write: Future[int]) -> None:
    """Until it is done. OSError: it failed. patience.Interrupted."""
    patience.check()
    while not futures.wait([write], _POLL_S).done:
        patience.check()
    write.result()


def no_room(error: OSError, target: NfsUrl, done_bytes: int) -> CannotCreateError:
    """The error for ENOSPC or EDQUOT after `done_bytes` of the file were written."""
    place, size = f"{target.directory} on {target.host}", quantities.format_size(done_bytes)
    if error.errno == errno.EDQUOT:
        return CannotCreateError(
            f"the quota for {place} is used up: there was room for {size}",
            "raise the quota, or ask for a smaller size",
        )
    return CannotCreateError(
        f"no space left in {place}: there was room for {size}", "free space there, or ask for a smaller size"
    )


def refuse_unless_room(file: NfsFile, target: NfsUrl, size_bytes: int) -> None:
    """CannotCreateError: the server says that the rest of a file of `size_bytes` does not fit (RFC 1813, FSSTAT).

    Not a promise: a quota need not show in it, and other clients write, too.
    """
    try:
        space = remote_file.retry(file.space)
    except OSError:
        return  # the writes will show
    missing_bytes = size_bytes - min(remote_file.stat(file)["used"], size_bytes)
    if space["total"] == 0 or missing_bytes <= space["available"]:  # a total of 0: it does not know
        return
    size = quantities.format_size
    raise CannotCreateError(
        f"no room for {size(missing_bytes)} in {target.directory} on {target.host}: "
        f"{size(space['available'])} of {size(space['total'])} are available",
        "free space there, or ask for a smaller size",
    )


def warn_unless_allocated(file: NfsFile, target: NfsUrl, size_bytes: int) -> None:
    """Log a warning when the server keeps much less than it was sent: zeros that it compresses away reserve no room.

    Takes up to _ALLOCATION_SETTLES_S.
    """
    deadline = time.monotonic() + _ALLOCATION_SETTLES_S
    while (used := remote_file.stat(file)["used"]) < size_bytes * 9 // 10:
        if time.monotonic() > deadline:
            log.warning(
                "%s keeps only %s of the %s it was sent (compression, deduplication, thin volumes?): "
                "when it fills up, there is no room for swapped-out pages",
                target.host,
                quantities.format_size(used),
                quantities.format_size(size_bytes),
            )
            return
        time.sleep(_POLL_S)


class _Writers:
    """Daemon threads that run the calls handed to `submit`. `_calls` is all that they share, and has its own lock.

    ThreadPoolExecutor will not do: it joins its threads when Python ends, and a write to a server that is away lasts
    for as long as the server is away.
    """

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[int], Callable[[], int]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], int]) -> Future[int]:
        """Have a thread run `call`; the future gets its result or its exception."""
        future: Future[int] = Future()
        self._calls.put((future, call))
        return future

    def end(self, timeout_s: float) -> None:
        """Drop the calls that have not begun, and wait for the others, `timeout_s` in all."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
