# SPDX-License-Identifier: LGPL-2.1-or-later
"""A keeper's handle of one worker: nbdkit with our plugin on one end of a socketpair, started as a standby.

`nbdkit -s` serves the one connection that it is started with, so that a worker and its connection end together:
no listening socket, no shell in between for LISTEN_PID. docs/decisions/0005 and 0006 say why. A thread starts it with
posix_spawn(3): no copy of the keeper's page tables, no memory of its size, and a handle before there is a process,
because that takes as long as the server of the root file system does not answer. docs/decisions/0027.

A standby can outlive its keeper: it waits for as long as any process has the keeper's end of its control socket. What
else the next keeper needs waits in that socket's own queue, as one message with descriptors (an *ancillary message*,
cmsg(3)). It is read with MSG_PEEK, and taken out only when the standby is activated. docs/decisions/0014 says why.
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

from nbdnfs import __version__, programs
from nbdnfs.errors import is_of_want
from nbdnfs.worker import protocol

# The ancillary message of a parked standby: its pid and its recipe, with so many descriptors.
_ANCILLARY_BYTES_MAX = 16384
_ANCILLARY_DESCRIPTORS = 3
_DESCRIPTOR_BYTES = array.array("i").itemsize


def recipe(argv: list[str]) -> bytes:
    """What two workers that can stand in for each other have in common: the version of nbdnfs, and all settings."""
    return "\0".join([__version__, *argv]).encode()


class WorkerHandle:
    """A worker, started by this keeper or by the one before. Not thread-safe; used by the keeper's loop alone.

    One that was started is a standby until `activate`. It exits when the keeper does, unless another process has what
    `make_parkable` returns as well.

    pidfd        -1 until its process has started, and once it has ended
    socket        the kernel's end of its NBD connection; None for a serving worker that was adopted, and once the
                  kernel has it
    is_ready      a standby that waits, or a worker that serves
    is_activated  it has been told to serve, or is an adopted one that does
    start_error   why its process cannot be started, for people; "" before
    """

    def __init__(
        self, pid: int, pidfd: int, *, is_child: bool, is_standby: bool, spawn: programs.Spawn | None = None
    ) -> None:
        self._pid = pid
        self.pidfd = pidfd
        self.socket: socket.socket | None = None
        self.is_ready = not is_standby
        self.is_activated = not is_standby
        self.start_error = ""
        self._is_child = is_child
        self._spawn = spawn
        self._control: socket.socket | None = None
        self._control_peer: socket.socket | None = None  # until the ancillary message is sent through it, or never is
        self._socket_peer: socket.socket | None = None
        self._recipe = b""
        self._status: int | None = None

    @classmethod
    def start(cls, program: str, argv: list[str], environment: Mapping[str, str], region_fd: int) -> WorkerHandle:
        """Begin to start a standby. OSError when there are too many descriptors already."""
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            control, control_peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            for sock in (ours, theirs, control, control_peer):
                stack.callback(sock.close)
            assert max(region_fd, control_peer.fileno()) < protocol.REGION_FD
            descriptors = {
                0: theirs.fileno(),
                1: theirs.fileno(),
                protocol.REGION_FD: region_fd,
                protocol.CONTROL_FD: control_peer.fileno(),
            }
            spawn = programs.Spawn(program, argv, environment, descriptors, new_session=True)
            handle = cls(0, -1, is_child=True, is_standby=True, spawn=spawn)
            control.setblocking(False)
            handle.socket, handle._socket_peer = ours, theirs
            handle._control, handle._control_peer = control, control_peer
            handle._recipe = recipe(argv)
            stack.pop_all()
        return handle

    @classmethod
    def adopt(cls, pid: int) -> WorkerHandle | None:
        """A serving worker of the keeper before; None when it has ended. The caller compares its start time before and
        afterwards. OSError: it is not known, for want of memory or descriptors."""
        try:
            return cls(pid, os.pidfd_open(pid), is_child=False, is_standby=False)
        except OSError as error:
            if is_of_want(error):
                raise
            return None

    @classmethod
    def take(cls, parked: int, wanted_recipe: bytes) -> WorkerHandle | None:
        """The standby that an earlier keeper has parked, from the descriptor that `make_parkable` returned. The
        ancillary message stays in its queue, for the next keeper.

        None, and `parked` is closed, when it has another recipe, has ended, or has been activated. A standby that still
        waits then reads an end of file, whichever processes have a copy of the descriptor.

        OSError: it is not known, for want of memory or descriptors. `parked` stays open, and the standby waits.
        """
        control = socket.socket(fileno=parked)
        try:
            handle = cls._look_into(control, wanted_recipe)
        except BaseException:
            control.detach()
            raise
        if handle is None:
            _hang_up(control)
            control.close()
        return handle

    @classmethod
    def _look_into(cls, control: socket.socket, wanted_recipe: bytes) -> WorkerHandle | None:
        """The standby at the other end of `control`, which is its then, or None. OSError as `take`."""
        with contextlib.ExitStack() as stack:
            control.setblocking(False)
            room = socket.CMSG_SPACE(_ANCILLARY_DESCRIPTORS * _DESCRIPTOR_BYTES)
            wanted_flags = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
            try:
                message, rights, flags, _ = control.recvmsg(_ANCILLARY_BYTES_MAX, room, wanted_flags)
            except OSError as error:
                if is_of_want(error) and not isinstance(error, BlockingIOError):
                    raise
                return None  # nothing in it: it has been activated, or its keeper died just before it did that
            descriptors = array.array("i", b"".join(data for _, kind, data in rights if kind == socket.SCM_RIGHTS))
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            pid, _, found_recipe = message.partition(b"\0")
            if found_recipe != wanted_recipe:
                return None
            if flags & socket.MSG_CTRUNC:  # net/core/scm.c: scm_detach_fds, where this process can have no more
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if len(descriptors) != _ANCILLARY_DESCRIPTORS or _is_readable(descriptors[2]):
                return None
            handle = cls(int(pid), descriptors[2], is_child=False, is_standby=True)
            handle.is_ready = True
            handle.socket, handle._socket_peer = (socket.socket(fileno=descriptor) for descriptor in descriptors[:2])
            handle._control = control
            stack.pop_all()
        return handle

    @property
    def pid(self) -> int:
        """Of its process, which must have started: kill(2) with 0 would be for the caller's own process group."""
        assert self._pid > 0
        return self._pid

    @property
    def label(self) -> str:
        """For people, also of one that has no process."""
        return f"worker {self._pid}" if self._pid else "a worker that had not started yet"

    def descriptors(self) -> list[int]:
        """What to poll for input: each is readable when `check_ready`, `has_ended` or `has_greeted` has news."""
        if self._spawn is not None:
            return [self._spawn.fileno()]
        found = [self.pidfd] if self._status is None else []
        if not self.is_ready and self._control is not None:
            found.append(self._control.fileno())
        if self.is_activated and self.socket is not None:
            found.append(self.socket.fileno())
        return found

    def is_late(self, now: float) -> bool:
        """Whether its process should have started by now (time.monotonic())."""
        return self._spawn is not None and self._spawn.is_late(now)

    def check_ready(self) -> bool:
        """Whether it is ready, by what it has sent so far."""
        if not self.is_ready and self._has_started() and self._control is not None:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self.is_ready = self._control.recv(1) == protocol.READY
        return self.is_ready

    def activate(self, address: str = "") -> None:
        """Have it connect to the server, map the region and serve. Also before it is ready, or has started.

        `address` is the server's where it differs from the one in its settings. The ancillary message is taken out of
        the control socket first: from here on this keeper has the only copies of both ends of its NBD connection.

        OSError where the kernel has no memory for it: it has been told nothing, and waits until this is called again.
        """
        self._close_control_peer()
        if self._control is not None:
            with contextlib.suppress(ConnectionError):  # it has ended: see has_ended
                if self.is_ready:
                    with contextlib.suppress(BlockingIOError):  # nothing in it
                        self._control.recv(_ANCILLARY_BYTES_MAX)  # the kernel closes descriptors that have no room
                self._control.send(protocol.activation(address))
        self.is_activated = True

    @property
    def is_parkable(self) -> bool:
        """Whether the ancillary message is in the control socket."""
        return self._control_peer is None

    def make_parkable(self) -> int:
        """Put what another keeper needs for `take` into the control socket of a ready standby, and return the
        descriptor to park. A second call returns the same. OSError where the kernel has no memory for it."""
        assert self._control is not None
        if self._control_peer is not None:
            assert self.socket is not None
            assert self._socket_peer is not None
            descriptors = array.array("i", [self.socket.fileno(), self._socket_peer.fileno(), self.pidfd])
            assert len(descriptors) == _ANCILLARY_DESCRIPTORS
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            message = str(self.pid).encode() + b"\0" + self._recipe
            self._control_peer.sendmsg([message], rights, socket.MSG_DONTWAIT)
            self._close_control_peer()
        return self._control.fileno()

    def has_greeted(self) -> bool:
        """Whether it has begun the NBD handshake: it is connected to the server and has mapped the region."""
        return self._has_started() and self.socket is not None and _is_readable(self.socket.fileno())

    def release_to_kernel(self) -> bool:
        """Close the keeper's copy of the socket. False where the kernel has none: the worker's end has hung up then.

        Closing is done when close(2) and sendmsg(2) return (fs/file_table.c: fput's task work), so there is nothing
        to wait for. That holds for a standby that was parked, too: systemd, which may be slow to close things, has a
        copy of the control socket and none of this one. A copy was in the control socket's queue; `activate` took it
        out there, before the worker could greet, and all processes that have the socket share one queue. An earlier
        keeper's copies were closed when it ended, before this keeper was started.
        """
        assert self.socket is not None
        assert self._socket_peer is not None
        self.socket.close()
        self.socket = None
        poll = select.poll()
        poll.register(self._socket_peer, 0)
        is_kept = not poll.poll(0)
        self._close_socket_peer()
        if self._control is not None:
            self._control.close()
            self._control = None
        return is_kept

    def has_ended(self) -> bool:
        """Whether its process has ended, and with it its lock on the region, or cannot be started: see `start_error`.
        Collects the exit status of a child."""
        if self._has_started() and self._status is None and _is_readable(self.pidfd):
            self._status = 0
            if self._is_child:
                with contextlib.suppress(ChildProcessError):
                    self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.close()
        return self._status is not None

    @property
    def status(self) -> int:
        """Its exit status, or minus the signal; 0 for an adopted one, whose status is unknown, and for one that cannot
        be started. After `has_ended`."""
        assert self._status is not None
        return self._status

    @property
    def how_it_ended(self) -> str:
        """For people, in brackets; empty for an adopted one. After `has_ended`."""
        if not self._is_child:
            return ""
        return f" (killed by signal {-self.status})" if self.status < 0 else f" (exit status {self.status})"

    def kill(self) -> None:
        """SIGKILL. Nothing is lost: what the NAS does not have is in the region."""
        if not self._has_started():
            self._status = -signal.SIGKILL if self._status is None else self._status
            self.close()
        elif self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close all descriptors. A standby that is not parked exits because of that, or is not started."""
        if self._spawn is not None:
            self._spawn.cancel()
            self._spawn = None
        for sock in (self.socket, self._control):
            if sock is not None:
                sock.close()
        self.socket = self._control = None
        self._close_control_peer()
        self._close_socket_peer()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _has_started(self) -> bool:
        """Whether it has, or has had, a process."""
        if self._spawn is not None and self._spawn.is_over():
            spawn, self._spawn = self._spawn, None
            try:
                if spawn.error is not None:
                    raise spawn.error
                self.pidfd = os.pidfd_open(spawn.pid)
                self._pid = spawn.pid
            except OSError as error:
                self.start_error = error.strerror or str(error)
                self._status = 0
                self.close()
                if spawn.pid:
                    os.kill(spawn.pid, signal.SIGKILL)
                    os.waitpid(spawn.pid, 0)
        return self._pid != 0

    def _close_control_peer(self) -> None:
        if self._control_peer is not None:
            self._control_peer.close()
            self._control_peer = None

    def _close_socket_peer(self) -> None:
        if self._socket_peer is not None:
            self._socket_peer.close()
            self._socket_peer = None


def _hang_up(control: socket.socket) -> None:
    """The other end reads an end of file, although there may be copies of this one."""
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
