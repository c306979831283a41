# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the keeper reports: lines in the journal, and its state for `nbdnfs status` and `systemctl status`.

Nothing here waits: the journal and PID 1 may themselves wait for swap. What cannot be written at once is dropped.
"""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from nbdnfs.keeper.records import Records
    from nbdnfs.keeper.sd_notify import Notifier


class Reporter:
    """Used by the keeper's loop alone."""

    def __init__(self, records: Records, notifier: Notifier) -> None:
        self._records = records
        self._notifier = notifier
        self._complaint = ""

    def say(self, text: str) -> None:
        """One line on stderr, about a change of state."""
        with contextlib.suppress(OSError):
            os.write(2, f"nbdnfs: {self._records.name}: {text}\n".encode())

    def complain(self, kind: str, text: str) -> None:
        """Say what is wrong, but only once for several complaints of one kind in a row, until `all_is_well`."""
        if kind != self._complaint:
            self._complaint = kind
            self.say(text)

    def all_is_well(self) -> None:
        self._complaint = ""

    def state(self, state: str) -> None:
        """Record a step of the keeper, or Records.STOLEN."""
        with contextlib.suppress(OSError):
            self._records.write(self._records.STATE, state)
        self._notifier.send(f"STATUS={state}")
