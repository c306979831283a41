# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writing zeros: chunks, the window, a server without room, and interruptions, on a server in memory."""

from __future__ import annotations

import errno
import logging
import threading

import pytest
from support import fake_files
from support.fake_files import CHUNK, SIZE, URL, WINDOW_CHUNKS, FakeServer, Inode, InterruptAt, fails_with

from nbdnfs import backing_size, nfs_url
from nbdnfs.errors import CannotCreateError, IOFailureError
from nbdnfs.nas import backing_file, part_file, zeros


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """As fake_files.install."""
    return fake_files.install(monkeypatch)


@pytest.mark.parametrize("size_bytes", [backing_size.MIN_BYTES, 11 * 4096, 1 << 20], ids=str)
def test_sizes_that_are_not_a_multiple_of_the_chunk(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    """The last chunk is as long as the rest of the file."""
    monkeypatch.setattr(zeros, "CHUNK_BYTES", 3 * 4096)
    backing_file.create(URL, size_bytes)
    assert bytes(server.files["swap0"].data) == bytes(size_bytes)


@pytest.mark.parametrize("missing", range(WINDOW_CHUNKS))
def test_an_interruption_leaves_holes_in_the_window_only(server: FakeServer, missing: int) -> None:
    """A file whose last writes arrived out of order when the machine died has no hole afterwards."""
    chunks = 30
    name = part_file.name_of(nfs_url.parse(URL))
    part = server.add(name, b"\0" * CHUNK * chunks)
    hole = (chunks - WINDOW_CHUNKS + missing) * CHUNK
    part.data[hole : hole + CHUNK] = b"\xff" * CHUNK
    backing_file.create(URL, SIZE)
    assert bytes(server.files["swap0"].data) == bytes(SIZE)


def test_the_window_is_kept(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one chunk is slow, no chunk is written that lies a window or more behind it."""
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
    ("number", "message", "hint"),
    [
        (errno.ENOSPC, "no space left in /export on 192.0.2.1: there was room for 80 KiB", "free space"),
        (errno.EDQUOT, "the quota for /export on 192.0.2.1 is used up: there was room for 80 KiB", "quota"),
    ],
    ids=["ENOSPC", "EDQUOT"],
)
def test_no_room(server: FakeServer, number: int, message: str, hint: str) -> None:
    """A full disk and a used-up quota have messages of their own; the part file is removed."""
    server.room_bytes, server.no_room_errno = 20 * CHUNK, number
    fails_with(CannotCreateError, message, hint)
    assert not server.files


def test_no_room_for_a_file_that_grows(server: FakeServer) -> None:
    """An existing file that cannot grow is not removed."""
    server.add("swap0", bytes(CHUNK))
    server.room_bytes = 20 * CHUNK
    fails_with(CannotCreateError, "no space left", "free space", force=True)
    assert list(server.files) == ["swap0"]


def test_a_server_that_fails_to_write(server: FakeServer) -> None:
    """The message says at which offset, and nothing stays."""
    server.write_errno_at = {20 * CHUNK: errno.EIO}
    fails_with(IOFailureError, "failed to write /export/swap0 at 80 KiB: Input/output error", "again")
    assert not server.files


@pytest.mark.parametrize("force", [False, True])
def test_a_server_that_has_no_room(server: FakeServer, force: bool) -> None:
    """FSSTAT says so: nothing is written, and nothing stays but the file that was there."""
    server.available_bytes = SIZE // 2
    before = {"swap0": server.add("swap0", bytes(CHUNK))} if force else {}
    missing = SIZE - CHUNK if force else SIZE
    fails_with(
        CannotCreateError,
        f"no room in /export on 192.0.2.1: {missing // 1024} KiB are needed, and 128 KiB of 1 TiB are available",
        "free space there",
        force=force,
    )
    assert server.files == before
    assert server.writes == 0


def test_a_server_that_does_not_know_its_room(server: FakeServer) -> None:
    """It says 0 of 0: the writes will show."""
    server.available_bytes = server.total_bytes = 0
    backing_file.create(URL, SIZE)
    assert list(server.files) == ["swap0"]


def test_a_server_that_keeps_no_zeros(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """Zeros that are compressed away reserve no room: a warning says so, once."""
    server.allocates = 0.01
    with caplog.at_level(logging.WARNING):
        backing_file.create(URL, SIZE)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "192.0.2.1 keeps only 2.6 KiB of the 256 KiB it was sent" in warning


def test_an_interruption_while_the_server_is_away(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C ends create although writes hang, and the log says how far it was."""
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
