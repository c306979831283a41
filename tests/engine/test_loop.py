# SPDX-License-Identifier: LGPL-2.1-or-later
"""The loop that serves one NBD client without nbdkit, Engine.serve(): a client on the other end of a socketpair."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import socket
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import PAGE, opening
from support.fake_nfs import NFS3ERR_ACCES, NFS3ERR_INVAL, NFS3ERR_NOENT, NFS3ERR_NOSPC, FakeNfsServer
from support.nbd_client import FLAG_FUA, FLUSH, READ, TRIM, WRITE, NbdClient, Request
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs import region
from nbdnfs.engine import Engine
from nbdnfs.kernel import nbd_handshake

MIB = 1 << 20
SIZE = 4 * MIB
SLOTS = 256
PIECE = 128 * 1024
REQUEST_BYTES_MAX = MIB
WRITE_ZEROES = 6
DISCONNECT = 2
# No test ends by it: what is not called for hangs, and fails its test.
TICK_MS = 3_600_000
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")


@pytest.fixture
def fake() -> Iterator[FakeNfsServer]:
    """A server with 4 MiB of random bytes."""
    with FakeNfsServer(os.urandom(SIZE)) as server:
        yield server


class Served:
    """An engine whose loop serves `socket`'s other end; `ended` is the result of Engine.serve()."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.socket, self._theirs = socket.socketpair()
        self.socket.settimeout(DEADLINE_S)
        self.ended: Future[None] = in_background(self._serve)

    def _serve(self) -> None:
        with self._theirs:
            self.engine.serve(self._theirs.fileno(), TICK_MS)

    def client(self) -> NbdClient:
        """After the handshake."""
        nbd_handshake.negotiate(self.socket)
        return NbdClient.over(self.socket, DEADLINE_S)

    def send(self, kind: int, cookie: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> None:
        """A request, without waiting for its reply."""
        self.socket.sendall(request(kind, cookie, offset, length or len(data), flags) + data)

    def receive(self, length: int = 0) -> tuple[int, int, bytes]:
        """A reply: its cookie, its error, and the data of one that has `length` bytes."""
        magic, error, cookie = _REPLY.unpack(self.take(_REPLY.size))
        assert magic == 0x67446698
        return cookie, error, self.take(length if not error else 0)

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            assert piece, "the loop has hung up"
            data += piece
        return data


def request(kind: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    return _REQUEST.pack(0x25609513, flags, kind, cookie, offset, length)


@pytest.fixture
def serve(fake: FakeNfsServer) -> Iterator[Callable[..., Served]]:
    """Open an engine and serve it; at the end the client hangs up, and the loop must end because of that."""
    made: list[Served] = []

    with opening(region_pages=SLOTS, connections=2) as open_engine:

        def start(**options: object) -> Served:
            made.append(Served(open_engine(fake.url(), **options)))
            return made[-1]

        yield start
        for op in ("READ", "WRITE"):
            fake.fail(op, 0)
        fake.release()
        for served in made:
            served.socket.close()
            with contextlib.suppress(OSError):
                served.ended.result(DEADLINE_S)


def unread_bytes(sender: socket.socket) -> int:
    """What the other side has not received of what was sent: unix(7), SIOCOUTQ."""
    return int.from_bytes(fcntl.ioctl(sender, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def errno_of(call: Callable[[], object]) -> int | None:
    """Of the OSError that it raises; None where it raises none."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def counter(served: Served, name: str) -> int:
    value = served.engine.counters()[name]
    assert isinstance(value, int)
    return value


def write_and_evict(client: NbdClient, data: bytes) -> None:
    """Write page 0, and have it on the server and in no slot.

    It is clean before the others are written: one whose WRITE is answered late outlives those that came after it.
    """
    client.write(0, data)
    client.flush()
    for page in range(1, 2 * SLOTS):
        client.write(page * PAGE, os.urandom(PAGE))
    client.flush()


def wait_for_reads(served: Served, count: int) -> None:
    wait_until(lambda: counter(served, "reads") >= count, f"{count} reads are done")


def requests_under_way(region_fd: int) -> int:
    """How many requests a region has noted: struct region_waits."""
    begin = region.WAITS_OFFSET + 8 * (2 + region.CONNECTIONS)
    header = os.pread(region_fd, region.HEADER_BYTES, 0)
    return sum(any(header[at : at + 8]) for at in range(begin, region.HEADER_BYTES, 8))


# The handshake


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data


def greet(served: Served, flags: int = 3) -> None:
    assert served.take(18) == b"NBDMAGICIHAVEOPT\x00\x03"
    served.socket.sendall(struct.pack(">I", flags))


def option_reply(served: Served, number: int) -> tuple[int, bytes]:
    magic, echoed, kind, length = struct.unpack(">QIII", served.take(20))
    assert (magic, echoed) == (0x3E889045565A9, number)
    return kind, served.take(length)


def test_what_it_offers(serve: Callable[..., Served]) -> None:
    """What the plugin offers through nbdkit, and the largest request that it takes."""
    export = nbd_handshake.negotiate(serve().socket)
    assert export.size_bytes == SIZE
    assert (export.min_block_bytes, export.preferred_block_bytes) == (PAGE, PAGE)
    assert export.max_block_bytes == REQUEST_BYTES_MAX
    flags = nbd_handshake.TransmissionFlags
    assert export.flags == (
        flags.HAS_FLAGS
        | flags.SEND_FLUSH
        | flags.SEND_FUA
        | flags.SEND_TRIM
        | flags.SEND_WRITE_ZEROES
        | flags.CAN_MULTI_CONN
    )


@pytest.mark.parametrize("zeroes", [124, 0])
def test_export_name(serve: Callable[..., Served], zeroes: int) -> None:
    """The oldest way to ask: no reply, but the export at once; with 124 zeros unless the client does without."""
    served = serve()
    greet(served, 1 if zeroes else 3)
    served.socket.sendall(option(1, b"any name"))
    size, flags = struct.unpack(">QH", served.take(10))
    assert (size, flags & 1, served.take(zeroes)) == (SIZE, 1, bytes(zeroes))
    served.send(FLUSH, 7)
    assert served.receive() == (7, 0, b"")


def test_options(serve: Callable[..., Served]) -> None:
    """What it does not know is refused, what is not well formed is an error, and the next option is answered."""
    served = serve()
    greet(served)
    for number in (5, 8, 10):  # TLS, structured replies, meta contexts
        served.socket.sendall(option(number))
        assert option_reply(served, number)[0] == 1 << 31 | 1
    served.socket.sendall(option(3))
    assert [option_reply(served, 3) for _ in range(2)] == [(2, bytes(4)), (1, b"")]
    for data in (b"", b"\xff" * 6, struct.pack(">IH", 0, 1), struct.pack(">IHB", 0, 0, 0)):
        served.socket.sendall(option(7, data))
        assert option_reply(served, 7) == (1 << 31 | 3, b"")
    served.socket.sendall(option(7, bytes(100_000)))
    assert option_reply(served, 7) == (1 << 31 | 9, b"")
    served.socket.sendall(option(3, b"x"))
    assert option_reply(served, 3) == (1 << 31 | 3, b"")
    served.socket.sendall(option(6, struct.pack(">IH", 0, 0)))
    assert [option_reply(served, 6)[0] for _ in range(3)] == [3, 3, 1]
    served.socket.sendall(option(2))
    assert option_reply(served, 2) == (1, b"")
    served.ended.result(DEADLINE_S)


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"",
        b"\x00\x00",
        b"\x00\x00\x00\x03IHAVE",
        b"\x00\x00\x00\x03" + option(7, b"")[:-1],
        b"\x00\x00\x00\x03" + option(7, bytes(100_000))[:-1],
    ],
)
def test_a_client_that_leaves_during_the_handshake(serve: Callable[..., Served], bytes_sent: bytes) -> None:
    """Serving ends."""
    served = serve()
    served.socket.sendall(bytes_sent)
    served.socket.close()
    served.ended.result(DEADLINE_S)


@pytest.mark.parametrize("bytes_sent", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x03" + b"GET / HTTP/1.1\r\n"])
def test_a_client_that_speaks_something_else(serve: Callable[..., Served], bytes_sent: bytes) -> None:
    """Serving ends with an error."""
    served = serve()
    served.socket.sendall(bytes_sent)
    assert errno_of(lambda: served.ended.result(DEADLINE_S)) == errno.EPROTO


# Requests


def test_requests(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """Each kind, one at a time: what is written is read, in the file after a FLUSH, and zeros after WRITE_ZEROES."""
    served, content = serve(), bytearray(fake.content)
    client = served.client()
    data = os.urandom(REQUEST_BYTES_MAX)
    for offset, length in ((0, PAGE), (5 * PAGE, 3 * PAGE), (64 * PAGE, PIECE), (MIB, REQUEST_BYTES_MAX)):
        assert client.read(offset, length) == content[offset : offset + length]
        client.write(offset, data[:length])
        content[offset : offset + length] = data[:length]
        assert client.read(offset, length) == data[:length]
    client.flush()
    assert fake.on_disk == content
    client.write(PAGE, data[:PAGE], fua=True)
    assert fake.on_disk[PAGE : 2 * PAGE] == data[:PAGE]
    writes = counter(served, "writes")
    served.send(WRITE_ZEROES, 9, 2 * PAGE, 100 * PAGE)
    assert served.receive() == (9, 0, b"")
    assert counter(served, "writes") == writes + 1
    assert client.read(0, 103 * PAGE)[2 * PAGE : 102 * PAGE] == bytes(100 * PAGE)
    client.trim(0, SIZE)
    client.trim(0, PAGE)
    assert counter(served, "trims") == 2


@pytest.mark.parametrize(
    ("kind", "offset", "length"),
    [
        (READ, 1, PAGE),
        (READ, 0, PAGE - 1),
        (READ, 0, 0),
        (READ, SIZE, PAGE),
        (READ, SIZE - PAGE, 2 * PAGE),
        (READ, 2**64 - PAGE, PAGE),
        (READ, 0, REQUEST_BYTES_MAX + PAGE),
        (READ, 0, 2**32 - PAGE),
        (WRITE, 1, PAGE),
        (WRITE, 0, 100),
        (WRITE, 0, 0),
        (WRITE, SIZE, PAGE),
        (WRITE, 0, REQUEST_BYTES_MAX + PAGE),
        (TRIM, 1, PAGE),
        (TRIM, 0, SIZE + PAGE),
        (WRITE_ZEROES, 0, 0),
        (WRITE_ZEROES, 1, PAGE),
        (WRITE_ZEROES, 2**64 - PAGE, 2 * PAGE),
        (FLUSH, 0, PAGE),
        (FLUSH, PAGE, 0),
        (5, 0, PAGE),
        (77, 0, 0),
    ],
)
def test_what_is_not_valid(serve: Callable[..., Served], kind: int, offset: int, length: int) -> None:
    """EINVAL, and the next request is answered: the data of a write that was refused is not taken for requests."""
    served = serve()
    client = served.client()
    served.send(kind, 3, offset, length, bytes(length if kind == WRITE else 0))
    assert served.receive() == (3, errno.EINVAL, b"")
    assert len(client.read(0, PAGE)) == PAGE


@pytest.mark.parametrize(
    ("kind", "length", "flags"),
    [(READ, PAGE, 2), (READ, PAGE, 4), (WRITE, PAGE, 0x8000), (FLUSH, 0, 2), (TRIM, PAGE, 2), (WRITE_ZEROES, PAGE, 16)],
)
def test_flags_that_are_not_valid(serve: Callable[..., Served], kind: int, length: int, flags: int) -> None:
    """EINVAL: a client that asks for what was not offered is not told that it got it. FUA is allowed everywhere."""
    served = serve()
    client = served.client()
    data = bytes(length if kind == WRITE else 0)
    served.send(kind, 3, 0, length, data, flags)
    assert served.receive() == (3, errno.EINVAL, b"")
    served.send(kind, 4, 0, length, data, FLAG_FUA)
    assert served.receive(length if kind == READ else 0)[:2] == (4, 0)
    assert len(client.read(0, PAGE)) == PAGE


def test_requests_in_pieces(serve: Callable[..., Served]) -> None:
    """However the bytes are cut: also a head, and a head from the data before it."""
    served = serve()
    served.client()
    data = os.urandom(3 * PAGE)
    stream = request(WRITE, 1, 0, len(data)) + data + request(READ, 2, 0, len(data)) + request(FLUSH, 3, 0, 0)
    at = 0
    for length in (1, 3, 20, 4, 1000, 7000, 2, 4000):
        served.socket.sendall(stream[at : at + length])
        at += length
    served.socket.sendall(stream[at:])
    replies = {}
    for _ in range(3):
        magic, error, cookie = _REPLY.unpack(served.take(16))
        replies[cookie] = (magic, error, served.take(len(data)) if cookie == 2 else b"")
    assert replies[2][2] == data or replies[2][1] == 0, "the read may have been answered before the write"
    assert [replies[cookie][1] for cookie in (1, 2, 3)] == [0, 0, 0]


def test_many_at_once(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """More requests than there are places, all sent before the first reply is received: each is answered once."""
    served, content = serve(), fake.content
    served.client()
    count = 300
    pages = [random.Random(1).randrange(SIZE // PAGE) for _ in range(count)]
    sender = in_background(
        lambda: served.socket.sendall(b"".join(request(READ, i, page * PAGE, PAGE) for i, page in enumerate(pages)))
    )
    found = {cookie: data for cookie, _, data in (served.receive(PAGE) for _ in range(count))}
    sender.result(DEADLINE_S)
    assert found == {i: content[page * PAGE : (page + 1) * PAGE] for i, page in enumerate(pages)}


def test_a_request_leaves_the_socket_after_a_reply(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """Room in the socket wakes the client's thread that waits for replies: there is to be one for it by then."""
    served, content = serve(), fake.content
    client = served.client()
    client.read(900 * PAGE, PAGE)  # a client that reads
    fake.hold("READ")
    for cookie, page in enumerate((100, 300, 500)):
        served.send(READ, cookie, page * PAGE, PAGE)
        fake.wait_for(cookie + 1, DEADLINE_S)
    assert unread_bytes(served.socket) > 0
    served.send(WRITE, 3, 0, PAGE, bytes(range(256)) * 16)  # all leave it before a write's data
    assert served.receive() == (3, 0, b"")
    wait_until(lambda: unread_bytes(served.socket) == 0, "the write has left the socket, and what was before it")
    fake.release()
    assert sorted(served.receive(PAGE) for _ in range(3)) == [
        (cookie, 0, content[page * PAGE : (page + 1) * PAGE]) for cookie, page in enumerate((100, 300, 500))
    ]
    wait_until(lambda: unread_bytes(served.socket) == 0, "nothing is left in the socket")


def test_a_client_that_does_not_receive(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """The loop waits for it with nothing: its replies are complete once it does, and pages that it wrote reach the
    server meanwhile, which takes a thread that is not blocked in a send."""
    served, content = serve(), fake.content
    served.client()
    data = os.urandom(PAGE)
    served.send(WRITE, 100, SIZE - PAGE, 0, data)
    assert served.receive()[:2] == (100, 0)
    for cookie in range(30):  # far more than the socket takes
        served.send(READ, cookie, cookie * PIECE % MIB, PIECE)
    served.engine.flush()
    assert fake.on_disk[SIZE - PAGE :] == data
    found = {cookie: reply for cookie, _, reply in (served.receive(PIECE) for _ in range(30))}
    assert found == {i: content[i * PIECE % MIB : i * PIECE % MIB + PIECE] for i in range(30)}


def test_requests_that_come_one_by_one_to_a_full_socket(serve: Callable[..., Served]) -> None:
    """A socket that takes no more replies holds up no request: each is received and done, while there are places."""
    served = serve()
    served.client()
    for cookie in range(15):
        served.send(READ, cookie, cookie * PIECE % MIB, PIECE)
        wait_for_reads(served, cookie + 1)


# What waits does not hold up the rest


def test_reads_go_on_while_a_flush_waits(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """The FLUSH is answered when the server has the page stably, and reads and writes before that."""
    served, content = serve(), fake.content
    client = served.client()
    fake.hold("WRITE")
    client.write(0, os.urandom(PAGE))
    for cookie in range(5):  # more than there are waiters
        served.send(FLUSH, cookie)
    fake.wait_for(1, DEADLINE_S)
    served.send(READ, 50, 9 * PAGE, PAGE)
    assert served.receive(PAGE) == (50, 0, content[9 * PAGE : 10 * PAGE])
    served.send(WRITE, 51, 10 * PAGE, 0, bytes(PAGE))
    assert served.receive() == (51, 0, b"")
    assert not any(call.op == "COMMIT" for call in fake.calls("COMMIT"))
    fake.release()
    assert sorted(served.receive()[:2] for _ in range(5)) == [(cookie, 0) for cookie in range(5)]


def test_a_full_region(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """Writes wait for room, in the order in which they came, and reads are served meanwhile."""
    served, content = serve(), fake.content
    client = served.client()
    fake.hold("WRITE")
    for page in range(SLOTS):
        client.write(2 * page * PAGE, os.urandom(PAGE))
    data = [os.urandom(3 * PAGE), os.urandom(PAGE)]
    served.send(WRITE, 1, 1 * PAGE * 701, 0, data[0])
    served.send(WRITE, 2, 1 * PAGE * 801, 0, data[1])
    wait_until(lambda: counter(served, "stalls") > 0, "a write finds no slot")
    served.send(READ, 3, 999 * PAGE, PAGE)
    assert served.receive(PAGE) == (3, 0, content[999 * PAGE : 1000 * PAGE])
    fake.release()
    assert [served.receive()[:2] for _ in range(2)] == [(1, 0), (2, 0)]
    client.flush()
    assert fake.on_disk[701 * PAGE : 704 * PAGE] == data[0]
    assert fake.on_disk[801 * PAGE : 802 * PAGE] == data[1]


def test_writes_that_wait_are_timed(serve: Callable[..., Served], fake: FakeNfsServer, region_fd: int) -> None:
    """Each from when it came, also one that waits behind another: health and a soft limit go by that."""
    served = serve(region_fd=region_fd)
    client = served.client()
    fake.hold("WRITE")
    for page in range(SLOTS):
        client.write(2 * page * PAGE, os.urandom(PAGE))
    for cookie in range(3):
        served.send(WRITE, cookie, (701 + 2 * cookie) * PAGE, 0, os.urandom(PAGE))
    wait_until(lambda: requests_under_way(region_fd) == 3, "three requests are noted")
    fake.release()
    assert [served.receive()[:2] for _ in range(3)] == [(0, 0), (1, 0), (2, 0)]
    wait_until(lambda: requests_under_way(region_fd) == 0, "they are over")


def test_read_ahead(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """A reader that walks the device is served from what was fetched before, and waits for what is being fetched."""
    served, content = serve(read_ahead_pages=64), fake.content
    client = served.client()
    fake.delay("READ", 0.005)
    requests = (Request(READ, page * PAGE, PAGE) for page in range(256))
    for reply in client.run(requests, depth=4):
        assert reply.data == content[reply.request.offset : reply.request.offset + PAGE]
    assert counter(served, "read_ahead_hits") > 100
    assert len(fake.calls("READ")) < 128


def test_a_page_that_is_written_while_it_is_read(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """The server's older bytes do not agree with the page's checksum any more; those of the slot are returned."""
    served, data = serve(), os.urandom(PAGE)
    client = served.client()
    write_and_evict(client, os.urandom(PAGE))
    fake.hold("READ", after=True)
    served.send(READ, 1, 0, PAGE)
    fake.wait_for(1, DEADLINE_S)
    served.send(WRITE, 2, 0, 0, data)
    assert served.receive() == (2, 0, b"")
    fake.release()
    assert served.receive(PAGE) == (1, 0, data)


def test_a_page_that_the_server_changed(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """It is read again, by a thread that may wait, and is an error then; others are served, and it is, once right."""
    served, data = serve(), os.urandom(PAGE)
    client = served.client()
    write_and_evict(client, data)
    fake.overwrite(0, os.urandom(PAGE))
    assert errno_of(lambda: client.read(0, PAGE)) == errno.EIO
    assert (counter(served, "checksum_failures"), counter(served, "checksum_rereads")) == (1, 3)
    fake.overwrite(0, data)
    assert client.read(0, PAGE) == data
    assert counter(served, "failed_reads") == 1


def test_a_thread_that_receives_when_serving_begins(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """It waits for its own answer over the connection that the loop wants, which is called once it has that."""
    engine_alone, content = serve(connections=1), fake.content
    page = bytearray(PAGE)
    engine_alone.socket.close()
    engine_alone.ended.result(DEADLINE_S)
    fake.hold("READ")
    reading = in_background(engine_alone.engine.pread, page, PAGE)
    fake.wait_for(1, DEADLINE_S)
    served = Served(engine_alone.engine)
    client = served.client()
    served.send(READ, 1, 2 * PAGE, PAGE)
    fake.wait_for(2, DEADLINE_S)
    fake.answer_held(1)
    reading.result(DEADLINE_S)
    fake.release()
    assert served.receive(PAGE) == (1, 0, content[2 * PAGE : 3 * PAGE])
    assert client.read(3 * PAGE, PAGE) == content[3 * PAGE : 4 * PAGE]
    served.socket.close()
    served.ended.result(DEADLINE_S)


def test_a_read_that_needs_a_longer_look_while_the_server_is_full(
    serve: Callable[..., Served], fake: FakeNfsServer
) -> None:
    """FLUSHes that wait for the server to take writes, more than there are waiters, do not hold it up."""
    served, data = serve(), os.urandom(PAGE)
    client = served.client()
    write_and_evict(client, data)
    fake.fail("WRITE", NFS3ERR_NOSPC)
    client.write(PAGE, os.urandom(PAGE))
    for cookie in range(4):
        served.send(FLUSH, cookie)
    wait_until(lambda: counter(served, "write_errors") > 0, "the server has refused")
    fake.overwrite(0, os.urandom(PAGE))
    served.send(READ, 9, 0, PAGE)
    assert served.receive(PAGE) == (9, errno.EIO, b"")
    fake.overwrite(0, data)
    served.send(READ, 10, 0, PAGE)
    assert served.receive(PAGE) == (10, 0, data)
    fake.fail("WRITE", 0)
    assert sorted(served.receive()[:2] for _ in range(4)) == [(cookie, 0) for cookie in range(4)]


def test_what_waits_for_a_waiter_is_noted(serve: Callable[..., Served], fake: FakeNfsServer, region_fd: int) -> None:
    """From when it comes, however many FLUSHes are before it."""
    served = serve(region_fd=region_fd)
    client = served.client()
    fake.hold("WRITE")
    client.write(PAGE, os.urandom(PAGE))
    for cookie in range(9):
        served.send(FLUSH, cookie)
    wait_until(lambda: requests_under_way(region_fd) == 9, "all of them are noted")
    fake.release()
    assert sorted(served.receive()[:2] for _ in range(9)) == [(cookie, 0) for cookie in range(9)]
    wait_until(lambda: requests_under_way(region_fd) == 0, "none is any more")


# The server's faults


def test_a_server_that_restarts(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """Connections break again and again under load: no request sees it, and the file is right in the end."""
    served = serve(connections=4)
    client = served.client()
    content, rng = bytearray(fake.content), random.Random(3)
    for number in range(40):
        if number % 8 == 0:
            fake.crash()
        pages = rng.sample(range(SIZE // PAGE), 16)
        data = {page: os.urandom(PAGE) for page in pages[:8]}
        requests = [Request(WRITE, page * PAGE, PAGE, data[page]) for page in data]
        requests += [Request(READ, page * PAGE, PAGE) for page in pages[8:]]
        for reply in client.run(requests, depth=16):
            assert reply.error == 0
            if reply.request.op == READ:
                assert reply.data == content[reply.request.offset : reply.request.offset + PAGE]
        for page, page_data in data.items():
            content[page * PAGE : (page + 1) * PAGE] = page_data
    client.flush()
    assert fake.on_disk == content
    assert counter(served, "reconnects") > 0


def test_a_read_that_the_server_refuses(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """An error of the protocol's own; the connection to the client stays."""
    served = serve(soft_limit_ms=500)
    client = served.client()
    fake.fail("READ", NFS3ERR_ACCES)
    assert errno_of(lambda: client.read(0, PAGE)) == errno.EIO
    fake.fail("READ", 0)
    assert len(client.read(0, PAGE)) == PAGE
    assert errno_of(lambda: client.read(SIZE, PAGE)) == errno.EINVAL  # the client's fault
    assert counter(served, "failed_reads") == 1


@pytest.mark.long
def test_a_read_that_the_server_calls_invalid(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """The server's EINVAL, after 30 s, has failed a read; the client's own has not."""
    served = serve()
    served.client()
    served.socket.settimeout(2 * DEADLINE_S)
    fake.fail("READ", NFS3ERR_INVAL)
    served.send(READ, 1, 0, PAGE)
    assert served.receive()[:2] == (1, errno.EINVAL)
    assert counter(served, "failed_reads") == 1


def test_a_file_that_is_gone(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """After gone_limit reads fail, the first ones on each connection and those that come later, until it is there."""
    served = serve(gone_limit_ms=300)
    client = served.client()
    fake.fail("LOOKUP", NFS3ERR_NOENT)
    fake.expire_handles()
    for page in range(4):
        assert errno_of(lambda page=page: client.read(page * PAGE, PAGE)) == errno.EIO
    fake.fail("LOOKUP", 0)
    wait_until(lambda: counter(served, "file_state") == region.FILE_THERE, "it is there again")
    assert client.read(PAGE, PAGE) == fake.content[PAGE : 2 * PAGE]


def test_a_soft_limit(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """Reads and writes that wait for longer fail with EIO, although nothing at all happens that would end a wait."""
    served = serve(soft_limit_ms=700)
    client = served.client()
    fake.hold("WRITE")
    fake.hold("READ")
    for page in range(SLOTS):
        client.write(2 * page * PAGE, os.urandom(PAGE))
    served.send(WRITE, 1, PAGE, 0, bytes(range(256)) * 16)
    served.send(READ, 2, 999 * PAGE, PAGE)
    assert sorted(served.receive()[:2] for _ in range(2)) == [(1, errno.EIO), (2, errno.EIO)]


def test_a_truncated_file(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """What lay beyond is EIO."""
    served = serve()
    client = served.client()
    fake.content = fake.content[:MIB]
    assert errno_of(lambda: client.read(2 * MIB, PAGE)) == errno.EIO
    assert len(client.read(0, PAGE)) == PAGE


# The end


def test_disconnect(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """What was asked for before NBD_CMD_DISC is answered, then serving ends, and the engine goes on to work."""
    served, content = serve(), fake.content
    served.client()
    fake.hold("READ")
    served.send(READ, 1, 0, PAGE)
    fake.wait_for(1, DEADLINE_S)
    served.send(DISCONNECT, 2)
    served.send(READ, 3, 0, PAGE)  # nobody looks at that any more
    fake.release()
    assert served.receive(PAGE) == (1, 0, content[:PAGE])
    served.ended.result(DEADLINE_S)
    page = bytearray(PAGE)
    served.engine.pread(page, PAGE)
    assert page == content[PAGE : 2 * PAGE]
    served.engine.flush()


@pytest.mark.parametrize("kind", [READ, FLUSH, WRITE])
def test_a_client_that_hangs_up_with_requests_under_way(
    serve: Callable[..., Served], fake: FakeNfsServer, kind: int
) -> None:
    """Serving ends once they have; what was acknowledged reaches the server, half a write does not."""
    served = serve()
    client = served.client()
    data = os.urandom(PAGE)
    client.write(0, data)
    fake.hold("READ")
    fake.hold("WRITE")
    if kind == WRITE:
        served.socket.sendall(request(WRITE, 1, 5 * PAGE, PAGE) + bytes(100))
    else:
        served.send(kind, 1, 64 * PAGE, PAGE)
        fake.wait_for(1, DEADLINE_S)
    served.socket.close()
    if kind == WRITE:
        served.ended.result(DEADLINE_S)
    fake.release()
    served.ended.result(DEADLINE_S)
    before = fake.content[5 * PAGE : 6 * PAGE]
    served.engine.flush()
    assert fake.on_disk[:PAGE] == data
    assert fake.on_disk[5 * PAGE : 6 * PAGE] == before


def test_a_client_that_hangs_up_without_receiving(serve: Callable[..., Served]) -> None:
    """The replies that it does not want any more do not keep the loop."""
    served = serve()
    served.client()
    for cookie in range(20):
        served.send(READ, cookie, cookie * PIECE % MIB, PIECE)
    wait_for_reads(served, 8)
    served.socket.close()
    served.ended.result(DEADLINE_S)


def test_a_client_that_stops_receiving_within_a_write(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """It is known to have left by a reply that cannot be sent, and the write that was begun does not keep the loop."""
    served = serve()
    served.client()
    fake.hold("READ")
    served.send(READ, 1, 64 * PAGE, PAGE)
    fake.wait_for(1, DEADLINE_S)
    served.socket.sendall(request(WRITE, 2, 5 * PAGE, PAGE) + bytes(100))
    wait_until(lambda: unread_bytes(served.socket) == 0, "the beginning of the write is received")
    served.socket.shutdown(socket.SHUT_RD)
    fake.release()
    served.ended.result(DEADLINE_S)


@pytest.mark.parametrize("wrong", [bytes(28), b"\0" * 4 + request(DISCONNECT, 2, 0, 0)[4:]])
def test_a_client_that_breaks_the_protocol(serve: Callable[..., Served], wrong: bytes) -> None:
    """Serving ends with an error; requests before the one that is wrong are answered."""
    served = serve()
    served.client()
    served.socket.sendall(request(FLUSH, 1, 0, 0) + wrong)
    assert served.receive() == (1, 0, b"")
    assert errno_of(lambda: served.ended.result(DEADLINE_S)) == errno.EPROTO


def test_one_after_the_other(serve: Callable[..., Served], fake: FakeNfsServer) -> None:
    """An engine serves the next client after the first; the engine's own threads receive between the two."""
    served, data = serve(), os.urandom(PAGE)
    served.client().write(0, data)
    served.socket.close()
    served.ended.result(DEADLINE_S)
    served.engine.flush()
    again = Served(served.engine)
    assert again.client().read(0, PAGE) == data
    again.socket.close()
    again.ended.result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == data


# A model

PAGES = 64
pages = st.integers(0, PAGES - 1)
lengths = st.integers(1, 8)
operations = st.lists(
    st.one_of(
        st.tuples(st.just(READ), pages, lengths, st.just(0)),
        st.tuples(st.just(WRITE), pages, lengths, st.sampled_from([0, 0, 0, FLAG_FUA])),
        st.tuples(st.just(WRITE_ZEROES), pages, lengths, st.just(0)),
        st.tuples(st.just(FLUSH), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def model() -> Iterator[tuple[FakeNfsServer, Served, NbdClient]]:
    """One device for all examples."""
    with FakeNfsServer(os.urandom(PAGES * PAGE)) as server, opening() as open_engine:
        served = Served(open_engine(server.url(), region_pages=SLOTS, connections=3))
        yield server, served, served.client()
        served.socket.close()
        served.ended.result(DEADLINE_S)


@given(operations, st.integers(1, 16), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_model(
    model: tuple[FakeNfsServer, Served, NbdClient],
    operations: list[tuple[int, int, int, int]],
    depth: int,
    seed: int,
) -> None:
    """Against a dict of pages, with `depth` requests under way: a read that overlaps no request under way returns what
    was written last; after a FLUSH at the end the server has all of it."""
    server, _, client = model
    rng = random.Random(seed)  # of the pages' bytes: hypothesis calls an example too large that is made of so many
    client.flush()  # hypothesis may have ended the last example before its end
    content = bytearray(server.content)
    expected: dict[int, bytes] = {}
    busy: set[int] = set()  # pages of requests under way: what overlaps one waits for it
    batch: list[Request] = []

    def run() -> None:
        for reply in client.run(batch, depth):
            assert reply.error == 0
            if reply.request.op == READ:
                assert reply.data == expected[id(reply.request)]
        batch.clear()
        busy.clear()

    for kind, page, length, flags in operations:
        count = min(length, PAGES - page)
        span = range(page, page + count)
        if not busy.isdisjoint(span):
            run()
        busy.update(span)
        offset, size = page * PAGE, count * PAGE
        if kind == READ:
            batch.append(Request(READ, offset, size))
            expected[id(batch[-1])] = bytes(content[offset : offset + size])
        elif kind == WRITE:
            data = rng.choice([rng.randbytes(size), rng.randbytes(4) * (size // 4)])
            batch.append(Request(WRITE, offset, size, data, flags))
            content[offset : offset + size] = data
        elif kind == WRITE_ZEROES:
            batch.append(Request(WRITE_ZEROES, offset, size))
            content[offset : offset + size] = bytes(size)
        else:
            batch.append(Request(FLUSH, 0, 0))
    run()
    client.flush()
    assert server.on_disk == content
