# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server in memory, in the place of NfsFile, for tests of what creates and inspects files. It fails as it is set."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from nbdnfs.errors import NbdnfsError
from nbdnfs.nas import backing_file, creator_lock, part_file, patience, remote_file, zeros

URL = "nfs://192.0.2.1/export/swap0?version=3&uid=0&gid=0"
CHUNK = 4096
WINDOW_CHUNKS = 8
SIZE = 64 * CHUNK


@dataclasses.dataclass
class Inode:
    """A file of the fake: its bytes, and the offsets of the chunks that were written."""

    ino: int
    data: bytearray = dataclasses.field(default_factory=bytearray)
    written: set[int] = dataclasses.field(default_factory=set)
    uid: int = 0
    mode: int = 0o600
    nlink: int = 1
    is_regular: bool = True


class FakeServer:
    """One directory in memory, and what is wrong with it. `_lock` guards the files and the counters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inos = itertools.count(100)
        self.files: dict[str, Inode] = {}
        self.writes = 0
        self.most_under_way = 0
        self._under_way = 0
        # faults
        self.new_file_uid = 0
        self.open_errno: dict[str, int] = {}
        self.create_errno = 0
        self.room_bytes = 1 << 40
        self.total_bytes = self.available_bytes = 1 << 40
        self.no_room_errno = errno.ENOSPC
        self.write_errno_at: dict[int, int] = {}
        self.has_links = True
        self.symbolic_links: set[str] = set()
        self.busy: dict[str, int] = {}
        self.lost_answers: list[str] = []
        self.allocates = 1.0
        self.before_link: Callable[[], object] = lambda: None
        self.before_create: Callable[[str], object] = lambda name: None
        self.before_stat: Callable[[], object] = lambda: None
        self.hold_write_at = 1 << 62
        self.let_go = threading.Event()

    def add(self, name: str, data: bytes = b"", **fields: Any) -> Inode:
        self.files[name] = Inode(next(self._inos), bytearray(data), **fields)
        return self.files[name]

    def open(
        self,
        url: str,
        address: str,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o600,
        names_only: bool = False,
        **_: bool,
    ) -> FakeNfsFile:
        """What NfsFile(...) is."""
        assert address == "192.0.2.1"
        name = url.partition("?")[0].rpartition("/")[2]
        self.put_off("create" if create else "open")
        if names_only:
            return FakeNfsFile(self, Inode(0, bytearray(), is_regular=False))
        if create:
            self.before_create(name)
        with self._lock:
            if name in self.open_errno:
                raise failure(self.open_errno[name])
            if name not in self.files:
                if not create:
                    raise failure(errno.ENOENT)
                if self.create_errno:
                    raise failure(self.create_errno)
                self.add(name, uid=self.new_file_uid, mode=mode)
            elif exclusive:
                raise failure(errno.EEXIST)
            return FakeNfsFile(self, self.files[name])

    def write(self, inode: Inode, data: bytes, offset: int) -> int:
        with self._lock:
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
            number = self.write_errno_at.get(offset)
            end = offset + len(data)
        try:
            if offset >= self.hold_write_at:
                self.let_go.wait(30)
            if number:
                raise OSError(number, os.strerror(number))
            with self._lock:
                if end > self.room_bytes:
                    raise OSError(self.no_room_errno, os.strerror(self.no_room_errno))
                self.writes += 1
                inode.data.extend(bytes([255]) * (end - len(inode.data)))  # a hole would show
                inode.data[offset:end] = data
                inode.written.add(offset)
        finally:
            with self._lock:
                self._under_way -= 1
        return len(data)

    def name_operation(self, what: str, operation: Callable[[], None]) -> None:
        """Do it; say that the connection was lost where that is wanted."""
        self.put_off(what)
        with self._lock:
            try:
                operation()
            except KeyError:
                raise failure(errno.ENOENT, "name") from None
            if what in self.lost_answers:
                self.lost_answers.remove(what)
                raise failure(errno.ECONNRESET, "name")

    def put_off(self, what: str) -> None:
        """Ask to try again later, for as many calls as `busy` says."""
        with self._lock:
            if self.busy.get(what, 0) > 0:
                self.busy[what] -= 1
                raise failure(errno.EAGAIN, "connect" if what in ("open", "create") else "name")

    def link(self, old: str, new: str) -> None:
        self.before_link()
        if not self.has_links:
            raise failure(errno.ENOTSUP, "name")
        if new in self.files:
            raise failure(errno.EEXIST, "name")
        self.files[new] = self.files[old]
        self.files[old].nlink += 1

    def rename(self, old: str, new: str) -> None:
        self.files[new] = self.files.pop(old)

    def unlink(self, name: str) -> None:
        self.files.pop(name).nlink -= 1


class FakeNfsFile:
    """The interface of nbdnfs.engine.NfsFile."""

    def __init__(self, server: FakeServer, inode: Inode) -> None:
        self._server = server
        self._inode = inode
        self.size_bytes = len(inode.data)

    def stat(self) -> dict[str, Any]:
        self._server.put_off("stat")
        self._server.before_stat()
        inode = self._inode
        return {
            "size": len(inode.data),
            "mode": inode.mode,
            "uid": inode.uid,
            "gid": inode.uid,
            "ino": inode.ino,
            "nlink": inode.nlink,
            "mtime_us": self._server.writes,
            "used": int(len(inode.data) * self._server.allocates),
            "is_regular": inode.is_regular,
        }

    def space(self) -> dict[str, int]:
        return {"total": self._server.total_bytes, "available": self._server.available_bytes}

    def pread(self, buffer: bytearray, offset: int) -> int:
        found = self._inode.data[offset : offset + len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    def pwrite(self, data: memoryview, offset: int) -> int:
        return self._server.write(self._inode, bytes(data), offset)

    def lookup(self, path: str, follow: bool = True) -> dict[str, Any]:
        self._server.put_off("lookup")
        name = path.removeprefix("/")
        try:
            found = FakeNfsFile(self._server, self._server.files[name]).stat()
            return found | {"is_regular": found["is_regular"] and (follow or name not in self._server.symbolic_links)}
        except KeyError:
            raise failure(errno.ENOENT, "name") from None

    def link(self, old: str, new: str) -> None:
        self._server.name_operation("link", lambda: self._server.link(old[1:], new[1:]))

    def rename(self, old: str, new: str) -> None:
        self._server.name_operation("rename", lambda: self._server.rename(old[1:], new[1:]))

    def unlink(self, path: str) -> None:
        self._server.name_operation("unlink", lambda: self._server.unlink(path[1:]))

    def close(self) -> None:
        pass


def failure(number: int, phase: str = "open") -> OSError:
    error = OSError(number, os.strerror(number))
    error.phase = phase  # type: ignore[attr-defined]
    return error


def install(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """An empty server, in the place of NfsFile; zeros are written in chunks of one page."""
    server = FakeServer()
    monkeypatch.setattr(remote_file, "NfsFile", server.open)
    monkeypatch.setattr(zeros, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(part_file, "_WATCH_S", 0.0)
    monkeypatch.setattr(zeros, "_ALLOCATION_SETTLES_S", 0.0)
    monkeypatch.setattr(remote_file, "_RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    # each process has a server of its own at this address: their creators must not wait for each other
    monkeypatch.setattr(creator_lock, "_NFS_PORT", os.getpid())
    return server


def part_names(server: FakeServer) -> list[str]:
    return [name for name in server.files if name.endswith(".part")]


def fails_with(kind: type[NbdnfsError], message: str, hint: str, **arguments: Any) -> None:
    """create fails with this kind of error, and these words in message and hint."""
    with pytest.raises(kind) as caught:
        backing_file.create(**{"url": URL, "size_bytes": SIZE, **arguments})
    assert message in caught.value.message
    assert hint in caught.value.hint


class InterruptAt:
    """A progress callback that is Ctrl-C when so much is done."""

    def __init__(self, done_bytes: int) -> None:
        self.limit = done_bytes

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if done_bytes >= self.limit:
            raise KeyboardInterrupt
