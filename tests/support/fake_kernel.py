# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a kernel's nbd device for a keeper, and the client that does I/O on it.

It behaves as the real one (drivers/block/nbd.c): it keeps a socket until that is dead; only then does it accept
another, and it reports success either way; a request that was in flight when its socket died is sent again on the
next. One device, one request at a time.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable

from nbdnfs.errors import BusyError, NbdnfsError, UnreadableError
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.nbd_handshake import Export
from support.nbd_client import FLUSH, READ, WRITE, NbdClient, Request


class FakeLinkError(AssertionError):
    """The keeper gave no living link in time."""


class FakeKernel:
    """keeper.Kernel. Every wait of the client ends after `timeout_s`; the counters count the keeper's calls. `use` says
    what uses the device: "as swap", "by dm-0", or "" for nothing. So often as `unreadable` says, /sys cannot be read.

    The keeper's thread calls the protocol's methods; another thread does the I/O. `_lock` guards the socket and the
    device, and is notified when they change.
    """

    def __init__(self, *, timeout_s: float = 30.0) -> None:
        self.attached: Attached | None = None
        self.attaches = 0
        self.reconnects = 0
        self.dropped = 0
        self.disconnects = 0
        self.last_outage_s = 0.0
        self.refuses: list[NbdnfsError] = []
        self.unreadable = 0
        self.use: Callable[[], str] = str
        self._timeout_s = timeout_s
        self._lock = threading.Condition()
        self._socket: socket.socket | None = None
        self._links = 0
        self._news_read, self._news_write = os.pipe2(os.O_NONBLOCK)
        self._dead: list[int] = []

    # The keeper's side: keeper.Kernel

    def fileno(self) -> int:
        return self._news_read

    def dead_links(self) -> list[int]:
        with self._lock:
            dead, self._dead = self._dead, []
            if dead:
                os.read(self._news_read, 4096)
        return dead

    def find(self) -> Attached | None:
        if self.unreadable:
            self.unreadable -= 1
            raise UnreadableError("cannot read /sys/block: Cannot allocate memory")
        return self.attached

    def attach(self, sock: socket.socket, export: Export) -> Attached:
        if self.refuses:
            raise self.refuses.pop(0)
        self.attaches += 1
        self.attached = Attached(7, export.size_bytes)
        self._take(sock)
        return self.attached

    def reconnect(self, attached: Attached, sock: socket.socket) -> None:
        if self.refuses:
            raise self.refuses.pop(0)
        if self.attached != attached:
            raise NbdnfsError("no such device")
        self.reconnects += 1
        if self._socket is not None and not _is_dead(self._socket):
            self.dropped += 1
            return
        self._take(sock)

    def refuse_if_used(self, attached: Attached) -> None:
        if use := self.use():
            raise BusyError(f"{attached.path} is in use {use}")

    def disconnect(self, attached: Attached) -> None:
        self.refuse_if_used(attached)
        self.fail_requests(attached)

    def fail_requests(self, attached: Attached) -> None:
        assert attached == self.attached
        self.disconnects += 1
        self.close()
        self.attached = None

    # The test's side

    def send_link_dead(self, index: int) -> None:
        """Announce LINK_DEAD for a device, whether its socket is dead or not."""
        with self._lock:
            self._dead.append(index)
            os.write(self._news_write, b"x")

    def close(self) -> None:
        """Close the socket, as when the worker dies."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            self._lock.notify_all()

    def destroy(self) -> None:
        """Close the socket and all other descriptors. The object is of no use afterwards."""
        self.close()
        os.close(self._news_read)
        os.close(self._news_write)

    @property
    def links(self) -> int:
        """How many sockets it has accepted so far."""
        with self._lock:
            return self._links

    def wait_for_link(self, count: int) -> None:
        """Wait until it has accepted `count` sockets. FakeLinkError after `timeout_s`."""
        with self._lock:
            if not self._lock.wait_for(lambda: self._links >= count, self._timeout_s):
                raise FakeLinkError(f"{self._links} links after {self._timeout_s} s, not {count}")

    def read(self, offset: int, length_bytes: int) -> bytes:
        return self._request(Request(READ, offset, length_bytes))

    def write(self, offset: int, data: bytes) -> None:
        self._request(Request(WRITE, offset, len(data), data))

    def flush(self) -> None:
        self._request(Request(FLUSH, 0, 0))

    def _take(self, sock: socket.socket) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = sock.dup()
            self._links += 1
            self._lock.notify_all()

    def _request(self, request: Request) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        broken_s: float | None = None
        while True:
            with self._lock:
                sock, links = self._socket, self._links
            if sock is not None:
                try:
                    (reply,) = NbdClient.over(sock, self._timeout_s).run([request])
                except (OSError, ValueError):  # also EBADF, and -1 for select: `_take` may close it meanwhile
                    broken_s = broken_s or time.monotonic()
                else:
                    if broken_s is not None:
                        self.last_outage_s = time.monotonic() - broken_s
                    if reply.error:
                        raise OSError(reply.error, f"I/O error: {request.op} at {request.offset}")
                    return reply.data
            with self._lock:
                left_s = deadline - time.monotonic()
                if not self._lock.wait_for(lambda: self._links > links, left_s):  # noqa: B023
                    raise FakeLinkError(f"no new link within {self._timeout_s} s")


def _is_dead(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))
