# SPDX-License-Identifier: LGPL-2.1-or-later
"""NfsFile: a file of any size with byte offsets, and the names beside it, on a real server."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import stat
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import FileOnServer
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nfs_server import LOOPBACK, Ganesha, free_ports
from support.proxy import TcpProxy
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

from nbdnfs.engine import Engine, NfsError, NfsFile, libnfs_version

MIB = 1 << 20

# libnfs 4.0 cannot write over NFSv4
each_version = pytest.mark.parametrize("version", (3, 4) if int(libnfs_version.split(".")[0]) >= 5 else (3,))


@pytest.fixture
def open_file() -> Iterator[Callable[..., NfsFile]]:
    """`open_file(url, ...)`: as NfsFile, closed at the end of the test."""
    files: list[NfsFile] = []

    def open_it(url: str, **options: bool | int) -> NfsFile:
        files.append(NfsFile(url, LOOPBACK, **options))
        return files[-1]

    yield open_it
    for file in files:
        file.close()


@pytest.fixture(scope="module")
def small_file(ganesha: Ganesha) -> Iterator[NfsFile]:
    """A new file for all examples of a property."""
    file = NfsFile(ganesha.url("small"), LOOPBACK, create=True)
    yield file
    file.close()
    (ganesha.export_path / "small").unlink()


def read(file: NfsFile, offset: int, length: int) -> bytes:
    buffer = bytearray(b"?" * length)
    moved = file.pread(buffer, offset)
    assert buffer[moved:] == b"?" * (length - moved)
    return bytes(buffer[:moved])


@given(
    st.lists(
        st.tuples(st.integers(0, 70_000), st.binary(min_size=1, max_size=100) | st.just(b"z" * 66_000)), max_size=8
    )
)
@settings(max_examples=40, deadline=None)
def test_any_offset_and_length(ganesha: Ganesha, small_file: NfsFile, writes: list[tuple[int, bytes]]) -> None:
    """Writes at odd places, over each other and past the end, against a model; holes read as zeros."""
    path = ganesha.export_path / "small"
    os.truncate(path, 0)
    model = bytearray()
    for offset, data in writes:
        assert small_file.pwrite(data, offset) == len(data)
        model.extend(bytes(max(0, offset - len(model))))
        model[offset : offset + len(data)] = data
        assert read(small_file, offset, len(data) + 10) == model[offset : offset + len(data) + 10]
    assert path.read_bytes() == model
    assert small_file.stat()["size"] == len(model)


@each_version
def test_large_transfers(
    new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile], version: int
) -> None:
    """More than one READ or WRITE moves, at odd offsets."""
    on_server = new_file(5 * MIB + 17)
    before = on_server.path.read_bytes()
    file = open_file(on_server.url(version))
    assert file.size_bytes == len(before)
    assert read(file, 3, 4 * MIB + 1) == before[3 : 4 * MIB + 4]
    data = os.urandom(3 * MIB + 5)
    assert file.pwrite(data, MIB + 1) == len(data)
    assert on_server.path.read_bytes() == before[: MIB + 1] + data + before[MIB + 1 + len(data) :]


@each_version
def test_a_read_ends_at_the_end_of_the_file(
    new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile], version: int
) -> None:
    """Across the end fewer bytes, at the end and beyond none, into an empty buffer none."""
    file = open_file(new_file(content=b"0123456789").url(version))
    assert read(file, 4, 100) == b"456789"
    assert read(file, 10, 5) == read(file, 1 << 40, 5) == read(file, 0, 0) == b""


def test_reading_over_version_4(ganesha: Ganesha, new_file: Callable[..., FileOnServer]) -> None:
    """What libnfs 4.0 can do over NFSv4, too: a file is read to its end, a device by pages, and names are looked up."""
    on_server = new_file(content=(content := os.urandom(100_000)))
    file = NfsFile(on_server.url(4), LOOPBACK, read_only=True, silence_ms=300)
    with contextlib.closing(file):
        assert file.size_bytes == file.stat()["size"] == len(content)
        assert read(file, 0, 200_000) == content
        assert read(file, len(content), 10) == b""
        assert file.lookup(f"/{on_server.name}")["ino"] == on_server.path.stat().st_ino
        assert on_server.name in file.names()
        assert file.read_beside(f"/{on_server.name}", 100) == content[:100]
        for call in (lambda: file.lookup("/nothing"), lambda: file.read_beside("/nothing", 1)):
            with pytest.raises(NfsError) as caught:
                call()
            assert (caught.value.phase, caught.value.errno) == ("name", errno.ENOENT)
    for url in (ganesha.url("none/here", 4), on_server.url(4).replace(str(ganesha.export_path), "/nowhere")):
        with pytest.raises(NfsError) as caught:
            NfsFile(url, LOOPBACK, connect_timeout_s=2)
        assert caught.value.phase in ("mount", "open")
    device = new_file(64 * 4096)
    with contextlib.closing(Engine(device.url(4), LOOPBACK, region_pages=256)) as engine:
        page = bytearray(4096)
        engine.pread(page, 17 * 4096)
        assert page == device.path.read_bytes()[17 * 4096 : 18 * 4096]


def test_offsets_beyond_64_bits_are_einval(
    new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile]
) -> None:
    """They do not come out somewhere else in the file."""
    file = open_file(new_file(100).url())
    for offset in (-1, 1 << 64):
        with pytest.raises(OSError, match="Invalid argument"):
            read(file, offset, 10)
        with pytest.raises(OSError, match="Invalid argument"):
            file.pwrite(b"x", offset)


@each_version
def test_stat_is_asked_of_the_server(
    new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile], version: int
) -> None:
    """Everything as stat(2) has it, and of this moment; `size_bytes` is that of the opening."""
    on_server = new_file(10_000)
    os.chmod(on_server.path, 0o640)
    os.chown(on_server.path, 1234, 5678)
    file = open_file(on_server.url(version))
    os.truncate(on_server.path, 20_000)
    os.link(on_server.path, on_server.path.with_suffix(".link"))
    expected = on_server.path.stat()
    on_server.path.with_suffix(".link").unlink()
    found = file.stat() | {"nlink": 2}
    assert found == {
        "size": 20_000,
        "mode": 0o640,
        "uid": 1234,
        "gid": 5678,
        "ino": expected.st_ino,
        "nlink": 2,
        "used": expected.st_blocks * 512,
        "mtime_us": expected.st_mtime_ns // 1000,
        "is_regular": True,
    }
    assert file.size_bytes == 10_000


@each_version
def test_lookup_of_other_names(
    ganesha: Ganesha, new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile], version: int
) -> None:
    """A file, a directory, nothing."""
    file, other = open_file(new_file(1).url(version)), new_file(12_345)
    found = file.lookup(f"/{other.name}")
    assert (found["size"], found["ino"], found["is_regular"]) == (12_345, other.path.stat().st_ino, True)
    (ganesha.export_path / "directory").mkdir()
    assert file.lookup("/directory")["is_regular"] is False
    (ganesha.export_path / "directory").rmdir()
    with pytest.raises(NfsError) as caught:
        file.lookup("/nothing")
    assert (caught.value.phase, caught.value.errno) == ("name", errno.ENOENT)


@each_version
def test_link_rename_unlink(
    ganesha: Ganesha, new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile], version: int
) -> None:
    """They do what link(2), rename(2) and unlink(2) do; link is refused where the name is taken."""
    first, second = new_file(content=b"first"), new_file(content=b"second")
    file = open_file(first.url(version))
    folder = ganesha.export_path
    file.link(f"/{first.name}", "/link")
    assert (folder / "link").stat().st_ino == first.path.stat().st_ino
    with pytest.raises(NfsError) as caught:
        file.link(f"/{first.name}", f"/{second.name}")
    assert (caught.value.phase, caught.value.errno) == ("name", errno.EEXIST)
    assert second.path.read_bytes() == b"second"
    file.rename("/link", f"/{second.name}")
    assert (second.path.read_bytes(), (folder / "link").exists()) == (b"first", False)
    file.unlink(f"/{second.name}")
    assert not second.path.exists()
    for call in (lambda: file.unlink("/link"), lambda: file.rename("/link", "/other")):
        with pytest.raises(NfsError) as caught:
            call()
        assert (caught.value.phase, caught.value.errno) == ("name", errno.ENOENT)
    assert read(file, 0, 10) == b"first"


@each_version
def test_names_are_relative_to_the_directory_of_the_url(
    ganesha: Ganesha, open_file: Callable[..., NfsFile], version: int
) -> None:
    """Beside the file, not beside the export."""
    folder = ganesha.export_path / f"sub{version}" / "directory"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x")
    file = open_file(ganesha.url(f"sub{version}/directory/file", version))
    file.link("/file", "/copy")
    assert sorted(path.name for path in folder.iterdir()) == ["copy", "file"]


def test_a_name_that_is_too_long(new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile]) -> None:
    """ENAMETOOLONG, from the server or before it."""
    file = open_file(new_file(1).url())
    for length in (300, 5000):
        with pytest.raises(NfsError) as caught:
            file.lookup("/" + "x" * length)
        assert (caught.value.phase, caught.value.errno) == ("name", errno.ENAMETOOLONG)


# Making files


@pytest.mark.parametrize("mode", [0o600, 0o640])
@each_version
def test_create(ganesha: Ganesha, open_file: Callable[..., NfsFile], mode: int, version: int) -> None:
    """An empty file with the mode that was asked for, whatever the umask of this process."""
    path = ganesha.export_path / f"new-{mode:o}"
    before = os.umask(0o077)
    try:
        file = open_file(ganesha.url(path.name, version), create=True, mode=mode)
    finally:
        os.umask(before)
    assert (path.stat().st_size, stat.S_IMODE(path.stat().st_mode)) == (0, mode)
    assert file.pwrite(b"data", 0) == 4
    assert path.read_bytes() == b"data"
    path.unlink()


@each_version
def test_create_opens_what_is_there(
    new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile], version: int
) -> None:
    """Without `exclusive` an existing file keeps its bytes and its mode."""
    on_server = new_file(content=b"precious")
    os.chmod(on_server.path, 0o644)
    file = open_file(on_server.url(version), create=True, mode=0o600)
    assert read(file, 0, 100) == b"precious"
    assert stat.S_IMODE(on_server.path.stat().st_mode) == 0o644


@each_version
def test_exclusive_create_refuses_what_is_there(new_file: Callable[..., FileOnServer], version: int) -> None:
    """EEXIST, and the file is as it was."""
    on_server = new_file(content=b"precious")
    with pytest.raises(NfsError) as caught:
        NfsFile(on_server.url(version), LOOPBACK, create=True, exclusive=True)
    assert (caught.value.phase, caught.value.errno) == ("open", errno.EEXIST)
    assert on_server.path.read_bytes() == b"precious"


@each_version
def test_of_many_exclusive_creates_one_wins(ganesha: Ganesha, version: int) -> None:
    """Eight at the same moment: one file, seven EEXIST."""
    futures = [
        in_background(lambda: NfsFile(ganesha.url("contended", version), LOOPBACK, create=True, exclusive=True))
        for _ in range(8)
    ]
    winners, errors = [], []
    for future in futures:
        try:
            winners.append(future.result(DEADLINE_S))
        except NfsError as error:
            errors.append(error.errno)
    for winner in winners:
        winner.close()
    (ganesha.export_path / "contended").unlink()
    assert (len(winners), errors) == (1, [errno.EEXIST] * 7)


def test_a_created_file_is_not_created_again(
    ganesha: Ganesha, proxy: TcpProxy, open_file: Callable[..., NfsFile], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its name vanishes while the connection is lost: it does not come back empty; requests wait for the old one."""
    path = ganesha.export_path / "vanishing"
    file = open_file(ganesha.url(path.name, nfsport=proxy.port), create=True)
    file.pwrite(b"data", 0)
    path.rename(path.with_suffix(".aside"))
    said = SaidOnStderr(capfd)
    proxy.cut()
    request = in_background(read, file, 0, 4)
    said.wait_for("was deleted")
    attempts = proxy.accepted
    wait_until(lambda: proxy.accepted > attempts, "it tries again")
    assert not path.exists()
    path.with_suffix(".aside").rename(path)
    assert request.result(DEADLINE_S) == b"data"
    path.unlink()


# What goes wrong


@pytest.mark.parametrize("kind", ["missing", "directory", "below a file", "fifo"])
@each_version
def test_what_cannot_be_opened(ganesha: Ganesha, kind: str, version: int) -> None:
    """No file, a directory, a file in the place of a directory, a fifo: `phase` and errno tell which."""
    path = ganesha.export_path / f"odd {kind}"
    name, number = {
        "missing": (path.name, errno.ENOENT),
        "directory": (path.name, errno.EISDIR),
        "below a file": (f"{path.name}/file", errno.ENOTDIR),
        "fifo": (path.name, errno.EINVAL),
    }[kind]
    {
        "missing": lambda: None,
        "directory": path.mkdir,
        "below a file": path.touch,
        "fifo": lambda: os.mkfifo(path),
    }[kind]()
    try:
        with pytest.raises(NfsError) as caught:
            NfsFile(ganesha.url(name, version), LOOPBACK)
    finally:
        if kind == "directory":
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    assert (caught.value.phase, caught.value.errno) == ("open", number)
    assert isinstance(caught.value, OSError)


def test_no_permission(new_file: Callable[..., FileOnServer]) -> None:
    """A file of root's, mode 0600, and another uid in the URL."""
    on_server = new_file(100)
    os.chmod(on_server.path, 0o600)
    with pytest.raises(NfsError) as caught:
        NfsFile(on_server.url(uid=1234, gid=1234), LOOPBACK)
    assert (caught.value.phase, caught.value.errno) == ("open", errno.EACCES)


def test_a_read_only_file_is_not_written(
    new_file: Callable[..., FileOnServer], open_file: Callable[..., NfsFile]
) -> None:
    """It opens where one may only read, and refuses writes itself."""
    on_server = new_file(content=b"data")
    os.chmod(on_server.path, 0o444)
    file = open_file(on_server.url(uid=1234, gid=1234), read_only=True)
    assert read(file, 0, 10) == b"data"
    as_root = open_file(on_server.url(), read_only=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        as_root.pwrite(b"x", 0)
    assert on_server.path.read_bytes() == b"data"


def test_no_such_export(ganesha: Ganesha) -> None:
    """The server answers, but lets nobody mount that."""
    url = f"nfs://{LOOPBACK}/no/such/file?version=3&nfsport={ganesha.nfs_port}&mountport={ganesha.mount_port}"
    with pytest.raises(NfsError) as caught:
        NfsFile(url, LOOPBACK)
    assert caught.value.phase == "mount"
    assert caught.value.errno in (errno.ENOENT, errno.EACCES)


@pytest.mark.parametrize("which", ["nfsport", "mountport"])
def test_nobody_listens(ganesha: Ganesha, new_file: Callable[..., FileOnServer], which: str) -> None:
    """A refused connection is phase connect, at once, on either port."""
    start = time.monotonic()
    with pytest.raises(NfsError) as caught:
        NfsFile(new_file(1).url(**{which: free_ports(1)[0]}), LOOPBACK)
    assert caught.value.phase == "connect"
    assert time.monotonic() - start < 5


def test_nobody_answers(new_file: Callable[..., FileOnServer], proxy: TcpProxy) -> None:
    """A server that accepts and says nothing is given up after `connect_timeout_s`."""
    proxy.black_hole = True
    start = time.monotonic()
    with pytest.raises(NfsError) as caught:
        NfsFile(new_file(1).url(nfsport=proxy.port), LOOPBACK, connect_timeout_s=1)
    assert (caught.value.phase, caught.value.errno) == ("connect", errno.ETIMEDOUT)
    assert 1 <= time.monotonic() - start < 5


def test_name_operations_fail_when_the_connection_is_lost(
    new_file: Callable[..., FileOnServer], proxy: TcpProxy, open_file: Callable[..., NfsFile]
) -> None:
    """Nobody knows whether a RENAME was done, so it is not sent again; with the server back, others work."""
    on_server = new_file(1)
    file = open_file(on_server.url(nfsport=proxy.port), silence_ms=1000)
    proxy.black_hole = True
    lost = in_background(file.rename, f"/{on_server.name}", "/renamed")
    with pytest.raises(TimeoutError):
        lost.result(0.2)
    proxy.refuse = True
    proxy.reset()
    with pytest.raises(NfsError) as caught:
        lost.result(DEADLINE_S)
    assert (caught.value.phase, caught.value.errno) == ("name", errno.ECONNRESET)
    with pytest.raises(NfsError, match="no connection"):
        file.unlink(f"/{on_server.name}")
    proxy.black_hole = proxy.refuse = False
    assert in_background(read, file, 0, 1).result(DEADLINE_S) == on_server.path.read_bytes()
    file.rename(f"/{on_server.name}", "/renamed")
    assert not on_server.path.exists()
    file.unlink("/renamed")


def test_close_and_forgetting(new_file: Callable[..., FileOnServer], proxy: TcpProxy) -> None:
    """close() may be called twice; a file that is dropped without it closes its connection too."""
    url = new_file(1).url(nfsport=proxy.port)
    file = NfsFile(url, LOOPBACK)
    file.close()
    file.close()
    for call in (lambda: read(file, 0, 1), lambda: file.pwrite(b"x", 0), file.stat, lambda: file.unlink("/x")):
        with pytest.raises(ValueError, match="closed"):
            call()
    dropped = NfsFile(url, LOOPBACK)
    assert proxy.open_connections == 1
    del dropped
    gc.collect()
    wait_until(lambda: proxy.open_connections == 0, "the connection is closed")
