# SPDX-License-Identifier: LGPL-2.1-or-later
"""Before swapon: use every thread and path of the worker once, through the device itself.

What a worker touches for the first time, it touches here, while there is memory: the threads' stacks and buffers, the
kernel's requests and socket buffers, and code of Python, libnfs and the C library that has not run at start. The
content does not change: each page is written as it was read, under an exclusive open, which excludes swap and mounts.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import queue
import stat
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from nbdnfs.errors import (
    BusyError,
    IOFailureError,
    NbdnfsError,
    NoInputError,
    NoMemoryError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from nbdnfs.sizes import SECTOR_BYTES, SLOT_BYTES

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 60.0

# Requests under way at once: more than the default number of nbdkit's threads (worker/nbdkit.py: THREADS), which take
# turns at the socket. Each is busy with one of these for as long as the NAS takes, so that all of them get one.
PARALLEL = 16

_SINGLE_SLOTS = 8

# include/uapi/linux/fs.h
_BLKROGET = 0x125E
_BLKSECTGET = 0x1267


@dataclass(frozen=True)
class Exercise:
    """What a warm-up did: bytes read and written back, and the size of its largest request."""

    read_bytes: int
    rewritten_bytes: int
    largest_request_bytes: int


def warm_up(path: Path, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Exercise:
    """Exercise the worker behind the attached, unused block device `path`. Never changes what is on it.

    A read-only device is only read, and the log says so. Requests have the size of one slot and the largest size that
    the queue allows (queue/max_sectors_kb); the block layer splits larger ones, block/blk-merge.c.

    NoInputError: no such device. UsageError: not a block device, or an empty one. BusyError: swap, a mount or another
    device uses it. IOFailureError: a request failed. NoMemoryError: there is none for its threads and their buffers.
    UnavailableError: not done within `timeout_s` seconds; the threads that wait for the device stay behind, because no
    signal ends that wait. PermissionDeniedError: not root.
    """
    outcome: queue.SimpleQueue[Exercise | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(_warm_up(path))
        except Exception as error:  # whatever it is: the other thread waits for it
            outcome.put(error)

    try:
        threading.Thread(target=run, name="warm-up", daemon=True).start()
    except RuntimeError as error:
        raise _no_memory(error) from None
    try:
        done = outcome.get(timeout=timeout_s)
    except queue.Empty:
        raise UnavailableError(
            f"{path} did not answer the warm-up within {timeout_s:g} s",
            "see whether the NAS answers, and the messages of the worker",
        ) from None
    if isinstance(done, Exception):
        raise done
    log.info("%s: warmed up: %d KiB read, %d KiB rewritten", path, done.read_bytes >> 10, done.rewritten_bytes >> 10)
    return done


def _warm_up(path: Path) -> Exercise:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            writable, largest_bytes = _limits(descriptor, path)
        finally:
            os.close(descriptor)
        if not writable:
            log.warning("%s is read-only: the warm-up reads only, and the code for writing stays cold", path)
        mode = os.O_RDWR if writable else os.O_RDONLY
        descriptor = os.open(path, mode | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise _explain(error, path) from None
    try:
        return exercise(descriptor, largest_bytes=largest_bytes, writable=writable)
    except OSError as error:
        raise IOFailureError(
            f"{path} failed in the warm-up: {error.strerror}", "see the messages of the worker, and dmesg | tail"
        ) from None
    finally:
        os.close(descriptor)


def _limits(descriptor: int, path: Path) -> tuple[bool, int]:
    """Whether the device may be written, and its largest request in bytes."""
    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        raise UsageError(f"{path} is not a block device", "give an attached one, such as /dev/nbd0")
    if os.lseek(descriptor, 0, os.SEEK_END) < SLOT_BYTES:
        raise UsageError(f"{path} is empty", "attach it first: nbdnfs attach SOCKET")
    (read_only,) = struct.unpack("i", fcntl.ioctl(descriptor, _BLKROGET, bytes(4)))
    (sectors,) = struct.unpack("H", fcntl.ioctl(descriptor, _BLKSECTGET, bytes(2)))
    return not read_only, max(sectors * SECTOR_BYTES // SLOT_BYTES, 1) * SLOT_BYTES


def _explain(error: OSError, path: Path) -> NbdnfsError:
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return NoInputError(f"there is no device {path}", "attach it first: nbdnfs attach SOCKET")
    if error.errno == errno.EBUSY:
        return BusyError(
            f"{path} is in use as swap, mounted, or part of another device", "warm it up before that, or not at all"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(f"permission denied on {path}", "run it as root")
    return IOFailureError(f"{path} cannot be opened: {error.strerror}", "see dmesg | tail")


def exercise(descriptor: int, *, largest_bytes: int, writable: bool, parallel: int = PARALLEL) -> Exercise:
    """Read and rewrite parts of the open device from `parallel` threads, and flush. OSError: a request failed.
    NoMemoryError: there is none for the threads and their buffers.

    Each thread has a part of the device to itself, so that no page is read by one while another writes it.
    """
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    parallel = min(parallel, size_bytes // SLOT_BYTES)
    stretch_bytes = size_bytes // parallel // SLOT_BYTES * SLOT_BYTES
    errors: queue.SimpleQueue[OSError | NoMemoryError] = queue.SimpleQueue()
    together = threading.Barrier(parallel)
    largest_bytes = min(largest_bytes, stretch_bytes)
    offsets = [*range(0, stretch_bytes, max(stretch_bytes // _SINGLE_SLOTS // SLOT_BYTES, 1) * SLOT_BYTES)]
    extents = [(0, largest_bytes), *((offset, SLOT_BYTES) for offset in offsets[:_SINGLE_SLOTS])]

    def give_up(error: Exception) -> None:
        """Not all of them will meet: those that wait at the barrier end."""
        errors.put(_no_memory(error))
        together.abort()

    def work(start: int) -> None:
        try:
            page_aligned = mmap.mmap(-1, largest_bytes)
        except (OSError, MemoryError) as error:
            give_up(error)
            return
        with page_aligned, memoryview(page_aligned) as buffer:
            try:
                together.wait()
                for offset, length in extents:
                    _rewrite(descriptor, buffer[:length], start + offset, writable)
            except threading.BrokenBarrierError:  # another one says why
                pass
            except OSError as error:
                errors.put(error)

    threads = [
        threading.Thread(target=work, args=(number * stretch_bytes,), name=f"warm-up {number}", daemon=True)
        for number in range(parallel)
    ]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as error:
        give_up(error)
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    if not errors.empty():
        raise errors.get()
    if writable:
        os.fsync(descriptor)  # once: it covers the writes of all threads, and waits for the disk of the NAS
    total_bytes = parallel * sum(length for _, length in extents)
    return Exercise(total_bytes, total_bytes if writable else 0, largest_bytes)


def _no_memory(error: Exception) -> NoMemoryError:
    """For a thread that cannot be started, or has no buffer. Not for a request: that is the device's."""
    why = error.strerror if isinstance(error, OSError) else str(error)
    return NoMemoryError(
        f"no memory to warm the worker up with{f': {why}' if why else ''}",
        "free memory, or raise the limits of memory and of processes (ulimit -a, pids.max), and try again",
    )


def _rewrite(descriptor: int, buffer: memoryview, offset: int, writable: bool) -> None:
    """One read, and a write of exactly the bytes read. OSError also where either is short."""
    with buffer:
        if os.preadv(descriptor, [buffer], offset) != len(buffer):
            raise OSError(errno.EIO, "a read returned too few bytes")
        if writable and os.pwrite(descriptor, buffer, offset) != len(buffer):
            raise OSError(errno.EIO, "a write took too few bytes")
