# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: the file descriptor store of PID 1, for keepers that come and go.

It behaves as systemd (src/core/service.c): takes notifications in order, keeps descriptors by name, drops one whose
other end has closed unless it was sent with FDPOLL=0, and passes all of them to the next process.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from pathlib import Path

_FLUSH = b"X_FLUSHED=1"


class FakeSystemd:
    """Listens until `close`. While `loses` is set, FDSTOREREMOVE is ignored. `is_ready` is set by READY=1.

    `_lock` guards the store and is notified when a message has been taken.
    """

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "notify")
        self.environment = {"NOTIFY_SOCKET": self._path}
        self.loses = False
        self.is_ready = False
        self._stored: dict[str, int] = {}
        self._polled: set[str] = set()
        self._lock = threading.Condition()
        self._flushed = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def names(self) -> set[str]:
        """The names that are stored, once all notifications so far have been taken."""
        self._settle()
        return set(self._stored)

    def hand_over(self) -> dict[str, int]:
        """Copies of the stored descriptors, as the next keeper gets them; the store keeps its own."""
        self._settle()
        with self._lock:
            self._drop_what_hung_up()
            return {name: os.dup(descriptor) for name, descriptor in self._stored.items()}

    def drop(self) -> None:
        """Empty the store, as when the unit has stopped."""
        self._settle()
        with self._lock:
            for name in list(self._stored):
                self._forget(name)

    def close(self) -> None:
        self.drop()
        self._send(b"X_END=1")
        self._thread.join(10)
        self._socket.close()

    def _settle(self) -> None:
        with self._lock:
            wanted = self._flushed + 1
            self._send(_FLUSH)
            assert self._lock.wait_for(lambda: self._flushed >= wanted, 10)

    def _send(self, message: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message, self._path)

    def _listen(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 4)
            if data == b"X_END=1":
                return
            lines = data.decode().split("\n")
            name = next((line.partition("=")[2] for line in lines if line.startswith("FDNAME=")), "")
            with self._lock:
                self.is_ready |= "READY=1" in lines
                if "FDSTOREREMOVE=1" in lines and not self.loses:
                    self._forget(name)
                elif "FDSTORE=1" in lines:
                    self._forget(name)
                    (self._stored[name],) = descriptors
                    if "FDPOLL=0" not in lines:
                        self._polled.add(name)
                self._flushed += data == _FLUSH
                self._lock.notify_all()

    def _drop_what_hung_up(self) -> None:
        poll = select.poll()
        for name in self._polled:
            poll.register(self._stored[name], 0)
        hung_up = {descriptor for descriptor, _ in poll.poll(0)}
        for name in [name for name in self._polled if self._stored[name] in hung_up]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        if name in self._stored:
            os.close(self._stored.pop(name))
            self._polled.discard(name)


def wait_until_ended(pid: int, timeout_s: float = 15.0) -> None:
    """Wait for the end of a process, which need not be a child of this one; a zombie has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        started_s = time.monotonic()
        assert poll.poll(timeout_s * 1000), f"process {pid} lives after {time.monotonic() - started_s:.0f} s"
    finally:
        os.close(pidfd)
