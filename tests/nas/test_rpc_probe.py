# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a server's RPC services say, and answers that are none."""

from __future__ import annotations

import os
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_nas import FakeNas
from support.nfs_server import LOOPBACK, free_ports

from nbdnfs.nas import rpc_probe
from nbdnfs.nas.rpc_probe import MOUNT, NFS, Offer


def test_offers() -> None:
    """A version that is there, another one, another program, and no server."""
    (portmapper,) = free_ports(1)
    with FakeNas(portmap_port=portmapper) as nas:
        assert rpc_probe.offer(LOOPBACK, nas.port, NFS, 3) is Offer.YES
        assert rpc_probe.offer(LOOPBACK, nas.port, NFS, 4) is Offer.OTHER_VERSIONS
        assert rpc_probe.offer(LOOPBACK, nas.port, MOUNT, 3) is Offer.NOT_AT_ALL
        assert rpc_probe.registered_port(LOOPBACK, MOUNT, 3, portmapper) == nas.mount_port
        assert rpc_probe.registered_port(LOOPBACK, 100021, 4, portmapper) == 0
        assert rpc_probe.why_closed(LOOPBACK, nas.port) is None
    assert rpc_probe.offer(LOOPBACK, nas.port, NFS, 3) is Offer.SILENT
    assert rpc_probe.registered_port(LOOPBACK, MOUNT, 3, portmapper) is None
    assert rpc_probe.why_closed(LOOPBACK, nas.port) == "connection refused"


def answering(answer: bytes, address: str = LOOPBACK) -> tuple[socket.socket, int]:
    """A server that sends the xid of the first call and `answer` in one record, and closes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            xid = connection.recv(4096)[4:8]
            connection.sendall(struct.pack(">I", 0x8000_0000 | 4 + len(answer)) + xid + answer)

    threading.Thread(target=serve, daemon=True).start()
    return listener, listener.getsockname()[1]


@pytest.mark.parametrize(
    ("universal", "port"), [(b"::.8.1", 2049), (b"", 0), (b"fe80::1%2.3.4", 772), (b"nonsense", 0), (b"a.b.c", 0)]
)
def test_rpcbind_over_ipv6(universal: bytes, port: int) -> None:
    """It answers with a universal address."""
    body = struct.pack(">I", len(universal)) + universal + bytes(-len(universal) % 4)
    listener, portmapper = answering(struct.pack(">5I", 1, 0, 0, 0, 0) + body, "::1")
    with listener:
        assert rpc_probe.registered_port("::1", NFS, 3, portmapper) == port


def test_a_call_that_is_denied() -> None:
    """MSG_DENIED, AUTH_ERROR, AUTH_TOOWEAK: a server that wants a reserved port."""
    listener, port = answering(struct.pack(">4I", 1, 1, 1, 5))
    with listener:
        assert rpc_probe.offer(LOOPBACK, port, NFS, 3) is Offer.REFUSED


@given(st.binary(max_size=60))
@settings(max_examples=50, deadline=None)
def test_any_answer_is_survived(answer: bytes) -> None:
    """No exception."""
    listener, port = answering(answer)
    with listener:
        assert isinstance(rpc_probe.offer(LOOPBACK, port, NFS, 3), Offer)


def test_reserved_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root has them; a process whose bind() is refused does not."""
    if os.geteuid() == 0:
        assert rpc_probe.may_use_reserved_ports()

    class Unprivileged(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError

    monkeypatch.setattr(socket, "socket", Unprivileged)
    assert not rpc_probe.may_use_reserved_ports()
