# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C engine against servers and networks that are slow, short-handed, wrong, cut off and away."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import FileOnServer
from support.engines import PAGE, OpenEngine, read_pages, results, write_pages, write_pages_and_flush
from support.fake_nfs import (
    FILE_SYNC,
    NFS3_OK,
    NFS3ERR_ACCES,
    NFS3ERR_BADHANDLE,
    NFS3ERR_DQUOT,
    NFS3ERR_FBIG,
    NFS3ERR_IO,
    NFS3ERR_JUKEBOX,
    NFS3ERR_NOSPC,
    NFS3ERR_PERM,
    NFS3ERR_ROFS,
    NFS3ERR_SERVERFAULT,
    NFS3ERR_STALE,
    UNSTABLE,
    FakeNfsServer,
)
from support.nfs_server import LOOPBACK, Ganesha
from support.proxy import TcpProxy
from support.sunrpc import opaque
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

from nbdnfs.engine import Engine, NfsError

MIB = 1 << 20
MIB_PAGES = MIB // PAGE


@pytest.fixture
def new_fake() -> Iterator[Callable[..., FakeNfsServer]]:
    """`new_fake(content, ...)`: a fake server, as FakeNfsServer, for the test."""
    with contextlib.ExitStack() as servers:
        yield lambda content, **options: servers.enter_context(FakeNfsServer(content, **options))


@pytest.fixture
def fake(new_fake: Callable[..., FakeNfsServer]) -> FakeNfsServer:
    """One with 1 MiB of random bytes."""
    return new_fake(os.urandom(MIB))


# Requests in flight together


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "out of order"])
def test_four_reads_are_in_flight_together(fake: FakeNfsServer, open_engine: OpenEngine, reverse: bool) -> None:
    """The server has four READs before it answers the first; each caller gets its own page, in any order."""
    engine = open_engine(fake.url())
    fake.hold("READ")
    pages = [in_background(read_pages, engine, number) for number in range(4)]
    fake.wait_for(4, DEADLINE_S)
    fake.release(reverse=reverse)
    assert b"".join(results(pages)) == fake.content[: 4 * PAGE]


def test_four_writes_are_in_flight_together(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The same for WRITEs, of pages that are no neighbours."""
    engine = open_engine(fake.url())
    expected = bytearray(fake.content)
    fake.hold("WRITE")
    written = []
    for number in range(4):
        page = os.urandom(PAGE)
        expected[number * 64 * PAGE : (number * 64 + 1) * PAGE] = page
        written.append(in_background(write_pages_and_flush, engine, number * 64, page))
    fake.wait_for(4, DEADLINE_S)
    fake.release(reverse=True)
    results(written)
    assert fake.content == expected


def test_one_large_read_is_several_in_flight(new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine) -> None:
    """A read of 128 KiB from a server that moves 16 KiB at a time: all eight pieces are asked for at once."""
    fake = new_fake(os.urandom(MIB), rtmax=16384, wtmax=16384)
    engine = open_engine(fake.url())
    fake.hold("READ")
    future = in_background(read_pages, engine, 0, MIB_PAGES // 8)
    fake.wait_for(8, DEADLINE_S)
    fake.release(reverse=True)
    assert future.result(DEADLINE_S) == fake.content[: MIB // 8]
    assert sorted((call.offset, call.count) for call in fake.calls("READ")) == [
        (number * 16384, 16384) for number in range(8)
    ]


# Servers that do less than they are asked to


@pytest.mark.parametrize("limit", [1, 1000, PAGE, 65536])
def test_short_reads_go_on(new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine, limit: int) -> None:
    """A server that returns fewer bytes than asked for is asked for the rest."""
    length = min(limit * 40, MIB) // PAGE * PAGE or PAGE
    fake = new_fake(os.urandom(2 * MIB))
    engine = open_engine(fake.url())
    fake.limit("READ", limit)
    assert read_pages(engine, 3, length // PAGE) == fake.content[3 * PAGE : 3 * PAGE + length]
    assert len(fake.calls("READ")) >= length // limit


@pytest.mark.parametrize("limit", [1, 1000, PAGE, 65536])
def test_short_writes_go_on(new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine, limit: int) -> None:
    """The same for one that takes fewer."""
    length = min(limit * 40, MIB) // PAGE * PAGE or PAGE
    fake = new_fake(os.urandom(2 * MIB))
    engine = open_engine(fake.url())
    expected = bytearray(fake.content)
    expected[3 * PAGE : 3 * PAGE + length] = data = os.urandom(length)
    fake.limit("WRITE", limit)
    write_pages_and_flush(engine, 3, data)
    assert fake.content == fake.on_disk == expected
    assert len(fake.calls("WRITE")) >= length // limit


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_a_server_that_is_not_ready_is_asked_again(fake: FakeNfsServer, open_engine: OpenEngine, op: str) -> None:
    """NFS3ERR_JUKEBOX (RFC 1813: try again later) three times, then done; the caller sees nothing of it."""
    engine = open_engine(fake.url())
    fake.fail(op, NFS3ERR_JUKEBOX, times=3)
    data = os.urandom(PAGE) if op == "WRITE" else fake.content[PAGE : 2 * PAGE]
    if op == "WRITE":
        write_pages_and_flush(engine, 1, data)
    assert read_pages(engine, 1) == data == fake.content[PAGE : 2 * PAGE]
    assert len(fake.calls(op)) == 4


def test_others_go_on_while_one_is_asked_to_wait(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """JUKEBOX for one request does not hold up those that come after it."""
    engine = open_engine(fake.url())
    fake.fail("READ", NFS3ERR_JUKEBOX, times=1)
    slow = in_background(read_pages, engine, 0)
    wait_until(lambda: fake.calls("READ"), "the first READ")
    assert read_pages(engine, 1) == fake.content[PAGE : 2 * PAGE]
    assert [call.offset for call in fake.calls("READ")][:2] == [0, PAGE]
    assert slow.result(DEADLINE_S) == fake.content[:PAGE]


# Servers that refuse and servers that are wrong


REFUSALS = [NFS3ERR_FBIG, NFS3ERR_PERM, NFS3ERR_IO, NFS3ERR_ACCES, NFS3ERR_ROFS, NFS3ERR_SERVERFAULT]


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
@pytest.mark.parametrize("status", REFUSALS)
def test_a_read_that_is_refused_for_a_moment(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str], status: int, transport: str
) -> None:
    """An export, a disk or a name service comes and goes: reads wait for it as writes do, and one line says so."""
    engine = open_engine(fake.url(), transport=transport)
    said = SaidOnStderr(capfd)
    fake.fail("READ", status)
    pages = [in_background(read_pages, engine, number) for number in range(3)]
    wait_until(lambda: len(fake.calls("READ")) >= 3 * 3, "each is tried again")
    assert not any(page.done() for page in pages)
    fake.fail("READ", NFS3_OK)
    assert b"".join(results(pages)) == fake.content[: 3 * PAGE]
    said.wait_for("refuses to read")
    assert sum("refuses to read" in line for line in said.lines) == 1


def test_a_read_that_stays_refused(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """After the limit it is an error, and the next one works."""
    engine = open_engine(fake.url(), soft_limit_ms=700)
    fake.fail("READ", NFS3ERR_IO)
    with pytest.raises(OSError, match="Input/output error"):
        in_background(read_pages, engine, 0).result(DEADLINE_S)
    assert len(fake.calls("READ")) >= 2
    fake.fail("READ", NFS3_OK)
    assert read_pages(engine, 0) == fake.content[:PAGE]


@pytest.mark.parametrize("status", [NFS3ERR_ACCES, NFS3ERR_PERM])
def test_a_read_that_is_not_permitted(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str], status: int
) -> None:
    """It fails after gone_limit, as with a missing file: an administrator needs time to notice and fix the export."""
    engine = open_engine(fake.url(), gone_limit_ms=1000)
    said = SaidOnStderr(capfd)
    fake.fail("READ", status)
    with pytest.raises(OSError, match=r"permitted|denied"):
        in_background(read_pages, engine, 0).result(DEADLINE_S)
    said.wait_for("asking again for 1 s, and then a program that needs such a page gets an I/O error")


def test_a_read_that_is_not_permitted_is_retried_for_ever(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """With gone_limit = 0."""
    engine = open_engine(fake.url(), gone_limit_ms=0)
    said = SaidOnStderr(capfd)
    fake.fail("READ", NFS3ERR_ACCES)
    reading = in_background(read_pages, engine, 0)
    said.wait_for("asking again until it does not")
    fake.fail("READ", NFS3_OK)
    assert reading.result(DEADLINE_S) == fake.content[:PAGE]


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
@pytest.mark.parametrize("status", [NFS3ERR_IO, NFS3ERR_NOSPC, NFS3ERR_DQUOT, NFS3ERR_BADHANDLE])
def test_a_commit_that_is_refused(fake: FakeNfsServer, open_engine: OpenEngine, status: int, transport: str) -> None:
    """What was written UNSTABLE is not said to be on the server; it is once a COMMIT is answered."""
    engine = open_engine(fake.url(), transport=transport)
    page = os.urandom(PAGE)
    fake.fail("COMMIT", status)
    flushed = in_background(write_pages_and_flush, engine, 0, page)
    wait_until(lambda: len(fake.calls("COMMIT")) >= 2, "it is asked again")
    assert not flushed.done()
    fake.fail("COMMIT", NFS3_OK)
    flushed.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == page


def test_a_full_server(fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]) -> None:
    """ENOSPC is nobody's error: the page stays, the flush waits, two lines tell of it; with room it is written."""
    engine = open_engine(fake.url())
    page = os.urandom(PAGE)
    fake.fail("WRITE", NFS3ERR_NOSPC)
    said = SaidOnStderr(capfd)
    written = in_background(write_pages_and_flush, engine, 0, page)
    said.wait_for("refuses to write (No space left on device)")
    assert read_pages(engine, 0) == page
    assert not written.done()
    fake.fail("WRITE", NFS3_OK)
    written.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == page
    said.wait_for("the server writes again")
    assert len(said.lines) == 2


def test_a_stable_write_that_is_not(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """A FILE_SYNC write that the server calls UNSTABLE is not taken for done (RFC 1813, 3.3.7); it is said and
    tried again.
    """
    engine = open_engine(fake.url(), stable_writes=True)
    fake.claim_stable(UNSTABLE)
    said = SaidOnStderr(capfd)
    written = in_background(write_pages_and_flush, engine, 0, os.urandom(PAGE))
    said.wait_for("refuses to write (Protocol error)")
    assert not written.done()
    fake.claim_stable(None)
    written.result(DEADLINE_S)
    assert len(fake.calls("WRITE")) >= 2


def test_a_file_name_that_looks_like_a_version(new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine) -> None:
    """`version=4` in the path is part of it: what is spoken is NFSv3 as the engine speaks it, with COMMIT."""
    fake = new_fake(os.urandom(MIB), path="/export/version=4&version=4")
    engine = open_engine(fake.url())
    assert read_pages(engine, 0) == fake.content[:PAGE]
    write_pages_and_flush(engine, 0, bytes(PAGE))
    assert {call.stable for call in fake.calls("WRITE")} == {UNSTABLE}
    assert fake.calls("COMMIT")


def test_a_file_that_was_cut(backing_file: FileOnServer, open_engine: OpenEngine) -> None:
    """Somebody truncates the file: reads of what is gone fail with EIO, never zeros; the rest is still read."""
    backing_file.path.write_bytes(content := os.urandom(backing_file.size_bytes))
    engine = open_engine(backing_file.url())
    os.truncate(backing_file.path, 8 * MIB + 100)
    for offset, length in ((8 * MIB, PAGE), (12 * MIB, PAGE), (7 * MIB, 2 * MIB)):
        with pytest.raises(OSError, match="Input/output error") as caught:
            read_pages(engine, offset // PAGE, length // PAGE)
        assert caught.value.errno == errno.EIO
    assert read_pages(engine, 8 * MIB_PAGES - 1) == content[8 * MIB - PAGE : 8 * MIB]


@pytest.mark.parametrize("op", ["READ", "WRITE"])
@pytest.mark.parametrize("claim", [PAGE + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_count_beyond_what_was_asked(
    fake: FakeNfsServer, open_engine: OpenEngine, op: str, claim: int, transport: str
) -> None:
    """A reply that claims to have moved more than was asked for is not believed; the request is done again."""
    engine = open_engine(fake.url(), transport=transport)
    guard = os.urandom(PAGE)
    buffer = bytearray(guard * 3)
    fake.claim_count(op, claim)
    data = os.urandom(PAGE)
    if op == "READ":
        request = in_background(engine.pread, memoryview(buffer)[PAGE : 2 * PAGE], 0)
    else:
        request = in_background(write_pages_and_flush, engine, 0, data)
    wait_until(lambda: len(fake.calls(op)) >= 2, "the request is sent again")
    fake.claim_count(op, None)
    request.result(DEADLINE_S)
    if op == "READ":
        assert buffer == guard + fake.content[:PAGE] + guard
    else:
        assert fake.on_disk[:PAGE] == data


def test_a_server_that_is_always_wrong_is_not_hammered(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Connecting works, no answer makes sense: there is a pause between the attempts, and it grows."""
    engine = open_engine(fake.url())
    fake.claim_count("READ", 2**31)
    request = in_background(read_pages, engine, 0)
    wait_until(lambda: len(fake.calls("READ")) >= 3, "the request is sent again")
    before = len(fake.calls("READ"))
    time.sleep(1.0)  # what may happen in a second is what is measured
    assert len(fake.calls("READ")) - before < 10
    fake.claim_count("READ", None)
    assert request.result(DEADLINE_S) == fake.content[:PAGE]


def test_garbage_instead_of_a_reply(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Replies that do not decode cost the connection, not the request."""
    engine = open_engine(fake.url())
    fake.mangle("READ", lambda result: result[:7])
    request = in_background(read_pages, engine, 0)
    wait_until(lambda: len(fake.calls("READ")) >= 2, "the request is sent again")
    fake.mangle("READ", None)
    assert request.result(DEADLINE_S) == fake.content[:PAGE]


# Stability


@pytest.mark.parametrize("stable_writes", [False, True])
def test_what_is_flushed_survives_a_crash(
    new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine, stable_writes: bool
) -> None:
    """Large and small writes, some taken short, none larger than the server takes; after the flush all of them are
    on its disk: written FILE_SYNC, or committed.
    """
    fake = new_fake(bytes(MIB), wtmax=32768)
    engine = open_engine(fake.url(), stable_writes=stable_writes)
    fake.limit("WRITE", 10_000)
    data = os.urandom(MIB)
    write_pages(engine, 0, data[: MIB // 2])
    for number in range(128, 256):
        write_pages(engine, number, data[number * PAGE : (number + 1) * PAGE])
    engine.flush()
    fake.crash()
    assert fake.content == data
    assert {call.stable for call in fake.calls("WRITE")} == {FILE_SYNC if stable_writes else UNSTABLE}
    assert max(call.count for call in fake.calls("WRITE")) <= 32768
    assert bool(fake.calls("COMMIT")) is not stable_writes


@pytest.mark.parametrize("request_kind", ["flush", "fua"])
def test_nothing_is_said_to_be_stable_too_early(
    fake: FakeNfsServer, open_engine: OpenEngine, request_kind: str
) -> None:
    """Flush and FUA wait for the COMMIT's answer, not only for the WRITE's."""
    engine = open_engine(fake.url())
    page = os.urandom(PAGE)
    fake.hold("COMMIT")
    if request_kind == "flush":
        request = in_background(write_pages_and_flush, engine, 0, page)
    else:
        request = in_background(engine.pwrite, page, 0, True)
    fake.wait_for(1, DEADLINE_S)
    assert not request.done()
    assert fake.on_disk[:PAGE] != page
    fake.release()
    request.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == page


def test_a_crash_between_write_and_commit(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server forgets what it had taken unstably: the new write verifier tells, and all of it is written again
    before the flush returns.
    """
    engine = open_engine(fake.url())
    said = SaidOnStderr(capfd)
    data = os.urandom(8 * PAGE)
    fake.hold("COMMIT")
    written = in_background(write_pages_and_flush, engine, 0, data)
    fake.wait_for(1, DEADLINE_S)
    fake.crash()
    assert fake.content[: len(data)] != data
    fake.release()
    written.result(DEADLINE_S)
    assert fake.on_disk[: len(data)] == data
    said.wait_for("writing 8 pages again")


def test_a_page_is_never_written_twice_at_once(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Rewritten while its WRITE is under way, it reads as the newest, and goes when the first has been answered."""
    engine = open_engine(fake.url())
    first, second = os.urandom(PAGE), os.urandom(PAGE)
    fake.hold("WRITE")
    flushes = [in_background(write_pages_and_flush, engine, 0, first)]
    fake.wait_for(1, DEADLINE_S)
    write_pages(engine, 0, second)
    flushes.append(in_background(engine.flush))
    assert read_pages(engine, 0) == second
    with pytest.raises(TimeoutError):
        flushes[1].result(0.3)  # time enough for a second WRITE, if there were one
    assert fake.held_count == 1
    fake.release()
    for flush in flushes:
        flush.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == second


def test_a_server_that_lies_is_caught(
    new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """It says that a page is on disk and loses it in a crash: reading it is EIO, never the old bytes. What it has
    kept is read on.
    """
    fake = new_fake(bytes(4 * MIB))
    engine = open_engine(fake.url(), region_pages=256)
    said = SaidOnStderr(capfd)
    fake.lying = True
    write_pages_and_flush(engine, 0, os.urandom(PAGE))
    fake.lying = False
    others = os.urandom(3 * MIB)
    write_pages_and_flush(engine, MIB_PAGES, others)  # more than the region holds: the page is nowhere else by now
    fake.crash()
    with pytest.raises(OSError, match="Input/output error"):
        read_pages(engine, 0)
    said.wait_for("page 0 of the backing file is not what was written to it")
    assert read_pages(engine, MIB_PAGES, len(others) // PAGE) == others


# Connections that break


def test_resets_in_the_middle_of_a_reply(backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine) -> None:
    """200 times RST inside a READ's reply, with eight reads under way: every one returns the right bytes."""
    backing_file.path.write_bytes(content := os.urandom(backing_file.size_bytes))
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    length = 64 * 1024
    for number in range(200):
        proxy.reset_after_reply_bytes(1 + number * 2_550)  # 200 places in eight replies of 64 KiB
        offsets = [(number * 8 + reader) * length % len(content) for reader in range(8)]
        pieces = results([in_background(read_pages, engine, offset // PAGE, length // PAGE) for offset in offsets])
        for offset, piece in zip(offsets, pieces, strict=True):
            assert piece == content[offset : offset + length], f"round {number}, offset {offset}"
        assert proxy.resets == number + 1


def test_resets_while_writing(backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine) -> None:
    """30 times RST with eight writes under way: all return, and the file has every byte of them."""
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    expected = bytearray(backing_file.size_bytes)
    length = 64 * 1024
    for number in range(30):
        proxy.reset_after_reply_bytes(1 + number * 40)  # replies to WRITEs are short
        written = []
        for writer in range(8):
            offset = (number * 8 + writer) * length
            expected[offset : offset + length] = data = os.urandom(length)
            written.append(in_background(write_pages_and_flush, engine, offset // PAGE, data))
        results(written)
    assert proxy.resets > 10
    assert backing_file.path.read_bytes() == expected


@pytest.mark.parametrize("fault", ["cut", "reset", "half_close"])
def test_connections_that_end_while_requests_wait(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine, fault: str
) -> None:
    """FIN, RST, FIN from one side, with reads and writes waiting for their replies: all are done."""
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    page = os.urandom(PAGE)
    sent = proxy.passed_bytes[0]
    proxy.delay_s = 0.5  # longer than it takes to send the requests and end the connection
    reads = [in_background(read_pages, engine, number) for number in range(4)]
    writes = [in_background(write_pages_and_flush, engine, 16 + number, page) for number in range(4)]
    wait_until(lambda: proxy.passed_bytes[0] > sent + 4 * PAGE, "the requests are with the server")
    {"cut": proxy.cut, "reset": proxy.reset, "half_close": lambda: proxy.half_close("client")}[fault]()
    proxy.delay_s = 0.0
    assert results(reads) == [bytes(PAGE)] * 4
    results(writes)
    assert backing_file.path.read_bytes()[16 * PAGE : 20 * PAGE] == page * 4
    assert proxy.accepted > 1


@pytest.mark.parametrize("op", ["READ", "WRITE", "COMMIT"])
@pytest.mark.parametrize("idle_s", [0, 0.2], ids=["at once", "after a while"])
@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_nobody_else_has_to_ask(
    fake: FakeNfsServer, open_engine: OpenEngine, op: str, idle_s: float, transport: str
) -> None:
    """One request waits alone when the connection goes: it is sent again by itself, whoever listens just then."""
    engine = open_engine(fake.url(), transport=transport)
    time.sleep(idle_s)
    page = fake.content[:PAGE] if op == "READ" else os.urandom(PAGE)
    fake.hold(op)
    request = (
        in_background(read_pages, engine, 0) if op == "READ" else in_background(write_pages_and_flush, engine, 0, page)
    )
    fake.wait_for(1, DEADLINE_S)
    fake.crash()
    fake.release()
    request.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == page
    assert len(fake.calls(op)) >= 2


def test_a_network_that_hangs_for_a_while(backing_file: FileOnServer, proxy: TcpProxy, open_engine: OpenEngine) -> None:
    """Nothing passes: the request waits, for it is not dead that is slow. Then everything goes on, on the same way."""
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    connections = proxy.accepted
    proxy.black_hole = True
    request = in_background(read_pages, engine, 0)
    with pytest.raises(TimeoutError):
        request.result(1.0)
    proxy.black_hole = False
    assert request.result(DEADLINE_S) == bytes(PAGE)
    assert proxy.accepted == connections


def test_a_server_that_is_away_and_comes_back(
    own_ganesha: Ganesha, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed with requests under way and restarted: they are done, without an error, and two lines tell of it."""
    path = own_ganesha.export_path / "swap"
    path.write_bytes(content := os.urandom(4 * MIB))
    engine = open_engine(own_ganesha.url("swap"))
    page = os.urandom(PAGE)
    said = SaidOnStderr(capfd)
    own_ganesha.kill()
    reads = [in_background(read_pages, engine, number * MIB_PAGES) for number in range(4)]
    written = in_background(write_pages_and_flush, engine, 1, page)
    said.wait_for("no connection")
    own_ganesha.start()
    assert results(reads) == [content[number * MIB : number * MIB + PAGE] for number in range(4)]
    written.result(DEADLINE_S)
    assert path.read_bytes()[PAGE : 2 * PAGE] == page
    said.wait_for("connected again after")
    assert len(said.lines) == 2
    assert "waiting for one" in said.lines[0]


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_file_that_was_replaced_is_not_written_into(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str], transport: str
) -> None:
    """Another file under the name while the connection was lost: requests wait, a line says why; the stranger stays
    as it is. With the old file back in its place, everything goes on.
    """
    engine = open_engine(fake.url(), transport=transport)
    fileid, content = fake.fileid, fake.content
    page = os.urandom(PAGE)
    said = SaidOnStderr(capfd)
    fake.replace(stranger := os.urandom(MIB), fileid=fileid + 1)
    fake.crash()
    written = in_background(write_pages_and_flush, engine, 0, page)
    said.wait_for("the file was replaced by another")
    lookups = len(fake.calls("LOOKUP"))
    wait_until(lambda: len(fake.calls("LOOKUP")) > lookups, "it looks again")
    assert not written.done()
    assert fake.content == stranger
    fake.replace(content, fileid)
    written.result(DEADLINE_S)
    assert fake.content == page + content[PAGE:]


@pytest.mark.parametrize("how", ["it breaks", "less data than the answer says"])
def test_a_connection_that_fails_while_the_file_is_recognised(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """By libnfs: it says nothing about the file. The next connection does, and everything goes on."""
    engine = open_engine(fake.url(), transport="libnfs")
    write_pages_and_flush(engine, 0, os.urandom(PAGE))
    said = SaidOnStderr(capfd)
    if how == "it breaks":
        fake.hold("READ", times=1)
    else:
        fake.mangle("READ", lambda result: result[: -PAGE - 4] + opaque(result[-PAGE:][:1000]))
    fake.expire_handles()
    fake.disconnect()
    if how == "it breaks":
        fake.wait_for(1, DEADLINE_S)
        fake.disconnect()
    else:
        said.wait_for("no connection (Protocol error)")
        fake.mangle("READ", None)
    assert in_background(read_pages, engine, 7).result(DEADLINE_S) == fake.content[7 * PAGE : 8 * PAGE]
    assert not [line for line in said.lines if "another" in line]


# The end


def test_close_while_idle(fake: FakeNfsServer) -> None:
    """It ends at once; the server sees the connection go; further calls say that it is closed."""
    engine = Engine(fake.url(), LOOPBACK)
    assert fake.open_connections == 1
    in_background(engine.close).result(5)
    wait_until(lambda: fake.open_connections == 0, "the connection is closed")
    for call in (lambda: read_pages(engine, 0), lambda: write_pages(engine, 0, bytes(PAGE)), engine.flush):
        with pytest.raises(ValueError, match="closed"):
            call()
    engine.close()


def test_close_while_the_server_is_away(
    backing_file: FileOnServer, proxy: TcpProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does not wait for the next attempt to connect."""
    engine = Engine(backing_file.url(nfsport=proxy.port), LOOPBACK)
    said = SaidOnStderr(capfd)
    proxy.refuse = True
    proxy.cut()
    said.wait_for("no connection")
    in_background(engine.close).result(5)


def test_close_while_the_server_hangs(backing_file: FileOnServer, proxy: TcpProxy) -> None:
    """Nor for a server that takes the connection and says nothing: idle, or while it connects again."""
    engine = Engine(backing_file.url(nfsport=proxy.port), LOOPBACK)
    connections = proxy.accepted
    proxy.black_hole = True
    proxy.cut()
    wait_until(lambda: proxy.accepted > connections, "the next attempt")
    in_background(engine.close).result(5)


def test_close_brings_everything_to_the_server(
    backing_file: FileOnServer, proxy: TcpProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was written and not flushed waits for the server as long as it is away; then it is on it."""
    engine = Engine(backing_file.url(nfsport=proxy.port), LOOPBACK)
    said = SaidOnStderr(capfd)
    proxy.refuse = True
    proxy.cut()
    said.wait_for("no connection")
    data = os.urandom(8 * PAGE) + b"\0" * PAGE + b"word" * (PAGE // 2)  # pages of one word are kept as such
    backing_file.path.write_bytes(b"\xff" * backing_file.size_bytes)
    write_pages(engine, 1, data)
    closed = in_background(engine.close)
    with pytest.raises(TimeoutError):
        closed.result(0.3)
    proxy.refuse = False
    closed.result(DEADLINE_S)
    assert backing_file.path.read_bytes()[PAGE : PAGE + len(data)] == data


def test_close_waits_for_nobody(fake: FakeNfsServer) -> None:
    """While requests run it is refused, and the device works on."""
    engine = Engine(fake.url(), LOOPBACK)
    fake.hold("READ")
    request = in_background(read_pages, engine, 0)
    fake.wait_for(1, DEADLINE_S)
    with pytest.raises(RuntimeError, match="still running"):
        engine.close()
    fake.release()
    assert request.result(DEADLINE_S) == fake.content[:PAGE]
    engine.close()


# Where the file lies


@pytest.mark.parametrize("export", ["/srv", "/srv/a", "/srv/a/b"])
def test_an_export_of_a_parent_directory(
    new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine, export: str
) -> None:
    """The server lets only a parent of the URL's directory be mounted: it is, also when the file is looked up again."""
    fake = new_fake(os.urandom(MIB), path="/srv/a/b/swap", export=export)
    engine = open_engine(fake.url())
    assert read_pages(engine, 0) == fake.content[:PAGE]
    mounts = len(fake.calls("MNT"))
    assert mounts == 1 + "/srv/a/b".count("/") - export.count("/")
    fake.crash()
    assert read_pages(engine, 1) == fake.content[PAGE : 2 * PAGE]
    assert len(fake.calls("MNT")) == mounts
    fake.expire_handles()
    fake.fail("LOOKUP", NFS3ERR_STALE, times=1)  # the directory's handle is no better
    assert read_pages(engine, 2) == fake.content[2 * PAGE : 3 * PAGE]
    assert len(fake.calls("MNT")) == mounts + 1


def test_no_export_at_all(new_fake: Callable[..., FakeNfsServer]) -> None:
    """Where no parent can be mounted either, the first refusal is what is reported."""
    fake = new_fake(bytes(PAGE), path="/srv/a/swap", export="/elsewhere")
    with pytest.raises(NfsError) as caught:
        Engine(fake.url(), LOOPBACK)
    assert (caught.value.phase, caught.value.errno) == ("mount", errno.EACCES)
    assert len(fake.calls("MNT")) == 3  # with "/"
