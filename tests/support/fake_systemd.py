# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: the file descriptor store of PID 1, for keepers that come and go.

It behaves as systemd (src/core/service.c): takes notifications in order, keeps descriptors with their names, drops one
whose other end has closed unless it was sent with FDPOLL=0, and passes all of them to the next process, the newest
first. A name that there is already is stored a second time (service_add_fd_store()); the same descriptor again is not,
and neither is one that the store has no room for. FDSTOREREMOVE drops all that have the name.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_FLUSH = b"X_FLUSHED=1"
# FileDescriptorStoreMax= of systemd/nbdnfs@.service
_STORED_MAX = 4


@dataclass(frozen=True)
class _Stored:
    name: str
    descriptor: int
    is_polled: bool


class FakeSystemd:
    """Listens until `close`. While `loses` is set, FDSTOREREMOVE is ignored. `is_ready` is set by READY=1.

    `_lock` guards the store and is notified when a message has been taken.
    """

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "notify")
        self.environment = {"NOTIFY_SOCKET": self._path}
        self.loses = False
        self.is_ready = False
        self._stored: list[_Stored] = []  # the newest first
        self._lock = threading.Condition()
        self._flushed = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def names(self) -> list[str]:
        """The names that are stored, sorted, once all notifications so far have been taken."""
        self._settle()
        with self._lock:
            return sorted(stored.name for stored in self._stored)

    def hand_over(self) -> dict[str, int]:
        """Copies of the stored descriptors, as the next keeper gets them, which of several with one name takes the last
        (sd_notify.listen_fds); the store keeps its own."""
        self._settle()
        with self._lock:
            self._drop_what_hung_up()
            chosen = {stored.name: stored.descriptor for stored in self._stored}
            return {name: os.dup(descriptor) for name, descriptor in chosen.items()}

    def drop(self) -> None:
        """Empty the store, as when the unit has stopped."""
        self._settle()
        with self._lock:
            self._forget(self._stored)

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
                if "FDSTOREREMOVE=1" in lines:
                    self._forget([stored for stored in self._stored if stored.name == name and not self.loses])
                elif "FDSTORE=1" in lines:
                    (descriptor,) = descriptors
                    self._store(_Stored(name, descriptor, "FDPOLL=0" not in lines))
                self._flushed += data == _FLUSH
                self._lock.notify_all()

    def _store(self, new: _Stored) -> None:
        if len(self._stored) >= _STORED_MAX or any(_is_same(new.descriptor, one.descriptor) for one in self._stored):
            os.close(new.descriptor)
        else:
            self._stored.insert(0, new)

    def _drop_what_hung_up(self) -> None:
        poll = select.poll()
        for stored in self._stored:
            if stored.is_polled:
                poll.register(stored.descriptor, 0)
        hung_up = {descriptor for descriptor, _ in poll.poll(0)}
        self._forget([stored for stored in self._stored if stored.descriptor in hung_up])

    def _forget(self, old: list[_Stored]) -> None:
        for stored in old:
            os.close(stored.descriptor)
        self._stored = [stored for stored in self._stored if stored not in old]


def _is_same(one: int, other: int) -> bool:
    """Whether these are copies of one descriptor; systemd asks kcmp(2). Nobody opens a stored file a second time."""
    return os.path.sameopenfile(one, other)


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
