# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which region an attached device has. Another one has none of its pages: they would be read as zeros, or as they once
were.

systemd may store one of an earlier start: with FileDescriptorStorePreserve=yes it outlives the unit's stop, and a
keeper that a person has started since stores nothing. So each keeper records which one its device has.
docs/decisions/0014.
"""

from __future__ import annotations

import os

from nbdnfs import region

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from nbdnfs.keeper.records import Records


def record(records: Records, descriptor: int) -> None:
    """Before the device is attached: a record that is older than the device could be of another region."""
    records.put(records.REGION, region.identity(descriptor))


def find(records: Records, stored: int | None) -> int | None:
    """The region of the attached device: `stored` where it is that one, or else a descriptor of what its worker has.
    None where no process has it. OSError, UnreadableError: it is not known.

    A keeper of an earlier version has recorded none: `stored` counts then, unless the worker has another one.

    stored  what systemd has kept, which stays the caller's; None without
    """
    recorded = records.read(records.REGION)
    worker = records.living(records.WORKER)
    if stored is not None and region.identity(stored) == recorded:
        return stored
    taken = region.take_from(worker.pid) if worker is not None else None
    if stored is None:
        return taken
    if taken is None:
        return stored if recorded is None else None
    if region.identity(taken) == region.identity(stored):
        os.close(taken)
        return stored
    return taken
