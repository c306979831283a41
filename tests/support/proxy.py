# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a TCP proxy between a client and a server that delays, closes, resets, stalls and refuses.

    with TcpProxy(server.nfs_port) as proxy:
        url = server.url("swap0", nfsport=proxy.port)
        proxy.delay_s = 0.2                 # every reply comes 200 ms later, and none waits for another
        proxy.reset_after_reply_bytes(2000) # RST to both sides in the middle of a reply
        proxy.refuse = True                 # ECONNREFUSED, on the same port, until False

The kernel acknowledges what a stalled proxy does not read: TCP_USER_TIMEOUT and keepalive see a living peer.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import math
import selectors
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Literal, TypeVar

from support.nfs_server import LOOPBACK, free_ports

T = TypeVar("T")

_COMMAND_DEADLINE_S = 10.0
_RECEIVE_BYTES = 256 << 10
# What a direction holds back before it stops reading: so much is in flight on a delayed connection.
_QUEUE_LIMIT_BYTES = 16 << 20
# A throttled direction sends in slices of this length.
_THROTTLE_SLICE_S = 0.02
_RESET_DEADLINE_S = 1.0


class _Direction:
    """What happens to the bytes of one direction, in all connections. Owned by the proxy's thread."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.bytes_per_s = math.inf
        self.reset_after_bytes = math.inf
        self.passed_bytes = 0
        self.recorded: list[bytes] | None = None


class _Flow:
    """One direction of one connection: from `source` through a queue to `sink`. Owned by the proxy."""

    def __init__(self, direction: _Direction, source: socket.socket, sink: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        # (when it is due, bytes), in order; no bytes: the end of the stream
        self.chunks: collections.deque[tuple[float, memoryview]] = collections.deque()
        self.queued_bytes = 0
        self.next_send_s = 0.0
        self.sink_is_full = False
        self.source_ended = False
        self.sink_ended = False

    def receive(self) -> None:
        """Take what the source has. ConnectionError when it was reset."""
        try:
            data = self.source.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        self.source_ended = not data
        self.queued_bytes += len(data)
        self.chunks.append((time.monotonic() + self.direction.delay_s, memoryview(data)))

    def send_due(self) -> float:
        """Send what is due; returns when more will be (inf: when the sink or the source becomes ready).

        ConnectionError when the sink was reset, _ResetNow when this direction is to reset its connection.
        """
        self.sink_is_full = False
        while self.chunks:
            now = time.monotonic()
            due, data = self.chunks[0]
            if max(due, self.next_send_s) > now:
                return max(due, self.next_send_s)
            if not data:
                self.chunks.popleft()
                self.end_sink()
                continue
            slice_bytes = max(1, min(len(data), self.direction.bytes_per_s * _THROTTLE_SLICE_S))
            wanted = int(min(slice_bytes, self.direction.reset_after_bytes))
            try:
                sent = self.sink.send(data[:wanted]) if wanted and not self.sink_ended else wanted
            except BlockingIOError:
                self.sink_is_full = True
                return math.inf
            self.next_send_s = now + sent / self.direction.bytes_per_s
            self.direction.passed_bytes += sent
            if self.direction.recorded is not None:
                self.direction.recorded.append(bytes(data[:sent]))
            self.queued_bytes -= sent
            if sent == len(data):
                self.chunks.popleft()
            else:
                self.chunks[0] = (due, data[sent:])
            self.direction.reset_after_bytes -= sent
            if self.direction.reset_after_bytes <= 0:
                self.direction.reset_after_bytes = math.inf
                raise _ResetNow
        return math.inf

    def end_sink(self) -> None:
        """Send FIN to the sink; bytes that arrive afterwards are dropped."""
        if not self.sink_ended:
            self.sink_ended = True
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)


class _ResetNow(Exception):
    """A direction has passed the bytes after which it is to reset its connection."""


class _Connection:
    """A client, the server, and the two flows between them. Owned by the proxy's thread."""

    def __init__(self, client: socket.socket, server: socket.socket, requests: _Direction, replies: _Direction) -> None:
        self.client = client
        self.server = server
        self.to_server = _Flow(requests, client, server)
        self.to_client = _Flow(replies, server, client)
        self.is_silent = False
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def cut(self) -> None:
        """Close in both directions with FIN. Bytes on their way are lost."""
        for end in (self.client, self.server):
            # a socket closed with bytes unread sends RST instead of FIN
            with contextlib.suppress(OSError):
                while end.recv(_RECEIVE_BYTES):
                    pass
            end.close()

    def reset(self) -> None:
        """RST to both ends, after the client's kernel has what was sent to it."""
        deadline = time.monotonic() + _RESET_DEADLINE_S
        while _unacknowledged_bytes(self.client) and time.monotonic() < deadline:
            time.sleep(0.0002)
        for end in (self.client, self.server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


# TCP_CLOSE, include/net/tcp_states.h
_TCP_CLOSE = 7


def _unacknowledged_bytes(end: socket.socket) -> int:
    """SIOCOUTQ of tcp(7): a reset throws away what the other side has not acknowledged.

    0 when the other side has reset the connection: it will acknowledge no more.
    """
    try:
        if end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            return 0
        return int(struct.unpack("i", fcntl.ioctl(end, termios.TIOCOUTQ, b"\0" * 4))[0])
    except OSError:
        return 0


class TcpProxy:
    """Fault tool: passes TCP connections from `port` to `target_port`, with the faults that are set.

    Its thread owns the sockets, the connections and the settings. Other threads queue commands for it and wait, so
    that a fault is in force when the call that sets it returns; only the queue is shared, and there is no lock. Any
    thread may use it. `close()` ends it.
    """

    def __init__(self, target_port: int, target_host: str = LOOPBACK) -> None:
        self._target = (target_host, target_port)
        self.port = free_ports(1)[0]
        self._requests = _Direction()
        self._replies = _Direction()
        self._connections: list[_Connection] = []
        self._accepted = 0
        self._resets = 0
        self._stalled = False
        self._ending = False
        self._failure: BaseException | None = None
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._listen(True)
        self._thread = threading.Thread(target=self._run, name=f"tcp-proxy-{self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # For tests, from any thread

    @property
    def delay_s(self) -> float:
        """Seconds by which every reply comes later. Pipelined: four replies delayed by 0.2 s take 0.2 s."""
        return self._replies.delay_s

    @delay_s.setter
    def delay_s(self, seconds: float) -> None:
        self._do(lambda: setattr(self._replies, "delay_s", seconds))

    @property
    def request_delay_s(self) -> float:
        """Seconds by which every request arrives later; it adds to `delay_s`."""
        return self._requests.delay_s

    @request_delay_s.setter
    def request_delay_s(self, seconds: float) -> None:
        self._do(lambda: setattr(self._requests, "delay_s", seconds))

    def throttle(self, *, requests_bytes_per_s: float = math.inf, replies_bytes_per_s: float = math.inf) -> None:
        """Limit each connection's speed in either direction; without arguments: no limit."""

        def set_rates() -> None:
            self._requests.bytes_per_s = requests_bytes_per_s
            self._replies.bytes_per_s = replies_bytes_per_s

        self._do(set_rates)

    @property
    def black_hole(self) -> bool:
        """While True nothing passes, on old connections or new; afterwards everything goes on."""
        return self._stalled

    @black_hole.setter
    def black_hole(self, value: bool) -> None:
        self._do(lambda: setattr(self, "_stalled", value))

    @property
    def refuse(self) -> bool:
        """While True a new connection gets ECONNREFUSED. Connections that exist stay."""
        return self._listener is None

    @refuse.setter
    def refuse(self, value: bool) -> None:
        self._do(lambda: self._listen(not value))

    def cut(self) -> None:
        """Close every connection on both sides, as a server that ends does. New connections work."""
        self._do(lambda: self._end_all(_Connection.cut))

    def reset(self) -> None:
        """Send RST on every connection, to both sides. New connections work."""
        self._do(lambda: self._end_all(_Connection.reset))

    def reset_after_reply_bytes(self, count: int) -> None:
        """Let `count` more bytes of replies pass (of all connections), then reset the one they came on; once.

        With a count between one and the reply's length the client has half a reply. See `resets`.
        """
        self._do(lambda: setattr(self._replies, "reset_after_bytes", count))

    def silence(self) -> None:
        """Nothing passes on the present connections any more, but they stay open; new ones work.

        As with a firewall that has dropped their state.
        """

        def silence_all() -> None:
            for connection in self._connections:
                connection.is_silent = True

        self._do(silence_all)

    def half_close(self, toward: Literal["client", "server"]) -> None:
        """Send FIN to one side of every connection; the other direction still works."""

        def half_close_all() -> None:
            for connection in self._connections:
                (connection.to_client if toward == "client" else connection.to_server).end_sink()

        self._do(half_close_all)

    @property
    def accepted(self) -> int:
        """How many connections there have been."""
        return self._do(lambda: self._accepted)

    @property
    def open_connections(self) -> int:
        """How many connections there are."""
        return self._do(lambda: len(self._connections))

    @property
    def resets(self) -> int:
        """How many connections `reset_after_reply_bytes` has ended."""
        return self._do(lambda: self._resets)

    @property
    def passed_bytes(self) -> tuple[int, int]:
        """Bytes (to the server, to the client) so far."""
        return self._do(lambda: (self._requests.passed_bytes, self._replies.passed_bytes))

    def record(self) -> None:
        """From here on, keep everything that passes, for `recorded`."""

        def begin() -> None:
            self._requests.recorded, self._replies.recorded = [], []

        self._do(begin)

    def recorded(self) -> tuple[bytes, bytes]:
        """What has passed since `record`: (to the server, to the client)."""
        return self._do(lambda: (b"".join(self._requests.recorded or ()), b"".join(self._replies.recorded or ())))

    def close(self) -> None:
        """Reset every connection and end the thread. May be called twice."""
        if self._thread.is_alive() and self._failure is None:
            self._do(lambda: setattr(self, "_ending", True))
        self._thread.join(_COMMAND_DEADLINE_S)
        assert not self._thread.is_alive(), "the proxy's thread does not end"
        self._wake_writer.close()
        if self._failure is not None:
            raise RuntimeError("the proxy's thread failed") from self._failure

    def _do(self, command: Callable[[], T]) -> T:
        """Run a command in the thread; returns its result. RuntimeError when the thread has failed."""
        if self._failure is not None:
            raise RuntimeError("the proxy's thread failed") from self._failure
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        self._commands.put(run)
        # The thread may have taken the command that ends it, and have ended already.
        with contextlib.suppress(OSError):
            self._wake_writer.send(b"!")
        return future.result(_COMMAND_DEADLINE_S)

    # The thread

    def _run(self) -> None:
        try:
            while not self._ending:
                self._turn()
        except BaseException as error:
            self._failure = error
        finally:
            self._listen(False)
            self._end_all(_Connection.reset)
            self._wake_reader.close()
            self._selector.close()

    def _turn(self) -> None:
        """Send what is due, then wait for the next event and handle it."""
        wake_s = math.inf
        for connection in self._connections.copy():
            wake_s = min(wake_s, self._advance(connection))
        timeout_s = None if wake_s == math.inf else max(0.0, wake_s - time.monotonic())
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._wake_reader:
                self._wake_reader.recv(4096)
            elif key.fileobj is self._listener:
                self._accept()
            elif events & selectors.EVENT_READ:
                self._receive(*key.data)
        with contextlib.suppress(Empty):
            while True:
                self._commands.get_nowait()()

    def _listen(self, wanted: bool) -> None:
        if wanted and self._listener is None:
            self._listener = socket.create_server((LOOPBACK, self.port), backlog=64)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif not wanted and self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:  # the client has closed already
            return
        self._accepted += 1
        try:
            server = socket.create_connection(self._target, timeout=_RESET_DEADLINE_S)
        except OSError:  # the server is away: the client sees a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            return
        self._connections.append(_Connection(client, server, self._requests, self._replies))

    def _receive(self, connection: _Connection, flow: _Flow) -> None:
        try:
            flow.receive()
        except OSError:
            self._end(connection, _Connection.reset)

    def _advance(self, connection: _Connection) -> float:
        """Send what is due on a connection and watch for what it needs; returns when more is due."""
        flows = (connection.to_server, connection.to_client)
        wake_s = math.inf
        stands = self._stalled or connection.is_silent
        if not stands:
            try:
                wake_s = min(flow.send_due() for flow in flows)
            except _ResetNow:
                self._resets += 1
                self._end(connection, _Connection.reset)
                return math.inf
            except OSError:
                self._end(connection, _Connection.reset)
                return math.inf
            if all(flow.source_ended and not flow.chunks for flow in flows):
                self._end(connection, _Connection.cut)
                return math.inf
        for flow, back in (flows, flows[::-1]):
            reads = not (stands or flow.source_ended or flow.queued_bytes >= _QUEUE_LIMIT_BYTES)
            writes = not stands and back.sink_is_full
            events = selectors.EVENT_READ * reads | selectors.EVENT_WRITE * writes
            self._watch(flow.source, events, (connection, flow))
        return wake_s

    def _watch(self, end: socket.socket, events: int, data: object) -> None:
        key = self._selector.get_map().get(end)
        if key is None and events:
            self._selector.register(end, events, data)
        elif key is not None and not events:
            self._selector.unregister(end)
        elif key is not None and key.events != events:
            self._selector.modify(end, events, data)

    def _end(self, connection: _Connection, how: Callable[[_Connection], None]) -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        for end in (connection.client, connection.server):
            self._watch(end, 0, None)
        how(connection)

    def _end_all(self, how: Callable[[_Connection], None]) -> None:
        for connection in self._connections.copy():
            self._end(connection, how)
