# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C engine and a NAS that hangs, fills up, is away, forgets its clients, or has lost or exchanged the file."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FileOnServer
from support.engines import PAGE, OpenEngine, read_pages, write_pages
from support.fake_nfs import (
    NFS3_OK,
    NFS3ERR_ACCES,
    NFS3ERR_DQUOT,
    NFS3ERR_IO,
    NFS3ERR_NOENT,
    NFS3ERR_NOSPC,
    NFS3ERR_ROFS,
    NFS3ERR_STALE,
    FakeNfsServer,
)
from support.nfs_server import Ganesha
from support.proxy import TcpProxy
from support.small_filesystem import small_filesystem
from support.sunrpc import u32
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

from nbdnfs import region
from nbdnfs.engine import Engine

MIB = 1 << 20
SLOTS = 256

# region.h: enum region_file
THERE, REMOVED, REPLACED, CUT = range(4)


@pytest.fixture
def fake() -> Iterator[FakeNfsServer]:
    """A server with 4 MiB of random bytes."""
    with FakeNfsServer(os.urandom(4 * MIB)) as server:
        yield server


@pytest.fixture
def engine_options() -> dict[str, int]:
    """A small region, which a test can fill."""
    return {"region_pages": SLOTS}


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> SaidOnStderr:
    """What the C code says during the test."""
    return SaidOnStderr(capfd)


def counter(engine: Engine, name: str) -> int:
    value = engine.counters()[name]
    assert isinstance(value, int)
    return value


def wait_for_counter(engine: Engine, name: str, value: int) -> None:
    wait_until(lambda: counter(engine, name) == value, f"{name} is {value}")


@contextlib.contextmanager
def io_error() -> Iterator[None]:
    with pytest.raises(OSError, match="Input/output error") as caught:
        yield
    assert caught.value.errno == errno.EIO


def fill_region(engine: Engine, first_page: int = 512) -> None:
    """As many different pages as it has slots; none of them can go while the server takes nothing."""
    for page in range(first_page, first_page + SLOTS):
        write_pages(engine, page, os.urandom(PAGE))


# What counts as away


def test_the_counters_tell_of_the_connection(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine
) -> None:
    """`disconnected` while there is none, `reconnects` for each that was made again; also with nobody asking."""
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    assert (counter(engine, "disconnected"), counter(engine, "reconnects")) == (0, 0)
    proxy.refuse = True
    proxy.cut()
    wait_for_counter(engine, "disconnected", 1)
    proxy.refuse = False
    wait_for_counter(engine, "disconnected", 0)
    assert counter(engine, "reconnects") == 1
    proxy.reset()
    wait_for_counter(engine, "reconnects", 2)
    assert counter(engine, "disconnected") == 0


def test_a_stopped_server_is_waited_for(own_ganesha: Ganesha, open_engine: OpenEngine, said: SaidOnStderr) -> None:
    """SIGSTOP, and the kernel goes on acknowledging: requests wait, on the same connection, without a word."""
    (own_ganesha.export_path / "swap").write_bytes(content := os.urandom(4 * MIB))
    engine = open_engine(own_ganesha.url("swap"))
    own_ganesha.pause()
    reading = in_background(read_pages, engine, 3)
    written = in_background(engine.pwrite, bytes(range(256)) * 16, 0, True)
    time.sleep(2)
    assert not reading.done()
    assert not written.done()
    own_ganesha.resume()
    assert reading.result(DEADLINE_S) == content[3 * PAGE : 4 * PAGE]
    written.result(DEADLINE_S)
    assert counter(engine, "reconnects") == 0
    assert said.lines == []


def test_a_server_that_is_slow_to_connect(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Each attempt to connect again is given twice the time of the one before, so that one gets through."""
    engine = open_engine(fake.url(), connect_timeout_s=1)
    fake.delay("GETATTR", 2.5)
    attempts = len(fake.calls("GETATTR"))
    fake.disconnect()
    assert in_background(read_pages, engine, 1).result(DEADLINE_S) == fake.content[PAGE : 2 * PAGE]
    assert len(fake.calls("GETATTR")) == attempts + 3


@pytest.mark.timeout(300)
@pytest.mark.parametrize("away_s", [1, 10, pytest.param(60, marks=pytest.mark.long)])
def test_killed_under_write_load(own_ganesha: Ganesha, open_engine: OpenEngine, away_s: float) -> None:
    """SIGKILL with the region full and a writer waiting; after the restart a request is answered within 2 s, and
    nothing is lost.
    """
    path = own_ganesha.export_path / "swap"
    path.write_bytes(bytes(4 * MIB))
    engine = open_engine(own_ganesha.url("swap"))
    expected = bytearray(4 * MIB)

    def load(rounds: int) -> None:
        for number in range(rounds * 1024):
            page = number * 37 % 1024
            expected[page * PAGE : (page + 1) * PAGE] = data = os.urandom(PAGE)
            write_pages(engine, page, data)

    load(1)
    loading = in_background(load, 4)
    wait_until(lambda: counter(engine, "nfs_in_flight") > 0, "writes are under way")
    own_ganesha.kill()
    time.sleep(away_s)
    assert not loading.done()
    own_ganesha.start()
    begin = time.monotonic()
    in_background(read_pages, engine, 5).result(DEADLINE_S)
    assert time.monotonic() - begin < 2
    loading.result(DEADLINE_S)
    in_background(engine.flush).result(DEADLINE_S)
    assert path.read_bytes() == expected


# Silence


def test_a_connection_that_says_nothing_more(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine, said: SaidOnStderr
) -> None:
    """TCP sees a living peer, and nothing comes; the server answers on a new connection, and so do all requests."""
    engine = open_engine(backing_file.url(nfsport=proxy.port), silence_ms=500)
    proxy.silence()
    requests = [in_background(read_pages, engine, 1), in_background(engine.pwrite, b"word" * 1024, 0, True)]
    for request in requests:
        request.result(DEADLINE_S)
    assert counter(engine, "reconnects") == 1
    assert backing_file.path.read_bytes()[:PAGE] == b"word" * 1024
    assert ["is silent, and the server is not" in line for line in said.lines] == [True, False]


def test_connections_that_went_silent_with_another(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine
) -> None:
    """What one of them has found out the others need not: they are made anew before anybody has waited for them."""
    engine = open_engine(backing_file.url(nfsport=proxy.port), silence_ms=500, connections=4)
    proxy.silence()
    in_background(read_pages, engine, 1).result(DEADLINE_S)
    wait_until(lambda: counter(engine, "reconnects") == 4, "all have connected again")
    begin = time.monotonic()
    for page in range(2, 34):
        assert in_background(read_pages, engine, page).result(DEADLINE_S) == bytes(PAGE)
    assert time.monotonic() - begin < 5  # or one of them has waited for an answer in vain
    assert counter(engine, "reconnects") == 4


def test_a_slow_answer_is_no_silence(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The server is asked whether it lives, says so over the same connection, and is waited for."""
    engine = open_engine(fake.url(), silence_ms=500)
    fake.delay("READ", 1.8)
    assert in_background(read_pages, engine, 1).result(DEADLINE_S) == fake.content[PAGE : 2 * PAGE]
    assert fake.calls("NULL")
    assert len(fake.calls("READ")) == 1
    assert counter(engine, "reconnects") == 0


def test_a_request_that_was_dropped(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """All others are answered, one never: it is sent again."""
    engine = open_engine(fake.url(), silence_ms=250)
    fake.hold("READ", times=1)
    dropped = in_background(read_pages, engine, 1)
    fake.wait_for(1, DEADLINE_S)
    wait_until(lambda: read_pages(engine, 2) and dropped.done(), "it is done")
    assert dropped.result(DEADLINE_S) == fake.content[PAGE : 2 * PAGE]
    assert counter(engine, "reconnects") == 1


def test_a_very_slow_server_gets_through(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """It needs longer for a READ than a request is given before it is sent again: each time it is given more."""
    engine = open_engine(fake.url(), silence_ms=200)
    fake.delay("READ", 3.0)
    assert in_background(read_pages, engine, 1).result(DEADLINE_S) == fake.content[PAGE : 2 * PAGE]
    assert 1 <= counter(engine, "reconnects") <= 4


# hard and soft


def test_soft(backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine) -> None:
    """After the limit, and not before: EIO to a read, a flush, a write with FUA, and one that waits for a slot. What
    was acknowledged is still read, and is on the server when that is back.
    """
    engine = open_engine(backing_file.url(nfsport=proxy.port), soft_limit_ms=1000)
    acknowledged = os.urandom(PAGE)
    proxy.refuse = True
    proxy.cut()
    write_pages(engine, 0, acknowledged)
    begin = time.monotonic()
    waiting = [
        in_background(read_pages, engine, 100),
        in_background(engine.flush),
        in_background(engine.pwrite, os.urandom(PAGE), PAGE, True),
    ]
    for future in waiting:
        with io_error():
            future.result(DEADLINE_S)
    assert time.monotonic() - begin >= 1.0
    with io_error():
        in_background(fill_region, engine).result(DEADLINE_S)
    assert read_pages(engine, 0) == acknowledged
    proxy.refuse = False
    wait_for_counter(engine, "disconnected", 0)
    in_background(engine.flush).result(DEADLINE_S)
    assert backing_file.path.read_bytes()[:PAGE] == acknowledged
    assert read_pages(engine, 100) == bytes(PAGE)


def test_nothing_waits_after_a_soft_error(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine, region_fd: int
) -> None:
    """After the request fails, the region shows nothing waiting, even without a connection."""
    engine = open_engine(backing_file.url(nfsport=proxy.port), soft_limit_ms=300, region_fd=region_fd)
    proxy.refuse = True
    proxy.cut()
    wait_for_counter(engine, "disconnected", 1)
    with io_error():
        in_background(read_pages, engine, 100).result(DEADLINE_S)
    wait_until(lambda: (region.read_waits(region_fd) or (0, 1, 1))[1:] == (0, 0), "nothing waits")
    assert counter(engine, "disconnected") == 1
    proxy.refuse = False


def test_soft_forgets_nothing_at_its_end(backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine) -> None:
    """Closing waits for the server, longer than a request does: what was acknowledged is nowhere else."""
    engine = open_engine(backing_file.url(nfsport=proxy.port), soft_limit_ms=500)
    data = os.urandom(PAGE)
    proxy.refuse = True
    proxy.cut()
    write_pages(engine, 0, data)
    closed = in_background(engine.close)
    with pytest.raises(TimeoutError):
        closed.result(2)
    proxy.refuse = False
    closed.result(DEADLINE_S)
    assert backing_file.path.read_bytes()[:PAGE] == data


@pytest.mark.parametrize("pages", [SLOTS, SLOTS + 50])
def test_the_end_says_what_it_waits_for(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine, said: SaidOnStderr, pages: int
) -> None:
    """One line, with the number of pages, those that repeat one word too, also where these do not fit into the region
    together. Nothing is said where it takes no time."""
    open_engine(backing_file.url()).close()
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    data = os.urandom(3 * PAGE) + b"".join(bytes([1 + number % 255]) * PAGE for number in range(pages - 3))
    proxy.black_hole = True
    write_pages(engine, 0, data)
    closed = in_background(engine.close)
    said.wait_for("the end waits")
    proxy.black_hole = False
    closed.result(DEADLINE_S)
    lines = [line for line in said.lines if "the end waits" in line]
    assert lines == [f"nbdnfs: the end waits for the server: {pages} pages are still to be written (1 MiB)"]
    assert backing_file.path.read_bytes()[: len(data)] == data


def test_soft_and_a_server_that_hangs(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The connection is there, a request under way: it ends as well, and its late answer harms nobody."""
    engine = open_engine(fake.url(), soft_limit_ms=1000)
    fake.hold("READ")
    with io_error():
        in_background(read_pages, engine, 1).result(DEADLINE_S)
    fake.release()
    assert read_pages(engine, 1) == fake.content[PAGE : 2 * PAGE]


def test_hard_is_the_default(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """A request that is not answered waits, and is not sent a second time while it does."""
    engine = open_engine(fake.url())
    fake.hold("READ")
    request = in_background(read_pages, engine, 1)
    with pytest.raises(TimeoutError):
        request.result(3)
    assert len(fake.calls("READ")) == 1
    fake.release()
    assert request.result(DEADLINE_S) == fake.content[PAGE : 2 * PAGE]


# What a server refuses


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (NFS3ERR_NOSPC, errno.ENOSPC),
        (NFS3ERR_DQUOT, errno.EDQUOT),
        (NFS3ERR_IO, errno.EIO),
        (NFS3ERR_ROFS, errno.EROFS),
        (NFS3ERR_ACCES, errno.EACCES),
    ],
)
@pytest.mark.parametrize("op", ["WRITE", "COMMIT"])
def test_what_is_refused_is_kept(
    fake: FakeNfsServer, open_engine: OpenEngine, said: SaidOnStderr, op: str, status: int, code: int
) -> None:
    """The page stays and is read, it is tried again and again, the region says why, and one line does."""
    engine = open_engine(fake.url())
    data = os.urandom(PAGE)
    fake.fail(op, status)
    write_pages(engine, 7, data)
    flushed = in_background(engine.flush)
    wait_for_counter(engine, "write_back_error", code)
    wait_until(lambda: len(fake.calls(op)) >= 3, "it is tried again")
    assert read_pages(engine, 7) == data
    assert not flushed.done()
    fake.fail(op, NFS3_OK)
    flushed.result(DEADLINE_S)
    assert fake.on_disk[7 * PAGE : 8 * PAGE] == data
    assert counter(engine, "write_back_error") == 0
    assert [line.partition(":")[2].split(" (")[0] for line in said.lines] == [
        " the server refuses to write",
        " the server writes again",
    ]
    assert os.strerror(code) in said.lines[0]


def test_a_file_system_that_is_full(tmp_path: Path, open_engine: OpenEngine, said: SaidOnStderr) -> None:
    """A real one, under a file with holes. What has its blocks is written, what has not waits; with room again, all
    of it is there. That some pages go through meanwhile is not told as an end of it.
    """
    with small_filesystem(tmp_path, 16 * MIB) as folder, Ganesha(tmp_path / "ganesha", export=folder) as server:
        path = folder / "swap"
        expected = bytearray(4 * MIB)
        with path.open("wb") as file:
            file.write(bytes(MIB))
            file.truncate(len(expected))
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(65536))
        engine = open_engine(server.url("swap"))
        for number in range(SLOTS // 2):
            page = number * 7 % 1024  # on blocks and on holes
            expected[page * PAGE : (page + 1) * PAGE] = data = os.urandom(PAGE)
            write_pages(engine, page, data)
        flushed = in_background(engine.flush)
        wait_for_counter(engine, "write_back_error", errno.ENOSPC)
        wait_until(lambda: counter(engine, "write_errors") >= 8, "it is tried again")
        expected[:PAGE] = data = os.urandom(PAGE)
        in_background(engine.pwrite, data, 0, True).result(DEADLINE_S)
        assert path.read_bytes()[:PAGE] == data
        assert not flushed.done()
        filler.unlink()
        flushed.result(DEADLINE_S)
        assert path.read_bytes() == expected
        assert [("refuses" in line, "again" in line.rpartition(" ")[2]) for line in said.lines] == [
            (True, True),
            (False, True),
        ]
        in_background(engine.close).result(DEADLINE_S)


# The file


def test_a_stale_handle_of_the_same_file(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """ESTALE: the file is looked up again, it is the same, everything goes on."""
    engine = open_engine(fake.url())
    data = os.urandom(PAGE)
    fake.expire_handles()
    assert read_pages(engine, 1) == fake.content[PAGE : 2 * PAGE]
    fake.expire_handles()
    write_pages(engine, 0, data)
    in_background(engine.flush).result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == data
    assert counter(engine, "file_state") == THERE


def test_a_server_that_calls_everything_stale_is_not_hammered(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Looking up works, reading does not: there is a pause between the attempts."""
    engine = open_engine(fake.url())
    fake.fail("READ", NFS3ERR_STALE)
    request = in_background(read_pages, engine, 0)
    wait_until(lambda: len(fake.calls("READ")) >= 3, "it is tried again")
    before = len(fake.calls("READ"))
    time.sleep(1.0)  # what may happen in a second is what is measured
    assert len(fake.calls("READ")) - before < 10
    fake.fail("READ", NFS3_OK)
    assert request.result(DEADLINE_S) == fake.content[:PAGE]


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_that_is_gone(fake: FakeNfsServer, open_engine: OpenEngine, said: SaidOnStderr, how: str) -> None:
    """For gone_limit everybody waits; then reads, flushes and writes without a slot end with EIO. What is in the region
    is read. The stranger is not written to. With the old file back, what was acknowledged is written.
    """
    engine = open_engine(fake.url(), gone_limit_ms=2000)
    fileid, content = fake.fileid, fake.content
    acknowledged = os.urandom(PAGE)
    write_pages(engine, 0, acknowledged)
    stranger = os.urandom(4 * MIB)
    if how == "replaced":
        fake.replace(stranger, fileid + 1)
    else:
        fake.fail("LOOKUP", NFS3ERR_NOENT)
        fake.expire_handles()
    begin = time.monotonic()
    waiting = [in_background(read_pages, engine, 100), in_background(engine.flush)]
    wait_for_counter(engine, "file_state", REPLACED if how == "replaced" else REMOVED)
    assert counter(engine, "disconnected") == 0
    for future in waiting:
        with io_error():
            future.result(DEADLINE_S)
    assert time.monotonic() - begin >= 2.0
    with io_error():
        in_background(read_pages, engine, 200).result(DEADLINE_S)
    with io_error():
        in_background(fill_region, engine).result(DEADLINE_S)
    assert read_pages(engine, 0) == acknowledged
    if how == "replaced":
        assert fake.content == fake.on_disk == stranger
        fake.replace(content, fileid)
    else:
        assert fake.content == content
        fake.fail("LOOKUP", NFS3_OK)
    wait_for_counter(engine, "file_state", THERE)
    in_background(engine.flush).result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == acknowledged
    assert read_pages(engine, 100) == content[100 * PAGE : 101 * PAGE]
    # once, and first; on a slow machine a connection may be reported, too
    assert [number for number, line in enumerate(said.lines) if "was deleted" in line or "was replaced" in line] == [0]


def test_a_file_that_is_gone_and_then_another(fake: FakeNfsServer, open_engine: OpenEngine, said: SaidOnStderr) -> None:
    """It is said once that requests fail from now on: of all connections, and whatever the name has later."""
    engine = open_engine(fake.url(), gone_limit_ms=300, connections=2)
    fileid, content = fake.fileid, fake.content
    fake.fail("LOOKUP", NFS3ERR_NOENT)
    fake.expire_handles()
    for page in range(2):  # over each of them
        with io_error():
            in_background(read_pages, engine, page).result(DEADLINE_S)
    wait_for_counter(engine, "file_state", REMOVED)
    fake.replace(os.urandom(4 * MIB), fileid + 1)
    fake.fail("LOOKUP", NFS3_OK)
    wait_for_counter(engine, "file_state", REPLACED)
    with io_error():
        in_background(read_pages, engine, 2).result(DEADLINE_S)
    fake.replace(content, fileid)
    wait_for_counter(engine, "file_state", THERE)
    assert read_pages(engine, 3) == content[3 * PAGE : 4 * PAGE]
    assert sum("requests that need it fail from now on" in line for line in said.lines) == 1


def test_an_export_that_is_mounted_late(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """A NAS that boots serves the folder before the disk with the file is there: everybody waits, nobody fails."""
    engine = open_engine(fake.url())
    data = os.urandom(PAGE)
    write_pages(engine, 0, data)
    fake.fail("LOOKUP", NFS3ERR_NOENT)
    fake.fail("GETATTR", NFS3ERR_STALE)
    fake.crash()
    requests = [in_background(read_pages, engine, 1), in_background(engine.flush)]
    wait_for_counter(engine, "file_state", REMOVED)
    assert not any(request.done() for request in requests)
    fake.fail("LOOKUP", NFS3_OK)
    fake.fail("GETATTR", NFS3_OK)
    assert requests[0].result(DEADLINE_S) == fake.content[PAGE : 2 * PAGE]
    requests[1].result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == data


@pytest.mark.parametrize("how", ["renamed over", "removed"])
def test_a_real_file_that_is_gone_under_load(own_ganesha: Ganesha, open_engine: OpenEngine, how: str) -> None:
    """Ganesha serves a file without a name as long as it has it open: the state is told, and nothing fails yet. After
    its restart all that wait end. The new file stays as it is.
    """
    path = own_ganesha.export_path / "victim"
    path.write_bytes(os.urandom(4 * MIB))
    engine = open_engine(own_ganesha.url("victim"), gone_limit_ms=1000)
    stranger = os.urandom(4 * MIB)

    def load() -> None:
        number = 0
        while True:
            number += 1
            write_pages(engine, number * 37 % 1024, os.urandom(PAGE))
            read_pages(engine, number * 53 % 1024)

    loads = [in_background(load), in_background(load)]
    wait_until(lambda: counter(engine, "nfs_writes") > 20, "the load is running")
    if how == "renamed over":
        path.with_suffix(".new").write_bytes(stranger)
        path.with_suffix(".new").rename(path)
    else:
        path.unlink()
    wait_for_counter(engine, "file_state", REMOVED)
    before = counter(engine, "nfs_writes")
    wait_until(lambda: counter(engine, "nfs_writes") > before + 20, "the load is running on")
    own_ganesha.kill()
    own_ganesha.start()
    for future in loads:
        with io_error():
            future.result(DEADLINE_S)
    assert counter(engine, "file_state") == (REPLACED if how == "renamed over" else REMOVED)
    in_background(engine.close).result(DEADLINE_S)
    assert (path.read_bytes() if path.exists() else stranger) == stranger


def test_a_new_file_with_the_old_number(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """File systems give a new file the number of one that was removed. It is not taken for the old one: what is
    known of that is not in it.
    """
    engine = open_engine(fake.url(), gone_limit_ms=500)
    content, fileid = fake.content, fake.fileid
    data = os.urandom(PAGE)
    write_pages(engine, 3, data)
    in_background(engine.flush).result(DEADLINE_S)
    kept = fake.content
    fake.replace(content, fileid)
    with io_error():
        in_background(read_pages, engine, 100).result(DEADLINE_S)
    assert counter(engine, "file_state") == REPLACED
    assert fake.content == content
    fake.replace(kept, fileid)
    wait_for_counter(engine, "file_state", THERE)
    assert read_pages(engine, 100) == content[100 * PAGE : 101 * PAGE]


def test_a_file_that_is_cut_under_load(ganesha: Ganesha, open_engine: OpenEngine, said: SaidOnStderr) -> None:
    """Reads of what is lost fail at once, also where writing has made the file long again; what was not lost is read,
    what is written is read.
    """
    path = ganesha.export_path / "short"
    path.write_bytes(content := os.urandom(4 * MIB))
    engine = open_engine(ganesha.url("short"))
    old = os.urandom(PAGE)
    write_pages(engine, 900, old)
    in_background(engine.flush).result(DEADLINE_S)
    for page in range(SLOTS):  # the old one out of the region
        write_pages(engine, page, content[page * PAGE : (page + 1) * PAGE])
    in_background(engine.flush).result(DEADLINE_S)
    os.truncate(path, MIB)
    with io_error():
        in_background(read_pages, engine, 900).result(DEADLINE_S)
    assert counter(engine, "file_state") == CUT
    new = os.urandom(PAGE)
    write_pages(engine, 1023, new)
    in_background(engine.flush).result(DEADLINE_S)
    assert path.stat().st_size == 4 * MIB
    for page in (500, 900):  # one that nobody knows, one that was written
        with io_error():
            in_background(read_pages, engine, page).result(DEADLINE_S)
    assert read_pages(engine, 100, 2) == content[100 * PAGE : 102 * PAGE]
    assert read_pages(engine, 1023) == new
    assert [f"truncated to {MIB} bytes" in line for line in said.lines] == [True, False]
    path.unlink()


def test_a_cut_that_the_next_write_mends(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The first to meet it is a write behind it, which makes the file long again: the server says how long it was
    before (RFC 1813: wcc_data), and the zeros in between are not read for what was there.
    """
    engine = open_engine(fake.url())
    fake.content = fake.content[:MIB]
    write_pages(engine, 1023, os.urandom(PAGE))
    in_background(engine.flush).result(DEADLINE_S)
    assert len(fake.content) == 4 * MIB
    assert counter(engine, "file_state") == CUT
    with io_error():
        in_background(read_pages, engine, 500).result(DEADLINE_S)


def test_what_was_cut_is_not_read_ahead(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Neither where the file ends, nor what lies there once it is long again."""
    engine = open_engine(fake.url(), read_ahead_pages=64)
    content, cut = fake.content, MIB // PAGE
    fake.content = content[:MIB]
    for page in range(cut - 64, cut):
        assert read_pages(engine, page) == content[page * PAGE : (page + 1) * PAGE]
    with io_error():
        in_background(read_pages, engine, cut).result(DEADLINE_S)
    assert counter(engine, "read_ahead_hits") > 0
    before = len(fake.calls("READ"))
    fake.content = content
    for page in range(cut + 1, cut + 128):
        with io_error():
            in_background(read_pages, engine, page).result(DEADLINE_S)
    assert max(call.count for call in fake.calls("READ")[before:]) > PAGE  # it was tried


def test_a_page_that_is_wrong_and_then_not_there(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """It is read again because of its checksum, and the server says that the file ends before it: EIO, for that."""
    engine = open_engine(fake.url())
    write_pages(engine, 9, os.urandom(PAGE))
    fill_region(engine)
    in_background(engine.flush).result(DEADLINE_S)
    fill_region(engine)  # the first one out of it
    in_background(engine.flush).result(DEADLINE_S)
    fake.overwrite(9 * PAGE, os.urandom(PAGE))
    before = len(fake.calls("READ"))

    def change(result: bytes) -> bytes:
        return result if len(fake.calls("READ")) == before + 1 else result[: -PAGE - 12] + u32(0, 1, 0)

    fake.mangle("READ", change)
    with io_error():
        in_background(read_pages, engine, 9).result(DEADLINE_S)
    assert (counter(engine, "checksum_rereads"), counter(engine, "checksum_failures")) == (1, 0)
    assert len(fake.calls("READ")) == before + 4  # that it ends is believed when three answers say so


def test_a_page_that_is_wrong_and_then_refused(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Of a soft file: it is read again because of its checksum, and the server refuses that until the limit."""
    engine = open_engine(fake.url(), soft_limit_ms=1000)
    write_pages(engine, 9, os.urandom(PAGE))
    in_background(engine.flush).result(DEADLINE_S)
    fill_region(engine)  # page 9 is out of it then
    in_background(engine.flush).result(DEADLINE_S)
    fake.overwrite(9 * PAGE, os.urandom(PAGE))
    fake.hold("READ", after=True, times=1)
    reading = in_background(read_pages, engine, 9)
    fake.wait_for(1, DEADLINE_S)
    fake.fail("READ", NFS3ERR_IO)
    fake.release()
    with io_error():
        reading.result(DEADLINE_S)
    assert (counter(engine, "checksum_rereads"), counter(engine, "checksum_failures")) == (1, 0)
    assert counter(engine, "failed_reads") == 1
    fake.fail("READ", NFS3_OK)


# Writes that are repeated


def test_a_late_twin_of_a_repeated_write(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """A WRITE lies in the queue of a connection that breaks. It is repeated and answered, the page written anew; then
    the server does the old one after all. The page has its newest bytes in the end, and reading it is no error.
    """
    engine = open_engine(fake.url())
    first, second = os.urandom(PAGE), os.urandom(PAGE)
    fake.hold("WRITE", times=1)
    write_pages(engine, 9, first)
    flushed = in_background(engine.flush)
    fake.wait_for(1, DEADLINE_S)
    fake.disconnect()
    flushed.result(DEADLINE_S)
    assert fake.on_disk[9 * PAGE : 10 * PAGE] == first
    write_pages(engine, 9, second)
    flushed = in_background(engine.flush)
    with pytest.raises(TimeoutError):
        flushed.result(1.5)  # it would have been there long ago
    fake.release()
    flushed.result(DEADLINE_S)
    for page in range(512, 512 + SLOTS):  # out of the region
        write_pages(engine, page, os.urandom(PAGE))
    in_background(engine.flush).result(DEADLINE_S)
    assert fake.on_disk[9 * PAGE : 10 * PAGE] == second
    assert read_pages(engine, 9) == second
    assert counter(engine, "checksum_rereads") == 0


def test_a_late_twin_of_a_dead_workers_write(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The next worker, too, waits with other bytes until the first one's repeated write must have been done."""
    region_fd = os.memfd_create("region")
    engine = open_engine(fake.url(), region_fd=region_fd)
    first, second = os.urandom(PAGE), os.urandom(PAGE)
    fake.hold("WRITE", times=1)
    write_pages(engine, 9, first)
    flushed = in_background(engine.flush)
    fake.wait_for(1, DEADLINE_S)
    fake.disconnect()
    flushed.result(DEADLINE_S)
    write_pages(engine, 9, second)
    engine.close()
    engine = open_engine(fake.url(), region_fd=region_fd)
    flushed = in_background(engine.flush)
    with pytest.raises(TimeoutError):
        flushed.result(2)
    fake.release()
    flushed.result(DEADLINE_S)
    assert fake.on_disk[9 * PAGE : 10 * PAGE] == second
    os.close(region_fd)


def test_others_do_not_wait_for_a_repeated_write(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Only the pages that were repeated are held back."""
    engine = open_engine(fake.url())
    fake.hold("WRITE", times=1)
    write_pages(engine, 9, first := os.urandom(PAGE))
    flushed = in_background(engine.flush)
    fake.wait_for(1, DEADLINE_S)
    fake.disconnect()
    flushed.result(DEADLINE_S)
    write_pages(engine, 9, os.urandom(PAGE))
    in_background(engine.pwrite, os.urandom(PAGE), 10 * PAGE, True).result(DEADLINE_S)
    assert fake.content[9 * PAGE : 10 * PAGE] == first
