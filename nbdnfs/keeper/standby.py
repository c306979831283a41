# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next worker, ready before it is needed, parked with systemd for the next keeper. docs/decisions/0006 and 0014."""

from __future__ import annotations

import contextlib
import functools

from nbdnfs import __version__, region
from nbdnfs.keeper import events
from nbdnfs.keeper.failures import patiently, pause_s

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from nbdnfs.keeper.interfaces import Work
    from nbdnfs.keeper.records import Records
    from nbdnfs.keeper.reporter import Reporter
    from nbdnfs.keeper.sd_notify import Notifier
    from nbdnfs.keeper.worker_handle import WorkerHandle

# Its name in systemd's store.
STORED_NAME = "standby"


class Standby:
    """At most one standby. Used by the keeper's loop alone.

    worker     the standby; None while there is none
    is_parked  whether systemd has been sent it
    """

    def __init__(
        self, work: Work, records: Records, notifier: Notifier, reporter: Reporter, stored: dict[str, int]
    ) -> None:
        """Takes the parked standby of an earlier keeper out of `stored`; see `take_over`."""
        self.worker: WorkerHandle | None = None
        self.is_parked = False
        self._work = work
        self._records = records
        self._notifier = notifier
        self._reporter = reporter
        self._stored = stored.pop(STORED_NAME, None)
        self._dying: list[WorkerHandle] = []
        self._failures = 0
        self._due_s = 0.0
        self._region = -1

    @property
    def is_ready(self) -> bool:
        return self.worker is not None and self.worker.is_ready

    @property
    def workers(self) -> list[WorkerHandle]:
        """Those whose descriptors are to be polled: the standby, and former ones that have not ended yet."""
        return [self.worker, *self._dying] if self.worker is not None else self._dying

    @property
    def due_s(self) -> float | None:
        """When the next one may be started (time.monotonic()); None while there is one."""
        return self._due_s if self.worker is None else None

    def take_over(self, region_fd: int, *, is_attached: bool) -> None:
        """Have the last keeper's standby where there is one; end it where it has another version or another region.

        OSError: whether there is one is not known. It waits, and stays parked.

        region_fd    the region of this keeper's workers from here on; stays the caller's
        is_attached  whether there is a device that it could serve
        """
        self._region = region_fd
        if self._stored is None:
            return
        worker = patiently(functools.partial(self._work.take_worker, self._stored))
        is_ours = False
        if worker is not None and is_attached:
            is_ours = patiently(functools.partial(region.is_held_by, region_fd, worker.pid))
        if worker is not None and is_ours:
            self.worker = worker
            self.is_parked = True
            text = f"standby {worker.pid} of the previous keeper is ready: taking it over"
            self._reporter.say(text, events.STANDBY_ADOPTED, pid=worker.pid)
            return
        self._notifier.remove(STORED_NAME)
        if worker is not None:
            worker.kill()
            worker.close()

    def keep(self, now: float, *, may_start: bool) -> None:
        """Have one ready and parked. `may_start`: a worker serves, so there is memory, and time to read from a disk."""
        self._dying = [worker for worker in self._dying if not worker.has_ended()]
        if self.worker is not None:
            is_ready = self.worker.check_ready()
            if self.worker.has_ended():
                if self.worker.start_error:
                    self._reporter.complain("start", f"cannot start a worker: {self.worker.start_error}")
                elif self._failures == 0:
                    text = f"standby {self.worker.pid} has ended{self.worker.how_it_ended}"
                    self._reporter.say(text, events.STANDBY_ENDED, pid=self.worker.pid, status=self.worker.status)
                self.unpark()
                self.worker = None
                self._fail(now)
            elif is_ready:
                self._failures = 0
                self._park(self.worker)
        if self.worker is None and may_start and now >= self._due_s:
            self.worker = self._start()
            if self.worker is None:
                self._fail(now)

    def take(self) -> WorkerHandle | None:
        """The standby, which is this object's no more, or else a new one; None when none can be started now.

        It is unparked before it can be activated: no activated one is ever handed to the next keeper.
        """
        worker, self.worker = self.worker or self._start(), None
        self.unpark()
        return worker

    def discard(self) -> None:
        """End it: it may be of an older version. `keep` starts another one."""
        self.unpark()
        if self.worker is not None:
            self.worker.kill()
            self._dying.append(self.worker)
            self.worker = None

    def unpark(self) -> None:
        """Have systemd close it. Not waited for: systemd reads a message before it notices the end of its sender."""
        if self.is_parked:
            self.is_parked = False
            self._notifier.remove(STORED_NAME)

    def close(self) -> None:
        """Close all descriptors: a standby that is not parked exits because of that."""
        for worker in self.workers:
            worker.close()

    def _park(self, worker: WorkerHandle) -> None:
        """Have systemd keep it for the next keeper, in case this one is killed; systemd drops one that ends."""
        if not self.is_parked and self._notifier.is_enabled:
            with contextlib.suppress(OSError):  # no memory just now, or it has ended: at the next turn
                # first, for `down`: some versions of systemd keep the store when the unit has stopped
                if not worker.is_parkable and not self._records.put_process(
                    self._records.STANDBY, worker.pid, __version__
                ):
                    return  # it has ended, or /proc cannot be read just now: at the next turn
                self.is_parked = self._notifier.store(STORED_NAME, worker.make_parkable(), until_hang_up=True)

    def _start(self) -> WorkerHandle | None:
        try:
            return self._work.start_worker(self._region)
        except OSError as error:
            self._reporter.complain("start", f"cannot start a worker: {error.strerror}")
            return None

    def _fail(self, now: float) -> None:
        self._due_s = now + pause_s(self._failures)
        self._failures += 1
