# SPDX-License-Identifier: LGPL-2.1-or-later
"""What NfsFile says of a directory: its names, its room, small files in it; with a file, and without one."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

import pytest
from support.fake_nas import FakeNas, NasCall, Oddities
from support.fake_nfs import NFS3ERR_ACCES, NFS3ERR_IO, NFS3ERR_NOENT
from support.nfs_server import LOOPBACK, Ganesha
from support.sunrpc import record
from support.waiting import DEADLINE_S, in_background, wait_until

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


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("SETATTR", lambda export: export.chmod("/one", 0o600)),
        ("FSSTAT", lambda export: export.space()),
        ("READDIRPLUS", lambda export: export.names()),
        ("LINK", lambda export: export.link("/one", "/two")),
        ("RENAME", lambda export: export.rename("/one", "/two")),
        ("REMOVE", lambda export: export.unlink("/one")),
    ],
)
def test_what_the_server_refuses(nas: FakeNas, op: str, call: Callable[[NfsFile], object]) -> None:
    """Its error is the caller's, and the next call is made. The names are as they were."""
    with directory(nas.url("/export/x")) as export:
        nas.fail(op, NFS3ERR_IO, times=1)
        with pytest.raises(NfsError) as caught:
            call(export)
        assert (caught.value.errno, caught.value.phase) == (errno.EIO, "name")
        assert nas.struck(op)
        assert nas.names("/export") == ["one", "sub"]
        call(export)


def test_a_small_file_that_cannot_be_read(nas: FakeNas) -> None:
    """It is an error, not an empty file. libnfs 4.0 says EFAULT, which counts as a connection that broke."""
    with directory(nas.url("/export/x")) as export:
        nas.fail("READ", NFS3ERR_IO, times=1)
        with pytest.raises(NfsError) as caught:
            export.read_beside("/one", 10)
        assert caught.value.errno in (errno.EIO, errno.ECONNRESET)
        assert nas.struck("READ")
        assert len(export.names()) == 2
        assert export.read_beside("/one", 10) == bytes(10)


@pytest.mark.parametrize("op", ["LOOKUP", "ACCESS", "READ"])
def test_a_connection_that_breaks_while_a_small_file_is_read(nas: FakeNas, op: str) -> None:
    """At any call of it: ECONNRESET, and the next one reads it."""
    with directory(nas.url("/export/x")) as export:
        before = len(nas.calls(op))
        nas.drop(op)
        reading = in_background(export.read_beside, "/one", 10)
        wait_until(lambda: len(nas.calls(op)) > before, f"{op} has arrived")
        nas.disconnect()
        with pytest.raises(NfsError) as caught:
            reading.result(DEADLINE_S)
        assert (caught.value.errno, caught.value.phase) == (errno.ECONNRESET, "name")
        assert len(export.names()) == 2
        assert export.read_beside("/one", 10) == bytes(10)


def test_two_calls_at_once(nas: FakeNas) -> None:
    """The second one is answered first; each gets its own answer, also over a new connection."""
    with directory(nas.url("/export/x")) as export:
        nas.drop("READDIRPLUS")
        listing = in_background(export.names)
        wait_until(lambda: nas.struck("READDIRPLUS"), "the call has arrived")
        assert export.lookup("/one")["size"] == 8192
        assert export.space()["total"] == 2 << 30
        assert not listing.done()
        nas.drop("FSSTAT")
        space = in_background(export.space)
        wait_until(lambda: nas.struck("FSSTAT"), "that call has arrived, too")
        nas.disconnect()
        assert sorted(listing.result(DEADLINE_S)) == ["one", "sub"]
        assert space.result(DEADLINE_S)["available"] == 1 << 30


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("GETATTR", lambda export: export.lookup("/one")),
        ("LOOKUP", lambda export: export.lookup("/one")),
        ("FSSTAT", lambda export: export.space()),
        ("REMOVE", lambda export: export.unlink("/one")),
    ],
)
def test_a_server_that_puts_everything_off(nas: FakeNas, op: str, call: Callable[[NfsFile], object]) -> None:
    """There is an end to that: an error, and what is asked for later is done."""
    with contextlib.closing(NfsFile(nas.url("/export/x"), LOOPBACK, names_only=True, silence_ms=300)) as export:
        nas.jukebox(op)
        with pytest.raises(NfsError, match="puts it off") as caught:
            call(export)
        assert caught.value.errno in (errno.EAGAIN, errno.ETIMEDOUT)
        assert len(nas.calls(op)) >= 2
        nas.end_faults()
        call(export)


def test_a_server_that_puts_off_what_has_little_time(nas: FakeNas) -> None:
    """The time of the call is over before the server has put it off for too long: that is said."""
    with contextlib.closing(NfsFile(nas.url("/export/x"), LOOPBACK, names_only=True, silence_ms=150)) as export:
        nas.jukebox("FSSTAT")
        with pytest.raises(NfsError, match="puts it off") as caught:
            export.space()
        assert caught.value.errno == errno.ETIMEDOUT
        nas.end_faults()
        assert export.space()["total"] == 2 << 30


def test_a_server_that_was_slow_before(nas: FakeNas) -> None:
    """What may be done once only has no more time because of that, and its error says that its time is over. An older
    call that has more is made again.
    """
    with contextlib.closing(NfsFile(nas.url("/export/x"), LOOPBACK, names_only=True, silence_ms=500)) as export:
        nas.drop("FSSTAT")
        assert export.space()["total"] == 2 << 30
        assert len(nas.calls("FSSTAT")) == 2
        nas.drop("READDIRPLUS")
        listing = in_background(export.names)
        wait_until(lambda: nas.struck("READDIRPLUS"), "it has arrived")
        nas.drop("REMOVE", executed=False)
        with pytest.raises(NfsError, match="has not answered") as caught:
            export.unlink("/one")
        assert caught.value.errno == errno.ETIMEDOUT
        assert sorted(listing.result(DEADLINE_S)) == ["one", "sub"]
        assert len(nas.calls("REMOVE")) == 1
        export.unlink("/one")
    assert nas.names("/export") == ["sub"]


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("fault", ["later", "refused", "silence", "another file"])
def test_attributes_while_a_file_is_opened(nas: FakeNas, after: int, fault: str) -> None:
    """GETATTR is called several times: at any of them the server may put it off, refuse, break the connection, or speak
    of another file. The file is opened in the end, or that is an error."""
    seen: list[NasCall] = []

    def change(call: NasCall, message: bytes) -> bytes | None:
        seen.append(call)
        if len([it for it in seen if it.op == "GETATTR"]) != after + 1 or call.op != "GETATTR":
            return None
        at = 24 + 4 + 5 * 4 + 2 * 8 + 2 * 4 + 8  # up to fattr3's fileid
        return record(message[:at] + bytes(7) + b"\x63" + message[at + 8 :])

    if fault == "later":
        nas.jukebox("GETATTR", times=1, after=after)
    elif fault == "refused":
        nas.fail("GETATTR", NFS3ERR_IO, times=1, after=after)
    elif fault == "silence":
        nas.drop("GETATTR", after=after)
    else:
        nas.mutate(change)
    opening = in_background(lambda: NfsFile(nas.url("/export/one"), LOOPBACK, connect_timeout_s=8, silence_ms=300))
    if fault == "silence":
        wait_until(lambda: opening.done() or nas.struck("GETATTR"), "it is struck, or the file is open")
        if nas.struck("GETATTR"):
            nas.disconnect()
    error = opening.exception(DEADLINE_S)
    if error is None:
        with contextlib.closing(opening.result(0)) as opened:
            assert opened.size_bytes == 8192
    else:
        assert isinstance(error, NfsError)
        assert error.errno in (errno.EIO, errno.EPROTO, errno.ENOTCONN)


@pytest.mark.parametrize("names_only", [False, True])
def test_mountd_puts_off_the_parent(nas: FakeNas, names_only: bool) -> None:
    """Of a directory that is not exported itself: it is asked again, and not taken for a refusal."""
    nas.jukebox("MNT", times=1, after=1)
    url = nas.url("/export/sub/\N{SNOWMAN}")
    with contextlib.closing(NfsFile(url, LOOPBACK, names_only=names_only, connect_timeout_s=8)) as opened:
        assert opened.names() == ["\N{SNOWMAN}"]
    assert nas.struck("MNT")
    assert len(nas.calls("MNT")) >= 3


def test_mountd_refuses_for_a_while(nas: FakeNas) -> None:
    """What was mounted once is mounted again: no other directory is tried."""
    with directory(nas.url("/export/x")) as export:
        nas.fail("MNT", NFS3ERR_ACCES, times=2)
        nas.disconnect()
        assert len(export.names()) == 2
        assert nas.struck("MNT")


def test_a_file_that_is_gone(nas: FakeNas) -> None:
    """After a while that is an error, also of stat(): ESTALE; names are still looked up once it is there again."""
    options = {"gone_limit_ms": 300, "silence_ms": 300}
    with contextlib.closing(NfsFile(nas.url("/export/one"), LOOPBACK, **options)) as opened:
        nas.fail("LOOKUP", NFS3ERR_NOENT)
        nas.expire_handles()
        nas.disconnect()
        for call in (lambda: opened.pread(bytearray(1), 0), opened.stat):
            with pytest.raises(OSError, match=f"Errno {errno.ESTALE}"):
                in_background(call).result(DEADLINE_S)
        nas.end_faults()
        wait_until(lambda: opened.lookup("/one")["size"] == 8192, "it is there again")


def test_closing_while_a_call_runs(nas: FakeNas) -> None:
    """RuntimeError, and the call goes on."""
    nas.drop("READDIRPLUS")
    with directory(nas.url("/export/x")) as export:
        listing = in_background(export.names)
        wait_until(lambda: nas.struck("READDIRPLUS"), "the call has arrived")
        with pytest.raises(RuntimeError, match="still running"):
            export.close()
        nas.disconnect()
        assert len(listing.result(DEADLINE_S)) == 2


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
