# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bytes in a TCP connection's queues, at both ends."""

from __future__ import annotations

import socket

from support.nfs_server import LOOPBACK
from support.tcp_queues import TcpQueues
from support.waiting import wait_until


def test_unread_bytes_are_counted() -> None:
    """Bytes count until the receiver has read them; a connection that does not exist has none."""
    with TcpQueues() as queues, socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection((LOOPBACK, port))
        client_port = client.getsockname()[1]
        server, _ = listener.accept()
        with client, server:
            assert queues.of(port, client_port) == (0, 0)
            client.sendall(bytes(1000))
            wait_until(lambda: queues.of(port, client_port) == (1000, 0), "all of it is there")
            server.recv(400)
            assert queues.of(port, client_port) == (600, 0)
            assert queues.of(client_port, port)[0] == 0
            server.recv(600)
            assert queues.of(port, client_port) == (0, 0)
        assert queues.of(1, 2) == (0, 0)


def test_unacknowledged_bytes_are_counted() -> None:
    """A receiver that reads nothing has no room at some time: what was sent beyond that is the sender's."""
    with TcpQueues() as queues, socket.create_server((LOOPBACK, 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        port = listener.getsockname()[1]
        client = socket.create_connection((LOOPBACK, port))
        client.setblocking(False)
        server, _ = listener.accept()
        with client, server:
            sent = client.send(bytes(1 << 20))
            client_port = client.getsockname()[1]
            unread, _ = queues.of(port, client_port)
            _, unacknowledged = queues.of(client_port, port)
            assert 0 < unacknowledged <= sent
            assert unread < sent
