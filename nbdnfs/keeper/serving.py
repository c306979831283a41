# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps the kernel's device connected to a worker: replaces one that has ended, shakes hands, hands over the socket.

Starting, recovering and adopting what an earlier keeper left are the same calls. Only the poll, a handshake that has
begun (HANDSHAKE_TIMEOUT_S) and the kernel's netlink ever wait.
"""

from __future__ import annotations

import contextlib
import time

from nbdnfs import __version__, region
from nbdnfs.errors import NbdnfsError, NoMemoryError, UnavailableError, UnreadableError
from nbdnfs.keeper import events, failures
from nbdnfs.keeper.worker_handle import WorkerHandle
from nbdnfs.kernel import nbd_handshake
from nbdnfs.worker.protocol import PROCESS_NAME, STOLEN_STATUS

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from nbdnfs.errors import OwnedError
    from nbdnfs.keeper.interfaces import Kernel, Work
    from nbdnfs.keeper.records import Records
    from nbdnfs.keeper.reporter import Reporter
    from nbdnfs.keeper.standby import Standby

HANDSHAKE_TIMEOUT_S = 5.0

# A connection that has lasted this long does not count as a failure.
LASTED_S = 2.0
# A worker exits by itself when the kernel has closed its connection; one that does not is stuck.
STUCK_S = 3.0
# How soon a worker that could not be told to serve is told again, and one that the kernel had no memory for is offered.
_AGAIN_S = 0.1
# LINK_DEAD that comes this soon after a connection was made may be about the connection before.
_SETTLED_S = 1.0


class Serving:
    """The device and the worker that serves it. Used by the keeper's loop alone.

    device             None until it is attached
    worker             None while there is none
    has_tried          whether an attempt to attach one has failed: it may be there although the kernel said no
    connected_since_s  since when the kernel has the worker's socket (time.monotonic()); None while it has none
    is_outdated        whether the worker was adopted, and is of another version than this keeper
    address            the server's, for workers to come, where it has changed; "" before
    """

    def __init__(self, kernel: Kernel, work: Work, records: Records, reporter: Reporter, standby: Standby) -> None:
        self.device = failures.patiently(kernel.find)
        self.has_tried = False
        self.worker: WorkerHandle | None = None
        self.connected_since_s: float | None = None
        self.address = ""
        self.is_outdated = False
        self._kernel = kernel
        self._work = work
        self._records = records
        self._reporter = reporter
        self._standby = standby
        self._disconnected_since_s: float | None = None
        self._failures = 0
        self._due_s = 0.0
        self._suspect_since_s: float | None = None
        self._given_up: WorkerHandle | None = None
        self._unoffered: WorkerHandle | None = None  # has shaken hands; the kernel had no memory to take its socket
        self._adoptable_region = -1  # of a device that may still have a worker of the keeper before; -1: it has none
        self._unrecorded: str | None = None  # the version of a worker that serves, and has no record yet

    @property
    def is_connected(self) -> bool:
        return self.connected_since_s is not None

    @property
    def due_s(self) -> float | None:
        """When the next worker may be started, is told to serve, or is offered to the kernel again (time.monotonic());
        None where none of this is to be done."""
        is_due = self.worker is None or not self.worker.is_activated or self.worker is self._unoffered
        return self._due_s if is_due else None

    def adopt(self, region_fd: int) -> None:
        """Take over the worker that serves our device, if it lives. `keep` looks again where another one ends that was
        started in its place, until one serves. OSError, UnreadableError: whether it lives is not known."""
        if self.device is None:
            return
        self._adoptable_region = region_fd
        record = self._records.living(self._records.WORKER)
        pid = record.pid if record is not None else region.holder(region_fd, PROCESS_NAME)
        if record is None and (parked := self._records.living(self._records.STANDBY)) is not None:
            record = parked if parked.pid == pid else None  # the last keeper's heir has connected it
        worker = WorkerHandle.adopt(pid) if pid is not None else None
        if worker is None:
            return
        is_ours = False
        try:
            # only now that it is held by a descriptor is it certain that the pid still means the same process
            is_ours = region.is_held_by(region_fd, worker.pid)
        finally:
            if not is_ours:
                worker.close()
        if not is_ours:
            return
        self._adoptable_region = -1
        self.worker, self.connected_since_s = worker, time.monotonic()
        text = f"{self.device.path}: worker {worker.pid} of the previous keeper still serves"
        self._reporter.say(text, events.WORKER_ADOPTED, pid=worker.pid, device=self.device.path)
        if record is not None:
            self._record_worker(worker, record.version)
        self.is_outdated = record is None or record.version != __version__

    def keep(self, now: float) -> None:
        """Do what is due. OwnedError: another machine has taken the file. UnavailableError: the device was detached.
        Others: the first worker fails for good, or the kernel refuses to attach."""
        self._look_at_dead_connections(now)
        if self.worker is not None:
            self.worker.check_ready()
        if self.worker is not None and self.worker.has_ended():
            self._worker_ended(self.worker, now)
            self.worker = self._unrecorded = self._unoffered = None
        if self.worker is None:
            if now < self._due_s:
                return
            if self._failures > 0 and self._adoptable_region >= 0:
                try:
                    self.adopt(self._adoptable_region)
                except (OSError, UnreadableError):  # one that is started in its place, and fails, would be lost
                    self._fail(now)
                    return
                if self.worker is not None:
                    return
            self.worker = self._standby.take()
            if self.worker is None:
                self._fail(now)
                return
        if not self.worker.is_activated and now >= self._due_s:
            self._activate(self.worker, now)
        if self.worker is self._unoffered:
            if now >= self._due_s:
                self._reconnect(self.worker)
        elif self.worker.has_greeted():
            self._connect(self.worker)
        elif self._unrecorded is not None:
            self._record_worker(self.worker, self._unrecorded)

    def replace(self, successor: WorkerHandle) -> None:
        """End the worker, so that the standby takes its place."""
        assert self.worker is not None
        text = f"replacing worker {self.worker.pid} with {successor.pid}"
        self._reporter.say(text, events.WORKER_REPLACED, pid=self.worker.pid)
        self.worker.kill()

    def _activate(self, worker: WorkerHandle, now: float) -> None:
        """Tell it to serve; again soon where there is no memory for that, as it waits for nothing else."""
        try:
            worker.activate(self.address)
        except OSError as error:
            text = f"cannot activate a worker: {error.strerror}; trying again until it can"
            self._reporter.complain("activate", text)
            self._due_s = now + _AGAIN_S

    def _connect(self, worker: WorkerHandle) -> None:
        """Shake hands, and give the socket to the kernel."""
        assert worker.socket is not None
        try:
            export = nbd_handshake.negotiate(worker.socket, timeout_s=HANDSHAKE_TIMEOUT_S)
        except NbdnfsError as error:
            self._give_up(worker, f"the NBD handshake with a worker failed: {error.message}")
            return
        if self.device is None:
            self.has_tried = True
            try:
                self.device = self._kernel.attach(worker.socket, export)
            except UnreadableError as error:  # the worker has been greeted once: it is another one's turn
                self._give_up(worker, f"cannot attach a device: {error.message}")
                return
            self.has_tried = False
            self._records.put(self._records.DEVICE, self.device.name)
            self._release(worker)
        else:
            self._reconnect(worker)

    def _reconnect(self, worker: WorkerHandle) -> None:
        """Offer the socket to the kernel; again soon where it has no memory for that, as there may be no other worker.
        It ignores what is offered while it has a socket that lives, so that a lost answer does no harm."""
        assert worker.socket is not None
        assert self.device is not None
        self._unoffered = None
        try:
            self._kernel.reconnect(self.device, worker.socket)
        except NoMemoryError as error:
            text = f"{self.device.path}: {error.message}; trying again until it can"
            self._reporter.complain("reconnect", text)
            self._unoffered, self._due_s = worker, time.monotonic() + _AGAIN_S
        except NbdnfsError as error:
            self._refuse_if_detached()
            self._give_up(worker, f"{self.device.path}: {error.message}")
        else:
            self._release(worker)

    def _release(self, worker: WorkerHandle) -> None:
        """The kernel has been given the socket: leave it to it alone, and see whether it has it."""
        assert self.device is not None
        if not worker.release_to_kernel():
            self._give_up(worker, f"{self.device.path}: the kernel has not taken a worker's socket: the old one lives")
            return
        self.connected_since_s = time.monotonic()
        self._adoptable_region = -1
        self.is_outdated = False
        self._suspect_since_s = None
        self._reporter.all_is_well()
        fields, text = {"pid": worker.pid}, f"{self.device.path}: worker {worker.pid} serves"
        if self._disconnected_since_s is not None:
            # not round(): that reads libm, which is not in locked memory, from the root
            fields["outage_ms"] = int((self.connected_since_s - self._disconnected_since_s) * 1000)
            text += f", after {fields['outage_ms']} ms without a worker"
        self._reporter.say(text, events.WORKER_SERVES, device=self.device.path, **fields)
        self._record_worker(worker, __version__)  # a file needs memory: now there is some

    def _give_up(self, worker: WorkerHandle, reason: str) -> None:
        """Kill a worker that cannot serve, and say why."""
        self._reporter.complain(reason, reason)
        self._given_up = worker
        worker.kill()

    def _worker_ended(self, worker: WorkerHandle, now: float) -> None:
        status = worker.status
        if worker.start_error:
            self._reporter.complain("start", f"cannot start a worker: {worker.start_error}")
        elif worker is not self._given_up:
            how = worker.how_it_ended
            fields = {"pid": worker.pid, "status": status}
            self._reporter.complain(f"ended{how}", f"{worker.label} has ended{how}", events.WORKER_ENDED, **fields)
        if status == STOLEN_STATUS:
            raise self._stolen()
        if self.device is None and failures.is_final(status, on_server=True):
            raise failures.failed("worker", status)
        if self.connected_since_s is not None:
            if now - self.connected_since_s >= LASTED_S:
                self._failures = 0
            self._disconnected_since_s = now
        self.connected_since_s = None
        self._fail(now)

    def _fail(self, now: float) -> None:
        self._due_s = now + failures.pause_s(self._failures)
        self._failures += 1

    def _stolen(self) -> OwnedError:
        """Have the requests of a device in use fail, instead of waiting for a worker that cannot come. The keeper takes
        down a device that is not in use."""
        if self.device is not None:
            try:
                self._kernel.refuse_if_used(self.device)
            except NbdnfsError:
                with contextlib.suppress(NbdnfsError):
                    self._kernel.fail_requests(self.device)
        self._reporter.state(self._records.STOLEN)
        return failures.stolen(self._records.name)

    def _refuse_if_detached(self) -> None:
        """UnavailableError: it has been. Where that cannot be seen just now, the next worker finds it out."""
        try:
            found = self._kernel.find()
        except UnreadableError:
            return
        if found is None or self.device is None or found.index != self.device.index:
            path = self.device.path if self.device is not None else "the device"
            self.device = None
            raise UnavailableError(f"{path} has been detached by another program")

    def _look_at_dead_connections(self, now: float) -> None:
        """LINK_DEAD for our device while its worker lives: it reads an end of file and exits, or is stuck."""
        dead = self._kernel.dead_links()
        if self.worker is None or self.connected_since_s is None or self.device is None:
            return
        if self.device.index in dead and now - self.connected_since_s > _SETTLED_S:
            self._suspect_since_s = self._suspect_since_s or now
        if self._suspect_since_s is not None and now - self._suspect_since_s > STUCK_S:
            self._reporter.say(
                f"worker {self.worker.pid} is disconnected from the kernel and does not exit: killing it"
            )
            self._suspect_since_s = None
            self.worker.kill()

    def _record_worker(self, worker: WorkerHandle, version: str) -> None:
        is_done = self._records.put_process(self._records.WORKER, worker.pid, version)
        self._unrecorded = None if is_done else version
