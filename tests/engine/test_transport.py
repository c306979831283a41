# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C engine against servers and networks that are slow, short-handed, wrong, cut off and away."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from conftest import FileOnServer
from fake_nfs import (
    FILE_SYNC,
    NFS3ERR_IO,
    NFS3ERR_JUKEBOX,
    NFS3ERR_NOSPC,
    UNSTABLE,
    FakeNfsServer,
)
from nfs_server import LOOPBACK, Ganesha
from proxy import TcpProxy
from waiting import DEADLINE_S, in_background, wait_until

from nbdnfs.engine import Engine, NfsError

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def open_engine() -> Iterator[Callable[..., Engine]]:
    """`open_engine(url)`: an engine that is closed at the end of the test."""
    engines: list[Engine] = []

    def open_it(url: str, **options: int) -> Engine:
        engines.append(Engine(url, LOOPBACK, **options))
        return engines[-1]

    yield open_it
    for engine in engines:
        engine.close()


@pytest.fixture
def fake() -> Iterator[FakeNfsServer]:
    """A fake server with 1 MiB of random bytes."""
    with FakeNfsServer(os.urandom(MIB)) as server:
        yield server


def read(engine: Engine, offset: int, length: int = PAGE) -> bytes:
    buffer = bytearray(length)
    engine.pread(buffer, offset)
    return bytes(buffer)


def write(engine: Engine, data: bytes, offset: int) -> None:
    """On the server when it returns."""
    engine.pwrite(data, offset)
    engine.flush()


def results(futures: list[Future[bytes]]) -> list[bytes]:
    deadline = time.monotonic() + DEADLINE_S
    return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]


# Requests in flight together


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "out of order"])
def test_four_reads_are_in_flight_together(
    fake: FakeNfsServer, open_engine: Callable[..., Engine], reverse: bool
) -> None:
    """The server has four READs before it answers the first; each caller gets its own page, in any order."""
    engine = open_engine(fake.url())
    fake.hold("READ")
    pages = [in_background(read, engine, number * PAGE) for number in range(4)]
    fake.wait_for(4, DEADLINE_S)
    fake.release(reverse=reverse)
    assert b"".join(results(pages)) == fake.content[: 4 * PAGE]


def test_four_writes_are_in_flight_together(fake: FakeNfsServer, open_engine: Callable[..., Engine]) -> None:
    """The same for WRITEs, of pages that are no neighbours."""
    engine = open_engine(fake.url())
    expected = bytearray(fake.content)
    fake.hold("WRITE")
    written = []
    for number in range(4):
        page = os.urandom(PAGE)
        expected[number * 64 * PAGE : (number * 64 + 1) * PAGE] = page
        written.append(in_background(write, engine, page, number * 64 * PAGE))
    fake.wait_for(4, DEADLINE_S)
    fake.release(reverse=True)
    results(written)
    assert fake.content == expected


def test_one_large_read_is_several_in_flight(open_engine: Callable[..., Engine]) -> None:
    """Half a MiB from a server that moves 64 KiB at a time: all eight pieces are asked for at once."""
    with FakeNfsServer(os.urandom(MIB), rtmax=65536, wtmax=65536) as fake:
        engine = open_engine(fake.url())
        fake.hold("READ")
        future = in_background(read, engine, 0, MIB // 2)
        fake.wait_for(8, DEADLINE_S)
        fake.release(reverse=True)
        assert future.result(DEADLINE_S) == fake.content[: MIB // 2]
        assert {call.count for call in fake.calls("READ")} == {65536}
        engine.close()


def test_four_requests_to_a_slow_server_take_the_time_of_one(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: Callable[..., Engine]
) -> None:
    """Replies 200 ms late: a read takes 200 ms, and four reads at once take hardly more, not 800."""
    backing_file.path.write_bytes(content := os.urandom(backing_file.size_bytes))
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    proxy.delay_s = 0.2
    start = time.monotonic()
    assert read(engine, 0) == content[:PAGE]
    one_s = time.monotonic() - start
    start = time.monotonic()
    pages = results([in_background(read, engine, number * MIB) for number in range(4)])
    four_s = time.monotonic() - start
    assert pages == [content[number * MIB : number * MIB + PAGE] for number in range(4)]
    assert one_s >= 0.2
    assert 0.2 <= four_s < 2 * one_s + 0.1


# Servers that do less than they are asked to


@pytest.mark.parametrize("limit", [1, 1000, PAGE, 65536])
def test_short_reads_go_on(open_engine: Callable[..., Engine], limit: int) -> None:
    """A server that returns fewer bytes than asked for is asked for the rest."""
    length = min(limit * 40, MIB) // PAGE * PAGE or PAGE
    with FakeNfsServer(os.urandom(2 * MIB)) as fake:
        engine = open_engine(fake.url())
        fake.limit("READ", limit)
        assert read(engine, 3 * PAGE, length) == fake.content[3 * PAGE : 3 * PAGE + length]
        assert len(fake.calls("READ")) == -(-length // limit)
        engine.close()


@pytest.mark.parametrize("limit", [1, 1000, PAGE, 65536])
def test_short_writes_go_on(open_engine: Callable[..., Engine], limit: int) -> None:
    """The same for one that takes fewer."""
    length = min(limit * 40, MIB) // PAGE * PAGE or PAGE
    with FakeNfsServer(os.urandom(2 * MIB)) as fake:
        engine = open_engine(fake.url())
        expected = bytearray(fake.content)
        expected[3 * PAGE : 3 * PAGE + length] = data = os.urandom(length)
        fake.limit("WRITE", limit)
        write(engine, data, 3 * PAGE)
        assert fake.content == fake.on_disk == expected
        assert len(fake.calls("WRITE")) >= length // limit
        engine.close()


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_a_server_that_is_not_ready_is_asked_again(
    fake: FakeNfsServer, open_engine: Callable[..., Engine], op: str
) -> None:
    """NFS3ERR_JUKEBOX (RFC 1813: try again later) three times, then done; the caller sees nothing of it."""
    engine = open_engine(fake.url())
    fake.fail(op, NFS3ERR_JUKEBOX, times=3)
    data = os.urandom(PAGE) if op == "WRITE" else fake.content[PAGE : 2 * PAGE]
    if op == "WRITE":
        write(engine, data, PAGE)
    assert read(engine, PAGE) == data == fake.content[PAGE : 2 * PAGE]
    assert len(fake.calls(op)) == 4


def test_others_go_on_while_one_is_asked_to_wait(fake: FakeNfsServer, open_engine: Callable[..., Engine]) -> None:
    """JUKEBOX for one request does not hold up those that come after it."""
    engine = open_engine(fake.url())
    fake.fail("READ", NFS3ERR_JUKEBOX, times=1)
    slow = in_background(read, engine, 0)
    wait_until(lambda: fake.calls("READ"), "the first READ")
    assert read(engine, PAGE) == fake.content[PAGE : 2 * PAGE]
    assert [call.offset for call in fake.calls("READ")][:2] == [0, PAGE]
    assert slow.result(DEADLINE_S) == fake.content[:PAGE]


# Servers that refuse and servers that are wrong


def test_a_failed_read_is_an_error_and_the_next_one_works(
    fake: FakeNfsServer, open_engine: Callable[..., Engine]
) -> None:
    """The server's EIO reaches the caller, once."""
    engine = open_engine(fake.url())
    fake.fail("READ", NFS3ERR_IO, times=1)
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(engine, 0)
    assert caught.value.errno == errno.EIO
    assert read(engine, 0) == fake.content[:PAGE]


def test_a_full_server(fake: FakeNfsServer, open_engine: Callable[..., Engine]) -> None:
    """ENOSPC reaches the caller; once there is room, the same write works."""
    engine = open_engine(fake.url())
    page = os.urandom(PAGE)
    fake.fail("WRITE", NFS3ERR_NOSPC, times=1)
    with pytest.raises(OSError, match="No space left") as caught:
        write(engine, page, 0)
    assert caught.value.errno == errno.ENOSPC
    write(engine, page, 0)
    assert fake.on_disk[:PAGE] == page


def test_a_write_that_is_not_stable_is_an_error(fake: FakeNfsServer, open_engine: Callable[..., Engine]) -> None:
    """A FILE_SYNC write that the server calls UNSTABLE is not taken for done (RFC 1813, 3.3.7)."""
    engine = open_engine(fake.url())
    fake.claim_stable(UNSTABLE)
    with pytest.raises(OSError, match="Protocol error"):
        write(engine, os.urandom(PAGE), 0)


def test_a_file_that_was_cut(backing_file: FileOnServer, open_engine: Callable[..., Engine]) -> None:
    """Somebody truncates the file: reads of what is gone fail with EIO, never zeros; the rest is still read."""
    backing_file.path.write_bytes(content := os.urandom(backing_file.size_bytes))
    engine = open_engine(backing_file.url())
    os.truncate(backing_file.path, 8 * MIB + 100)
    for offset, length in ((8 * MIB, PAGE), (12 * MIB, PAGE), (7 * MIB, 2 * MIB)):
        with pytest.raises(OSError, match="Input/output error") as caught:
            read(engine, offset, length)
        assert caught.value.errno == errno.EIO
    assert read(engine, 8 * MIB - PAGE) == content[8 * MIB - PAGE : 8 * MIB]


@pytest.mark.parametrize("op", ["READ", "WRITE"])
@pytest.mark.parametrize("claim", [PAGE + 1, 2**31, 2**32 - 1])
def test_a_count_beyond_what_was_asked(
    fake: FakeNfsServer, open_engine: Callable[..., Engine], op: str, claim: int
) -> None:
    """A reply that claims to have moved more than was asked for is not believed; the request is done again."""
    engine = open_engine(fake.url())
    guard = os.urandom(PAGE)
    buffer = bytearray(guard * 3)
    fake.claim_count(op, claim)
    data = os.urandom(PAGE)
    if op == "READ":
        request = in_background(engine.pread, memoryview(buffer)[PAGE : 2 * PAGE], 0)
    else:
        request = in_background(write, engine, data, 0)
    wait_until(lambda: len(fake.calls(op)) >= 2, "the request is sent again")
    fake.claim_count(op, None)
    request.result(DEADLINE_S)
    if op == "READ":
        assert buffer == guard + fake.content[:PAGE] + guard
    else:
        assert fake.on_disk[:PAGE] == data


def test_a_server_that_is_always_wrong_is_not_hammered(fake: FakeNfsServer, open_engine: Callable[..., Engine]) -> None:
    """Connecting works, no answer makes sense: there is a pause between the attempts, and it grows."""
    engine = open_engine(fake.url())
    fake.claim_count("READ", 2**31)
    request = in_background(read, engine, 0)
    wait_until(lambda: len(fake.calls("READ")) >= 3, "the request is sent again")
    before = len(fake.calls("READ"))
    time.sleep(1.0)  # what may happen in a second is what is measured
    assert len(fake.calls("READ")) - before < 10
    fake.claim_count("READ", None)
    assert request.result(DEADLINE_S) == fake.content[:PAGE]


def test_garbage_instead_of_a_reply(fake: FakeNfsServer, open_engine: Callable[..., Engine]) -> None:
    """Replies that do not decode cost the connection, not the request."""
    engine = open_engine(fake.url())
    fake.mangle("READ", lambda result: result[:7])
    request = in_background(read, engine, 0)
    wait_until(lambda: len(fake.calls("READ")) >= 2, "the request is sent again")
    fake.mangle("READ", None)
    assert request.result(DEADLINE_S) == fake.content[:PAGE]


# Stability


def test_every_write_is_stable(open_engine: Callable[..., Engine]) -> None:
    """Each WRITE on the wire is FILE_SYNC, also the rest of a short one, and none is larger than the server takes.

    A crash of the server right after the flush loses nothing.
    """
    with FakeNfsServer(bytes(MIB), wtmax=32768) as fake:
        engine = open_engine(fake.url())
        fake.limit("WRITE", 10_000)
        data = os.urandom(MIB)
        engine.pwrite(data[: MIB // 2], 0)
        for number in range(128, 256):
            engine.pwrite(data[number * PAGE : (number + 1) * PAGE], number * PAGE)
        engine.flush()
        fake.crash()
        calls = fake.calls("WRITE")
        assert fake.content == data
        assert {call.stable for call in calls} == {FILE_SYNC}
        assert max(call.count for call in calls) <= 32768
        engine.close()


# Connections that break


def test_resets_in_the_middle_of_a_reply(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: Callable[..., Engine]
) -> None:
    """30 times RST inside a READ's reply, with eight reads under way: every one returns the right bytes."""
    backing_file.path.write_bytes(content := os.urandom(backing_file.size_bytes))
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    length = 64 * 1024
    for number in range(30):
        proxy.reset_after_reply_bytes(1 + number * 17_000)  # 30 places in eight replies of 64 KiB
        offsets = [(number * 8 + reader) * length % len(content) for reader in range(8)]
        pieces = results([in_background(read, engine, offset, length) for offset in offsets])
        for offset, piece in zip(offsets, pieces, strict=True):
            assert piece == content[offset : offset + length], f"round {number}, offset {offset}"
        assert proxy.resets == number + 1


def test_resets_while_writing(backing_file: FileOnServer, proxy: TcpProxy, open_engine: Callable[..., Engine]) -> None:
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
            written.append(in_background(write, engine, data, offset))
        results(written)
    assert proxy.resets > 10
    assert backing_file.path.read_bytes() == expected


@pytest.mark.parametrize("fault", ["cut", "reset", "half_close"])
def test_connections_that_end_while_requests_wait(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: Callable[..., Engine], fault: str
) -> None:
    """FIN, RST, FIN from one side, with reads and writes waiting for their replies: all are done."""
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    page = os.urandom(PAGE)
    sent = proxy.passed_bytes[0]
    proxy.delay_s = 0.5  # longer than it takes to send the requests and end the connection
    reads = [in_background(read, engine, number * PAGE) for number in range(4)]
    writes = [in_background(write, engine, page, (16 + number) * PAGE) for number in range(4)]
    wait_until(lambda: proxy.passed_bytes[0] > sent + 4 * PAGE, "the requests are with the server")
    {"cut": proxy.cut, "reset": proxy.reset, "half_close": lambda: proxy.half_close("client")}[fault]()
    proxy.delay_s = 0.0
    assert results(reads) == [bytes(PAGE)] * 4
    results(writes)
    assert backing_file.path.read_bytes()[16 * PAGE : 20 * PAGE] == page * 4
    assert proxy.accepted > 1


def test_a_network_that_hangs_for_a_while(
    backing_file: FileOnServer, proxy: TcpProxy, open_engine: Callable[..., Engine]
) -> None:
    """Nothing passes: the request waits, for it is not dead that is slow. Then everything goes on, on the same way."""
    engine = open_engine(backing_file.url(nfsport=proxy.port))
    proxy.black_hole = True
    request = in_background(read, engine, 0)
    with pytest.raises(TimeoutError):
        request.result(1.0)
    proxy.black_hole = False
    assert request.result(DEADLINE_S) == bytes(PAGE)
    assert proxy.accepted == 1


def test_a_server_that_is_away_and_comes_back(
    own_ganesha: Ganesha, open_engine: Callable[..., Engine], capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed with requests under way and restarted: they are done, without an error, and two lines tell of it."""
    path = own_ganesha.export_path / "swap"
    path.write_bytes(content := os.urandom(4 * MIB))
    engine = open_engine(own_ganesha.url("swap"))
    page = os.urandom(PAGE)
    own_ganesha.kill()
    reads = [in_background(read, engine, number * MIB) for number in range(4)]
    written = in_background(write, engine, page, PAGE)
    said = ""

    def has_said_so() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "no connection" in said

    wait_until(has_said_so, "a line that the server is away")
    own_ganesha.start()
    assert results(reads) == [content[number * MIB : number * MIB + PAGE] for number in range(4)]
    written.result(DEADLINE_S)
    assert path.read_bytes()[PAGE : 2 * PAGE] == page
    said += capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("nbdnfs: ")]
    assert len(lines) == 2, said
    assert "waiting for it" in lines[0]
    assert "connected again after" in lines[1]


def test_a_file_that_was_replaced_is_not_written_into(
    fake: FakeNfsServer, open_engine: Callable[..., Engine], capfd: pytest.CaptureFixture[str]
) -> None:
    """Another file under the name while the connection was lost: requests wait, a line says why; the stranger stays
    as it is. With the old file back in its place, everything goes on.
    """
    engine = open_engine(fake.url())
    fileid, content = fake.fileid, fake.content
    page = os.urandom(PAGE)
    fake.replace(stranger := os.urandom(MIB), fileid=fileid + 1)
    fake.crash()
    written = in_background(write, engine, page, 0)
    said = ""

    def has_said_so() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "the file has been replaced by another" in said

    wait_until(has_said_so, "a line that the file is another")
    lookups = len(fake.calls("LOOKUP"))
    wait_until(lambda: len(fake.calls("LOOKUP")) > lookups, "it looks again")
    assert not written.done()
    assert fake.content == stranger
    fake.replace(content, fileid)
    written.result(DEADLINE_S)
    assert fake.content == page + content[PAGE:]


# The end


def test_close_while_idle(fake: FakeNfsServer) -> None:
    """It ends at once; the server sees the connection go; further calls say that it is closed."""
    engine = Engine(fake.url(), LOOPBACK)
    assert fake.open_connections == 1
    in_background(engine.close).result(5)
    wait_until(lambda: fake.open_connections == 0, "the connection is closed")
    for call in (lambda: read(engine, 0), lambda: engine.pwrite(bytes(PAGE), 0), engine.flush):
        with pytest.raises(ValueError, match="closed"):
            call()
    engine.close()


def test_close_while_the_server_is_away(
    backing_file: FileOnServer, proxy: TcpProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does not wait for the next attempt to connect."""
    engine = Engine(backing_file.url(nfsport=proxy.port), LOOPBACK)
    proxy.refuse = True
    proxy.cut()
    wait_until(lambda: "no connection" in capfd.readouterr().err, "a line that the server is away")
    in_background(engine.close).result(5)


def test_close_while_the_server_hangs(backing_file: FileOnServer, proxy: TcpProxy) -> None:
    """Nor for a server that takes the connection and says nothing: idle, or while it connects again."""
    engine = Engine(backing_file.url(nfsport=proxy.port), LOOPBACK)
    proxy.black_hole = True
    proxy.cut()
    wait_until(lambda: proxy.accepted == 2, "the next attempt")
    in_background(engine.close).result(5)


def test_close_waits_for_nobody(fake: FakeNfsServer) -> None:
    """While requests run it is refused, and the device works on."""
    engine = Engine(fake.url(), LOOPBACK)
    fake.hold("READ")
    request = in_background(read, engine, 0)
    fake.wait_for(1, DEADLINE_S)
    with pytest.raises(RuntimeError, match="still running"):
        engine.close()
    fake.release()
    assert request.result(DEADLINE_S) == fake.content[:PAGE]
    engine.close()


# Where the file lies


@pytest.mark.parametrize("export", ["/srv", "/srv/a", "/srv/a/b"])
def test_an_export_of_a_parent_directory(open_engine: Callable[..., Engine], export: str) -> None:
    """The server lets only a parent of the URL's directory be mounted: it is, also when connecting again."""
    with FakeNfsServer(os.urandom(MIB), path="/srv/a/b/swap", export=export) as fake:
        engine = open_engine(fake.url())
        assert read(engine, 0) == fake.content[:PAGE]
        mounts = len(fake.calls("MNT"))
        assert mounts == 1 + "/srv/a/b".count("/") - export.count("/")
        fake.crash()
        assert read(engine, PAGE) == fake.content[PAGE : 2 * PAGE]
        assert len(fake.calls("MNT")) == mounts + 1
        engine.close()


def test_no_export_at_all(fake: FakeNfsServer) -> None:
    """Where no parent can be mounted either, the first refusal is what is reported."""
    with FakeNfsServer(bytes(PAGE), path="/srv/a/swap", export="/elsewhere") as fake:
        with pytest.raises(NfsError) as caught:
            Engine(fake.url(), LOOPBACK)
        assert (caught.value.phase, caught.value.errno) == ("mount", errno.EACCES)
        assert len(fake.calls("MNT")) == 2
