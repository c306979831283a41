# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server's silence: it owes an answer and sends nothing, although its connection is up. The worker logs nothing of
that, or of its own record of the owner alone."""

from __future__ import annotations

from nbdnfs.keeper import events

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from nbdnfs.keeper.reporter import Reporter

# Longer than the worker takes to see that only its connection is silent (engine/nfs/silence.c), and than a suspend that
# fails, in which the clock goes on (docs/decisions/0026).
REPORTED_AFTER_MS = 25_000
STATUS = "the server does not answer: requests that need it wait"


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
        """The first two are of region.server_times(); `now_ms` is of the same clock.

        It ends when something is received. That nothing is owed any more is no end: the requests may have failed.
        """
        if self._since_ms:
            if heard_ms > self._since_ms:
                silent_ms, self._since_ms = heard_ms - self._since_ms, 0
                text = f"the server answers again, after {silent_ms // 1000} s"
                self._reporter.say(text, events.SERVER_ANSWERS, silent_ms=silent_ms)
        elif owed_since_ms and now_ms - owed_since_ms >= REPORTED_AFTER_MS:
            self._since_ms = owed_since_ms
            text = f"the server has not answered for {(now_ms - owed_since_ms) // 1000} s: requests that need it wait"
            self._reporter.warn(text, events.SERVER_SILENT)
