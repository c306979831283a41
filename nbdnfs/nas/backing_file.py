# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make and inspect backing files.

A backing file is made of real zeros, never of a hole: on a full NAS a hole is lost swap. It grows under a name
of its own, `.NAME.<hash>.part` beside the final one, where `<hash>` stands for this machine. A later `create`
goes on with it; when it is complete, a hard link gives it its name, which fails where the name exists. So a
file that has its name is complete, and nobody's file is ever overwritten by chance.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from nbdnfs import nfs_url, quantities
from nbdnfs.engine import NfsFile, libnfs_version
from nbdnfs.errors import (
    BusyError,
    CannotCreateError,
    ConfigError,
    IOFailureError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
    UsageError,
)
from nbdnfs.nas import explain, owner_record, ownership
from nbdnfs.nfs_url import NfsUrl
from nbdnfs.sizes import KERNEL_PAGE_BYTES, SLOT_BYTES

if TYPE_CHECKING:
    from nbdnfs.engine._engine import FileStat

log = logging.getLogger(__name__)

# mkswap(8): a swap area has ten pages at least
MIN_SIZE_BYTES = 10 * KERNEL_PAGE_BYTES

_CHUNK_BYTES = 1 << 20
# Chunks under way at a time. Chunk number n is written only when number n - _WINDOW_CHUNKS is on the NAS, so an
# interrupted file is whole up to its length less the window.
_WINDOW_CHUNKS = 8
# How long an interrupted create waits for writes that are under way.
_INTERRUPTED_GRACE_S = 2.0
# File systems that allocate late (ZFS: one transaction group) show the blocks of a file only after seconds.
_ALLOCATION_SETTLES_S = 8.0
# How often the connection may be lost under one and the same operation.
_LOSSES_PER_OPERATION = 20
_RETRY_PAUSE_S = 0.2

# Called with the bytes done and the total.
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class BackingFile:
    """What the server says about a backing file. `mode` is its permission bits."""

    size_bytes: int
    mode: int
    fileid: int
    allocated_bytes: int


def inspect(url: str) -> BackingFile:
    """Ask the server about the file of a URL. Raises UsageError, NoHostError, and what `diagnose.explain` makes."""
    target = nfs_url.parse(url)
    address = target.resolve()
    with _explained(target, address), _closing(NfsFile(target.text, address, read_only=True)) as file:
        found = _stat(file)
    return BackingFile(size_bytes=found["size"], mode=found["mode"], fileid=found["ino"], allocated_bytes=found["used"])


def create(url: str, size_bytes: int, *, force: bool = False, progress: Progress | None = None) -> None:
    """Make a backing file of `size_bytes` zero bytes, mode 0600, all of its blocks written.

    An existing file is refused unless `force`; then all of it is written with zeros and it grows to the size; it
    is never made smaller, and never overwritten while somebody owns it. Interrupted, even by SIGKILL or a power
    cut, the same call goes on where it stood (with `force` on an existing file: from the start). While the server
    is away it waits.

    UsageError: no possible size or URL. CannotCreateError: it exists, or there is no room (what was written is
    removed then). PermissionDeniedError: not allowed, or root is squashed. ConfigError: an existing file that
    others may read. BusyError: another create of this file runs on this machine. IOFailureError: the server
    fails to write. OwnedError: somebody swaps to it. Others as `diagnose.explain`.
    """
    _check_size(size_bytes)
    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    address = target.resolve()
    report = progress or (lambda _done, _total: None)
    with _only_creator_here(target), _explained(target, address):
        existing = _open_if_there(target.text, address, read_only=not force)
        if existing is None:
            _create_new(target, address, size_bytes, report)
            return
        with _closing(existing):
            _remove_leftover(existing, target)
            _check_may_overwrite(_stat(existing), target, size_bytes, force)
            ownership.refuse_if_owned(url, owner_record.identity())
            _write_zeros(existing, 0, size_bytes, target, report)
            _warn_unless_allocated(existing, target, size_bytes)


def _check_size(size_bytes: int) -> None:
    if size_bytes < MIN_SIZE_BYTES:
        raise UsageError(
            f"{size_bytes} bytes are too few: a swap area has at least {MIN_SIZE_BYTES}", "ask for example for 2G"
        )
    if size_bytes % SLOT_BYTES:
        raise UsageError(
            f"{size_bytes} bytes are not a multiple of {SLOT_BYTES}",
            f"ask for {size_bytes + -size_bytes % SLOT_BYTES} bytes, or for example for 2G",
        )


# A file that exists


def _remove_leftover(existing: NfsFile, target: NfsUrl) -> None:
    """Finish a create that died between giving the file its name and taking the old one away."""
    part_path = f"/{_part_name(target)}"
    if _fileid(existing, part_path) == _stat(existing)["ino"]:
        _unlink_if_there(existing, part_path)


def _check_may_overwrite(found: FileStat, target: NfsUrl, size_bytes: int, force: bool) -> None:
    path, size = f"{target.path} on {target.host}", quantities.format_size(found["size"])
    if not found["is_regular"]:
        raise NoInputError(f"{path} is no regular file", "name a file, for example .../%H.swap")
    if not force:
        raise CannotCreateError(
            f"{path} exists already ({size})", "use it as it is, or overwrite it with zeros: --force"
        )
    if found["size"] > size_bytes:
        raise CannotCreateError(
            f"{path} has {size} ({found['size']} bytes): it is never made smaller",
            f"ask for {found['size']} bytes or more, or remove the file",
        )
    if found["mode"] & 0o077:
        raise ConfigError(
            f"{path} is open to others (mode {found['mode']:04o}): they could read what is swapped out",
            "chmod 600 it, or remove it and create it anew",
        )


# A new file


def _create_new(target: NfsUrl, address: str, size_bytes: int, report: Progress) -> None:
    part_name = _part_name(target)
    with _closing(_open_part(target, part_name, address, size_bytes)) as part:
        _refuse_squashed(part, part_name, target)
        written = _stat(part)["size"]
        start = max(0, written - _WINDOW_CHUNKS * _CHUNK_BYTES) // _CHUNK_BYTES * _CHUNK_BYTES
        try:
            _write_zeros(part, start, size_bytes, target, report)
        except CannotCreateError:
            # a NAS left full by a hidden file would be everybody's trouble
            _unlink_if_there(part, f"/{part_name}")
            raise
        _give_name(part, part_name, target)
        _warn_unless_allocated(part, target, size_bytes)


def _part_name(target: NfsUrl) -> str:
    """The name under which this machine makes the file: the same each time, and another on each machine."""
    try:
        machine = nfs_url.machine_id()
    except UsageError:  # not every small system has one
        machine = ""
    digest = hashlib.sha256("\0".join([machine, socket.gethostname(), target.name]).encode()).hexdigest()[:12]
    # NAME_MAX is 255 bytes nearly everywhere
    name = target.name if len(target.name.encode()) <= 200 else "nbdnfs"
    return f".{name}.{digest}.part"


def _open_part(target: NfsUrl, part_name: str, address: str, size_bytes: int) -> NfsFile:
    """The part file, open for writing: that of an interrupted create where it can go on, else a new one."""
    path, mark, options = target.text.partition("?")
    part_url = path.removesuffix(target.name) + part_name + mark + options
    try:
        part = _open_if_there(part_url, address, read_only=False)
        if part is not None:
            found = _stat(part)
            # A second name: it is somebody's backing file by now. Other permissions: it was not made here. Too
            # long: it was to become a larger file, and nothing here truncates.
            if found["nlink"] == 1 and found["mode"] == 0o600 and found["size"] <= size_bytes:
                log.info("going on with an interrupted create, at %s", quantities.format_size(found["size"]))
                return part
            with _closing(part):
                _unlink_if_there(part, f"/{part_name}")
        return NfsFile(part_url, address, create=True, exclusive=True, mode=0o600)
    except OSError as error:
        raise _cannot_create(error, target, address) from None


def _cannot_create(error: OSError, target: NfsUrl, address: str) -> NbdnfsError:
    """The user's view of an error that making a file in the URL's directory raised."""
    if getattr(error, "phase", "open") == "open":
        uid = _own_uid(target)
        if error.errno == errno.ENOENT:
            return NoInputError(f"{target.host} has no directory {target.directory}", "make it there first")
        if error.errno in (errno.EACCES, errno.EPERM) and uid == 0:
            return PermissionDeniedError(
                f"{target.host} does not let root make a file in {target.directory}: root is squashed there",
                "export it with no_root_squash, or give the directory owner's uid= and gid= in the URL",
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return PermissionDeniedError(
                f"{target.host} does not let uid {uid} make a file in {target.directory}",
                "let that user write there, or give the directory owner's uid= and gid= in the URL",
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _no_room(error, target, 0)
    return explain.explain(error, target, address)


def _refuse_squashed(part: NfsFile, part_name: str, target: NfsUrl) -> None:
    """PermissionDeniedError, with the file gone, when the server made the file somebody else's.

    Then everybody whom the server takes for that somebody may read what is swapped out. Who wants that says so
    with uid= in the URL. NFSv4 sends owners as names, which need not translate: no conclusion there.
    """
    found = _stat(part)
    own_uid = _own_uid(target)
    if found["uid"] == own_uid or target.version != 3:
        return
    _unlink_if_there(part, f"/{part_name}")
    raise PermissionDeniedError(
        f"{target.host} squashes {'root' if own_uid == 0 else f'uid {own_uid}'}: a new file in {target.directory} "
        f"belongs to uid {found['uid']}, who could read what is swapped out",
        f"export it with no_root_squash, or accept that: uid={found['uid']}&gid={found['gid']} in the URL",
    )


def _own_uid(target: NfsUrl) -> int:
    """Who the server is told that we are: libnfs sends getuid() unless the URL says otherwise."""
    return target.options.get("uid", os.getuid())


def _give_name(part: NfsFile, part_name: str, target: NfsUrl) -> None:
    """Give the complete part file its final name, which must be free. CannotCreateError when it no longer is.

    By a hard link, which replaces nothing; where the server has none by a rename, with a gap between the look
    and the deed. What the answer says counts for little (it may be the second one, the first was lost): who has
    the name is asked.
    """
    old, new = f"/{part_name}", f"/{target.name}"
    own_fileid = _stat(part)["ino"]
    failure: OSError | None = None
    for operation in (part.link, part.rename):
        try:
            _retry(functools.partial(operation, old, new))
        except OSError as error:
            failure = error
        found = _fileid(part, new)
        if found == own_fileid:
            _unlink_if_there(part, old)
            return
        if found is not None:
            raise CannotCreateError(
                f"{target.path} on {target.host} has come into being meanwhile, by somebody else's hand",
                "use that one, or run this again with --force to overwrite it",
            )
    raise failure or OSError(errno.EIO, "the server does not give the file its name")


# Names


def _open_if_there(url: str, address: str, *, read_only: bool) -> NfsFile | None:
    try:
        return NfsFile(url, address, read_only=read_only)
    except OSError as error:
        if error.errno == errno.ENOENT and getattr(error, "phase", "open") == "open":
            return None
        raise


def _stat(file: NfsFile) -> FileStat:
    return _retry(file.stat)


def _fileid(file: NfsFile, path: str) -> int | None:
    """Which file has this name; None when none has."""
    try:
        return _retry(lambda: file.lookup(path))["ino"]
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _unlink_if_there(file: NfsFile, path: str) -> None:
    try:
        _retry(lambda: file.unlink(path))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _retry(operation: Callable[[], T]) -> T:
    """Do an operation when the server is there, and again when the connection was lost under it.

    It may have been done then. As writes do, it waits for a server that is away for as long as that takes.
    """
    losses = 0
    while True:
        try:
            return operation()
        except OSError as error:
            losses += error.errno == errno.ECONNRESET
            if error.errno not in (errno.ECONNRESET, errno.ENOTCONN) or losses > _LOSSES_PER_OPERATION:
                raise
        time.sleep(_RETRY_PAUSE_S)


# Writing


class _Writers:
    """Daemon threads that run calls; `submit` hands one over. They end with the context.

    No ThreadPoolExecutor: that one joins its threads when Python ends, and a write to a server that is away
    lasts for as long as it is. `_calls` is all that is shared.
    """

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[int], Callable[[], int]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], int]) -> Future[int]:
        future: Future[int] = Future()
        self._calls.put((future, call))
        return future

    def end(self, timeout_s: float) -> None:
        """Forget the calls that nobody has begun, and wait for the others, `timeout_s` in all."""
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


def _write_zeros(file: NfsFile, start: int, end: int, target: NfsUrl, report: Progress) -> None:
    """Write zeros from `start` up to `end`, in order but for the window; `report` what is on the NAS without gaps.

    CannotCreateError when there is no room, IOFailureError when the server fails otherwise.
    """
    zeros = memoryview(bytes(_CHUNK_BYTES))
    window: collections.deque[tuple[int, Future[int]]] = collections.deque()
    done, following = start, start
    writers = _Writers(_WINDOW_CHUNKS)
    report(done, end)
    try:
        while done < end:
            while following < end and len(window) < _WINDOW_CHUNKS:
                chunk, offset = zeros[: end - following], following
                following += len(chunk)
                window.append((following, writers.submit(functools.partial(file.pwrite, chunk, offset))))
            reached, write = window.popleft()
            write.result()
            done = reached
            report(done, end)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(error, target, done) from None
        raise IOFailureError(
            f"{target.host} failed to write {target.path} at {quantities.format_size(done)}: {error.strerror}",
            "mend that and run this again",
        ) from None
    except KeyboardInterrupt:
        log.warning("interrupted at %s of %s", quantities.format_size(done), quantities.format_size(end))
        raise
    finally:
        writers.end(_INTERRUPTED_GRACE_S)


def _no_room(error: OSError, target: NfsUrl, done_bytes: int) -> CannotCreateError:
    place, size = f"{target.directory} on {target.host}", quantities.format_size(done_bytes)
    if error.errno == errno.EDQUOT:
        return CannotCreateError(
            f"the quota for {place} is used up: it left room for {size}",
            "raise the quota, or ask for a smaller size",
        )
    return CannotCreateError(
        f"no space left in {place}: there was room for {size}", "free space there, or ask for a smaller size"
    )


def _warn_unless_allocated(file: NfsFile, target: NfsUrl, size_bytes: int) -> None:
    """Say it when the server keeps less than it was sent: zeros that it compresses away are no room set aside."""
    deadline = time.monotonic() + _ALLOCATION_SETTLES_S
    while (used := _stat(file)["used"]) < size_bytes * 9 // 10:
        if time.monotonic() > deadline:
            log.warning(
                "%s keeps only %s of the %s it was sent (compression, deduplication, thin volumes?): "
                "when it gets full, swapped-out pages have no room",
                target.host,
                quantities.format_size(used),
                quantities.format_size(size_bytes),
            )
            return
        time.sleep(_RETRY_PAUSE_S)


# Around it


@contextlib.contextmanager
def _only_creator_here(target: NfsUrl) -> Iterator[None]:
    """Hold this machine's lock for making this file: an abstract Unix socket (unix(7)), which no crash leaves."""
    digest = hashlib.sha256(f"{target.host}\0{target.path}".encode()).hexdigest()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        try:
            lock.bind(f"\0nbdnfs-create-{digest}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise BusyError(
                f"another create of {target.path} on {target.host} runs on this machine", "wait for its end"
            ) from None
        yield


@contextlib.contextmanager
def _explained(target: NfsUrl, address: str) -> Iterator[None]:
    """Turn an OSError of the engine into what the user can understand."""
    try:
        yield
    except OSError as error:
        raise explain.explain(error, target, address) from None


@contextlib.contextmanager
def _closing(file: NfsFile) -> Iterator[NfsFile]:
    """Close the file at the end, unless an interrupted write still runs: the process's end closes it then."""
    try:
        yield file
    finally:
        with contextlib.suppress(RuntimeError):
            file.close()
