# SPDX-License-Identifier: LGPL-2.1-or-later
"""create and inspect, on a server in memory: sizes, existing files, and what is left when it ends."""

from __future__ import annotations

import errno

import pytest
from support import fake_files
from support.fake_files import CHUNK, SIZE, URL, WINDOW_CHUNKS, FakeServer, fails_with

from nbdnfs.errors import BusyError, CannotCreateError, ConfigError, NoInputError, PermissionDeniedError, UsageError
from nbdnfs.nas import backing_file


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """As fake_files.install."""
    return fake_files.install(monkeypatch)


def test_a_new_file_has_every_block_written(server: FakeServer) -> None:
    """Size, mode, one name, every byte written, and no more writes in flight than the window allows."""
    seen: list[tuple[int, int]] = []
    backing_file.create(URL, SIZE, progress=lambda done, total: seen.append((done, total)))
    assert list(server.files) == ["swap0"]
    inode = server.files["swap0"]
    assert (bytes(inode.data), inode.mode, inode.nlink) == (bytes(SIZE), 0o600, 1)
    assert inode.written == set(range(0, SIZE, CHUNK))
    assert server.most_under_way <= WINDOW_CHUNKS
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, SIZE), (SIZE, SIZE))


@pytest.mark.parametrize(
    ("size_bytes", "message", "hint"),
    [
        (0, "0 bytes is too small", "2G"),
        (-4096, "-4096 bytes is too small", "2G"),
        (36864, "a swap area has at least 40960", "2G"),
        (1_000_000, "not a multiple of 4096", "1003520"),
        (200 << 40, "is too large: a swap area has at most 16 TiB", "2G"),
    ],
)
def test_impossible_sizes(server: FakeServer, size_bytes: int, message: str, hint: str) -> None:
    """Impossible sizes are refused before the server is asked anything."""
    fails_with(UsageError, message, hint, size_bytes=size_bytes)
    assert not server.files


def test_an_existing_file_is_refused(server: FakeServer) -> None:
    """An existing file is refused and left as it was."""
    server.add("swap0", b"precious")
    fails_with(CannotCreateError, "/export/swap0 on 192.0.2.1 already exists (8 B)", "--force")
    assert bytes(server.files["swap0"].data) == b"precious"
    assert list(server.files) == ["swap0"]


@pytest.mark.parametrize("old_size_bytes", [0, 5000, SIZE])
def test_force_rewrites_and_grows(server: FakeServer, old_size_bytes: int) -> None:
    """Every byte of the old file is overwritten, and it stays the same file."""
    inode = server.add("swap0", b"\xaa" * old_size_bytes)
    backing_file.create(URL, SIZE, force=True)
    assert server.files == {"swap0": inode}
    assert bytes(inode.data) == bytes(SIZE)


def test_force_never_shrinks(server: FakeServer) -> None:
    """A larger file is refused and left as it was."""
    server.add("swap0", b"\xaa" * (SIZE + 1))
    fails_with(CannotCreateError, f"({SIZE + 1} bytes): it is never made smaller", "remove the file", force=True)
    assert set(server.files["swap0"].data) == {0xAA}


def test_force_refuses_a_file_that_others_may_read(server: FakeServer) -> None:
    """Other users must not read swap; changing the mode of an existing file is left to its owner."""
    server.add("swap0", mode=0o640)
    fails_with(ConfigError, "mode 0640", "chmod 600", force=True)


def test_force_on_a_directory(server: FakeServer) -> None:
    """A directory is refused."""
    server.add("swap0", is_regular=False)
    fails_with(NoInputError, "not a regular file", "name a file", force=True)


def test_an_existing_file_without_permission(server: FakeServer) -> None:
    """An existing file that cannot be opened is not replaced by a new one."""
    server.open_errno["swap0"] = errno.EACCES
    fails_with(PermissionDeniedError, "does not let uid 0 read and write /export/swap0", "squash", force=True)
    assert not server.files


def test_one_creator_on_a_machine(server: FakeServer) -> None:
    """A second create of the file is refused while the first one runs; the lock leaves nothing behind."""
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


def test_inspect(server: FakeServer) -> None:
    """The server's attributes, and the error for a missing file."""
    inode = server.add("swap0", bytes(SIZE), mode=0o640)
    assert backing_file.inspect(URL) == backing_file.BackingFile(SIZE, 0o640, inode.ino, SIZE)
    with pytest.raises(NoInputError, match="there is no file /export/none"):
        backing_file.inspect(URL.replace("swap0", "none"))
