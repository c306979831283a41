# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs up` and `nbdnfs down`: start and stop a device from outside its keeper, through systemd where it runs.

docs/decisions/0005 says which process stops what.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from nbdnfs import config, name_lock, programs
from nbdnfs.commands import progress, starting, systemd_unit
from nbdnfs.config import Config
from nbdnfs.errors import (
    BusyError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
    UnavailableError,
    UnreadableError,
)
from nbdnfs.keeper import failures, hibernation, last_good, only_keeper
from nbdnfs.keeper.records import ProcessRecord, Records
from nbdnfs.kernel import device_in_use, nbd_device, openers, swap_area
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.nbd_netlink import NbdNetlink
from nbdnfs.kernel.state import Swap
from nbdnfs.kernel.waiting import wait_until
from nbdnfs.proc_stat import start_time_ticks

# How long `up` waits without systemd; the start goes on. As nbdnfs-start-timeout@.service.
UP_TIMEOUT_S = 180.0
# The keeper ends at once when it is asked to; a worker ends when the kernel disconnects.
_PROCESS_ENDS_S = 10.0
# How long other services may take, at shutdown, to end and so give memory back; systemd kills them after 90 s.
_SERVICES_END_S = 100.0
_POLL_S = 0.05
# How long to wait for another `up` or `down` of the device. At shutdown systemd ends one by hand sooner or later.
_COMMAND_WAITS_S = 2.0
_SERVICE_WAITS_S = 600.0

# Called with the bytes that are still swapped out, and with those at the start.
Progress = Callable[[int, int], None]


def run_up(args: argparse.Namespace) -> int:
    """The exit status. Errors as `up`."""
    up(args.name, steal=args.steal)
    return 0


def run_down(args: argparse.Namespace) -> int:
    """The exit status. Errors as `down`."""
    show = progress.reporter()
    down(args.name, lambda left_bytes, total_bytes: show(total_bytes - left_bytes, total_bytes), service=args.service)
    return 0


@contextlib.contextmanager
def _system_umask() -> Iterator[None]:
    """Whatever is made in /run meanwhile may be read by other users, whose `status` needs it."""
    before = os.umask(programs.SYSTEM_UMASK)
    try:
        yield
    finally:
        os.umask(before)


@_system_umask()
def up(name: str, *, steal: bool = False, timeout_s: float = UP_TIMEOUT_S) -> None:
    """Start the keeper of the device `name`, and return when swap is on.

    `steal` takes the file from another machine first, in this process: the keeper then finds that it owns the file. Not
    for a device that is attached, which has its file. `timeout_s` bounds the wait where systemd does not run.

    A device that is up, and whose swap was turned off by hand, swaps again. One that is attached, and whose
    configuration file is wrong or missing, runs with the last good one, as its keeper does; a line says so.

    PermissionDeniedError: not root. BusyError: the device is up, or something other than swap uses it.
    UnavailableError: it did not come up, with the exit status of the keeper, which has reported why; EX_TEMPFAIL where
    the start goes on. OwnedError: with `steal`, the device is attached, and another machine has taken its file. Others
    as `last_good.load`, and with `steal` as `stealing.taken`.
    """
    config.check_name(name)
    records = Records(name)
    is_attached = nbd_device.find(nbd_device.backend_of(name)) is not None
    settings, problem = last_good.load(records, is_attached=is_attached)
    _require_root(f"nbdnfs up {name}")
    if problem:
        print(f"nbdnfs: {name}: {problem}", file=sys.stderr)
    if steal and is_attached and records.read(Records.STATE) == Records.STOLEN:
        raise failures.stolen(name)
    keeper = only_keeper.keeper_of(records)
    if keeper is not None and records.read(Records.STATE) == "watch" and _turn_on_again(settings):
        return
    has_unit = systemd_unit.is_loaded(name)
    if keeper is not None and not (has_unit and systemd_unit.is_active(name)):
        who = f"process {keeper}" if keeper else "another process"
        raise BusyError(f"{name} is already up: its keeper is {who}", f"see: nbdnfs status {name}")
    with _taken(settings, records) if steal and settings.owner and not is_attached else contextlib.nullcontext():
        if has_unit:
            starting.with_systemd(name)
        else:
            starting.in_background(name, timeout_s)
    _turn_on_again(settings)


def _taken(settings: Config, records: Records) -> AbstractContextManager[None]:
    from nbdnfs.commands import stealing  # loads what a worker is started with, for --steal alone

    return stealing.taken(settings, records)


def _turn_on_again(settings: Config) -> bool:
    """Swap to the attached device where a foreign swapoff(8) has turned that off. Whether there was anything to do.

    BusyError: something other than swap uses the device. Others as starting.turn_on_again.
    """
    attached = nbd_device.find(nbd_device.backend_of(settings.name))
    if attached is None or swap_area.find(attached.path) is not None:
        return False
    with _only_command(settings.name, wait_s=_COMMAND_WAITS_S):
        state = kernel_state.nbd_device(attached.name)
        if state is not None:
            device_in_use.refuse_if_in_use(state)
        starting.turn_on_again(settings, attached.path)
    return True


@_system_umask()
def down(name: str, report: Progress, *, service: bool = False) -> None:
    """Turn swap off, and take down the device, its keeper and its worker. A second call does what is left to do.

    `service`: the caller is ExecStop= of the unit. Then nothing happens unless the unit is to stop for good. Needs no
    configuration.

    UsageError: no device can have this name. PermissionDeniedError: not root. NoInputError: the device is not up.
    BusyError: what is swapped out does not fit into memory, or into its cgroup, something other than swap uses the
    device, or another command is at work. UnavailableError: something does not end, or /proc is not mounted. Others as
    `swap_area.disable`.
    """
    config.check_name(name)
    _require_root(f"nbdnfs down {name}")
    try:
        kernel_state.require_proc()  # without it, a device that is in use as swap looks as if it were not
        if service and systemd_unit.job(name) != "stop":
            print(f"nbdnfs: {name}: restarting, swap stays on", file=sys.stderr)
            return
        with _only_command(name, wait_s=_SERVICE_WAITS_S if service else _COMMAND_WAITS_S):
            is_for_unit = _stop(name, report, service=service)
    except NbdnfsError:
        if service:  # also where systemd does not say what it is about to do: at a restart, it starts it anyway
            systemd_unit.start_after_stop(name)
        raise
    if is_for_unit:
        systemd_unit.stop(name)  # its ExecStop= is this very function, which does the rest


def _stop(name: str, report: Progress, *, service: bool) -> bool:
    """`down` without its locks and its unit. True where the unit is to be stopped now, and swap is off."""
    records = Records(name)
    attached = nbd_device.find(nbd_device.backend_of(name))
    if attached is None and not records.path.exists():
        if not service:
            raise NoInputError(f"the device '{name}' is not up", "there is nothing to do; see nbdnfs status")
        return False
    is_for_unit = not service and systemd_unit.is_active(name)
    keeper = _keeper(records)
    ours = openers.descendants(keeper.pid) if keeper is not None else frozenset()
    if attached is not None:
        _turn_off(name, attached, report, ours, service=service)
    if not is_for_unit:
        _take_down(records, keeper, ours)
    return is_for_unit


def _turn_off(name: str, attached: Attached, report: Progress, ours: frozenset[int], *, service: bool) -> None:
    """swapoff of the device. BusyError, and nothing has been changed: there is no room, or something other than swap
    and the processes `ours` uses the device."""
    state = kernel_state.nbd_device(attached.name)
    if state is not None:
        device_in_use.refuse_other_uses(state, ours=ours)
    if (swap := swap_area.find(attached.path)) is None:
        return
    if service and systemd_unit.is_shutting_down():
        _wait_for_room(swap)
    elif _must_fit(name):
        swap_area.refuse_unless_it_fits(swap)
    swap_area.disable(swap, report)


def _wait_for_room(swap: Swap) -> None:
    """At shutdown, other services end at the same time, and what they had swapped out goes with them. Wait for that.

    Not for ever: after _SERVICES_END_S swapoff is tried without room. No later moment is certain to have a network.
    """
    deadline = time.monotonic() + _SERVICES_END_S
    while (now := swap_area.find(swap.path.removesuffix(" (deleted)"))) is not None:
        try:
            return swap_area.refuse_unless_it_fits(now)
        except BusyError as error:
            if time.monotonic() > deadline:
                print(f"nbdnfs: {error.message}; trying all the same", file=sys.stderr)
                return None
        time.sleep(_POLL_S)
    return None


def _take_down(records: Records, keeper: ProcessRecord | None, ours: frozenset[int]) -> None:
    """End keeper, device, worker, standby and records, in this order: so nothing is started again in between. `ours`:
    the keeper and its helpers, which may have the device open.

    BusyError: the device is in use, or there is another keeper. UnavailableError: something does not end.
    UnreadableError: whether it lives is not known.
    """
    _end(keeper, signal.SIGTERM, "the keeper")
    with _no_keeper(records):
        _disconnect(records.name, ours)
        worker = records.living(Records.WORKER)
        try:
            _end(worker, 0, "the worker")  # by itself, because the kernel has disconnected
            worker = None
        except UnreadableError:  # it has not been given its time
            raise
        except UnavailableError:
            pass
        _end(worker, signal.SIGKILL, "the worker")
        _end(records.living(Records.STANDBY), signal.SIGKILL, "the standby")  # a parked one may outlive its keeper
        hibernation.permit(records.name)
        _release_file(records)
        records.remove()


def _keeper(records: Records) -> ProcessRecord | None:
    """The keeper, which may not have got as far as its record."""
    record = records.living(Records.KEEPER)
    pid = only_keeper.keeper_of(records)
    if record is None and pid and (started := start_time_ticks(pid)) is not None:
        return ProcessRecord(pid, started, "")
    return record


@contextlib.contextmanager
def _no_keeper(records: Records) -> Iterator[None]:
    """The device has no keeper meanwhile, and gets none. BusyError: one has been started."""
    descriptor = only_keeper.become(records)
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def _only_command(name: str, *, wait_s: float) -> Iterator[None]:
    """No other `up` or `down` of the device meanwhile. BusyError after `wait_s` seconds."""
    try:
        descriptor = name_lock.take(name, name_lock.COMMAND, wait_s=wait_s)
    except OSError as error:
        print(f"nbdnfs: {name}: going on without a lock in /run/nbdnfs: {error.strerror}", file=sys.stderr)
        descriptor = -1
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _disconnect(name: str, ours: frozenset[int]) -> None:
    """Take the device down. Errors as `_take_down`."""
    attached = nbd_device.find(nbd_device.backend_of(name))
    if attached is None:
        return
    with NbdNetlink.open() as kernel:
        device_in_use.disconnect(kernel, attached.index, ours=ours)
    if not wait_until(lambda: nbd_device.find(nbd_device.backend_of(name)) is None, _PROCESS_ENDS_S):
        raise UnavailableError(
            f"{attached.path} is disconnected but still in use: a process has it open",
            "end that process, then run this again",
        )


def _release_file(records: Records) -> None:
    """Let any machine have the file. An error is reported and ignored: this machine may be shutting down.

    URL and address come from the records, so that no configuration is needed.
    """
    text, _, address = (records.read(Records.ADDRESS) or "").partition("\n")
    if not address:
        return
    try:
        from nbdnfs.nas import owner_record, ownership  # only here: it loads libnfs, which may be gone

        holder = owner_record.keeper_holder(records.name)
        ownership.release(text, holder, owner_record.identity(), address=address)
    except NbdnfsError as error:
        print(f"nbdnfs: {records.name}: the owner record stays: {error.message}", file=sys.stderr)


def _end(record: ProcessRecord | None, number: int, what: str) -> None:
    """Send the signal `number` (0: none) and wait for the process to end. UnavailableError when it does not."""
    if record is None:
        return
    try:
        descriptor = failures.patiently(lambda: os.pidfd_open(record.pid))
    except ProcessLookupError:
        return
    try:
        if not failures.patiently(record.is_alive):
            return
        if number:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(_PROCESS_ENDS_S * 1000):
            raise UnavailableError(
                f"{what} (process {record.pid}) does not end",
                f"see its journal; nothing is lost by kill -9 {record.pid}, after which this can go on",
            )
    finally:
        os.close(descriptor)


def _must_fit(name: str) -> bool:
    """The reclaim_check of the configuration, or of the last good one; True without either."""
    try:
        return last_good.load(Records(name), is_attached=True)[0].reclaim_check
    except NbdnfsError:
        return True


def _require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise PermissionDeniedError("only root can do that", f"sudo {command}")
