# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NBD client: many requests in flight, replies in any order, errors, and servers that break the protocol."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from support.nbd_client import FLAG_FUA, FLUSH, READ, TRIM, WRITE, NbdClient, Reply, Request
from support.waiting import DEADLINE_S, in_background

PAGE = 4096
Header = tuple[int, int, int, int, int]


class Server:
    """The other end, played by the test."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.settimeout(DEADLINE_S)

    def receive(self) -> tuple[Header, bytes]:
        """A request: flags, type, cookie, offset, length; and the data of a write."""
        magic, *header = struct.unpack(">IHHQQI", self._exactly(28))
        assert magic == 0x25609513
        flags, op, cookie, offset, length = header
        return (flags, op, cookie, offset, length), self._exactly(length) if op == WRITE else b""

    def reply(self, cookie: int, data: bytes = b"", error: int = 0, magic: int = 0x67446698) -> None:
        self._socket.sendall(struct.pack(">IIQ", magic, error, cookie) + data)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._socket.recv(count - len(data))
            assert piece, "the client has closed"
            data += piece
        return data


@pytest.fixture
def ends() -> Iterator[tuple[NbdClient, Server]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield NbdClient.over(ours, DEADLINE_S), Server(theirs)


def test_one_request_each(ends: tuple[NbdClient, Server]) -> None:
    """Type, offset, length, flags and data arrive as they were given; a read returns what was replied."""
    client, server = ends
    calls: list[tuple[Callable[[], object], tuple[int, int, int, int], bytes, bytes]] = [
        (lambda: client.read(PAGE, 2), (0, READ, PAGE, 2), b"", b"ab"),
        (lambda: client.write(0, b"xyz"), (0, WRITE, 0, 3), b"xyz", b""),
        (lambda: client.write(8, b"xyz", fua=True), (FLAG_FUA, WRITE, 8, 3), b"xyz", b""),
        (client.flush, (0, FLUSH, 0, 0), b"", b""),
        (lambda: client.trim(PAGE, PAGE), (0, TRIM, PAGE, PAGE), b"", b""),
    ]
    for call, expected, written, answer in calls:
        done = in_background(call)
        (flags, op, cookie, offset, length), data = server.receive()
        assert ((flags, op, offset, length), data) == (expected, written)
        server.reply(cookie, answer)
        assert (done.result(DEADLINE_S) or b"") == answer


def test_replies_in_any_order(ends: tuple[NbdClient, Server]) -> None:
    """Four are in flight and no more; the last is answered first; each reply has its own request."""
    client, server = ends
    requests = [Request(READ, number, 1) for number in range(6)]

    def run() -> list[Reply]:
        return list(client.run(requests, depth=4))

    done = in_background(run)
    headers = [server.receive()[0] for _ in range(4)]
    for _, _, cookie, offset, _ in reversed(headers):
        server.reply(cookie, bytes([offset]))
    for _ in range(2):
        (_, _, cookie, offset, _), _ = server.receive()
        server.reply(cookie, bytes([offset]))
    replies = done.result(DEADLINE_S)
    assert [reply.request.offset for reply in replies[:4]] == [3, 2, 1, 0]
    assert all(reply.data == bytes([reply.request.offset]) for reply in replies)


def test_an_error_is_an_oserror(ends: tuple[NbdClient, Server]) -> None:
    """With the protocol's errno, and no data."""
    client, server = ends
    done = in_background(client.read, 0, PAGE)
    (_, _, cookie, _, _), _ = server.receive()
    server.reply(cookie, error=errno.ENOSPC)
    with pytest.raises(OSError, match="rejected the request") as caught:
        done.result(DEADLINE_S)
    assert caught.value.errno == errno.ENOSPC


def test_both_sides_send_at_once(ends: tuple[NbdClient, Server]) -> None:
    """The client takes replies while its own data does not fit into the server's buffer."""
    client, server = ends
    size = 4 << 20
    done = in_background(lambda: list(client.run([Request(READ, 0, size), Request(WRITE, 0, size, bytes(size))], 2)))
    (_, _, cookie, _, _), _ = server.receive()
    server.reply(cookie, bytes(size))
    (_, _, cookie, _, _), data = server.receive()
    server.reply(cookie)
    assert len(data) == size
    assert len(done.result(DEADLINE_S)) == 2


def test_what_is_not_a_reply(ends: tuple[NbdClient, Server]) -> None:
    """Another magic number, or an end in the middle of a reply, ends the connection with an error."""
    client, server = ends
    done = in_background(client.read, 0, PAGE)
    (_, _, cookie, _, _), _ = server.receive()
    server.reply(cookie, bytes(PAGE), magic=1)
    with pytest.raises(ConnectionError, match="0x1"):
        done.result(DEADLINE_S)


def test_the_server_ends_in_a_reply(ends: tuple[NbdClient, Server]) -> None:
    """Less data than the read asked for: ConnectionError, not a short read."""
    client, server = ends
    done = in_background(client.read, 0, PAGE)
    (_, _, cookie, _, _), _ = server.receive()
    server.reply(cookie, bytes(PAGE - 1))
    server.close()
    with pytest.raises(ConnectionError):
        done.result(DEADLINE_S)


def test_silence_ends_a_wait() -> None:
    """TimeoutError after the client's time, not later."""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        NbdClient.over(ours, 0.1).read(0, PAGE)
