# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper's workers: nbdkit with our plugin on one end of a socketpair, started as standby, parked, adopted, ended.

`nbdkit -s` serves the one connection that it is started with, so that a worker and its connection end together:
no listening socket, no shell in between for LISTEN_PID. docs/decisions/0005 and 0006 say why.

Starting one is posix_spawn(3): no copy of the keeper's page tables, no memory of its size.

A standby can outlive its keeper: whoever holds the keeper's end of its control socket keeps it waiting. All else that
the next keeper needs waits in that socket's own queue, as a message that is looked at (MSG_PEEK) and not taken out
before the standby gets the word. docs/decisions/0014 says why there.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import signal
import socket
from collections.abc import Mapping

from nbdnfs import __version__
from nbdnfs.worker import protocol

# What waits in a parked standby's control socket: its pid and its making, with so many descriptors.
_PARCEL_BYTES = 16384
_PARCEL_DESCRIPTORS = 3
_DESCRIPTOR_BYTES = array.array("i").itemsize


def making(argv: list[str]) -> bytes:
    """What two workers have in common that can stand for each other: the version of nbdnfs, and all settings."""
    return "\0".join([__version__, *argv]).encode()


class WorkerProcess:
    """A worker, started by this keeper or by the one before. Not thread-safe; used by the keeper's loop alone.

    One that was started is a standby until `go`. It ends when the keeper does, unless somebody else holds `pack` as
    well. `socket` is the end of its connection that the kernel is to get; None for a serving one that was adopted, and
    once the kernel has it.
    """

    def __init__(self, pid: int, pidfd: int, *, child: bool, standby: bool) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.socket: socket.socket | None = None
        self.is_ready = not standby
        self.has_gone = not standby
        self._child = child
        self._control: socket.socket | None = None
        self._their_control: socket.socket | None = None  # until the parcel has been sent through it, or never will
        self._peer: socket.socket | None = None
        self._making = b""
        self._status: int | None = None

    @classmethod
    def start(cls, program: str, argv: list[str], environment: Mapping[str, str], region_fd: int) -> WorkerProcess:
        """Start a standby. OSError where the kernel cannot."""
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            for sock in (ours, theirs, control, their_control):
                stack.callback(sock.close)
            assert max(region_fd, their_control.fileno()) < protocol.REGION_FD
            pid = os.posix_spawn(
                program,
                argv,
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, region_fd, protocol.REGION_FD),
                    (os.POSIX_SPAWN_DUP2, their_control.fileno(), protocol.CONTROL_FD),
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 1),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
            )
            process = cls(pid, os.pidfd_open(pid), child=True, standby=True)
            control.setblocking(False)
            process.socket, process._peer = ours, theirs
            process._control, process._their_control = control, their_control
            process._making = making(argv)
            stack.pop_all()
        return process

    @classmethod
    def adopt(cls, pid: int) -> WorkerProcess | None:
        """A worker of the keeper before. The caller has compared its start time, and does so again afterwards."""
        try:
            return cls(pid, os.pidfd_open(pid), child=False, standby=False)
        except OSError:
            return None

    @classmethod
    def take(cls, parked: int, made: bytes) -> WorkerProcess | None:
        """The standby that an earlier keeper has parked, from the descriptor that `pack` gave. The parcel stays in its
        queue, for the next keeper.

        None, and `parked` is closed, when it is not of the making `made`, has ended, or has got the word already. One
        that still waits then reads an end of file, whoever has a copy of the descriptor.
        """
        with contextlib.ExitStack() as stack:
            control = socket.socket(fileno=parked)
            stack.callback(control.close)
            stack.callback(_hang_up, control)
            control.setblocking(False)
            room = socket.CMSG_SPACE(_PARCEL_DESCRIPTORS * _DESCRIPTOR_BYTES)
            try:
                parcel, rights, _, _ = control.recvmsg(_PARCEL_BYTES, room, socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC)
            except OSError:  # nothing in it: it has the word, or has lost its keeper while that was about to give it
                return None
            descriptors = array.array("i", b"".join(data for _, kind, data in rights if kind == socket.SCM_RIGHTS))
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            pid, _, found = parcel.partition(b"\0")
            if found != made or len(descriptors) != _PARCEL_DESCRIPTORS or _readable(descriptors[2]):
                return None
            process = cls(int(pid), descriptors[2], child=False, standby=True)
            process.is_ready = True
            process.socket, process._peer = (socket.socket(fileno=descriptor) for descriptor in descriptors[:2])
            process._control = control
            stack.pop_all()
        return process

    def descriptors(self) -> list[int]:
        """What to poll for input: each becomes readable when there is something for `look`, `has_ended` or `greets`."""
        found = [self.pidfd] if self._status is None else []
        if not self.is_ready and self._control is not None:
            found.append(self._control.fileno())
        if self.has_gone and self.socket is not None:
            found.append(self.socket.fileno())
        return found

    def look(self) -> None:
        """Take notice of a standby that has become ready."""
        if not self.is_ready and self._control is not None:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self.is_ready = self._control.recv(1) == protocol.READY

    def go(self, address: str = "") -> None:
        """End its wait: it is to connect to the server, take the region over and serve. Also before it is ready.

        `address` is the server's where that is not the one that it was started with. What `pack` put into its control
        socket is taken out first: from here on this keeper has the only copies of both ends of its connection.
        """
        self.has_gone = True
        self._drop_their_control()
        if self._control is not None:
            with contextlib.suppress(OSError):  # nothing in it
                if self.is_ready:
                    self._control.recv(_PARCEL_BYTES)  # the kernel closes descriptors that no room is given for
            with contextlib.suppress(OSError):  # it has ended, which `has_ended` tells
                self._control.send(protocol.activation(address))

    @property
    def is_packed(self) -> bool:
        return self._their_control is None

    def pack(self) -> int:
        """Have all that another keeper needs for `take` in the control socket of a ready standby; the descriptor of
        that, which is to be parked. Again: the same. OSError where the kernel has no memory for it."""
        assert self._control is not None
        if self._their_control is not None:  # not is_packed
            assert self.socket is not None
            assert self._peer is not None
            descriptors = array.array("i", [self.socket.fileno(), self._peer.fileno(), self.pidfd])
            assert len(descriptors) == _PARCEL_DESCRIPTORS
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            parcel = str(self.pid).encode() + b"\0" + self._making
            self._their_control.sendmsg([parcel], rights, socket.MSG_DONTWAIT)
            self._drop_their_control()
        return self._control.fileno()

    def greets(self) -> bool:
        """Whether it has begun the handshake: it is connected to the server and has the region."""
        return self.socket is not None and _readable(self.socket.fileno())

    def is_kept_by_kernel(self) -> bool:
        """Let go of the socket, and say whether the kernel has a hold of it: the worker's end sees a hang-up otherwise.

        Closing is done when close(2) and sendmsg(2) return (fs/file_table.c: fput's task work), so there is nothing
        to wait for. That holds for a standby that was parked, too: systemd, which may be slow to let go, has a copy
        of the control socket and none of this one. A copy lay in the control socket's queue; `go` took it out there,
        before the worker could greet, and a queue is one for all holders of the socket. An earlier keeper's copies
        went when it ended, and it had ended before this one was started.
        """
        assert self.socket is not None
        assert self._peer is not None
        self.socket.close()
        self.socket = None
        poll = select.poll()
        poll.register(self._peer, 0)
        kept = not poll.poll(0)
        self._drop_peer()
        if self._control is not None:
            self._control.close()
            self._control = None
        return kept

    def has_ended(self) -> bool:
        """Whether it is gone, region lock and all; collects its exit status if it was ours."""
        if self._status is None and _readable(self.pidfd):
            self._status = 0
            if self._child:
                with contextlib.suppress(ChildProcessError):
                    self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.close()
        return self._status is not None

    @property
    def status(self) -> int:
        """Its exit status, or minus the signal; of an adopted one nobody knows, and it is 0. After `has_ended`."""
        assert self._status is not None
        return self._status

    @property
    def how_it_ended(self) -> str:
        """For people, in brackets; empty for an adopted one. After `has_ended`."""
        if not self._child:
            return ""
        return f" (killed by signal {-self.status})" if self.status < 0 else f" (exit status {self.status})"

    def kill(self) -> None:
        """SIGKILL. It loses nothing: what the NAS does not have lies in the region."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of everything that is the keeper's. A standby that is not parked ends by that."""
        for sock in (self.socket, self._control):
            if sock is not None:
                sock.close()
        self.socket = self._control = None
        self._drop_their_control()
        self._drop_peer()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _drop_their_control(self) -> None:
        if self._their_control is not None:
            self._their_control.close()
            self._their_control = None

    def _drop_peer(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


def _hang_up(control: socket.socket) -> None:
    """The other end reads an end of file, although there may be copies of this one."""
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        try:
            return bool(poll.poll(0))
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
