# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD clients for loads: many requests in flight on one connection, simple replies in any order."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from nbdnfs.kernel import nbd_handshake

READ, WRITE, FLUSH, TRIM = 0, 1, 3, 4
FLAG_FUA = 1

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698


@dataclass(frozen=True)
class Request:
    """One request: `data` of a write; `length_bytes` of everything else."""

    op: int
    offset: int
    length_bytes: int
    data: bytes = b""
    flags: int = 0


@dataclass(frozen=True)
class Reply:
    """A reply: an errno of the protocol (0: success), and the data of a read."""

    request: Request
    error: int
    data: bytes


class _OneByOne:
    """Requests that are waited for one by one, for whoever has `_one`."""

    def read(self, offset: int, length_bytes: int) -> bytes:
        """One read; OSError with the protocol's errno."""
        return self._one(Request(READ, offset, length_bytes))

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """One write; OSError with the protocol's errno."""
        self._one(Request(WRITE, offset, len(data), data, FLAG_FUA if fua else 0))

    def flush(self) -> None:
        """OSError with the protocol's errno."""
        self._one(Request(FLUSH, 0, 0))

    def _one(self, request: Request) -> bytes:
        raise NotImplementedError


class NbdClient(_OneByOne):
    """One connection. Not thread-safe. Every wait ends after `timeout_s` with TimeoutError."""

    def __init__(self, path: Path, timeout_s: float = 60.0) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(path))
            self.export = nbd_handshake.negotiate(sock, timeout_s=timeout_s)
        except BaseException:
            sock.close()
            raise
        self._use(sock, timeout_s)

    @classmethod
    def over(cls, sock: socket.socket, timeout_s: float = 60.0) -> NbdClient:
        """A client on a socket whose handshake is done. It has no `export`."""
        client = cls.__new__(cls)
        client._use(sock, timeout_s)
        return client

    def _use(self, sock: socket.socket, timeout_s: float) -> None:
        self._socket = sock
        self._socket.settimeout(timeout_s)
        self._timeout_s = timeout_s
        self._cookie = 0

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Send NBD_CMD_DISC and close the socket."""
        with contextlib.suppress(OSError):
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, 2, 0, 0, 0))
        self._socket.close()

    def run(self, requests: Iterable[Request], depth: int = 1) -> Iterator[Reply]:
        """Send the requests, at most `depth` in flight, and yield the replies as they arrive."""
        under_way: dict[int, Request] = {}
        for request in requests:
            while len(under_way) >= depth:
                yield self._receive(under_way)
            self._cookie += 1
            under_way[self._cookie] = request
            header = _REQUEST.pack(
                _REQUEST_MAGIC, request.flags, request.op, self._cookie, request.offset, request.length_bytes
            )
            unsent = memoryview(header + request.data)
            while unsent:
                # the server may be sending too: with the buffers of both sides full, neither could go on
                readable, writable, _ = select.select([self._socket], [self._socket], [], self._timeout_s)
                if not readable and not writable:
                    raise TimeoutError("the server neither receives nor sends")
                if readable:
                    yield self._receive(under_way)
                if writable:
                    unsent = unsent[self._socket.send(unsent, socket.MSG_DONTWAIT) :]
        while under_way:
            yield self._receive(under_way)

    def trim(self, offset: int, length_bytes: int) -> None:
        """OSError with the protocol's errno."""
        self._one(Request(TRIM, offset, length_bytes))

    def _one(self, request: Request) -> bytes:
        (reply,) = self.run([request])
        if reply.error:
            raise OSError(reply.error, "the server rejected the request")
        return reply.data

    def _receive(self, under_way: dict[int, Request]) -> Reply:
        magic, error, cookie = _REPLY.unpack(self._receive_exactly(_REPLY.size))
        if magic != _REPLY_MAGIC:
            raise ConnectionError(f"not a reply: its magic number is {magic:#x}")
        request = under_way.pop(cookie)
        wanted = request.length_bytes if request.op == READ and not error else 0
        return Reply(request, error, self._receive_exactly(wanted))

    def _receive_exactly(self, length_bytes: int) -> bytes:
        received = bytearray()
        while len(received) < length_bytes:
            piece = self._socket.recv(length_bytes - len(received))
            if not piece:
                raise ConnectionError("the server closed the connection")
            received += piece
        return bytes(received)


class SharedClient(_OneByOne):
    """One connection for several threads, each with a request of its own under way, as the kernel has one.

    Its methods are those of NbdClient, and wait for `timeout_s` at most.
    """

    def __init__(self, path: Path, timeout_s: float = 60.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
            nbd_handshake.negotiate(self._socket, timeout_s=timeout_s)
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(None)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # guards what follows, and sending
        self._cookie = 0
        self._under_way: dict[int, tuple[int, Future[bytes]]] = {}
        self._failure: OSError | None = None
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def __enter__(self) -> SharedClient:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._receiver.join()
        self._socket.close()

    def _one(self, request: Request) -> bytes:
        answer: Future[bytes] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._cookie += 1
            self._under_way[self._cookie] = (request.length_bytes if request.op == READ else 0, answer)
            header = _REQUEST.pack(
                _REQUEST_MAGIC, request.flags, request.op, self._cookie, request.offset, request.length_bytes
            )
            self._socket.sendall(header + request.data)
        return answer.result(self._timeout_s)

    def _receive(self) -> None:
        try:
            while True:
                magic, error, cookie = _REPLY.unpack(self._receive_exactly(_REPLY.size))
                if magic != _REPLY_MAGIC:
                    raise ConnectionError(f"not a reply: its magic number is {magic:#x}")
                with self._lock:
                    length_bytes, answer = self._under_way.pop(cookie)
                if error:
                    answer.set_exception(OSError(error, "the server rejected the request"))
                else:
                    answer.set_result(self._receive_exactly(length_bytes))
        except OSError as failure:
            with self._lock:
                self._failure = failure
                for _, answer in self._under_way.values():
                    answer.set_exception(failure)

    def _receive_exactly(self, length_bytes: int) -> bytes:
        received = self._socket.recv(length_bytes, socket.MSG_WAITALL) if length_bytes else b""
        if len(received) < length_bytes:
            raise ConnectionError("the server closed the connection")
        return received
