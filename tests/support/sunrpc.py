# SPDX-License-Identifier: LGPL-2.1-or-later
"""The base of FakeNfsServer: XDR (RFC 4506) and an ONC RPC server over TCP (RFC 5531), in one thread."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from support.nfs_server import LOOPBACK, free_ports
from support.tcp_queues import TcpQueues

_JOIN_DEADLINE_S = 10.0
_TAKEN_DEADLINE_S = 10.0
_RECEIVE_BYTES = 256 << 10
_NARROW_BYTES, _NARROW_SEGMENT_BYTES = 4096, 536
_RECORD_LIMIT_BYTES = 8 << 20
LAST_FRAGMENT = 0x8000_0000

# accept_stat, RFC 5531
SUCCESS, PROG_UNAVAIL, PROG_MISMATCH, PROC_UNAVAIL, GARBAGE_ARGS, SYSTEM_ERR = range(6)
# auth_flavor
_AUTH_SYS = 1


def u32(*values: int) -> bytes:
    """Unsigned integers, booleans and enums."""
    return struct.pack(f">{len(values)}I", *values)


def u64(*values: int) -> bytes:
    """Unsigned hyper integers."""
    return struct.pack(f">{len(values)}Q", *values)


def opaque(data: bytes) -> bytes:
    """Bytes of variable length, and strings."""
    return u32(len(data)) + data + bytes(-len(data) % 4)


def record(message: bytes) -> bytes:
    """A message as it goes over TCP: one fragment, behind its mark."""
    return u32(LAST_FRAGMENT | len(message)) + message


class XdrReader:
    """Takes values from a message, front to back. ValueError where it ends too early."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def _take(self, count: int) -> memoryview:
        if count > len(self._data):
            raise ValueError("the message ends too early")
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def u32(self) -> int:
        return int.from_bytes(self._take(4))

    def u64(self) -> int:
        return int.from_bytes(self._take(8))

    def opaque(self) -> bytes:
        count = self.u32()
        return bytes(self._take(count + -count % 4)[:count])


@dataclasses.dataclass(frozen=True)
class Credentials:
    """AUTH_SYS."""

    machine: str
    uid: int
    gid: int


class _Connection:
    """A client's socket, the bytes received from it and those to be sent. Owned by the server's thread."""

    def __init__(self, sock: socket.socket, client_port: int, number: int) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.client_port = client_port
        self.number = number
        self.last_received_s = time.monotonic()
        self.received = bytearray()
        self.record = bytearray()
        self.to_send = bytearray()

    def take_records(self) -> list[bytes]:
        """The complete records received since the last call. ValueError for one of more than 8 MiB."""
        records = []
        while len(self.received) >= 4:
            header = int.from_bytes(self.received[:4])
            length = header & ~LAST_FRAGMENT
            if length > _RECORD_LIMIT_BYTES:
                raise ValueError(f"a record of {length} bytes")
            if len(self.received) < 4 + length:
                break
            self.record += self.received[4 : 4 + length]
            del self.received[: 4 + length]
            if header & LAST_FRAGMENT:
                records.append(bytes(self.record))
                self.record.clear()
        return records


@dataclasses.dataclass(frozen=True, eq=False)
class RpcCall:
    """A call to be answered. `arguments` is the procedure's part of the message."""

    connection: _Connection
    xid: int
    program: int
    version: int
    procedure: int
    arguments: bytes
    credentials: Credentials | None = None


class RpcServer:
    """Serves RPC programs on a TCP port of loopback, from `with` to its end.

    One thread owns the sockets and runs everything that a subclass defines. `_lock` guards the rest, the
    subclass's state included; it is held while the subclass's methods run. Other threads change that state
    under the lock and call `_wake()`, so that a change is in force for every call answered after it.

    narrow       connections have little room in their buffers, at both ends
    port         where it listens; None: a free port
    idle_limit_s a connection on which nothing was received for so long is closed; None: never
    """

    def __init__(self, *, narrow: bool = False, port: int | None = None, idle_limit_s: float | None = None) -> None:
        self.port = free_ports(1)[0] if port is None else port
        self._idle_limit_s = idle_limit_s
        self._lock = threading.RLock()
        self._delayed: list[tuple[float, int, RpcCall]] = []  # a heap, by the time when it is due
        self._ready: list[RpcCall] = []
        self._numbers = itertools.count()
        self._connections: list[_Connection] = []
        self._connection_numbers = itertools.count()
        self._piece_sizes: Iterator[int] | None = None
        self._may_receive_bytes: int | None = None  # of all connections; None: no limit
        self._disconnect = False
        self._disconnected = threading.Event()
        self._ending = False
        self._failure: BaseException | None = None
        self._queues = TcpQueues()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server((LOOPBACK, self.port), backlog=64)
        self._listener.setblocking(False)
        if narrow:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW_BYTES)
            # the client's kernel makes room for some segments: tcp_sndbuf_expand()
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _NARROW_SEGMENT_BYTES)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"rpc-server-{self.port}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ending = True
        self._wake()
        self._thread.join(_JOIN_DEADLINE_S)
        assert not self._thread.is_alive(), "the fake server's thread does not end"
        self._wake_writer.close()
        if self._failure is not None:
            raise RuntimeError("the fake server's thread failed") from self._failure

    @property
    def open_connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    # For subclasses to define; all run in the thread, under the lock

    def _arrived(self, call: RpcCall) -> None:
        """Pass a new call to `_answer_at`, or keep it for later."""
        raise NotImplementedError

    def _run_call(self, call: RpcCall) -> tuple[int, bytes]:
        """Execute a call; returns accept_stat and the result."""
        raise NotImplementedError

    def _on_the_wire(self, call: RpcCall, message: bytes) -> bytes:
        """The bytes that are sent for an answer."""
        return record(message)

    # For subclasses to use, under the lock

    def _answer_at(self, call: RpcCall, when_s: float) -> None:
        """Run and answer a call at a time of time.monotonic()."""
        heapq.heappush(self._delayed, (when_s, next(self._numbers), call))

    def _send_reply(self, call: RpcCall, accept_stat: int, body: bytes) -> None:
        if call.connection in self._connections:
            # REPLY, MSG_ACCEPTED, a verifier of AUTH_NONE
            message = u32(call.xid, 1, 0, 0, 0, accept_stat) + body
            call.connection.to_send += self._on_the_wire(call, message)

    def _reset_connections(self) -> None:
        """Send RST to every client and drop the calls that wait. Then call `_wait_for_reset`, without the lock."""
        self._delayed.clear()
        self._disconnected.clear()
        self._disconnect = True

    def _wait_for_reset(self) -> None:
        """Wait until the connections are reset; not for the thread. Later connections are not affected."""
        self._wake()
        assert self._disconnected.wait(_JOIN_DEADLINE_S), "the fake server's thread is stuck"

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the thread has ended, and its end of the pair with it
            self._wake_writer.send(b"!")

    # The thread

    def _run(self) -> None:
        try:
            while not self._ending:
                self._turn()
        except BaseException as error:
            self._failure = error
        finally:
            self._drop_all()
            self._listener.close()
            self._wake_reader.close()
            self._queues.close()
            self._selector.close()

    def _turn(self) -> None:
        with self._lock:
            if self._disconnect:
                self._disconnect = False
                self._drop_all()
                self._disconnected.set()
            while self._delayed and self._delayed[0][0] <= time.monotonic():
                call = heapq.heappop(self._delayed)[2]
                self._send_reply(call, *self._run_call(call))
            due_s = [self._delayed[0][0]] if self._delayed else []
            due_s += self._close_idle_connections()
            timeout_s = max(0.0, min(due_s) - time.monotonic()) if due_s else None
            for connection in self._connections.copy():
                self._send(connection)  # a test may be adding to what is to be sent
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._wake_reader:
                self._wake_reader.recv(4096)
            elif key.fileobj is self._listener:
                self._accept()
            elif events & selectors.EVENT_READ:
                self._receive(key.data)

    def _close_idle_connections(self) -> list[float]:
        """Returns when the others will have been idle for too long."""
        if self._idle_limit_s is None:
            return []
        for connection in self._connections.copy():
            if connection.last_received_s + self._idle_limit_s <= time.monotonic():
                self._drop(connection)
        return [connection.last_received_s + self._idle_limit_s for connection in self._connections]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the client may have closed already
            sock, address = self._listener.accept()
            connection = _Connection(sock, address[1], next(self._connection_numbers))
            self._connections.append(connection)
            self._watch(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            while connection.to_send:
                size = next(self._piece_sizes, None) if self._piece_sizes is not None else None
                del connection.to_send[: connection.sock.send(connection.to_send[:size])]
                if size is not None:
                    self._wait_until_taken(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
            return
        self._watch(connection)

    def _wait_until_taken(self, connection: _Connection) -> None:
        deadline = time.monotonic() + _TAKEN_DEADLINE_S
        while self._queues.of(connection.client_port, self.port)[0] > 0:
            assert time.monotonic() < deadline, "the client does not read what it was sent"

    def _watch(self, connection: _Connection) -> None:
        wanted = selectors.EVENT_READ if self._may_receive_bytes != 0 else 0
        wanted |= selectors.EVENT_WRITE if connection.to_send else 0
        key = self._selector.get_map().get(connection.sock)
        if key is not None and not wanted:
            self._selector.unregister(connection.sock)
        elif key is None and wanted:
            self._selector.register(connection.sock, wanted, connection)
        elif key is not None and key.events != wanted:
            self._selector.modify(connection.sock, wanted, connection)

    def _receive(self, connection: _Connection) -> None:
        with self._lock:
            limit = _RECEIVE_BYTES if self._may_receive_bytes is None else self._may_receive_bytes
            if limit == 0:
                return
        try:
            data = connection.sock.recv(limit)
            connection.last_received_s = time.monotonic()
            connection.received += data
            calls = [self._parse(connection, record) for record in connection.take_records()]
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self._drop(connection)
            return
        with self._lock:
            if self._may_receive_bytes is not None:
                self._may_receive_bytes = max(0, self._may_receive_bytes - len(data))
            if self._disconnect:
                return
            for call in calls:
                self._arrived(call)
        if not data:
            self._drop(connection)

    def _parse(self, connection: _Connection, record: bytes) -> RpcCall:
        message = XdrReader(record)
        xid, kind, rpc_version, program, version, procedure = (message.u32() for _ in range(6))
        if kind != 0 or rpc_version != 2:
            raise ValueError("not a call of RPC version 2")
        flavour, credentials = message.u32(), message.opaque()
        message.u32()  # the verifier
        message.opaque()
        caller = _parse_credentials(flavour, credentials)
        return RpcCall(connection, xid, program, version, procedure, bytes(message._data), caller)

    def _drop(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        if connection.sock in self._selector.get_map():
            self._selector.unregister(connection.sock)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sock.close()

    def _drop_all(self) -> None:
        for connection in self._connections.copy():
            self._drop(connection)


def _parse_credentials(flavour: int, body: bytes) -> Credentials | None:
    if flavour != _AUTH_SYS:
        return None
    reader = XdrReader(body)
    reader.u32()  # the stamp
    return Credentials(reader.opaque().decode(), reader.u32(), reader.u32())
