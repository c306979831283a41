# SPDX-License-Identifier: LGPL-2.1-or-later
"""XDR values, records in fragments, and the RPC server that the fake NFS server stands on."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.nfs_server import LOOPBACK, rpc_null_answers
from support.sunrpc import (
    LAST_FRAGMENT,
    PROG_UNAVAIL,
    SUCCESS,
    Credentials,
    RpcCall,
    RpcServer,
    XdrReader,
    opaque,
    record,
    u32,
    u64,
)
from support.waiting import DEADLINE_S, wait_until

PROGRAM = 300_000


class Echo(RpcServer):
    """Procedure 0 does nothing, 1 returns its arguments, 2 fails in the server. Keeps the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RpcCall] = []

    def _arrived(self, call: RpcCall) -> None:
        self.calls.append(call)
        self._answer_at(call, 0.0)

    def _run_call(self, call: RpcCall) -> tuple[int, bytes]:
        if call.program != PROGRAM:
            return PROG_UNAVAIL, b""
        if call.procedure == 2:
            raise LookupError("no such thing")
        return SUCCESS, call.arguments if call.procedure else b""


def message(
    xid: int, procedure: int, arguments: bytes = b"", *, credentials: bytes = b"", program: int = PROGRAM
) -> bytes:
    flavour = 1 if credentials else 0
    return u32(xid, 0, 2, program, 1, procedure, flavour) + opaque(credentials) + u32(0, 0) + arguments


def receive(sock: socket.socket) -> bytes:
    """The next record, in one fragment; b"" at the end of the connection."""
    header = sock.recv(4, socket.MSG_WAITALL)
    return sock.recv(int.from_bytes(header) & ~LAST_FRAGMENT, socket.MSG_WAITALL) if header else b""


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=100))
def test_values_are_read_as_they_were_written(small: int, large: int, data: bytes) -> None:
    """Big-endian, and everything a multiple of four bytes: RFC 4506."""
    written = u32(small) + u64(large) + opaque(data)
    assert len(written) % 4 == 0
    reader = XdrReader(written)
    assert (reader.u32(), reader.u64(), reader.opaque()) == (small, large, data)
    with pytest.raises(ValueError, match="ends too early"):
        reader.u32()


def test_an_opaque_that_is_too_long() -> None:
    """A length beyond the end of the message."""
    with pytest.raises(ValueError, match="ends too early"):
        XdrReader(u32(5) + b"four").opaque()


def test_an_echo() -> None:
    """Two calls in one piece, the second in fragments of three bytes: both are answered, in order."""
    with Echo() as server, socket.create_connection((LOOPBACK, server.port), DEADLINE_S) as client:
        second = message(2, 1, b"wxyz")
        pieces = [second[start : start + 3] for start in range(0, len(second), 3)]
        marks = [len(piece) for piece in pieces[:-1]] + [LAST_FRAGMENT | len(pieces[-1])]
        fragments = [u32(mark) + piece for mark, piece in zip(marks, pieces, strict=True)]
        client.sendall(record(message(1, 1, b"abcd")) + b"".join(fragments))
        accepted = (1, 0, 0, 0, SUCCESS)
        assert receive(client) == u32(1, *accepted) + b"abcd"
        assert receive(client) == u32(2, *accepted) + b"wxyz"
        assert rpc_null_answers(server.port, PROGRAM, 1, DEADLINE_S)


def test_credentials() -> None:
    """AUTH_SYS is taken apart; without it there are none."""
    with Echo() as server, socket.create_connection((LOOPBACK, server.port), DEADLINE_S) as client:
        auth_sys = u32(7) + opaque(b"box") + u32(1000, 100, 0)
        client.sendall(record(message(1, 0, credentials=auth_sys)) + record(message(2, 0)))
        receive(client)
        receive(client)
        assert [call.credentials for call in server.calls] == [Credentials("box", 1000, 100), None]


def test_another_program_is_refused() -> None:
    """PROG_UNAVAIL, over the same connection."""
    with Echo() as server, socket.create_connection((LOOPBACK, server.port), DEADLINE_S) as client:
        client.sendall(record(message(1, 0, program=1)))
        assert XdrReader(receive(client)[20:]).u32() == PROG_UNAVAIL


@pytest.mark.parametrize("sent", [u32(LAST_FRAGMENT | 1 << 30), record(u32(1, 1, 2, PROGRAM, 1, 0)), record(b"ab")])
def test_what_is_no_call_ends_the_connection(sent: bytes) -> None:
    """A record of a gigabyte, a reply, and a record that is too short; another client is served."""
    with Echo() as server, socket.create_connection((LOOPBACK, server.port), DEADLINE_S) as client:
        client.sendall(sent)
        with pytest.raises(ConnectionResetError):
            receive(client)
        wait_until(lambda: server.open_connections == 0, "the connection is dropped")
        assert rpc_null_answers(server.port, PROGRAM, 1, DEADLINE_S)


def test_a_failure_in_the_thread_is_reported() -> None:
    """Clients are disconnected, and the end of the `with` raises what went wrong."""

    def call_what_fails() -> None:
        with Echo() as server, socket.create_connection((LOOPBACK, server.port), DEADLINE_S) as client:
            client.sendall(record(message(1, 2)))
            with pytest.raises(ConnectionResetError):
                receive(client)

    with pytest.raises(RuntimeError, match="the fake server's thread failed") as caught:
        call_what_fails()
    assert isinstance(caught.value.__cause__, LookupError)
