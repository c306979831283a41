# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's own protocol: a line with fields, so that monitoring need not parse words.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL: one datagram, an assignment on each line. A journal may itself wait for
swap: nothing here waits, and the socket is there from the start.
"""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Mapping

_PATH = "/run/systemd/journal/socket"
# syslog(3)
CRITICAL, WARNING, INFO, DEBUG = 2, 4, 6, 7
# Of one value: a server's words may be of any length, and a datagram that is too large does not go at all.
_VALUE_BYTES_MAX = 2000


class Journal:
    """Sends where this process's stderr is the journal's; does nothing elsewhere: in a terminal, say."""

    def __init__(self, environment: Mapping[str, str] = os.environ, *, path: str = _PATH, stderr: int = 2) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        if environment.get("JOURNAL_STREAM", "") == _identity(stderr):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @property
    def is_enabled(self) -> bool:
        return self._socket is not None

    def send(self, **fields: str | int) -> bool:
        """False where there is no journal, or it does not take it now."""
        if self._socket is None:
            return False
        lines = "".join(f"{key}={_one_line(value)}\n" for key, value in fields.items())
        try:
            self._socket.sendmsg([lines.encode(errors="replace")], [], socket.MSG_DONTWAIT, self._path)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _identity(descriptor: int) -> str:
    """As $JOURNAL_STREAM has it, systemd.exec(5)."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return "closed"
    return f"{found.st_dev}:{found.st_ino}"


def _one_line(value: str | int) -> str:
    """A line end would begin the next field."""
    return str(value).replace("\n", " ")[:_VALUE_BYTES_MAX]
