# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that a keeper starts, that does one thing and ends. Started with posix_spawn(3), like the workers."""

from __future__ import annotations

import contextlib
import os
import signal

from nbdnfs import programs

_READ_BYTES = 4096
# A line that is longer is passed on in pieces.
_LINE_BYTES_MAX = 2000


class HelperProcess:
    """Used by the keeper's loop alone."""

    def __init__(self, argv: list[str], environment: dict[str, str], *, stdout: int | None = None) -> None:
        """Start it. Its stderr is read by `lines`, and so is its stdout unless it goes to the descriptor `stdout`.
        OSError where the kernel cannot."""
        self._output, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output, False)
        try:
            self._pid = programs.spawn(
                argv[0],
                argv,
                environment,
                [
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, theirs if stdout is None else stdout, 1),
                    (os.POSIX_SPAWN_DUP2, theirs, 2),
                ],
                ordinary_priority=True,
            )
        except OSError:
            self._close_output()
            raise
        finally:
            os.close(theirs)
        self.pidfd = os.pidfd_open(self._pid)
        self._status = 0
        self._unfinished = b""
        self._last_lines: list[str] = []

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

    def lines(self) -> list[str]:
        """The lines that it has printed since the last call; after its end, what has no line end as well."""
        data = self._unfinished + self._read()
        *whole, self._unfinished = data.split(b"\n")
        if self._unfinished and (self.pidfd < 0 or len(self._unfinished) > _LINE_BYTES_MAX):
            whole, self._unfinished = [*whole, self._unfinished], b""
        if self.pidfd < 0:
            self._close_output()
        lines = [line.decode(errors="replace") for line in whole if line]
        self._last_lines = [*self._last_lines, *lines][-2:]
        return lines

    @property
    def error_line(self) -> str:
        """Of one that has failed, what is wrong: the last line but one that `lines` has returned. The last one says
        what to do (NbdnfsError.lines)."""
        return self._last_lines[0] if self._last_lines else ""

    def descriptors(self) -> list[int]:
        """What to poll for input: it has ended, or has printed something."""
        return [descriptor for descriptor in (self.pidfd, self._output) if descriptor >= 0]

    def terminate(self) -> None:
        """Ask it to end. What it prints from here on is dropped."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        self._close_output()

    def _read(self) -> bytes:
        """What there is now. A program that it has started may hold the pipe longer, and is not waited for."""
        data = b""
        while self._output >= 0:
            try:
                piece = os.read(self._output, _READ_BYTES)
            except BlockingIOError:
                break
            if not piece:
                self._close_output()
            data += piece
        return data

    def _close_output(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1
