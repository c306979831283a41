# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper: keeps one swap device alive. Drawn and explained in docs/keeper.md.

Two state machines in one loop. The *steps* go one way: provision ▸ attach ▸ warm_up ▸ swap_on ▸ watch; each is a method
that returns the next one. From attach on, serving.py keeps a worker connected to the kernel, and standby.py keeps the
next worker ready.

The loop imports nothing, resolves nothing, and has no programs started but workers and helpers. It opens nothing on the
root file system, whose server may be away: docs/decisions/0027.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import time

from nbdnfs import __version__, region
from nbdnfs.errors import BusyError, NbdnfsError, OwnedError, UnreadableError
from nbdnfs.keeper import device_region, events, failures, silence
from nbdnfs.keeper.serving import Serving
from nbdnfs.keeper.silence import Silence
from nbdnfs.keeper.standby import STORED_NAME as _STORED_STANDBY
from nbdnfs.keeper.standby import Standby

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from types import FrameType

    from nbdnfs.keeper.heir import Heir
    from nbdnfs.keeper.helper_process import HelperProcess
    from nbdnfs.keeper.interfaces import Kernel, Work
    from nbdnfs.keeper.records import Records
    from nbdnfs.keeper.reporter import Reporter
    from nbdnfs.kernel.nbd_device import Attached

# How often the loop turns without events: the kernel's LINK_DEAD may get lost.
_TICK_S = 1.0
# Sent once a tick while a helper runs, so that the unit's TimeoutStartSec= does not run out.
_MORE_TIME = "EXTEND_TIMEOUT_USEC=60000000"
# How long the server has been away when its name is looked up again, and how often from then on.
RESOLVE_AFTER_S = 60.0
RESOLVE_EVERY_S = 300.0
# How often records are written again that could not be written.
_RECORDS_EVERY_S = 5.0
# How long the standby may hold up swapon. The first one is read from the disk.
_STANDBY_TIMEOUT_S = 60.0

_PUT_OFF = "the worker is replaced when the server is back"

# The region's name in systemd's store.
_STORED_REGION = "region"


class Keeper:
    """One device. Made, then `run` once; used by one thread."""

    def __init__(
        self,
        kernel: Kernel,
        work: Work,
        records: Records,
        reporter: Reporter,
        *,
        stored: dict[str, int],
        config_text: str = "",
        warm_up: Callable[[], None] = lambda: None,
        heir: Heir | None = None,
    ) -> None:
        """stored       what an earlier keeper had put into systemd's store: sd_notify.listen_fds()
        config_text  for the record CONFIG, once a worker serves
        warm_up      called once, when all is loaded, before swap is on: it touches what memory will be needed
        heir         kept from then on

        BusyError: the device is attached, and its region no longer exists.
        """
        self._work = work
        self._records = records
        self._notifier = notifier = reporter.notifier
        self._kernel = kernel
        self._config_text = config_text
        self._warm_up_memory = warm_up
        self._heir = heir
        self._reporter = reporter
        self.standby = Standby(work, records, notifier, reporter, stored)
        self.serving = Serving(kernel, work, records, reporter, self.standby)

        self._steps: dict[str, Callable[[float], str]] = {
            "provision": self._provision,
            "attach": self._attach,
            "warm_up": self._warm_up,
            "swap_on": self._swap_on,
            "watch": self._watch,
        }
        self._step = ""
        self._step_since_s = 0.0
        self._is_adopted = False  # whether an earlier keeper has attached the device
        self.is_swap_on = False
        self._swap_text = ""
        self._is_ready_told = False  # to systemd
        self._helper: HelperProcess | None = None
        self._helper_failures = 0
        self._helper_due_s = 0.0
        self._records_due_s = 0.0
        self._is_recorded = False
        self._resolver: HelperProcess | None = None
        self._resolve_due_s: float | None = None
        self._is_new_standby_wanted = False  # SIGHUP
        self._is_new_worker_wanted = False  # when there is a standby
        self._is_put_off = False  # a replacement, until the server is back
        self._is_forced = False  # it is not put off
        self._mapping: mmap.mmap | None = None
        self._watchdog_sent_s = 0.0
        self._root_status = ""  # of a root file system that does not answer
        self._silence = Silence(reporter)
        self._shown = ""  # as the unit's status

        self._stop: str | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._is_region_parked = False
        self._region = self._take_region(stored)
        device_region.record(records, self._region)
        self._park_region()
        self.standby.take_over(self._region, is_attached=self.serving.device is not None)

    # Life

    def run(self) -> int:
        """Until SIGTERM or SIGINT; the exit status. Raises NbdnfsError for what no further try can mend."""
        before = self._take_signals()
        self._record_itself()
        self._is_adopted = self.serving.device is not None
        failures.patiently(functools.partial(self.serving.adopt, self._region))
        try:
            self._enter("provision" if self.serving.device is None else "attach")
            while self._stop is None:
                self._turn()
            self._reporter.say(f"{self._stop}: the keeper exits, the device and its worker stay", events.HANDED_OVER)
            self._notifier.send("STOPPING=1", f"STATUS={self._stop}: handed over")
        except BaseException as error:
            if isinstance(error, OwnedError):  # there is nothing that a next keeper could go on with
                self.standby.discard()
            self._undo()
            raise
        finally:
            self._close()
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._wake_read)
            os.close(self._wake_write)
        return 0

    def _record_itself(self) -> None:
        self._is_recorded = self._records.put_process(self._records.KEEPER, os.getpid(), __version__)

    def _close(self) -> None:
        """A worker that the kernel has connected goes on, and so does a standby that is parked."""
        if self.serving.worker is not None:
            self.serving.worker.close()
        self.standby.close()
        if self._mapping is not None:
            self._mapping.close()
        os.close(self._region)
        for helper in (self._helper, self._resolver):
            if helper is not None:
                helper.terminate()

    def _turn(self) -> None:
        """Do what is due, and sleep until there is an event."""
        now = time.monotonic()
        try:
            following = self._do(now)
        except UnreadableError as error:
            self._reporter.complain("unreadable", f"{error.message}; trying again until it can")
            following = self._step
        if following != self._step:
            self._enter(following)
            return
        self._sleep(now)

    def _do(self, now: float) -> str:
        """What is due; the step to go on with. UnreadableError: something is not known, and is looked at again."""
        self._park_region()
        if self._step != "provision":
            self.serving.keep(now)
            self._look_whether_put_off()
            if self._is_new_standby_wanted and not self._is_put_off:
                self._is_new_standby_wanted, self._is_new_worker_wanted = False, True
                self.standby.discard()
            self.standby.keep(now, may_start=self.serving.is_connected)
            self._keep_heir(now)
            self._look_for_server(now)
        self._look_for_root(now)
        self._look_for_silence()
        if self.serving.is_connected and now >= self._records_due_s:
            self._records_due_s = now + _RECORDS_EVERY_S
            if not self._is_recorded:
                self._record_itself()
            self._records.retry()
        return self._steps[self._step](now)

    def _keep_heir(self, now: float) -> None:
        """Once memory is locked: it shares that."""
        serving, standby = self.serving, self.standby
        if self._heir is not None and self._mapping is not None and serving.device is not None:
            parked = standby.worker if standby.is_parked else None
            self._heir.keep(now, serving.device, serving.worker, parked, serving.address)

    def _enter(self, step: str) -> None:
        self._step = step
        self._step_since_s = time.monotonic()
        self._reporter.state(step)

    def _sleep(self, now: float) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        poll.register(self._kernel.fileno(), select.POLLIN)
        for worker in (self.serving.worker, *self.standby.workers):
            for descriptor in worker.descriptors() if worker is not None else ():
                poll.register(descriptor, select.POLLIN)
        for other in (self._helper, self._resolver, self._heir):
            for descriptor in other.descriptors() if other is not None else ():
                poll.register(descriptor, select.POLLIN)
        until = now + _TICK_S
        watchdog_s = self._notifier.watchdog_s
        if watchdog_s is not None:
            until = min(until, self._watchdog_sent_s + watchdog_s / 3)
        for due_s in (self.serving.due_s, self.standby.due_s):
            if due_s is not None and due_s > now and self._step != "provision":
                until = min(until, due_s)
        poll.poll(max(0.0, until - time.monotonic()) * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 64)
        if watchdog_s is not None and time.monotonic() >= self._watchdog_sent_s + watchdog_s / 3:
            self._watchdog_sent_s = time.monotonic()
            self._notifier.send("WATCHDOG=1")

    # Steps: each returns the next one

    def _provision(self, now: float) -> str:
        """A helper creates the backing file where it is missing and the configuration has a size, and claims it. It
        waits by itself for what a server's return ends."""
        return self._await_helper(now, self._work.provision, following="attach", on_server=True)

    def _attach(self, now: float) -> str:
        if not self.serving.is_connected:
            return "attach"
        if self._config_text:
            self._records.put(self._records.CONFIG, self._config_text)
        return "warm_up"

    def _warm_up(self, now: float) -> str:
        """The region and all of the keeper's memory are in place, and a standby is ready, which needs none."""
        if self._mapping is None and region.is_made(self._region):
            self._mapping = region.hold_in_memory(self._region)
            self._warm_up_memory()
        if self.standby.is_ready:
            return "swap_on"
        if now > self._step_since_s + _STANDBY_TIMEOUT_S:
            self._reporter.say("there is no standby yet; going on without it")
            return "swap_on"
        return "warm_up"

    def _swap_on(self, now: float) -> str:
        assert self.serving.device is not None
        device = self.serving.device
        if self._helper is None and (self._work.is_swapped_on(device) or self._other_use(device)):
            return "watch"
        return self._await_helper(now, lambda: self._work.swap_on(device), following="watch")

    def _other_use(self, device: Attached) -> str:
        """What else than swap has the device of an earlier keeper, such as dm-crypt; "" for nothing that is known."""
        if not self._is_adopted:
            return ""
        try:
            self._kernel.refuse_if_used(device)
        except BusyError as error:
            return error.message
        return ""

    def _watch(self, now: float) -> str:
        if not self.is_swap_on:
            device = self.serving.device
            assert device is not None
            self._swap_text = f"swap is on: {device.path}"
            if not self._work.is_swapped_on(device):
                self._swap_text = f"its own swap is off: {self._other_use(device)}"
            self.is_swap_on = True
            self._reporter.say(self._swap_text, events.SWAP_ON, device=device.path)
        if not self._is_ready_told and self._notifier.is_enabled:
            self._is_ready_told = self._notifier.send("READY=1")
        self._show_status()
        successor = self.standby.worker
        is_wanted = (self._is_new_worker_wanted or self.serving.is_outdated) and not self._is_put_off
        if is_wanted and successor is not None and successor.is_ready and self.serving.is_connected:
            self._is_new_worker_wanted = self.serving.is_outdated = False
            self.serving.replace(successor)
        return "watch"

    def _look_for_server(self, now: float) -> None:
        """A server that has been away for long may have another address: a helper looks it up, and the next worker
        connects to that. In each step that has a worker, since none goes on without one; `provision` has a helper that
        looks itself. docs/decisions/0012 says why the worker does not do this.
        """
        if self._resolver is not None:
            try:
                is_over = self._resolver.status() is not None
            except OSError:
                is_over = True
            self._reporter.pass_on(self._resolver.lines())
            if not is_over:
                return
            self._resolver = None
            if address := self._work.resolved():
                self.serving.address = address
                self._reporter.say(f"the server's address is now {address}", events.SERVER_MOVED, address=address)
                if self.serving.worker is not None:
                    self.serving.worker.kill()
        is_connected = self.serving.is_connected and self._mapping is not None
        if is_connected and self._mapping is not None and not self._work.is_server_away(self._mapping):
            self._resolve_due_s = None
        elif self._resolve_due_s is None:
            self._resolve_due_s = now + RESOLVE_AFTER_S
        elif now >= self._resolve_due_s:
            self._resolve_due_s = now + RESOLVE_EVERY_S
            with contextlib.suppress(OSError):
                self._resolver = self._work.resolve()

    def _look_whether_put_off(self) -> None:
        """No worker is replaced while the server is away, and no standby: its successor could not serve before the
        server is back. The kernel would have no socket meanwhile, and fails all requests when it has had none for long
        (nbd_settings.DEAD_CONN_TIMEOUT_S)."""
        is_wanted = self._is_new_standby_wanted or self._is_new_worker_wanted or self.serving.is_outdated
        self._is_forced = self._is_forced and is_wanted
        before = self._is_put_off
        self._is_put_off = is_wanted and not self._is_forced and self._is_server_away()
        if self._is_put_off and not before:
            self._reporter.say(f"the server is away: {_PUT_OFF}; a second SIGHUP replaces it now")

    def _is_server_away(self) -> bool:
        """Whether the worker that the kernel has waits for the server, connected to it or not."""
        if self._mapping is None or not self.serving.is_connected:
            return False
        return self._silence.is_on or self._work.is_server_away(self._mapping)

    def _look_for_silence(self) -> None:
        if self._mapping is not None and self.serving.is_connected:
            self._silence.look(*self._work.server_times(self._mapping), time.monotonic_ns() // 1_000_000)

    def _show_status(self) -> None:
        """What `systemctl status` has of a device that is watched; again where systemd did not take it."""
        text = self._root_status or (silence.STATUS if self._silence.is_on else self._swap_text)
        if self._is_put_off:
            text = f"{text}; {_PUT_OFF}"
        if text != self._shown and self._notifier.send(f"STATUS={text}"):
            self._shown = text

    def _look_for_root(self, now: float) -> None:
        """Report a root file system that does not answer: then no program starts. The loop goes on."""
        starting = (self.serving.worker, self.standby.worker, self._helper, self._resolver)
        is_silent = any(one is not None and one.is_late(now) for one in starting)
        if is_silent == bool(self._root_status):
            return
        text = "the root file system answers again"
        if is_silent:
            goes_on = "swap goes on" if self.serving.is_connected else "swap waits"
            text = f"the root file system does not answer, so no program starts: {goes_on} until it does"
        self._root_status = text if is_silent else ""
        self._reporter.say(text, events.ROOT_SILENT if is_silent else events.ROOT_ANSWERS)
        if self._step != "watch":
            self._notifier.send(f"STATUS={text}")

    def _await_helper(
        self, now: float, start: Callable[[], HelperProcess | None], *, following: str, on_server: bool = False
    ) -> str:
        """Start a helper and wait for its end; start it again while that may help, and show its error meanwhile.

        `on_server` as in failures.is_final.
        """
        if self._helper is None and now < self._helper_due_s:
            return self._step
        try:
            if self._helper is None:
                self._helper = start()
                return following if self._helper is None else self._step
            status = self._helper.status()
        except OSError as error:
            self._reporter.complain("helper", f"cannot start a helper: {error.strerror}")
            self._helper = None
            self._helper_failed(now)
            return self._step
        self._reporter.pass_on(self._helper.lines())
        if status is None:
            self._notifier.send(_MORE_TIME)
            self._show(self._work.progress())
            return self._step
        ended, self._helper = self._helper, None
        if status == 0:
            self._helper_failures, self._helper_due_s = 0, 0.0
            self._reporter.wait_for("")
            return following
        if failures.is_final(status, on_server=on_server):
            raise failures.failed(self._step, status, ended.last_lines)
        if on_server:
            self._reporter.wait_for(failures.waiting_for(status, ended.error_line))
        self._helper_failed(now)
        return self._step

    def _show(self, line: str) -> None:
        """What a helper that runs has to say, "" for nothing new: what it waits for, or how far it has got."""
        if line.startswith(failures.WAITING):
            self._reporter.wait_for(line.removeprefix(failures.WAITING))
        elif line:
            self._reporter.wait_for("")
            self._notifier.send(f"STATUS={line}")

    def _helper_failed(self, now: float) -> None:
        self._helper_failures += 1
        self._helper_due_s = now + failures.pause_s(self._helper_failures)

    # What an earlier keeper left

    def _take_region(self, stored: dict[str, int]) -> int:
        """The region of a device that is attached, or a new one. What else is stored is closed; `_park_region` puts
        this region in its place."""
        kept = stored.pop(_STORED_REGION, None)
        found = self._find_region(kept)
        self._is_region_parked = found == kept
        if kept is not None and found != kept:
            if self.serving.device is not None:
                self._reporter.say(f"{self.serving.device.path}: systemd has stored another region; it is dropped")
            region.forget_keys(kept)
            os.close(kept)
        for descriptor in stored.values():
            os.close(descriptor)
        return found

    def _find_region(self, stored: int | None) -> int:
        device = self.serving.device
        if device is None:
            return region.create()
        found = failures.patiently(functools.partial(device_region.find, self._records, stored))
        if found is not None:
            return found
        raise BusyError(
            f"{device.path} is attached, but its region no longer exists: no process has it",
            "pages may be missing on the NAS: end what uses the device, then nbdnfs down"
            f" {self._records.name}; swapped-out programs cannot be saved",
        )

    def _park_region(self) -> None:
        """Have systemd keep it for the next keeper: with this one and the worker, acknowledged pages would go."""
        if not self._is_region_parked and self._notifier.is_enabled:
            self._is_region_parked = self._notifier.store(_STORED_REGION, self._region)

    def _undo(self) -> None:
        """After an error: take down a device that is not in use. One that is stays, with its worker, its standby and
        its region, for the next keeper."""
        device = self.serving.device
        try:
            if device is None and self.serving.has_tried:  # it may have been attached, and the kernel's answer lost
                device = failures.patiently(self._kernel.find)
            if device is not None:
                self._take_down(device)
        except NbdnfsError as error:
            path = device.path if device is not None else "a device that may be there"
            self._reporter.say(f"{path} stays attached: {error.message}")
            return
        self.standby.discard()
        if self._heir is not None:
            self._heir.end()
        if self.serving.worker is not None:
            self.serving.worker.kill()
        region.forget_keys(self._region)
        self._notifier.remove(_STORED_REGION)
        self._notifier.remove(_STORED_STANDBY)
        self._records.remove(keep_said=True)

    def _take_down(self, device: Attached) -> None:
        failures.patiently(lambda: self._kernel.disconnect(device))

    # Signals

    def _take_signals(self) -> dict[int, signal._HANDLER]:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = signal.Signals(number).name

        def renew(number: int, frame: FrameType | None) -> None:
            self._reporter.say("SIGHUP: replacing the worker")
            self._is_forced = self._is_put_off  # asked for once more: the worker may be what is wrong
            self._is_new_standby_wanted = True

        before: dict[int, signal._HANDLER] = {
            int(number): signal.signal(number, handler)
            for number, handler in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, renew))
        }
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        return before
