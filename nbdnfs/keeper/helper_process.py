# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that a keeper starts, that does one thing and ends. Started with posix_spawn(3), like the workers."""

from __future__ import annotations

import contextlib
import os
import signal

from nbdnfs import programs


class HelperProcess:
    """Used by the keeper's loop alone."""

    def __init__(self, argv: list[str], environment: dict[str, str], *, stdout: int = 2) -> None:
        """Start it. OSError where the kernel cannot."""
        self._pid = programs.spawn(
            argv[0],
            argv,
            environment,
            [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)],
            ordinary_priority=True,
        )
        self.pidfd = os.pidfd_open(self._pid)
        self._status = 0

    def status(self) -> int | None:
        """Its exit status, or minus the signal; None while it runs."""
        if self.pidfd >= 0:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid == 0:
                return None
            os.close(self.pidfd)
            self.pidfd = -1
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def terminate(self) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
