# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs run NAME`: keeps one swap device alive. Drawn and explained in docs/keeper.md.

Two small machines in one loop. The *steps* go one way: provision ▸ attach ▸ warm_up ▸ swap_on ▸ watch; each is a
function that says which one is next. The *link* is kept in all steps from attach on: a worker that has ended is
replaced by the standby, which is given the word, shakes hands, and is handed to the kernel. Starting, recovering and
adopting what an earlier keeper left are the same calls.

In the loop nothing is imported, resolved or run but workers; nothing waits but the poll, a handshake that has begun
(HANDSHAKE_TIMEOUT_S) and the kernel's netlink.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from nbdnfs import __version__, region
from nbdnfs.errors import BusyError, NbdnfsError, OwnedError, UnavailableError
from nbdnfs.keeper import records as run_dir
from nbdnfs.keeper.records import RunDir
from nbdnfs.keeper.sd_notify import Notifier
from nbdnfs.keeper.worker_handle import WorkerProcess
from nbdnfs.kernel import nbd_handshake
from nbdnfs.kernel.link import Attached
from nbdnfs.kernel.nbd_handshake import Export
from nbdnfs.worker.protocol import PROCESS_NAME, STOLEN_STATUS

HANDSHAKE_TIMEOUT_S = 5.0

# How long to wait before the next try, after so many failures in a row. There is no last try.
PAUSES_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# A link that has lasted this long was no failure.
_LASTED_S = 2.0
# A worker whose link the kernel has given up ends by itself; one that does not is stuck.
_STUCK_S = 3.0
# Without news the loop turns this often: the kernel's LINK_DEAD may be lost.
_TICK_S = 1.0
# While a helper works, the unit's TimeoutStartSec= does not run out; told once a tick.
_MORE_TIME = "EXTEND_TIMEOUT_USEC=60000000"
# When a server has been away for so long its name is looked up again, and then every so often.
RESOLVE_AFTER_S = 60.0
_RESOLVE_EVERY_S = 300.0
# The names of what is parked with systemd for the next keeper.
_REGION, _STANDBY = "region", "standby"
# How long the standby may hold up swapon. The first one is read from the disk.
_STANDBY_S = 60.0

# Ends of a worker or helper that another try may mend: sysexits(3), and signals.
_TEMPORARY = frozenset({os.EX_UNAVAILABLE, os.EX_TEMPFAIL, os.EX_NOHOST, os.EX_IOERR})


class Kernel(Protocol):
    """What the keeper asks of the kernel; link.Link."""

    def fileno(self) -> int: ...
    def dead_links(self) -> list[int]: ...
    def find(self) -> Attached | None: ...
    def attach(self, sock: socket.socket, export: Export) -> Attached: ...
    def reconnect(self, attached: Attached, sock: socket.socket) -> None: ...
    def disconnect(self, attached: Attached) -> None: ...


class Work(Protocol):
    """What the keeper has others do: start a worker on the region, or take a parked one of the same making; and
    helpers that come to an end."""

    def start_worker(self, region_fd: int) -> WorkerProcess: ...
    def take_worker(self, parked: int) -> WorkerProcess | None: ...
    def provision(self) -> Helper | None: ...
    def swap_on(self, attached: Attached) -> Helper: ...
    def is_swapped_on(self, attached: Attached) -> bool: ...
    def is_server_away(self, region: mmap.mmap) -> bool: ...
    def resolve(self) -> Helper: ...
    def resolved(self) -> str: ...


class Helper:
    """A process that does one thing and ends."""

    def __init__(self, argv: list[str], environment: dict[str, str], *, stdout: int = 2) -> None:
        """Start it. OSError where the kernel cannot."""
        self._pid = os.posix_spawn(
            argv[0],
            argv,
            environment,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)],
            setsigmask=(),
            setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
            scheduler=(os.SCHED_OTHER, os.sched_param(0)),  # the keeper's own may be a real-time one
        )
        self.pidfd = os.pidfd_open(self._pid)

    def ended(self) -> int | None:
        """Its exit status, or minus the signal; None while it runs."""
        if self.pidfd >= 0:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid == 0:
                return None
            os.close(self.pidfd)
            self.pidfd = -1
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def terminate(self) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)


class Keeper:
    """One device. Made, then `run` once; used by one thread."""

    def __init__(
        self,
        kernel: Kernel,
        work: Work,
        records: RunDir,
        notifier: Notifier,
        *,
        stored: dict[str, int],
        warm_up: Callable[[], None] = lambda: None,
    ) -> None:
        """stored    what an earlier keeper had parked: notify.stored()
        warm_up   called once, when all is loaded, before there is swap: it touches what memory will be needed
        """
        self._kernel = kernel
        self._work = work
        self._records = records
        self._notifier = notifier
        self._warm_up_memory = warm_up
        self._steps: dict[str, Callable[[float], str]] = {
            "provision": self._provision,
            "attach": self._attach,
            "warm_up": self._warm_up,
            "swap_on": self._swap_on,
            "watch": self._watch,
        }
        self._step = ""
        self._step_since_s = 0.0
        self._helper: Helper | None = None
        self._helper_failures = 0
        self._helper_due_s = 0.0

        self.device = kernel.find()
        self.worker: WorkerProcess | None = None
        self.standby: WorkerProcess | None = None
        self._is_standby_parked = False
        self._dying: list[WorkerProcess] = []
        self._linked_s: float | None = None
        self._lost_s: float | None = None
        self._failures = 0
        self._worker_due_s = 0.0
        self._standby_failures = 0
        self._standby_due_s = 0.0
        self._suspect_s: float | None = None
        self._complaint = ""
        self._given_up: WorkerProcess | None = None
        self._resolver: Helper | None = None
        self._resolve_due_s: float | None = None
        self._address = ""  # the server's, where it has changed
        self._renew = False
        self._replace = False
        self._told_ready = False
        self._mapping: mmap.mmap | None = None
        self._told_s = 0.0

        self._stop: str | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        parked = stored.pop(_STANDBY, None)
        self._region = self._take_region(stored)
        if parked is not None:
            self._take_standby(parked)

    # Life

    def run(self) -> int:
        """Until a signal says stop; the exit status. Raises NbdnfsError for what no further try can mend."""
        before = self._take_signals()
        self._records.write_process(run_dir.KEEPER, os.getpid(), __version__)
        self._adopt()
        try:
            self._enter("provision" if self.device is None else "attach")
            while self._stop is None:
                self._turn()
            self._say(f"{self._stop}: the device and its worker stay as they are")
            self._notifier.tell("STOPPING=1", f"STATUS={self._stop}: handed over")
        except BaseException as error:
            if isinstance(error, NbdnfsError) and self.standby is not None:  # nothing for a next keeper to go on with
                self._forget_standby()
                self.standby.kill()
            self._undo()
            raise
        finally:
            for process in (self.worker, self.standby, *self._dying):
                if process is not None:
                    # a standby that is not parked ends by that; a worker whom the kernel knows goes on
                    process.close()
            if self._mapping is not None:
                self._mapping.close()
            os.close(self._region)
            for helper in (self._helper, self._resolver):
                if helper is not None:
                    helper.terminate()
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._wake_read)
            os.close(self._wake_write)
        return 0

    def _turn(self) -> None:
        """Look at everything, do what is due, sleep until there is news."""
        now = time.monotonic()
        if self._step != "provision":
            self._keep_link(now)
            self._keep_standby(now)
        following = self._steps[self._step](now)
        if following != self._step:
            self._enter(following)
            return
        self._sleep(now)

    def _enter(self, step: str) -> None:
        self._step = step
        self._step_since_s = time.monotonic()
        self._note(step)

    def _sleep(self, now: float) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        poll.register(self._kernel.fileno(), select.POLLIN)
        for worker in (self.worker, self.standby, *self._dying):
            for descriptor in worker.descriptors() if worker is not None else ():
                poll.register(descriptor, select.POLLIN)
        for helper in (self._helper, self._resolver):
            if helper is not None and helper.pidfd >= 0:
                poll.register(helper.pidfd, select.POLLIN)
        until = now + _TICK_S
        if self._notifier.watchdog_s is not None:
            until = min(until, self._told_s + self._notifier.watchdog_s / 3)
        for due, missing in ((self._worker_due_s, self.worker), (self._standby_due_s, self.standby)):
            if missing is None and due > now and self._step != "provision":
                until = min(until, due)
        poll.poll(max(0.0, until - time.monotonic()) * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 64)
        if self._notifier.watchdog_s is not None and time.monotonic() >= self._told_s + self._notifier.watchdog_s / 3:
            self._told_s = time.monotonic()
            self._notifier.tell("WATCHDOG=1")

    # Steps: each says which one is next

    def _provision(self, now: float) -> str:
        """A helper makes the backing file where it is missing and the configuration gives a size."""
        return self._await_helper(now, self._work.provision, done="attach")

    def _attach(self, now: float) -> str:
        return "warm_up" if self._linked_s is not None else "attach"

    def _warm_up(self, now: float) -> str:
        """The region and all memory of the keeper's in place, and a standby that needs none to take over."""
        if self._mapping is None and region.is_made(self._region):
            self._mapping = region.hold_in_memory(self._region)
            self._warm_up_memory()
        if self.standby is not None and self.standby.is_ready:
            return "swap_on"
        if now > self._step_since_s + _STANDBY_S:
            self._say("there is no standby yet; going on without it")
            return "swap_on"
        return "warm_up"

    def _swap_on(self, now: float) -> str:
        assert self.device is not None
        device = self.device
        if self._helper is None and self._work.is_swapped_on(device):
            return "watch"
        return self._await_helper(now, lambda: self._work.swap_on(device), done="watch")

    def _watch(self, now: float) -> str:
        if not self._told_ready:
            self._told_ready = True
            assert self.device is not None
            self._say(f"swap is on: {self.device.path}")
            self._notifier.tell("READY=1", f"STATUS=swap is on: {self.device.path}")
        self._look_for_server(now)
        if self._replace and self.standby is not None and self.standby.is_ready and self._linked_s is not None:
            self._replace = False
            assert self.worker is not None
            self._say(f"worker {self.worker.pid} makes way for {self.standby.pid}")
            self.worker.kill()
        return "watch"

    def _look_for_server(self, now: float) -> None:
        """A server that is away for long may have another address: a helper asks, and the standby goes there.

        docs/decisions/0012 says why not the worker itself.
        """
        if self._resolver is not None:
            if self._resolver.ended() is None:
                return
            self._resolver = None
            if address := self._work.resolved():
                self._address = address
                self._say(f"the server has the address {address} now")
                if self.worker is not None:
                    self.worker.kill()
        if self._linked_s is not None and self._mapping is not None and not self._work.is_server_away(self._mapping):
            self._resolve_due_s = None
        elif self._resolve_due_s is None:
            self._resolve_due_s = now + RESOLVE_AFTER_S
        elif now >= self._resolve_due_s:
            self._resolve_due_s = now + _RESOLVE_EVERY_S
            with contextlib.suppress(OSError):
                self._resolver = self._work.resolve()

    def _await_helper(self, now: float, start: Callable[[], Helper | None], *, done: str) -> str:
        """Start a helper and wait for its end, again and again while that may mend it. It speaks for itself."""
        if self._helper is None:
            if now < self._helper_due_s:
                return self._step
            self._helper = start()
            return done if self._helper is None else self._step
        status = self._helper.ended()
        if status is None:
            self._notifier.tell(_MORE_TIME)
            return self._step
        self._helper = None
        if status == 0:
            self._helper_failures, self._helper_due_s = 0, 0.0
            return done
        if status > 0 and status not in _TEMPORARY:
            raise _failed(self._step, status)
        self._helper_failures += 1
        self._helper_due_s = now + _pause_s(self._helper_failures)
        return self._step

    # The link

    def _keep_link(self, now: float) -> None:
        """See to it that a worker serves the kernel."""
        self._look_at_dead_links(now)
        if self.worker is not None:
            self.worker.look()
        if self.worker is not None and self.worker.has_ended():
            self._worker_ended(self.worker, now)
            self.worker = None
        if self.worker is None:
            if now < self._worker_due_s:
                return
            self.worker, self.standby = self.standby or self._start(), None
            if self.worker is None:
                self._worker_due_s = now + _pause_s(self._failures)
                self._failures += 1
                return
            self._forget_standby()  # before it has the word: none that has is ever handed to the next keeper
            self.worker.go(self._address)
        if self.worker.socket is not None and self.worker.greets():
            self._connect(self.worker, now)

    def _connect(self, worker: WorkerProcess, now: float) -> None:
        """Shake hands, and hand the socket to the kernel."""
        assert worker.socket is not None
        try:
            export = nbd_handshake.negotiate(worker.socket, timeout_s=HANDSHAKE_TIMEOUT_S)
        except NbdnfsError as error:
            self._give_up(worker, f"a worker's handshake: {error.message}")
            return
        if self.device is None:
            self.device = self._kernel.attach(worker.socket, export)
            self._records.write("device", self.device.name)
        else:
            try:
                self._kernel.reconnect(self.device, worker.socket)
            except NbdnfsError as error:
                self._refuse_if_detached()
                self._give_up(worker, f"{self.device.path}: {error.message}")
                return
        if not worker.is_kept_by_kernel():
            self._give_up(worker, f"{self.device.path} has not taken a worker's socket: its old link still lives")
            return
        self._linked_s = time.monotonic()
        self._suspect_s = None
        self._complaint = ""
        away = f", {(self._linked_s - self._lost_s) * 1000:.0f} ms after the last" if self._lost_s is not None else ""
        self._say(f"{self.device.path}: worker {worker.pid} serves{away}")
        self._record_worker(worker)  # a file needs memory: now there is some

    def _give_up(self, worker: WorkerProcess, reason: str) -> None:
        """Kill a worker that cannot serve, and say why."""
        self._complain(reason, reason)
        self._given_up = worker
        worker.kill()

    def _complain(self, kind: str, text: str) -> None:
        """Say what is wrong once, however often it is tried: until it is something else, or the link is there."""
        if kind != self._complaint:
            self._complaint = kind
            self._say(text)

    def _worker_ended(self, worker: WorkerProcess, now: float) -> None:
        status = worker.status
        if worker is not self._given_up:
            self._complain(f"ended{worker.how_it_ended}", f"worker {worker.pid} has ended{worker.how_it_ended}")
        if status == STOLEN_STATUS:
            raise self._lost()
        if self.device is None and status > 0 and status not in _TEMPORARY:
            raise _failed("worker", status)
        if self._linked_s is not None and now - self._linked_s >= _LASTED_S:
            self._failures = 0
        if self._linked_s is not None:
            self._lost_s = now
        self._linked_s = None
        self._worker_due_s = now + _pause_s(self._failures)
        self._failures += 1

    def _lost(self) -> OwnedError:
        """Another machine has the file, as the worker has said. What waits for the device fails, rather than for ever:
        no other worker can serve it."""
        if self.device is not None and self._work.is_swapped_on(self.device):  # else _undo does it
            with contextlib.suppress(NbdnfsError):
                self._kernel.disconnect(self.device)
        self._note(run_dir.LOST)
        return lost(self._records.name)

    def _refuse_if_detached(self) -> None:
        found = self._kernel.find()
        if found is None or self.device is None or found.index != self.device.index:
            path = self.device.path if self.device is not None else "the device"
            self.device = None
            raise UnavailableError(f"{path} has been detached by somebody else")

    def _look_at_dead_links(self, now: float) -> None:
        """LINK_DEAD for our device while its worker lives: that one sees an end of file and ends, or is stuck."""
        dead = self._kernel.dead_links()
        if self.worker is None or self._linked_s is None or self.device is None:
            return
        if self.device.index in dead and now - self._linked_s > 1.0:  # not the last worker's
            self._suspect_s = self._suspect_s or now
        if self._suspect_s is not None and now - self._suspect_s > _STUCK_S:
            self._say(f"worker {self.worker.pid} has lost its link and does not end: killing it")
            self._suspect_s = None
            self.worker.kill()

    # Standby

    def _keep_standby(self, now: float) -> None:
        """Have the next worker ready once this one serves: then there is memory, and time to read from a disk."""
        self._dying = [worker for worker in self._dying if not worker.has_ended()]
        if self._renew:
            self._renew, self._replace = False, True
            if self.standby is not None:  # it may be of an older version
                self._forget_standby()
                self.standby.kill()
                self._dying.append(self.standby)
                self.standby = None
        if self.standby is not None:
            self.standby.look()
            if self.standby.has_ended():
                if self._standby_failures == 0:
                    self._say(f"standby {self.standby.pid} has ended{self.standby.how_it_ended}")
                self._forget_standby()
                self.standby = None
                self._standby_due_s = now + _pause_s(self._standby_failures)
                self._standby_failures += 1
            elif self.standby.is_ready:
                self._standby_failures = 0
                self._park(self.standby)
        if self.standby is None and self._linked_s is not None and now >= self._standby_due_s:
            self.standby = self._start()
            if self.standby is None:
                self._standby_due_s = now + _pause_s(self._standby_failures)
                self._standby_failures += 1

    def _park(self, standby: WorkerProcess) -> None:
        """Have systemd keep it for the next keeper, if this one is killed; the store drops one that ends."""
        if not self._is_standby_parked and self._notifier.is_heard:
            with contextlib.suppress(OSError):  # no memory just now, or it has ended: at the next turn
                if not standby.is_packed:
                    # first, for `down`: some versions of systemd keep the store when the unit has stopped
                    self._records.write_process(run_dir.STANDBY, standby.pid, __version__)
                self._is_standby_parked = self._notifier.store(_STANDBY, standby.pack(), until_hang_up=True)

    def _forget_standby(self) -> None:
        """Nobody waits for systemd's doing it; it takes what is told before it takes notice of the teller's end."""
        if self._is_standby_parked:
            self._is_standby_parked = False
            self._notifier.forget(_STANDBY)

    def _start(self) -> WorkerProcess | None:
        try:
            return self._work.start_worker(self._region)
        except OSError as error:
            self._complain("start", f"cannot start a worker: {error.strerror}")
            return None

    # What an earlier keeper left

    def _take_region(self, stored: dict[str, int]) -> int:
        """The region of a device that is attached, or a new one."""
        if self.device is None:
            # what is parked belongs to a device that is no more
            for descriptor in stored.values():
                os.close(descriptor)
            descriptor = region.create()
            self._notifier.store(_REGION, descriptor)
            return descriptor
        if _REGION in stored:
            return stored[_REGION]
        record = self._records.living(run_dir.WORKER)
        found = region.take_from(record.pid) if record is not None else None
        if found is not None:
            self._notifier.store(_REGION, found)
            return found
        raise BusyError(
            f"{self.device.path} is attached, but the memory that its last worker wrote to is gone",
            "pages may be missing on the NAS: end what uses the device, then nbdnfs down"
            f" {self._records.name}; swapped-out programs cannot be saved",
        )

    def _take_standby(self, parked: int) -> None:
        """Have the last keeper's standby; let go of one of another version, or of a region that is no more."""
        standby = self._work.take_worker(parked)
        if standby is not None and self.device is not None and region.is_held_by(self._region, standby.pid):
            self.standby = standby
            self._is_standby_parked = True
            self._say(f"standby {standby.pid} waits, and goes on")
            return
        self._notifier.forget(_STANDBY)
        if standby is not None:
            standby.kill()
            standby.close()

    def _adopt(self) -> None:
        """Take over the worker that serves our device, if it lives."""
        if self.device is None:
            return
        record = self._records.living(run_dir.WORKER)
        pid = record.pid if record is not None else region.holder(self._region, PROCESS_NAME)
        worker = WorkerProcess.adopt(pid) if pid is not None else None
        # only now that it is held by a descriptor is it certain that the pid still means the same process
        if worker is not None and region.is_held_by(self._region, worker.pid):
            self.worker, self._linked_s = worker, time.monotonic()
            self._say(f"{self.device.path}: worker {worker.pid} serves, and goes on")
            self._replace = record is None or record.version != __version__

    def _record_worker(self, worker: WorkerProcess) -> None:
        try:
            self._records.write_process(run_dir.WORKER, worker.pid, __version__)
        except OSError as error:  # it has ended, or /run is full: then a next keeper starts another
            self._say(f"no record of worker {worker.pid}: {error.strerror or error}")

    def _undo(self) -> None:
        """After an error: take down what nobody swaps to; leave what is in use."""
        device = self.device
        if device is not None and self._work.is_swapped_on(device):
            return
        if device is not None:
            with contextlib.suppress(NbdnfsError):
                self._kernel.disconnect(device)
        if self.worker is not None:
            self.worker.kill()
        self._notifier.forget(_REGION)
        self._notifier.forget(_STANDBY)
        self._records.remove()

    # The world

    def _take_signals(self) -> dict[int, signal._HANDLER]:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = signal.Signals(number).name

        def replace(number: int, frame: FrameType | None) -> None:
            self._say("SIGHUP: a new worker is to take over")
            self._renew = True

        before: dict[int, signal._HANDLER] = {
            int(number): signal.signal(number, handler)
            for number, handler in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, replace))
        }
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        return before

    def _note(self, state: str) -> None:
        """For `status`, and systemd's."""
        with contextlib.suppress(OSError):
            self._records.write(run_dir.STATE, state)
        self._notifier.tell(f"STATUS={state}")

    def _say(self, text: str) -> None:
        """One line in the journal. It does not wait for the journal, which may wait for swap."""
        with contextlib.suppress(OSError):
            os.write(2, f"nbdnfs: {self._records.name}: {text}\n".encode())


def _pause_s(failures: int) -> float:
    return PAUSES_S[min(failures, len(PAUSES_S) - 1)]


def lost(name: str) -> OwnedError:
    """The error of a device whose file another machine has taken. While it is in use as swap it stays, and is dead."""
    return OwnedError(
        f"{name}: the backing file is another machine's: swap has ended here",
        "what was swapped out is lost: start this machine anew",
    )


def _failed(what: str, status: int) -> NbdnfsError:
    """Something else has said what is wrong, on the same stderr: this adds its exit status and no more."""
    error = NbdnfsError(f"{what.replace('_', ' ')} failed, see above")
    error.exit_code = status
    return error
