# SPDX-License-Identifier: LGPL-2.1-or-later
"""What NfsFile says of a directory: its names, its room, small files in it; with a file, and without one."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import pytest
from support.fake_nas import FakeNas, Oddities
from support.nfs_server import LOOPBACK, Ganesha

from nbdnfs.engine import NfsError, NfsFile

MIB = 1 << 20


@pytest.fixture
def nas() -> Iterator[FakeNas]:
    """With two directories, and a file system of 2 GiB with 1 GiB left."""
    with FakeNas(Oddities(total_bytes=2 << 30, available_bytes=1 << 30)) as server:
        server.add("/export/one", bytes(8192))
        server.add("/export/sub/\N{SNOWMAN}", b"hello")
        yield server


@contextlib.contextmanager
def directory(url: str) -> Iterator[NfsFile]:
    """The URL's directory, open."""
    with contextlib.closing(NfsFile(url, LOOPBACK, names_only=True)) as opened:
        yield opened


def test_a_directory_without_a_file(nas: FakeNas) -> None:
    """Names, room and small files, also after the connection broke, and below what is exported. Nothing is created."""
    with directory(nas.url("/export/none")) as export, directory(nas.url("/export/sub/none")) as sub:
        assert sorted(export.names()) == ["one", "sub"]
        assert sub.names() == ["\N{SNOWMAN}"]
        assert export.space() == {"total": 2 << 30, "available": 1 << 30}
        assert sub.read_beside("/\N{SNOWMAN}", 4096) == b"hello"
        assert sub.read_beside("/\N{SNOWMAN}", 2) == b"he"
        nas.disconnect()
        assert sorted(export.names()) == ["one", "sub"]
        assert export.lookup("/one")["size"] == 8192
    assert nas.names("/export") == ["one", "sub"]


def test_there_is_no_file(nas: FakeNas) -> None:
    """What needs a file fails at once."""
    with directory(nas.url("/export/one")) as export:
        for call in (export.stat, lambda: export.pread(bytearray(1), 0), lambda: export.pwrite(b"x", 0)):
            with pytest.raises(OSError, match=f"Errno {errno.EBADF}"):
                call()


def test_errors(nas: FakeNas) -> None:
    """No directory, a file in its place, nothing to read."""
    for path, number in (("/export/none/x", errno.ENOENT), ("/export/one/x", errno.ENOTDIR)):
        with pytest.raises(NfsError) as caught:
            NfsFile(nas.url(path), LOOPBACK, names_only=True)
        assert caught.value.errno == number
    with directory(nas.url("/export/x")) as export, pytest.raises(NfsError) as caught:
        export.read_beside("/none", 10)
    assert (caught.value.errno, caught.value.phase) == (errno.ENOENT, "name")


def test_a_mode_is_set_though_the_answer_is_not_heard(nas: FakeNas) -> None:
    """SETATTR may be done twice: it is sent again."""
    nas.drop("SETATTR")
    url = nas.url("/export/one")
    with contextlib.closing(NfsFile(url, LOOPBACK, names_only=True, silence_ms=200)) as export:
        export.chmod("/one", 0o600)
        assert export.lookup("/one")["mode"] == 0o600
    assert len(nas.calls("SETATTR")) == 2


def test_many_names_on_a_real_server(ganesha: Ganesha) -> None:
    """A directory of several READDIRPLUS answers."""
    folder = ganesha.export_path / "many"
    folder.mkdir()
    names = {f"{number:04d}{'x' * 100}" for number in range(700)}
    for name in names:
        (folder / name).touch()
    try:
        with directory(ganesha.url("many/any")) as opened:
            found = opened.names()
            assert (len(found), set(found)) == (700, names)
            assert opened.space()["total"] >= opened.space()["available"] > MIB
    finally:
        for name in names:
            (folder / name).unlink()
        folder.rmdir()
