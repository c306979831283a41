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
import socket
import sys
import time
from collections.abc import Callable

from nbdnfs import config, programs
from nbdnfs.commands import progress, systemd_unit
from nbdnfs.errors import BusyError, NbdnfsError, NoInputError, PermissionDeniedError, UnavailableError
from nbdnfs.keeper import hibernation
from nbdnfs.keeper.records import ProcessRecord, Records
from nbdnfs.kernel import nbd_device, swap_area
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.nbd_netlink import NbdNetlink
from nbdnfs.kernel.state import Swap
from nbdnfs.kernel.waiting import wait_until

UP_TIMEOUT_S = 600.0
# The keeper ends at once when it is asked to; a worker ends when the kernel disconnects.
_PROCESS_ENDS_S = 10.0
# How long other services may take, at shutdown, to end and so give memory back; systemd kills them after 90 s.
_SERVICES_END_S = 100.0
_POLL_S = 0.05

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


def up(name: str, *, steal: bool = False, timeout_s: float = UP_TIMEOUT_S) -> None:
    """Start the keeper of the device `name`, and return when swap is on.

    `steal` takes the file from another machine first, in this process: the keeper then finds that it owns the file.
    `timeout_s` bounds the wait where systemd does not run.

    PermissionDeniedError: not root. BusyError: the device is up. UnavailableError: it did not come up, with the exit
    status of the keeper, which has reported why. Others as `config.load`, and with `steal` as `ownership.claim`.
    """
    settings = config.load(name)
    _require_root(f"nbdnfs up {name}")
    if steal and settings.owner:
        from nbdnfs.commands import claiming
        from nbdnfs.nas import owner_record, ownership  # only here: it loads libnfs

        holder, me = owner_record.keeper_holder(name), owner_record.identity()
        claiming.run_until_signal(lambda stop: ownership.claim(settings.url, holder, me, steal=True, stop=stop))
    if systemd_unit.is_loaded(name):
        systemd_unit.start(name)
        return
    if (keeper := Records(name).living(Records.KEEPER)) is not None:
        raise BusyError(f"{name} is already up: its keeper is process {keeper.pid}", f"see: nbdnfs status {name}")
    _start_in_background(name, timeout_s)


def down(name: str, report: Progress, *, service: bool = False) -> None:
    """Turn swap off, and take down the device, its keeper and its worker. A second call does what is left to do.

    `service`: the caller is ExecStop= of the unit. Then nothing happens unless the unit is to stop for good. Needs no
    configuration.

    UsageError: no device can have this name. PermissionDeniedError: not root. NoInputError: the device is not up.
    BusyError: what is swapped out does not fit into memory; nothing has been changed. UnavailableError: something does
    not end. Others as `swap_area.disable`.
    """
    config.check_name(name)
    _require_root(f"nbdnfs down {name}")
    if service and systemd_unit.job(name) != "stop":
        print(f"nbdnfs: {name}: restarting, swap stays on", file=sys.stderr)
        return
    records = Records(name)
    attached = nbd_device.find(nbd_device.backend_of(name))
    if attached is None and not records.path.exists():
        if not service:
            raise NoInputError(f"the device '{name}' is not up", "there is nothing to do; see nbdnfs status")
        return
    try:
        if attached is not None and (swap := swap_area.find(attached.path)) is not None:
            if service and systemd_unit.is_shutting_down():
                _wait_for_room(swap)
            elif _must_fit(name):
                swap_area.refuse_unless_it_fits(swap)
            swap_area.disable(swap, report)
    except NbdnfsError:
        if service:
            systemd_unit.start_after_stop(name)
        raise
    if not service and systemd_unit.is_active(name):
        systemd_unit.stop(name)  # its ExecStop= is this very function, which does the rest
        return
    _take_down(records, attached)


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


def _take_down(records: Records, attached: Attached | None) -> None:
    """End keeper, device, worker, standby and records, in this order: so nothing is started again in between."""
    _end(records.living(Records.KEEPER), signal.SIGTERM, "the keeper")
    if attached is not None:
        with NbdNetlink.open() as kernel:
            kernel.disconnect(attached.index)
        if not wait_until(lambda: nbd_device.find(nbd_device.backend_of(records.name)) is None, _PROCESS_ENDS_S):
            raise UnavailableError(
                f"{attached.path} is disconnected but still in use: a process has it open",
                "end that process, then run this again",
            )
    worker = records.living(Records.WORKER)
    with contextlib.suppress(UnavailableError):
        _end(worker, 0, "the worker")  # by itself, because the kernel has disconnected
        worker = None
    _end(worker, signal.SIGKILL, "the worker")
    _end(records.living(Records.STANDBY), signal.SIGKILL, "the standby")  # a parked one may outlive its keeper
    hibernation.permit(records.name)
    _release_file(records)
    records.remove()


def _release_file(records: Records) -> None:
    """Let any machine have the file. An error is reported and ignored: this machine may be shutting down.

    URL and address come from the records, so that no configuration is needed.
    """
    text, _, address = (records.read(Records.ADDRESS) or "").partition("\n")
    if not address:
        return
    from nbdnfs.nas import owner_record, ownership  # only here: it loads libnfs

    try:
        holder = owner_record.keeper_holder(records.name)
        ownership.release(text, holder, owner_record.identity(), address=address)
    except NbdnfsError as error:
        print(f"nbdnfs: {records.name}: the owner record stays: {error.message}", file=sys.stderr)


def _end(record: ProcessRecord | None, number: int, what: str) -> None:
    """Send the signal `number` (0: none) and wait for the process to end. UnavailableError when it does not."""
    if record is None:
        return
    try:
        descriptor = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if not record.is_alive():
            return
        if number:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(_PROCESS_ENDS_S * 1000):
            raise UnavailableError(f"{what} (process {record.pid}) does not end", "see its journal")
    finally:
        os.close(descriptor)


def _must_fit(name: str) -> bool:
    """The configuration's reclaim_check; True without a valid configuration."""
    try:
        return config.load(name).reclaim_check
    except NbdnfsError:
        return True


def _start_in_background(name: str, timeout_s: float) -> None:
    """Start a keeper in a session of its own, and wait until it is ready as systemd would: sd_notify(3)."""
    address = f"nbdnfs-up-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind("\0" + address)
        keeper = programs.start(
            [sys.executable, "-m", "nbdnfs", "run", name], {**os.environ, "NOTIFY_SOCKET": f"@{address}"}
        )
        notifications.settimeout(_POLL_S)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                message = notifications.recv(4096)
            except TimeoutError:
                message = b""
            if b"READY=1" in message.split(b"\n"):
                return
            if (status := keeper.poll()) is not None:
                error = UnavailableError(f"{name} did not come up, see above")
                error.exit_code = status if status > 0 else error.exit_code
                raise error
        keeper.terminate()
        raise UnavailableError(f"{name} is not up after {timeout_s:g} s", f"see its messages: nbdnfs run {name}")


def _require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise PermissionDeniedError("only root can do that", f"sudo {command}")
