# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proxy that makes a server's time a fixed one: bench/service.c between a client and a server of the test."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.nfs_server import free_ports

SOURCE = Path(__file__).parents[2] / "bench" / "service.c"
DEADLINE_S = 30.0
SERVICE_S = 0.1


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled."""
    path = tmp_path_factory.mktemp("service") / "service"
    subprocess.run(["gcc", "-O1", "-D_GNU_SOURCE", "-pthread", "-o", path, SOURCE], check=True)
    return path


@contextlib.contextmanager
def through(program: Path, protocol: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's and the server's end of a connection through the proxy."""
    port, server_port = free_ports(2)
    with socket.create_server(("127.0.0.1", server_port)) as listener:
        listener.settimeout(DEADLINE_S)
        argv = [program, str(port), str(server_port), str(round(SERVICE_S * 1e6)), protocol]
        process = subprocess.Popen([str(word) for word in argv])
        try:
            with connected(port) as client, listener.accept()[0] as server:
                server.settimeout(DEADLINE_S)
                yield client, server
        finally:
            process.kill()
            process.wait(DEADLINE_S)


def connected(port: int) -> socket.socket:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def take(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += sock.recv(length - len(data))
    return data


def record(xid: int, text: bytes) -> bytes:
    """One RPC message: record marking, xid, and what the proxy does not look at."""
    return struct.pack(">II", 0x8000_0000 | (4 + len(text)), xid) + text


def test_rpc_reply_is_held(program: Path) -> None:
    """A request passes at once; its reply does not come before the service time is over."""
    with through(program, "rpc") as (client, server):
        began_s = time.monotonic()
        client.sendall(record(1, b"call"))
        assert take(server, 12) == record(1, b"call")
        server.sendall(record(1, b"answer"))
        assert take(client, 14) == record(1, b"answer")
        assert time.monotonic() - began_s >= SERVICE_S


def test_rpc_replies_leave_in_the_order_of_their_requests(program: Path) -> None:
    """Whatever order the server answers in, and however the bytes are cut."""
    with through(program, "rpc") as (client, server):
        calls = record(1, b"first") + record(2, b"second")
        for at in range(0, len(calls), 5):
            client.sendall(calls[at : at + 5])
        assert take(server, len(calls)) == calls
        answers = record(2, b"b" * 100_000) + record(1, b"a")
        server.sendall(answers[:3])
        server.sendall(answers[3:50_000])
        server.sendall(answers[50_000:])
        assert take(client, len(answers)) == record(1, b"a") + record(2, b"b" * 100_000)


def test_nbd(program: Path) -> None:
    """The handshake passes; then a read's reply is held with its data, a write's without, an error's has none."""
    with through(program, "nbd") as (client, server):
        server.sendall(b"NBDMAGICIHAVEOPT\x00\x03")
        assert take(client, 18) == b"NBDMAGICIHAVEOPT\x00\x03"
        option = struct.pack(">I8sII", 3, b"IHAVEOPT", 7, 6) + b"option"
        client.sendall(option)
        assert take(server, len(option)) == option
        server.sendall(b"an answer to the option")
        assert take(client, 23) == b"an answer to the option"
        began_s = time.monotonic()
        requests = [struct.pack(">IHHQQI", 0x25609513, 0, kind, kind + 10, 0, 8) for kind in (0, 1)]
        requests[1] += b"new data"
        requests.append(struct.pack(">IHHQQI", 0x25609513, 0, 0, 12, 0, 8))
        client.sendall(b"".join(requests))
        assert take(server, sum(map(len, requests))) == b"".join(requests)
        replies = [struct.pack(">IIQ", 0x67446698, error, cookie) for error, cookie in ((0, 10), (0, 11), (5, 12))]
        replies[0] += b"old data"
        server.sendall(b"".join(reversed(replies)))
        assert take(client, sum(map(len, replies))) == b"".join(replies)
        assert time.monotonic() - began_s >= SERVICE_S


def test_end_of_the_connection(program: Path) -> None:
    """What is held still comes when the server has hung up; then the client reads the end."""
    with through(program, "rpc") as (client, server):
        client.sendall(record(1, b"call"))
        take(server, 12)
        server.sendall(record(1, b"answer"))
        server.shutdown(socket.SHUT_WR)
        assert take(client, 14) == record(1, b"answer")
        assert client.recv(1) == b""
