# SPDX-License-Identifier: LGPL-2.1-or-later
"""The heir, seen from the keeper: started once memory is locked, and told what there is to guard.

It is a process in the keeper's own memory (nbdnfs/heir/). When the keeper is killed and the worker too, it connects the
parked standby to the kernel, on a machine where no new process gets the memory that it needs. docs/decisions/0031.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket

from nbdnfs import name_lock, proc_stat
from nbdnfs.errors import NbdnfsError, UnreadableError, is_of_want
from nbdnfs.heir import _heir
from nbdnfs.kernel import nbd_handshake
from nbdnfs.worker import protocol

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdnfs.keeper.records import Records
    from nbdnfs.keeper.reporter import Reporter
    from nbdnfs.keeper.worker_handle import WorkerHandle
    from nbdnfs.kernel.nbd_device import Attached, Reconnection

# In /proc/PID/comm: a heir is none of the keepers, whose command line it shares.
COMMAND = "nbdnfs-heir"

# How long it may take to close descriptors that are not its own.
_READY_TIMEOUT_S = 5.0
# How soon another one is started when it has ended, or cannot be started.
_PAUSE_S = 10.0


def is_heir(pid: int) -> bool:
    """Whether a process is the heir of a keeper, which lives or has ended. UnreadableError: it is not known."""
    try:
        with open(f"/proc/{pid}/comm") as comm:
            return comm.read() == f"{COMMAND}\n"
    except OSError as error:
        if is_of_want(error):
            raise UnreadableError(f"cannot look at process {pid}: {error.strerror}") from None
        return False


def end(pid: int) -> None:
    """End an heir. What it was connecting exits because of that."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if is_heir(pid):  # only now that it is held by a descriptor is it certain that the pid still means the same
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


class Heir:
    """At most one process. Used by the keeper's loop alone, which must have the root that the heir is to have."""

    def __init__(self, records: Records, reporter: Reporter, prepare: Callable[[Attached], Reconnection]) -> None:
        """`prepare` opens what a process needs to give the device another socket; nbd_device.prepare_reconnection."""
        self.pid = 0
        self._records = records
        self._reporter = reporter
        self._prepare = prepare
        self._channel: socket.socket | None = None
        self._due_s = 0.0
        self._told: tuple[int, int, str] | None = None

    def descriptors(self) -> list[int]:
        """What to poll for input: readable when it has ended."""
        return [self._channel.fileno()] if self._channel is not None else []

    def keep(
        self, now: float, device: Attached, worker: WorkerHandle | None, standby: WorkerHandle | None, address: str
    ) -> None:
        """Have one, and have it know the present state. Does not wait but for its start.

        worker   has, or is about to have, the device; None while there is none
        standby  is parked; None while there is none
        address  with which the standby is to be activated, "" for the one in its settings
        """
        if self._channel is not None and self._has_ended():
            self._reporter.complain("heir", f"the heir, process {self.pid}, has ended: starting another one")
            self._forget(now)
        if self._channel is None and now >= self._due_s:
            try:
                self._start(device)
            except (OSError, NbdnfsError) as error:
                self._reporter.complain("heir", f"cannot start an heir: {error}")
                self._forget(now)
        if self._channel is not None:
            self._tell(worker, standby, address)

    def end(self) -> None:
        """There is nothing to guard any more."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send(bytes([_heir.END]), socket.MSG_DONTWAIT)
        self.close()

    def close(self) -> None:
        """It goes on without being told anything more."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _start(self, device: Attached) -> None:
        """OSError, NbdnfsError: it cannot be started now."""
        records = self._records
        if name_lock.holder(records.name, name_lock.KEEPER, root=records.root, run=records.run) != os.getpid():
            raise NbdnfsError("this keeper has no lock")
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(theirs.close)
            opened = stack.enter_context(self._prepare(device))
            lock = name_lock.open_file(records.name, name_lock.KEEPER, root=records.root, run=records.run)
            stack.callback(os.close, lock)
            keeper = os.pidfd_open(os.getpid())
            stack.callback(os.close, keeper)
            self._channel = ours
            self.pid = _heir.start(
                (theirs.fileno(), keeper, opened.netlink, lock, opened.backend_file),
                f"{opened.backend}\n".encode(),
                opened.request,
                opened.descriptor_at,
                nbd_handshake.go_option(),
                COMMAND.encode(),
                f"nbdnfs: {records.name}: ".encode(),
                _heap_address(),
            )
        # until then it has copies of all descriptors of this process
        if not _is_readable(ours, _READY_TIMEOUT_S) or not ours.recv(1):
            end(self.pid)  # it would live for as long as this keeper, knowing nothing, and there can be one only
            raise TimeoutError("it does not answer")
        self._told = None

    def _has_ended(self) -> bool:
        """It says nothing once it is ready: what can be read is the end."""
        assert self._channel is not None
        return _is_readable(self._channel, 0)

    def _forget(self, now: float) -> None:
        self.close()
        self._due_s = now + _PAUSE_S

    def _tell(self, worker: WorkerHandle | None, standby: WorkerHandle | None, address: str) -> None:
        """What is dropped for want of memory is sent again at the next turn."""
        assert self._channel is not None
        found = (
            worker.pid if worker is not None and worker.pidfd >= 0 else 0,
            standby.pid if standby is not None else 0,
            address,
        )
        if found == self._told:
            return
        flags, descriptors = 0, []
        if worker is not None and found[0]:
            flags |= _heir.HAS_WORKER
            descriptors.append(worker.pidfd)
        if standby is not None:
            flags |= _heir.HAS_STANDBY
            descriptors.append(standby.make_parkable())
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        message = bytes([flags]) + protocol.activation(address)
        with contextlib.suppress(OSError):
            self._channel.sendmsg([message], rights, socket.MSG_DONTWAIT)
            self._told = found


def _heap_address() -> int:
    """Where the heap of this process begins; 0 where the kernel does not tell."""
    with open("/proc/self/stat") as stat:
        return int(proc_stat.fields(stat.read()).get(proc_stat.HEAP_ADDRESS, 0))


def _is_readable(sock: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
