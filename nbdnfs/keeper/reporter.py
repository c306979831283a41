# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the keeper reports: lines in the journal, with fields for monitoring (events.py), or on stderr where there is
none; and its state for `nbdnfs status` and `systemctl status`.

Nothing here waits: the journal and PID 1 may themselves wait for swap. What cannot be written at once is dropped.
"""

from __future__ import annotations

import contextlib
import os
import time

from nbdnfs import __version__
from nbdnfs.errors import UnreadableError
from nbdnfs.keeper import events
from nbdnfs.keeper.journal import CRITICAL, DEBUG, INFO, WARNING, Journal

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdnfs.keeper.records import Records
    from nbdnfs.keeper.sd_notify import Notifier

# How soon a complaint that still holds is said again.
REPEAT_AFTER_S = 600.0
# How many complaints are remembered: what fails in turns, a worker for one reason and its successor for another.
_REMEMBERED = 8
_RECORD_BYTES_MAX = 4000


class Reporter:
    """Used by the keeper's loop alone. What has been said is in the record SAID, so that the next keeper, which a
    failure may start every few seconds, does not say it again."""

    def __init__(self, records: Records, notifier: Notifier, journal: Journal | None = None) -> None:
        self._records = records
        self._journal = journal if journal is not None else Journal({})
        self.notifier = notifier
        said = None
        with contextlib.suppress(UnreadableError):  # then something is said twice
            said = records.read(records.SAID)
        self._said_at_s = _parsed(said or "")
        self._is_waiting = False

    def say(self, text: str, event: str = "", priority: int = INFO, **fields: str | int) -> None:
        """One line about a change of state. `event` is one of events.py; the journal has `fields` as NBDNFS_*."""
        self._print(f"nbdnfs: {self._records.name}: {text}", priority, event, fields)

    def complain(self, kind: str, text: str, event: str = events.COMPLAINT, **fields: str | int) -> bool:
        """Say what is wrong, but one kind of complaint only once in REPEAT_AFTER_S, until `all_is_well`. Whether it was
        said."""
        is_due = self._is_due(kind)
        if is_due:
            self._print(f"nbdnfs: {self._records.name}: {text}", WARNING, event, fields)
        return is_due

    def pass_on(self, lines: Iterable[str]) -> None:
        """Print what a helper has printed, as `complain` does: each try prints the same."""
        for line in lines:
            if self._is_due(line):
                self._print(line, WARNING, events.COMPLAINT, {})

    def all_is_well(self) -> None:
        if self._said_at_s:
            self._said_at_s.clear()
            self._records.put(self._records.SAID, "")

    def state(self, state: str) -> None:
        """Record a step of the keeper, or Records.STOLEN."""
        self._records.put(self._records.STATE, state)
        priority = CRITICAL if state == self._records.STOLEN else DEBUG
        self._send(f"nbdnfs: {self._records.name}: {state}", priority, events.STEP, {"state": state})
        self.notifier.send(f"STATUS={state}")

    def wait_for(self, text: str) -> None:
        """Show that the keeper waits, and what for; "": it does not any more."""
        if text or self._is_waiting:
            self._is_waiting = bool(text)
            self._records.put(self._records.WAITING, text)
        if text:
            self.notifier.send(f"STATUS=waiting: {text}")

    def _is_due(self, kind: str) -> bool:
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        said_s = self._said_at_s.get(kind)
        if said_s is not None and 0 <= now_s - said_s < REPEAT_AFTER_S:
            return False
        self._said_at_s.pop(kind, None)
        self._said_at_s[kind] = now_s
        while len(self._said_at_s) > _REMEMBERED:
            del self._said_at_s[next(iter(self._said_at_s))]
        lines = "\n".join(f"{int(at_s)} {one}" for one, at_s in self._said_at_s.items())
        self._records.put(self._records.SAID, lines if len(lines) < _RECORD_BYTES_MAX else "")
        return True

    def _print(self, line: str, priority: int, event: str, fields: dict[str, str | int]) -> None:
        """Also where the journal's socket is full: its other end, stderr, may not be."""
        if not self._send(line, priority, event, fields):
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode(errors="replace"))

    def _send(self, line: str, priority: int, event: str, fields: dict[str, str | int]) -> bool:
        return self._journal.is_enabled and self._journal.send(
            MESSAGE=line,
            PRIORITY=priority,
            SYSLOG_IDENTIFIER="nbdnfs",
            **({"MESSAGE_ID": event} if event else {}),
            NBDNFS_NAME=self._records.name,
            NBDNFS_VERSION=__version__,
            **{f"NBDNFS_{key.upper()}": value for key, value in fields.items()},
        )


def _parsed(text: str) -> dict[str, float]:
    """The record SAID: lines of "SECONDS WHAT"; a line that is not one is ignored."""
    words = (line.partition(" ") for line in text.splitlines())
    return {what: float(at_s) for at_s, _, what in words if at_s.isascii() and at_s.isdigit() and len(at_s) < 16}
