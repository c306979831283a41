# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server's silence: it owes an answer and sends nothing, although its connection is up. The worker logs nothing of
that but, with an owner, that the owner record is not refreshed."""

from __future__ import annotations

from nbdnfs.keeper import events
from nbdnfs.keeper.journal import WARNING

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from nbdnfs.keeper.reporter import Reporter

# Longer than the worker takes, the first time, to see that only its connection is silent (engine/nfs/silence.c), and
# than a suspend that fails, in which the clock goes on (docs/decisions/0026).
REPORTED_AFTER_MS = 25_000
_ADVICE = "look at it, and at the network to it"
STATUS = f"the server does not answer: {_ADVICE}"


class Silence:
    """One at a time: reported when it has lasted, and when it ends. Used by the keeper's loop alone."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._since_ms = 0

    @property
    def is_on(self) -> bool:
        """Whether one is reported, and has not ended."""
        return self._since_ms > 0

    def look(self, heard_ms: int, owed_since_ms: int, now_ms: int) -> None:
        """Report one that has begun, or ended, by the times that region.server_times() has returned, and the present
        time of the same clock, in ms; 0 for what has not been.

        It ends when something is received. That nothing is owed any more is no end: the requests may have failed.
        """
        if self._since_ms:
            if heard_ms > self._since_ms:
                silent_ms, self._since_ms = heard_ms - self._since_ms, 0
                text = f"the server answers again, after {silent_ms // 1000} s"
                self._reporter.say(text, events.SERVER_ANSWERS, silent_ms=silent_ms)
            return
        silent_ms = now_ms - owed_since_ms
        if owed_since_ms and silent_ms >= REPORTED_AFTER_MS:
            self._since_ms = owed_since_ms
            text = f"the server has not answered for {silent_ms // 1000} s: {_ADVICE}"
            self._reporter.say(text, events.SERVER_SILENT, WARNING)
