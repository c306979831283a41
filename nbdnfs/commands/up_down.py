# SPDX-License-Identifier: LGPL-2.1-or-later
"""`up` and `down`: from outside of the keeper, with systemd where it runs. docs/decisions/0005 says what stops what."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nbdnfs import config, programs
from nbdnfs.errors import BusyError, NbdnfsError, NoInputError, PermissionDeniedError, UnavailableError
from nbdnfs.keeper.records import ProcessRecord, Records
from nbdnfs.kernel import nbd_device, swap_area
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.nbd_netlink import NbdNetlink
from nbdnfs.kernel.state import Swap
from nbdnfs.nas import owner_record, ownership

log = logging.getLogger(__name__)

UP_TIMEOUT_S = 600.0
# The keeper hands over at once; a worker ends when the kernel hangs up.
_ENDS_S = 10.0
# How long services that are being stopped may take to give memory back; systemd kills them after 90 s.
_OTHERS_END_S = 100.0
_POLL_S = 0.05

Progress = Callable[[int, int], None]


def unit_of(name: str) -> str:
    """The unit's name; '-' and '.' stand for themselves in an instance's name, systemd.unit(5)."""
    return f"nbdnfs@{name}.service"


def up(name: str, *, steal: bool = False, timeout_s: float = UP_TIMEOUT_S) -> None:
    """Start the keeper of `name` and return when swap is on.

    `steal` takes the file from another machine first, here and now: the keeper, whoever starts it, then finds it ours.
    UnavailableError: not within `timeout_s`. Others as the keeper's own; it has said what they are about.
    """
    settings = config.load(name)
    _need_root(f"nbdnfs up {name}")
    if steal and settings.owner:
        ownership.claim(settings.url, owner_record.keeper_holder(name), owner_record.identity(), steal=True)
    if _systemd_has(name):
        if programs.status([_systemctl(), "start", unit_of(name)]) != 0:
            raise UnavailableError(f"{unit_of(name)} did not start", f"see why: journalctl -u {unit_of(name)}")
        return
    records = Records(name)
    if (keeper := records.living(Records.KEEPER)) is not None:
        raise BusyError(f"{name} is up already: process {keeper.pid} keeps it", f"see nbdnfs status {name}")
    _start_in_background(name, timeout_s)


def down(name: str, progress: Progress, *, service: bool = False) -> None:
    """Swap off, device and worker gone. May be run again; does what is left to do.

    With `service` it is systemd's ExecStop=: it does so only when the unit is to stop for good. Works without a
    configuration. BusyError: what is swapped out has no room; nothing has been changed then.
    """
    config.check_name(name)
    _need_root(f"nbdnfs down {name}")
    if service and _job_of(name) != "stop":
        print(f"nbdnfs: {name}: restarting: swap stays on", file=sys.stderr)
        return
    records = Records(name)
    attached = nbd_device.find(nbd_device.backend_of(name))
    if attached is None and not records.path.exists():
        if not service:
            raise NoInputError(f"{name} is not up", "there is nothing to do; see nbdnfs status")
        return
    try:
        if attached is not None and (swap := swap_area.find(attached.path)) is not None:
            if service and _machine_goes_down():
                _wait_for_room(swap)
            elif _must_fit(name):
                swap_area.refuse_unless_it_fits(swap)
            swap_area.disable(swap, progress)
    except NbdnfsError:
        if service:
            _come_back(name)
        raise
    if not service and _unit_is_active(name):
        # what is left is done by this very function, as ExecStop=
        if programs.status([_systemctl(), "stop", unit_of(name)]) != 0:
            raise UnavailableError(f"{unit_of(name)} did not stop", f"see why: journalctl -u {unit_of(name)}")
        return
    _take_down(records, attached)


def _wait_for_room(swap: Swap) -> None:
    """At shutdown, services end beside us, and what they had swapped out goes with them: give them time.

    Not for ever: afterwards swapoff is tried all the same. This is the last moment when the network is certain.
    """
    deadline = time.monotonic() + _OTHERS_END_S
    while (now := swap_area.find(swap.path.removesuffix(" (deleted)"))) is not None:
        try:
            return swap_area.refuse_unless_it_fits(now)
        except BusyError as error:
            if time.monotonic() > deadline:
                print(f"nbdnfs: {error.message}; trying it all the same", file=sys.stderr)
                return None
        time.sleep(_POLL_S)
    return None


def _take_down(records: Records, attached: Attached | None) -> None:
    """Keeper, device, worker, standby, records, in this order: nothing is started again in between."""
    _end(records.living(Records.KEEPER), signal.SIGTERM, "the keeper")
    if attached is not None:
        with NbdNetlink.open() as kernel:
            kernel.disconnect(attached.index)
        _wait(
            lambda: nbd_device.find(nbd_device.backend_of(records.name)) is None,
            f"{attached.path} is disconnected, but does not go: somebody has it open",
        )
    worker = records.living(Records.WORKER)
    with contextlib.suppress(UnavailableError):
        _end(worker, 0, "the worker")  # by itself: the kernel has hung up
        worker = None
    _end(worker, signal.SIGKILL, "the worker")
    _end(records.living(Records.STANDBY), signal.SIGKILL, "the standby")  # a parked one may outlive its keeper
    _give_up(records)
    records.remove()


def _give_up(records: Records) -> None:
    """Let any machine have the file. What goes wrong is said, and no reason not to go on: this machine may go down.

    Of the records, so that no configuration is needed: the URL as the worker had it, and the server's address.
    """
    text, _, address = (records.read(Records.ADDRESS) or "").partition("\n")
    if not address:
        return
    try:
        holder = owner_record.keeper_holder(records.name)
        ownership.release(text.replace("%", "%%"), holder, owner_record.identity(), address=address)
    except NbdnfsError as error:
        print(f"nbdnfs: {records.name}: the owner record stays: {error.message}", file=sys.stderr)


def _end(record: ProcessRecord | None, number: int, what: str) -> None:
    """Send a signal (0: none) and wait for the process to end. UnavailableError when it does not."""
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
        if not poll.poll(_ENDS_S * 1000):
            raise UnavailableError(f"{what} (process {record.pid}) does not end", "see its journal")
    finally:
        os.close(descriptor)


def _wait(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + _ENDS_S
    while not condition():
        if time.monotonic() > deadline:
            raise UnavailableError(complaint, "it goes when that ends")
        time.sleep(_POLL_S)


def _must_fit(name: str) -> bool:
    """The configuration's reclaim_check; yes when there is none, or it is wrong."""
    try:
        return config.load(name).reclaim_check
    except NbdnfsError:
        return True


# systemd


def _systemd_runs(root: Path = Path("/")) -> bool:
    """sd_booted(3)."""
    return (root / "run/systemd/system").is_dir()


def _systemctl() -> str:
    return programs.find_program("systemctl", "systemd")


def _systemd_has(name: str) -> bool:
    return _systemd_runs() and _property(name, "LoadState") == "loaded"


def _unit_is_active(name: str) -> bool:
    return _systemd_runs() and _property(name, "ActiveState") in ("active", "activating", "reloading")


def _property(name: str, key: str) -> str:
    shown = programs.run([_systemctl(), "show", "--value", f"--property={key}", unit_of(name)], what="asking systemd")
    return shown.strip()


def _job_of(name: str) -> str:
    """What systemd is about to do with the unit: "stop", "restart", "start"; "" for nothing, or not to be known."""
    if not _systemd_runs():
        return ""
    jobs = programs.run([_systemctl(), "list-jobs", "--no-legend", "--plain"], what="asking systemd for its jobs")
    for line in jobs.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[1] == unit_of(name):
            return fields[2]
    return ""


def _machine_goes_down() -> bool:
    """Whether systemd is on its way to power-off, reboot or the like."""
    return programs.output([_systemctl(), "is-system-running"]).strip() == "stopping"


def _come_back(name: str) -> None:
    """Have systemd start the keeper again once it has stopped it. Turned away at shutdown, and rightly so."""
    print(f"nbdnfs: {name}: swap stays on, and the keeper comes back to it", file=sys.stderr)
    with contextlib.suppress(NbdnfsError):
        programs.run([_systemctl(), "--no-block", "start", unit_of(name)], what="asking systemd for a start")


def _start_in_background(name: str, timeout_s: float) -> None:
    """A keeper in a session of its own, whose readiness is awaited as systemd does it: sd_notify(3)."""
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


def _need_root(command: str) -> None:
    if os.geteuid() != 0:
        raise PermissionDeniedError("only root can do that", f"sudo {command}")
