# SPDX-License-Identifier: LGPL-2.1-or-later
"""create and inspect against a server that exists in memory only, and fails as it is told."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from nbdnfs import nfs_url
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
from nbdnfs.nas import backing_file, part_file, remote_file, zeros

URL = "nfs://192.0.2.1/export/swap0?version=3&uid=0&gid=0"
CHUNK = 4096
WINDOW_CHUNKS = 8
SIZE = 64 * CHUNK


@dataclasses.dataclass
class Inode:
    """A file of the fake: its bytes, and which chunks of it somebody has written."""

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
        self.no_room_errno = errno.ENOSPC
        self.write_errno_at: dict[int, int] = {}
        self.has_links = True
        self.lost_answers: list[str] = []
        self.allocates = 1.0
        self.before_link: Callable[[], object] = lambda: None

    def add(self, name: str, data: bytes = b"", **fields: Any) -> Inode:
        self.files[name] = Inode(next(self._inos), bytearray(data), **fields)
        return self.files[name]

    def open(
        self, url: str, address: str, *, create: bool = False, exclusive: bool = False, mode: int = 0o600, **_: bool
    ) -> FakeNfsFile:
        """What NfsFile(...) is."""
        assert address == "192.0.2.1"
        name = url.partition("?")[0].rpartition("/")[2]
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
        with self._lock:
            try:
                operation()
            except KeyError:
                raise failure(errno.ENOENT, "name") from None
            if what in self.lost_answers:
                self.lost_answers.remove(what)
                raise failure(errno.ECONNRESET, "name")

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
        inode = self._inode
        return {
            "size": len(inode.data),
            "mode": inode.mode,
            "uid": inode.uid,
            "gid": inode.uid,
            "ino": inode.ino,
            "nlink": inode.nlink,
            "used": int(len(inode.data) * self._server.allocates),
            "is_regular": inode.is_regular,
        }

    def pwrite(self, data: memoryview, offset: int) -> int:
        return self._server.write(self._inode, bytes(data), offset)

    def lookup(self, path: str) -> dict[str, Any]:
        try:
            return FakeNfsFile(self._server, self._server.files[path.removeprefix("/")]).stat()
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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """An empty server, in the place of NfsFile; chunks of one page."""
    server = FakeServer()
    monkeypatch.setattr(remote_file, "NfsFile", server.open)
    monkeypatch.setattr(zeros, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(zeros, "_ALLOCATION_SETTLES_S", 0.0)
    monkeypatch.setattr(remote_file, "_RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(os, "getuid", lambda: 0)
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


def test_a_new_file_is_all_written_zeros(server: FakeServer) -> None:
    """Size, mode, one name, no byte that was not written, several writes under way but no more than the window."""
    seen: list[tuple[int, int]] = []
    backing_file.create(URL, SIZE, progress=lambda done, total: seen.append((done, total)))
    assert list(server.files) == ["swap0"]
    inode = server.files["swap0"]
    assert (bytes(inode.data), inode.mode, inode.nlink) == (bytes(SIZE), 0o600, 1)
    assert inode.written == set(range(0, SIZE, CHUNK))
    assert server.most_under_way <= WINDOW_CHUNKS
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, SIZE), (SIZE, SIZE))


@pytest.mark.parametrize("size_bytes", [backing_file.MIN_SIZE_BYTES, 11 * 4096, 1 << 20], ids=str)
def test_sizes_that_are_no_multiple_of_the_chunk(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    """The last chunk is as long as it must be."""
    monkeypatch.setattr(zeros, "CHUNK_BYTES", 3 * 4096)
    backing_file.create(URL, size_bytes)
    assert bytes(server.files["swap0"].data) == bytes(size_bytes)


@pytest.mark.parametrize(
    ("size_bytes", "message", "hint"),
    [
        (0, "0 bytes are too few", "2G"),
        (-4096, "-4096 bytes are too few", "2G"),
        (36864, "a swap area has at least 40960", "2G"),
        (1_000_000, "not a multiple of 4096", "1003520"),
    ],
)
def test_impossible_sizes(server: FakeServer, size_bytes: int, message: str, hint: str) -> None:
    """They are refused before the server is asked anything."""
    fails_with(UsageError, message, hint, size_bytes=size_bytes)
    assert not server.files


def test_an_existing_file_is_refused(server: FakeServer) -> None:
    """And is left as it was."""
    server.add("swap0", b"precious")
    fails_with(CannotCreateError, "/export/swap0 on 192.0.2.1 already exists (8 B)", "--force")
    assert bytes(server.files["swap0"].data) == b"precious"
    assert list(server.files) == ["swap0"]


@pytest.mark.parametrize("old_size_bytes", [0, 5000, SIZE])
def test_force_rewrites_and_grows(server: FakeServer, old_size_bytes: int) -> None:
    """Every byte of the old file is overwritten; it is the same file."""
    inode = server.add("swap0", b"\xaa" * old_size_bytes)
    backing_file.create(URL, SIZE, force=True)
    assert server.files == {"swap0": inode}
    assert bytes(inode.data) == bytes(SIZE)


def test_force_never_shrinks(server: FakeServer) -> None:
    """A larger file is refused and left as it was."""
    server.add("swap0", b"\xaa" * (SIZE + 1))
    fails_with(CannotCreateError, f"({SIZE + 1} bytes): it is never made smaller", "remove the file", force=True)
    assert set(server.files["swap0"].data) == {0xAA}


def test_force_wants_a_file_that_is_closed_to_others(server: FakeServer) -> None:
    """Nobody else may read swap; the mode of an existing file is its owner's to change."""
    server.add("swap0", mode=0o640)
    fails_with(ConfigError, "mode 0640", "chmod 600", force=True)


def test_force_on_a_directory(server: FakeServer) -> None:
    """What is no file is refused."""
    server.add("swap0", is_regular=False)
    fails_with(NoInputError, "not a regular file", "name a file", force=True)


@pytest.mark.parametrize("done_chunks", [0, 1, 20, 63])
def test_goes_on_after_an_interruption(server: FakeServer, done_chunks: int) -> None:
    """Ctrl-C leaves the part file; the next create writes the rest, and again no more than the window of it."""
    with pytest.raises(KeyboardInterrupt):
        backing_file.create(URL, SIZE, progress=InterruptAt(done_chunks * CHUNK))
    (part_name,) = part_names(server)
    assert list(server.files) == [part_name]
    part = server.files[part_name]
    server.writes = 0
    seen: list[int] = []
    backing_file.create(URL, SIZE, progress=lambda done, total: seen.append(done))
    assert server.files == {"swap0": part}
    assert bytes(part.data) == bytes(SIZE)
    assert server.writes <= SIZE // CHUNK - done_chunks + WINDOW_CHUNKS
    assert seen[0] >= (done_chunks - WINDOW_CHUNKS) * CHUNK


@pytest.mark.parametrize("missing", range(WINDOW_CHUNKS))
def test_an_interruption_leaves_holes_in_the_window_only(server: FakeServer, missing: int) -> None:
    """A file whose last writes arrived out of order, when the machine died, has no hole afterwards."""
    chunks = 30
    name = part_file.name_of(nfs_url.parse(URL))
    part = server.add(name, b"\0" * CHUNK * chunks)
    hole = (chunks - WINDOW_CHUNKS + missing) * CHUNK
    part.data[hole : hole + CHUNK] = b"\xff" * CHUNK
    backing_file.create(URL, SIZE)
    assert bytes(server.files["swap0"].data) == bytes(SIZE)


def test_the_window_is_kept(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one chunk is slow, none is written that lies a window or more behind it."""
    slow_chunk, release = 10 * CHUNK, threading.Event()
    beyond, reached = threading.Event(), threading.Event()
    write = server.write

    def slow_write(inode: Inode, data: bytes, offset: int) -> int:
        if offset == slow_chunk:
            assert release.wait(30)
        elif offset >= slow_chunk + WINDOW_CHUNKS * CHUNK and not release.is_set():
            beyond.set()
        elif offset == slow_chunk + (WINDOW_CHUNKS - 1) * CHUNK:
            reached.set()
        return write(inode, data, offset)

    monkeypatch.setattr(server, "write", slow_write)
    creator = threading.Thread(target=backing_file.create, args=(URL, SIZE))
    creator.start()
    assert reached.wait(30)
    assert not beyond.wait(0.2)
    release.set()
    creator.join(30)
    assert not creator.is_alive()
    assert bytes(server.files["swap0"].data) == bytes(SIZE)


@pytest.mark.parametrize(
    "unfit",
    [{"data": b"\xaa" * (SIZE + CHUNK)}, {"mode": 0o644}, {"nlink": 2}],
    ids=["too long", "open to others", "has another name"],
)
def test_a_part_file_that_cannot_go_on_is_made_anew(server: FakeServer, unfit: dict[str, Any]) -> None:
    """It loses its name, and nothing is written into it."""
    name = part_file.name_of(nfs_url.parse(URL))
    old = server.add(name, **unfit)
    backing_file.create(URL, SIZE)
    assert list(server.files) == ["swap0"]
    assert server.files["swap0"] is not old
    assert not old.written


def test_dead_between_link_and_unlink(server: FakeServer) -> None:
    """The file is complete and has both names: the next create refuses it, and takes the old name away."""
    name = part_file.name_of(nfs_url.parse(URL))
    server.files["swap0"] = server.add(name, bytes(SIZE), nlink=2)
    fails_with(CannotCreateError, "already exists", "--force")
    assert list(server.files) == ["swap0"]


def test_made_by_somebody_else_meanwhile(server: FakeServer) -> None:
    """Of two machines one makes the file; the other says so and overwrites nothing."""
    server.before_link = lambda: server.files.setdefault("swap0", Inode(1, bytearray(b"theirs")))
    fails_with(CannotCreateError, "was created by another machine", "--force")
    assert bytes(server.files["swap0"].data) == b"theirs"


def test_a_server_without_hard_links(server: FakeServer) -> None:
    """The part file is renamed, unless the name is taken by then."""
    server.has_links = False
    backing_file.create(URL, SIZE)
    assert list(server.files) == ["swap0"]
    server.files.clear()
    server.before_link = lambda: server.files.setdefault("swap0", Inode(1, bytearray(b"theirs")))
    fails_with(CannotCreateError, "was created by another machine", "--force")
    assert bytes(server.files["swap0"].data) == b"theirs"


@pytest.mark.parametrize("has_links", [True, False])
def test_lost_answers_to_name_operations(server: FakeServer, has_links: bool) -> None:
    """A link, rename or unlink whose answer was lost was made all the same."""
    server.has_links = has_links
    server.lost_answers = ["link", "rename", "unlink", "unlink"]
    backing_file.create(URL, SIZE)
    assert list(server.files) == ["swap0"]
    assert bytes(server.files["swap0"].data) == bytes(SIZE)


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (errno.ENOSPC, "no space left in /export on 192.0.2.1: there was room for 80 KiB", "free space"),
        (errno.EDQUOT, "the quota for /export on 192.0.2.1 is used up: there was room for 80 KiB", "quota"),
    ],
    ids=["ENOSPC", "EDQUOT"],
)
def test_no_room(server: FakeServer, number: int, message: str, hint: str) -> None:
    """Told apart; and the part file, which fills what little there was, is gone."""
    server.room_bytes, server.no_room_errno = 20 * CHUNK, number
    fails_with(CannotCreateError, message, hint)
    assert not server.files


def test_no_room_for_a_file_that_grows(server: FakeServer) -> None:
    """An existing file stays."""
    server.add("swap0", bytes(CHUNK))
    server.room_bytes = 20 * CHUNK
    fails_with(CannotCreateError, "no space left", "free space", force=True)
    assert list(server.files) == ["swap0"]


def test_no_room_for_a_name(server: FakeServer) -> None:
    """ENOSPC as early as when the file is made."""
    server.create_errno = errno.ENOSPC
    fails_with(CannotCreateError, "no space left", "free space")


@pytest.mark.parametrize(
    ("uid", "number", "message", "hint"),
    [
        (0, errno.EACCES, "does not let root create a file in /export: root is squashed", "no_root_squash"),
        (0, errno.EPERM, "does not let root create a file in /export: root is squashed", "no_root_squash"),
        (1000, errno.EACCES, "does not let uid 1000 create a file in /export", "let that user write there"),
    ],
)
def test_not_allowed(server: FakeServer, uid: int, number: int, message: str, hint: str) -> None:
    """Root that may not is squashed root; another user has no permission."""
    server.create_errno = number
    fails_with(PermissionDeniedError, message, hint, url=URL.replace("uid=0", f"uid={uid}"))


def test_squashed_to_an_owner_who_may(server: FakeServer) -> None:
    """A file that belongs to somebody else is refused and gone, unless the URL says that somebody."""
    server.new_file_uid = 65534
    fails_with(
        PermissionDeniedError, "squashes root: a new file in /export belongs to uid 65534", "uid=65534&gid=65534"
    )
    assert not server.files
    backing_file.create(URL.replace("uid=0", "uid=65534"), SIZE)
    assert server.files["swap0"].uid == 65534


def test_no_directory(server: FakeServer) -> None:
    """ENOENT for a new file is the directory's."""
    server.create_errno = errno.ENOENT
    fails_with(NoInputError, "192.0.2.1 has no directory /export", "create it")


def test_an_existing_file_that_may_not_be_opened(server: FakeServer) -> None:
    """It is somebody's, so it is not replaced by a new one."""
    server.open_errno["swap0"] = errno.EACCES
    fails_with(PermissionDeniedError, "does not let uid 0 read and write /export/swap0", "squash", force=True)
    assert not server.files


def test_a_server_that_fails_to_write(server: FakeServer) -> None:
    """The message says where; the part file stays, and the next create goes on with it."""
    server.write_errno_at = {20 * CHUNK: errno.EIO}
    fails_with(IOFailureError, "failed to write /export/swap0 at 80 KiB: Input/output error", "again")
    assert part_names(server)
    server.write_errno_at = {}
    backing_file.create(URL, SIZE)
    assert bytes(server.files["swap0"].data) == bytes(SIZE)


def test_one_creator_on_a_machine(server: FakeServer) -> None:
    """The second is refused while the first works, and welcome on another file; nothing is left of the lock."""
    outcomes: list[type[Exception] | None] = []

    def create_another(done: int, total: int) -> None:
        if done == 0:
            for url in (URL, URL.replace("version=3&", ""), URL.replace("swap0", "swap1")):
                try:
                    backing_file.create(url, SIZE)
                    outcomes.append(None)
                except BusyError as error:
                    outcomes.append(type(error))

    backing_file.create(URL, SIZE, progress=create_another)
    assert outcomes == [BusyError, BusyError, None]
    backing_file.create(URL, SIZE, force=True)


def test_a_server_that_keeps_no_zeros(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """Compressed away, zeros reserve nothing: that is said, once."""
    server.allocates = 0.01
    with caplog.at_level(logging.WARNING):
        backing_file.create(URL, SIZE)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "192.0.2.1 keeps only 2.6 KiB of the 256 KiB it was sent" in warning


def test_an_interruption_while_the_server_is_away(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C ends create although writes hang, and says how far it was."""
    monkeypatch.setattr(zeros, "_INTERRUPTED_GRACE_S", 0.05)
    away, release = 20 * CHUNK, threading.Event()
    write = server.write

    def hanging_write(inode: Inode, data: bytes, offset: int) -> int:
        if offset > away:
            release.wait(30)
        return write(inode, data, offset)

    monkeypatch.setattr(server, "write", hanging_write)
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        backing_file.create(URL, SIZE, progress=InterruptAt(away))
    assert "interrupted at 80 KiB of 256 KiB" in caplog.text
    release.set()


def test_long_names_keep_within_255_bytes(server: FakeServer) -> None:
    """The part file's name fits wherever the final one does."""
    url = URL.replace("swap0", "x" * 255)
    assert len(part_file.name_of(nfs_url.parse(url))) <= 255
    backing_file.create(url, SIZE)


def test_part_names_differ_by_file_and_machine(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines that make one file do not write into each other's."""
    names = {part_file.name_of(nfs_url.parse(url)) for url in (URL, URL.replace("swap0", "swap1"))}
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    names.add(part_file.name_of(nfs_url.parse(URL)))
    assert len(names) == 3


def test_inspect(server: FakeServer) -> None:
    """What the server says, in our words."""
    inode = server.add("swap0", bytes(SIZE), mode=0o640)
    assert backing_file.inspect(URL) == backing_file.BackingFile(SIZE, 0o640, inode.ino, SIZE)
    with pytest.raises(NoInputError, match="there is no file /export/none"):
        backing_file.inspect(URL.replace("swap0", "none"))
