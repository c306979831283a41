# SPDX-License-Identifier: LGPL-2.1-or-later
"""Python's one view of the region: the memfd that outlives a worker, and the layout of its header.

All of it is locked memory: SLOT_BYTES for each slot, and a little over 1 MiB of tables for each GiB of the device,
2 MiB with encryption.

The engine's region.h defines the layout; tests/foundation/test_region_layout.py compares. Keeper and worker have this
module in locked memory, and the keeper must not load the engine: hence plain `int.from_bytes`, and next to no imports.
"""

from __future__ import annotations

import os
import sys

from nbdnfs.errors import is_of_want
from nbdnfs.sizes import SLOT_BYTES

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

_NAME = "nbdnfs-region"

# struct region_header, in the machine's own byte order: what is not a counter has its offset here.
MAGIC = b"nbdnfs\0\0"
# enum region_version: pages are on the NAS as they are, or encrypted in one of two ways.
PLAIN = 2
ENCRYPTED = (3, 4)
VERSIONS = (PLAIN, *ENCRYPTED)
VERSION_OFFSET = 8
SLOT_COUNT_OFFSET = 12
REGION_BYTES_OFFSET = 40
GENERATION_OFFSET = 48
COUNTERS_OFFSET = 56

# struct region_counters: 64-bit numbers in this order, then histograms of HISTOGRAM_BUCKETS such numbers each.
COUNTERS = (
    "reads",
    "writes",
    "flushes",
    "trims",
    "read_bytes",
    "written_bytes",
    "hit_pages",
    "missed_pages",
    "filled_pages_written",
    "nfs_reads",
    "nfs_read_bytes",
    "nfs_writes",
    "nfs_written_bytes",
    "nfs_commits",
    "read_ahead_pages",
    "read_ahead_hits",
    "read_ahead_wasted",
    "stalls",
    "write_errors",
    "lost_uncommitted_pages",
    "checksum_rereads",
    "checksum_failures",
    "replayed_pages",
    "reconnects",
    "unstable_pages",
    "nfs_in_flight",
    "write_back_error",
    "disconnected",
    "file_state",
    "twins_until_ms",
    "owner_state",
)
HISTOGRAMS = ("read_us", "write_us", "nfs_read_us", "nfs_write_us")
HISTOGRAM_BUCKETS = 32
_COUNTER_BYTES = 8
# struct region_waits: the generation of its writer, when the server was last heard, and since when each connection has
# waited for it and each request has been served. Times are CLOCK_MONOTONIC in ms, 0 for none.
WAITS_OFFSET = COUNTERS_OFFSET + _COUNTER_BYTES * (len(COUNTERS) + HISTOGRAM_BUCKETS * len(HISTOGRAMS))
CONNECTIONS, REQUESTS = 16, 16
HEADER_BYTES = WAITS_OFFSET + _COUNTER_BYTES * (2 + CONNECTIONS + REQUESTS)
# The keys come next. They are never read here.
KEYS_OFFSET, KEYS_BYTES = HEADER_BYTES, 64
# Two numbers more.
FAILED_READS_OFFSET = KEYS_OFFSET + KEYS_BYTES + 8
# Where the backing file was last found (engine/region/last_place.h), twice.
LAST_PLACE_OFFSET, LAST_PLACE_BYTES = 2048, 256
_DISCONNECTED_OFFSET = COUNTERS_OFFSET + _COUNTER_BYTES * COUNTERS.index("disconnected")
_FILE_STATE_OFFSET = COUNTERS_OFFSET + _COUNTER_BYTES * COUNTERS.index("file_state")

# The counter `file_state`: enum region_file.
FILE_THERE, FILE_DELETED, FILE_REPLACED, FILE_TRUNCATED = range(4)
FILE_GONE = (FILE_DELETED, FILE_REPLACED)
# The counter `owner_state`: enum owner_state of owner_watch.h.
OWNER_NONE, OWNER_HELD, OWNER_UNSURE, OWNER_STOLEN = range(4)


def create() -> int:
    """An empty region; the first worker lays it out, and seals its size. Not inherited by children unless handed down.
    No other user's process may open it through /proc."""
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(descriptor, 0o600)
    return descriptor


def is_made(descriptor: int) -> bool:
    """Whether a worker has laid it out."""
    return os.fstat(descriptor).st_size > 0


def identity(descriptor: int) -> str:
    """What no other region has while the machine is up, whichever descriptor it is asked of."""
    found = os.fstat(descriptor)
    return f"{found.st_dev}:{found.st_ino}"


def version_of(descriptor: int) -> int | None:
    """The version of its layout; None when it is empty, or not a region. OSError where it cannot be read."""
    header = os.pread(descriptor, VERSION_OFFSET + 4, 0)
    return int.from_bytes(header[VERSION_OFFSET:], sys.byteorder) if header.startswith(MAGIC) else None


def forget_keys(descriptor: int) -> None:
    """Overwrite the keys of a region that is not needed again: what is on the NAS is of no use from here on.

    Not while a worker has it locked, which may encrypt with what is there then: the kernel frees the region soon, and
    no process can read its pages after that.
    """
    import fcntl  # not for the worker

    try:
        if version_of(descriptor) not in ENCRYPTED:
            return
        # flock(2) belongs to the open file, which may be shared with the worker
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(again, bytes(KEYS_BYTES), KEYS_OFFSET)
    except BlockingIOError:
        pass
    finally:
        os.close(again)


def read_counters(descriptor: int) -> dict[str, int | list[int]]:
    """Every counter by its name, each histogram as a list of HISTOGRAM_BUCKETS, and `slots`, `generation` (how many
    workers have mapped it), `region_bytes`, `failed_reads` and `failed_read_ms` (when the last did, CLOCK_MONOTONIC).
    Takes no lock: each number is consistent in itself only.

    Of a region that is_made, of one of VERSIONS. OSError where it cannot be read.
    """
    header = os.pread(descriptor, HEADER_BYTES, 0).ljust(HEADER_BYTES, b"\0")

    def number(offset: int, length_bytes: int = _COUNTER_BYTES) -> int:
        return int.from_bytes(header[offset : offset + length_bytes], sys.byteorder)

    found: dict[str, int | list[int]] = {}
    offset = COUNTERS_OFFSET
    for name in COUNTERS:
        found[name] = number(offset)
        offset += _COUNTER_BYTES
    for name in HISTOGRAMS:
        found[name] = [number(offset + _COUNTER_BYTES * bucket) for bucket in range(HISTOGRAM_BUCKETS)]
        offset += _COUNTER_BYTES * HISTOGRAM_BUCKETS
    found["slots"] = number(SLOT_COUNT_OFFSET, 4)
    found["generation"] = number(GENERATION_OFFSET)
    found["region_bytes"] = number(REGION_BYTES_OFFSET)
    # behind the keys, which are not read
    failed = os.pread(descriptor, 2 * _COUNTER_BYTES, FAILED_READS_OFFSET)
    found["failed_reads"] = int.from_bytes(failed[:_COUNTER_BYTES], sys.byteorder)
    found["failed_read_ms"] = int.from_bytes(failed[_COUNTER_BYTES:], sys.byteorder)
    return found


def read_waits(descriptor: int) -> tuple[int, int, int] | None:
    """When the server was last heard, since when an answer has been waited for without a pause, and when the oldest
    request began: CLOCK_MONOTONIC in ms, 0 for never and for nothing. Takes no lock.

    Of a region that is_made. None where its worker is of a version that does not write these. OSError where it cannot
    be read.
    """
    found = _waits(os.pread(descriptor, HEADER_BYTES, 0))
    if found is None:
        return None
    last_received_ms, *since_ms = found
    return last_received_ms, _earliest_ms(since_ms[:CONNECTIONS]), _earliest_ms(since_ms[CONNECTIONS:])


def server_times(mapping: mmap.mmap) -> tuple[int, int]:
    """When the server was last heard, and since when it owes an answer and has sent nothing over a connection that is
    up: CLOCK_MONOTONIC in ms, 0 for never and for nothing. Of a mapped region that is_made.

    It owes nothing while the file is gone: it may be answering each attempt to find that. Both are 0 where the worker
    is of a version that does not write these.
    """
    is_away = is_disconnected(mapping)  # first: the worker notes when it has connected, and then that it has
    header = mapping[:HEADER_BYTES]
    found = _waits(header)
    if found is None:
        return 0, 0
    state = header[_FILE_STATE_OFFSET : _FILE_STATE_OFFSET + _COUNTER_BYTES]
    if int.from_bytes(state, sys.byteorder) in FILE_GONE or is_away:
        return found[0], 0
    return found[0], owed_since_ms(found[0], _earliest_ms(found[1 : 1 + CONNECTIONS]))


def owed_since_ms(last_received_ms: int, waiting_since_ms: int) -> int:
    """Since when the server owes an answer and has sent nothing, from the first two values of `read_waits`."""
    return max(last_received_ms, waiting_since_ms) if waiting_since_ms else 0


def read_connection_waits(descriptor: int) -> list[int]:
    """Since when each connection has waited for answers, as in `read_waits`; none where that is None."""
    found = _waits(os.pread(descriptor, HEADER_BYTES, 0))
    return found[1 : 1 + CONNECTIONS] if found is not None else []


def _earliest_ms(found: list[int]) -> int:
    return min((at_ms for at_ms in found if at_ms), default=0)


def _waits(header: bytes) -> list[int] | None:
    """struct region_waits less its writer, of a region's header; None where another version wrote it."""
    header = header.ljust(HEADER_BYTES, b"\0")
    writer, *numbers = (
        int.from_bytes(header[offset : offset + _COUNTER_BYTES], sys.byteorder)
        for offset in range(WAITS_OFFSET, HEADER_BYTES, _COUNTER_BYTES)
    )
    generation = header[GENERATION_OFFSET : GENERATION_OFFSET + _COUNTER_BYTES]
    return numbers if writer and writer == int.from_bytes(generation, sys.byteorder) else None


def is_disconnected(mapping: mmap.mmap) -> bool:
    """Whether the worker has no connection to the server now: the counter `disconnected` of a mapped region."""
    return any(mapping[_DISCONNECTED_OFFSET : _DISCONNECTED_OFFSET + _COUNTER_BYTES])


def hold_in_memory(descriptor: int) -> mmap.mmap:
    """Map all of it and touch each page, so that a process that has locked its memory (mlockall(2), FUTURE) keeps
    it there while no worker does. The pages of a memfd are swappable."""
    import mmap  # not for the worker

    mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)
    for offset in range(0, len(mapping), SLOT_BYTES):
        mapping[offset]
    return mapping


# In other processes. `root` stands for "/".


def take_from(pid: int, root: str | os.PathLike[str] = "/") -> int | None:
    """A descriptor of the region that a process holds, through /proc/PID/fd; None when it holds none. OSError: it is
    not known, for want of memory or descriptors (errors.is_of_want).

    proc_pid_fd(5): needs the rights of ptrace(2) over the process.
    """
    for number in _descriptors_of(pid, root):
        with _UnlessClosed():
            return os.open(_proc(root, pid, "fd", number), os.O_RDWR | os.O_CLOEXEC)
    return None


def is_held_by(descriptor: int, pid: int, root: str | os.PathLike[str] = "/") -> bool:
    """Whether a living process has this very region. OSError as `take_from`."""
    return any(True for _ in _descriptors_of_this(descriptor, pid, root))


def holder(descriptor: int, process_name: str, root: str | os.PathLike[str] = "/") -> int | None:
    """The process called `process_name` (its argv[0]) that has this region locked, as a worker that serves has and a
    standby has not; None when none has. OSError as `take_from`.

    Only of one that has it locked is the name read, which is in its own memory: where that has been swapped out, to a
    device that has no worker, reading it waits for ever.
    """
    for pid in filter(str.isdigit, os.listdir(os.path.join(root, "proc"))):
        name = ""
        with _UnlessClosed():
            if _is_locked_by(descriptor, int(pid), root):
                name = _read(_proc(root, pid, "cmdline")).partition(b"\0")[0].decode(errors="replace")
        if name == process_name:
            return int(pid)
    return None


def _is_locked_by(descriptor: int, pid: int, root: str | os.PathLike[str]) -> bool:
    """proc_pid_fdinfo(5): a line "lock:" stands with the very open file that has the lock."""
    for number in _descriptors_of_this(descriptor, pid, root):
        with _UnlessClosed():
            if b"\nlock:" in _read(_proc(root, pid, "fdinfo", number)):
                return True
    return False


def _descriptors_of_this(descriptor: int, pid: int, root: str | os.PathLike[str]) -> Iterator[str]:
    """A process's descriptors of this very region."""
    wanted = os.fstat(descriptor)
    for number in _descriptors_of(pid, root):
        found = None
        with _UnlessClosed():
            found = os.stat(_proc(root, pid, "fd", number))
        if found is not None and (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            yield number


def _descriptors_of(pid: int, root: str | os.PathLike[str]) -> Iterator[str]:
    """A process's descriptors of any region; none when it has ended, or may not be looked into."""
    numbers: list[str] = []
    with _UnlessClosed():
        numbers = os.listdir(_proc(root, pid, "fd"))
    for number in numbers:
        target = ""
        with _UnlessClosed():
            target = os.readlink(_proc(root, pid, "fd", number))
        if target.startswith(f"/memfd:{_NAME}"):
            yield number


class _UnlessClosed:
    """What is looked at may have ended, or been closed, meanwhile. OSError: it is not known.

    A class, because the worker has this module: contextlib costs it 350 KiB.
    """

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, OSError) and not is_of_want(error)


def _proc(root: str | os.PathLike[str], pid: int | str, *parts: str) -> str:
    return os.path.join(root, "proc", str(pid), *parts)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
