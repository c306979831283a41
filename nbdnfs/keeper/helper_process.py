# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that a keeper starts, that does one thing and ends. Started by a thread of its own, like the workers."""

from __future__ import annotations

import contextlib
import os
import signal

from nbdnfs import programs

_READ_BYTES = 4096
# A line that is longer is passed on in pieces.
_LINE_BYTES_MAX = 2000


class HelperProcess:
    """Used by the keeper's loop alone.

    last_lines  of those that `lines` has returned, the last two at most: of one that has failed, NbdnfsError.lines
    """

    def __init__(self, argv: list[str], environment: dict[str, str], *, stdout: int | None = None) -> None:
        """Begin to start it. Its stderr is read by `lines`, and so is its stdout unless it goes to the descriptor
        `stdout`. OSError when there are too many descriptors already."""
        self._output, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output, False)
        null = -1
        try:
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            self._spawn: programs.Spawn | None = programs.Spawn(
                argv[0],
                argv,
                environment,
                {0: null, 1: theirs if stdout is None else stdout, 2: theirs},
                ordinary_priority=True,
            )
        except OSError:
            self._close_output()
            raise
        finally:
            os.close(theirs)
            if null >= 0:
                os.close(null)
        self._pid = 0
        self.pidfd = -1
        self._status = 0
        self._unfinished = b""
        self.last_lines: list[str] = []

    def status(self) -> int | None:
        """Its exit status, or minus the signal; None until it has ended. OSError when it cannot be started."""
        if self._spawn is not None:
            if not self._spawn.is_over():
                return None
            spawn, self._spawn = self._spawn, None
            if spawn.error is not None:
                self._close_output()
                raise spawn.error
            self._pid = spawn.pid
            self.pidfd = os.pidfd_open(self._pid)
        if self.pidfd >= 0:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid == 0:
                return None
            os.close(self.pidfd)
            self.pidfd = -1
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    @property
    def has_ended(self) -> bool:
        return self._spawn is None and self.pidfd < 0

    def is_late(self, now: float) -> bool:
        """Whether it should have started by now (time.monotonic())."""
        return self._spawn is not None and self._spawn.is_late(now)

    def lines(self) -> list[str]:
        """The lines that it has printed since the last call; after its end, what has no line end as well."""
        data = self._unfinished + self._read()
        *whole, self._unfinished = data.split(b"\n")
        if self._unfinished and (self.has_ended or len(self._unfinished) > _LINE_BYTES_MAX):
            whole, self._unfinished = [*whole, self._unfinished], b""
        if self.has_ended:
            self._close_output()
        lines = [line.decode(errors="replace") for line in whole if line]
        self.last_lines = [*self.last_lines, *lines][-2:]
        return lines

    @property
    def error_line(self) -> str:
        """Of one that has failed, what is wrong: the last line but one that `lines` has returned. The last one says
        what to do (NbdnfsError.lines)."""
        return self.last_lines[0] if self.last_lines else ""

    def descriptors(self) -> list[int]:
        """What to poll for input: it has started, has ended, or has printed something."""
        starting = self._spawn.fileno() if self._spawn is not None else -1
        return [descriptor for descriptor in (starting, self.pidfd, self._output) if descriptor >= 0]

    def terminate(self) -> None:
        """Ask it to end. What it prints from here on is dropped."""
        if self._spawn is not None:
            self._spawn.cancel()
            self._spawn = None
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
