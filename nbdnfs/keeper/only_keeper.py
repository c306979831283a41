# SPDX-License-Identifier: LGPL-2.1-or-later
"""One keeper for a device, and one device for a file, on this machine. docs/decisions/0022.

Two keepers of one device would each attach a device of their own to the same file, or replace each other's workers:
that loses pages. Another machine is kept away by the owner record (docs/decisions/0009).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from nbdnfs import name_lock, nfs_url
from nbdnfs.errors import BusyError, UnavailableError, UnreadableError, UsageError, is_of_want
from nbdnfs.keeper import failures, heir
from nbdnfs.keeper.records import Records
from nbdnfs.kernel import nbd_device

# A command may look for a moment, and a child that has not exec'ed yet may keep the lock of a keeper that was killed.
_WAIT_S = 2.0
_OTHERS_WAIT_S = 10.0
# An heir (0031) needs a second or two where the server answers. Where the server has another address, only a keeper
# finds that out.
_HEIR_WAIT_S = 60.0
_NFS_PORT = 2049


class OtherKeeperError(BusyError):
    """Another process is the keeper of the device."""


def become(records: Records) -> int:
    """Become the keeper of the device, for as long as the descriptor that this returns is open; -1 without a lock.

    OtherKeeperError: another process is, even one that is stopped, hangs, or cannot be seen from here.
    UnavailableError: the lock file cannot be made, and no device is attached that needs a keeper anyway.
    UnreadableError: there is no memory or descriptor to find out.
    """
    name = records.name
    descriptor = -1
    try:
        descriptor = failures.patiently(lambda: _take_lock(records))
    except OSError as error:
        text = f"cannot lock the device in {records.path.parent}: {error.strerror}"
        if is_of_want(error):  # there may be a lock, and another keeper that has it
            raise UnreadableError(text, "free memory, and try again") from None
        if failures.patiently(lambda: nbd_device.find(nbd_device.backend_of(name))) is None:
            raise UnavailableError(text, failures.room_in_run(error)) from None
        print(f"nbdnfs: {name}: {text}; going on for the device that is attached", file=sys.stderr)
    # one of a version that takes no lock
    record = failures.patiently(lambda: records.living(Records.KEEPER))
    if record is not None and record.pid != os.getpid():
        if descriptor >= 0:
            os.close(descriptor)
        raise _refusal(name, record.pid)
    return descriptor


def _take_lock(records: Records) -> int:
    """Where an heir has it, wait for that: it is about to connect a worker. One that waits for its server for longer
    than _HEIR_WAIT_S is ended. Errors as `become`."""
    until_s = time.monotonic() + _HEIR_WAIT_S
    waits_for = 0
    while True:
        try:
            return name_lock.take(records.name, name_lock.KEEPER, wait_s=_WAIT_S, root=records.root, run=records.run)
        except BusyError:
            pid = _holder(records)
            if pid is not None and not heir.is_heir(pid):
                raise _refusal(records.name, pid) from None
        if pid is not None and pid != waits_for:
            waits_for = pid
            print(f"nbdnfs: {records.name}: waiting for the heir of the last keeper, process {pid}", file=sys.stderr)
        elif pid is not None and time.monotonic() > until_s:
            heir.end(pid)


def _holder(records: Records) -> int | None:
    return name_lock.holder(records.name, name_lock.KEEPER, root=records.root, run=records.run)


def keeper_of(records: Records) -> int | None:
    """The process that is the keeper of the device; None when there is none. 0: one that cannot be seen from here."""
    pid = _holder(records)
    if pid is not None and not heir.is_heir(pid):
        return pid
    record = records.living(Records.KEEPER)  # of a version that takes no lock
    return record.pid if record is not None else None


def record_address(records: Records, text: str, address: str, *, is_attached: bool = False) -> None:
    """Record the file (its canonical URL, and the server's address), unless another device on this machine has it.

    BusyError names that one: its keeper lives, or its device is attached. OSError where nothing can be recorded. With
    `is_attached` this device is up already, and neither ends its keeper: that is reported.
    """
    try:
        _record_address(records, text, address)
    except (BusyError, OSError) as error:
        if not is_attached:
            raise
        print(f"nbdnfs: {records.name}: going on with the device that is attached: {error}", file=sys.stderr)
        records.put(Records.ADDRESS, f"{text}\n{address}")


def _record_address(records: Records, text: str, address: str) -> None:
    descriptor = name_lock.take_all(wait_s=_OTHERS_WAIT_S, root=records.root, run=records.run)
    try:
        for other in records.others():
            if has_file(other, text, address) and is_up(other):
                raise BusyError(
                    f"{nfs_url.parse_recorded(text).path} on {address} is the file of {other.name} on this machine",
                    f"give {records.name} a file of its own, or take the other one down: nbdnfs down {other.name}",
                )
        records.write(Records.ADDRESS, f"{text}\n{address}")
    finally:
        os.close(descriptor)


def has_file(records: Records, text: str, address: str) -> bool:
    """Whether the device's file is the one of the URL `text` on a server with that address, whatever names it."""
    return _file_of(records.read(Records.ADDRESS) or "") == _file_of(f"{text}\n{address}")


def is_up(records: Records, root: Path = Path("/")) -> bool:
    """Whether the device is attached, or has a keeper that may attach it."""
    return keeper_of(records) is not None or nbd_device.find(nbd_device.backend_of(records.name), root) is not None


def _refusal(name: str, pid: int) -> OtherKeeperError:
    text = f"{name} already has a keeper, or is being taken down"
    if not pid:
        return OtherKeeperError(
            f"{text}: a process that cannot be seen from here",
            f"it may be in a container, or this is one: nbdnfs down {name} there ends it",
        )
    return OtherKeeperError(f"{text}: process {pid}", f"see: nbdnfs status {name}; nbdnfs down {name} ends both")


def _file_of(recorded: str) -> tuple[str, int, str] | None:
    """Address, port and path: the same file, whatever else is in the URL. None for a damaged record."""
    text, _, address = recorded.partition("\n")
    try:
        url = nfs_url.parse_recorded(text)
    except UsageError:
        return None
    return address, url.options.get("nfsport", _NFS_PORT), url.path
