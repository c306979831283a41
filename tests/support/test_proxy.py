# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each fault of the proxy does what it promises; without a fault the proxy changes nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from support.nfs_server import LOOPBACK, free_ports
from support.proxy import TcpProxy

DEADLINE_S = 10.0


class EchoServer:
    """Sends back what it gets, on as many connections as come; `close()` ends it."""

    def __init__(self) -> None:
        self.port = free_ports(1)[0]
        self._listener = socket.create_server((LOOPBACK, self.port))
        self.connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            self._threads.append(threading.Thread(target=self._echo, args=(connection,)))
            self._threads[-1].start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.close()


@pytest.fixture
def faulty(echo: EchoServer) -> Iterator[TcpProxy]:
    with TcpProxy(echo.port) as proxy:
        yield proxy


@pytest.fixture
def client(faulty: TcpProxy) -> Iterator[socket.socket]:
    """A connection that has been through the proxy once."""
    with socket.create_connection((LOOPBACK, faulty.port), timeout=DEADLINE_S) as connection:
        assert ask(connection, b"hello") == b"hello"
        yield connection


def ask(connection: socket.socket, data: bytes) -> bytes:
    """Send, and receive as much: less when the connection ends first."""
    connection.sendall(data)
    return receive(connection, len(data))


def receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count and (data := connection.recv(count - len(received))):
        received += data
    return received


def elapsed_s(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def test_passes_bytes_unchanged(faulty: TcpProxy, client: socket.socket) -> None:
    """Four MiB come back as they went, and are counted."""
    data = os.urandom(4 << 20)
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    assert receive(client, len(data)) == data
    sender.join(DEADLINE_S)
    assert faulty.passed_bytes == (len(data) + 5, len(data) + 5)


def test_end_of_stream_passes(faulty: TcpProxy, client: socket.socket) -> None:
    """A client's FIN reaches the server and the server's comes back; the proxy forgets the connection."""
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    deadline = time.monotonic() + DEADLINE_S
    while faulty.open_connections and time.monotonic() < deadline:
        time.sleep(0.001)
    assert faulty.open_connections == 0


@pytest.mark.parametrize("setting", ["delay_s", "request_delay_s"])
def test_delay_is_pipelined(faulty: TcpProxy, client: socket.socket, setting: str) -> None:
    """Eight requests sent 10 ms apart, each delayed by 0.3 s, take 0.3 s and their 80 ms, not 2.4 s."""
    setattr(faulty, setting, 0.3)

    def eight_requests() -> None:
        for number in range(8):
            client.sendall(bytes([number]) * 100)
            time.sleep(0.01)
        assert receive(client, 800) == b"".join(bytes([number]) * 100 for number in range(8))

    assert 0.3 <= elapsed_s(eight_requests) < 1.2


def test_delays_add_up(faulty: TcpProxy, client: socket.socket) -> None:
    """Request and reply delay are one-way."""
    faulty.delay_s = faulty.request_delay_s = 0.1
    assert 0.2 <= elapsed_s(lambda: ask(client, b"x")) < 1.0


def test_cut_ends_in_order(faulty: TcpProxy, client: socket.socket) -> None:
    """After a cut the client reads an end of file, not an error; a new connection works."""
    faulty.cut()
    assert client.recv(1) == b""
    with socket.create_connection((LOOPBACK, faulty.port), timeout=DEADLINE_S) as again:
        assert ask(again, b"again") == b"again"


def test_reset_is_a_reset(faulty: TcpProxy, client: socket.socket) -> None:
    """After a reset the client gets ECONNRESET."""
    faulty.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_reset_mid_reply(faulty: TcpProxy, client: socket.socket) -> None:
    """Exactly the bytes asked for arrive, then ECONNRESET; once. Fifty times, to meet the races."""
    for number in range(50):
        faulty.reset_after_reply_bytes(1234)
        with socket.create_connection((LOOPBACK, faulty.port), timeout=DEADLINE_S) as victim:
            victim.sendall(bytes(4096))
            assert receive(victim, 1234) == bytes(1234)
            with pytest.raises(ConnectionResetError):
                victim.recv(1)
        assert faulty.resets == number + 1
    assert ask(client, b"alive") == b"alive"


def test_black_hole_swallows_and_heals(faulty: TcpProxy, client: socket.socket) -> None:
    """Nothing comes while it is on, on an old connection or a new one; afterwards everything does."""
    faulty.black_hole = True
    with socket.create_connection((LOOPBACK, faulty.port), timeout=DEADLINE_S) as new:
        for connection in (client, new):
            connection.settimeout(0.1)
            connection.sendall(b"late")
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(DEADLINE_S)
        faulty.black_hole = False
        for connection in (client, new):
            assert receive(connection, 4) == b"late"


def test_silence_is_for_the_old_only(faulty: TcpProxy, client: socket.socket) -> None:
    """On a silenced connection nothing passes, and it stays open; a new one works."""
    faulty.silence()
    client.settimeout(0.1)
    client.sendall(b"anyone?")
    with pytest.raises(TimeoutError):
        client.recv(1)
    with socket.create_connection((LOOPBACK, faulty.port), timeout=DEADLINE_S) as new:
        assert ask(new, b"yes") == b"yes"


def test_throttle(faulty: TcpProxy, client: socket.socket) -> None:
    """100 KB at 200 KB/s take half a second, in either direction; without a limit they do not."""
    data = bytes(100_000)
    for limit in ({"replies_bytes_per_s": 200e3}, {"requests_bytes_per_s": 200e3}):
        faulty.throttle(**limit)
        assert 0.4 < elapsed_s(lambda: ask(client, data)) < 2
    faulty.throttle()
    assert elapsed_s(lambda: ask(client, data)) < 0.4


def test_half_close_toward_client(faulty: TcpProxy, client: socket.socket, echo: EchoServer) -> None:
    """The client reads an end of file and can still send."""
    faulty.half_close("client")
    assert client.recv(1) == b""
    before = faulty.passed_bytes[0]
    client.sendall(b"still")
    deadline = time.monotonic() + DEADLINE_S
    while faulty.passed_bytes[0] < before + 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert faulty.passed_bytes[0] == before + 5


def test_half_close_toward_server(faulty: TcpProxy, client: socket.socket) -> None:
    """The server reads an end of file; its own end comes back to the client."""
    faulty.half_close("server")
    assert client.recv(1) == b""


def test_refuse_and_return(faulty: TcpProxy, client: socket.socket) -> None:
    """ECONNREFUSED while it is on; the old connection lives; then the same port works again."""
    faulty.refuse = True
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, faulty.port), timeout=DEADLINE_S)
    assert ask(client, b"old") == b"old"
    faulty.refuse = False
    with socket.create_connection((LOOPBACK, faulty.port), timeout=DEADLINE_S) as new:
        assert ask(new, b"new") == b"new"
    assert faulty.accepted == 2


def test_server_away_is_a_reset() -> None:
    """Without a server behind the proxy, the client's connection is reset, perhaps while it connects."""

    def connect_and_receive(port: int) -> None:
        with socket.create_connection((LOOPBACK, port), timeout=DEADLINE_S) as client:
            client.recv(1)

    with TcpProxy(free_ports(1)[0]) as proxy, pytest.raises(ConnectionResetError):
        connect_and_receive(proxy.port)


def test_close_leaves_nothing(echo: EchoServer) -> None:
    """close() ends the connections and the thread, and may be called twice."""
    proxy = TcpProxy(echo.port)
    with socket.create_connection((LOOPBACK, proxy.port), timeout=DEADLINE_S) as client:
        assert ask(client, b"x") == b"x"
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert not any(thread.name.startswith("tcp-proxy") for thread in threading.enumerate())
