# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: the kernel's end of a netlink socket, for one that sends RECONFIGURE. It takes the socket that the
request names out of the process that has sent it, and hands it to the test."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable

from nbdnfs.kernel.nbd_netlink import NbdNetlink

BACKEND = "nbdnfs:t"
FAMILY = 42
INDEX = 7

_SYS_PIDFD_GETFD = 438
_NLMSG_ERROR = 2
# NBD_ATTR_SOCKETS ▸ NBD_SOCK_ITEM ▸ NBD_SOCK_FD: nested headers of 4 bytes, then the number
_NESTED = struct.Struct("=HHHHHHI")
_SOCKETS, _ITEM, _FD, _NESTED_BIT = 7, 1, 1, 1 << 15

_libc = ctypes.CDLL(None, use_errno=True)


def descriptor_in(request: bytes) -> int:
    """The descriptor that a RECONFIGURE request names."""
    for at in range(20, len(request) - _NESTED.size + 1, 4):
        fields = _NESTED.unpack_from(request, at)
        if (fields[1] & ~_NESTED_BIT, fields[3] & ~_NESTED_BIT, fields[5]) == (_SOCKETS, _ITEM, _FD):
            return int(fields[6])
    raise AssertionError(f"no socket in {request!r}")


def take_descriptor(pid: int, number: int) -> socket.socket:
    """A copy of another process's socket, pidfd_getfd(2)."""
    pidfd = os.pidfd_open(pid)
    try:
        found = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if found < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return socket.socket(fileno=found)
    finally:
        os.close(pidfd)


class Prepared:
    """Stands for nbd_device.Reconnection."""

    def __init__(self, netlink: int, backend_file: int) -> None:
        self.netlink, self.backend_file, self.backend = netlink, backend_file, BACKEND
        builder = NbdNetlink(socket.socket(), FAMILY)
        self.request, self.descriptor_at = builder.reconfigure_request(INDEX, backend=BACKEND)
        builder.close()

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FakeNbdNetlink:
    """`peer` is for the sender; `reconnect` is called with each socket, in a thread, and returns the errno to answer
    with. The sender is the process `pid`, to be set before it sends."""

    def __init__(self, reconnect: Callable[[socket.socket], int]) -> None:
        self.pid = 0
        self.requests: list[bytes] = []
        self._reconnect = reconnect
        self._ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._ours.close()
        self.peer.close()

    def _serve(self) -> None:
        while request := self._ours.recv(4096):
            self.requests.append(request)
            with take_descriptor(self.pid, descriptor_in(request)) as sock:
                code = self._reconnect(sock)
            answer = struct.pack("=IHHIIi", 36, _NLMSG_ERROR, 0, 0, 0, -code) + request[:16]
            with contextlib.suppress(BrokenPipeError):  # the sender has closed its end
                self._ours.send(answer)
