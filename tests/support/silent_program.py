# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program on a root file system whose server does not answer: a fake, made with a lease.

A process that opens a file on which another one has a lease waits until that is given back (fcntl(2), F_SETLEASE; the
kernel waits for /proc/sys/fs/lease-break-time, 45 s by default). So execve(2) waits where it opens the program, as it
does for a server. What differs: there is no page cache here that has half of it, and the wait ends by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from support.waiting import wait_until


class SilentProgram:
    """An executable script at `path`, which cannot be opened until `answer`, or the end of the `with`."""

    def __init__(self, path: Path, command: str = "exit 0") -> None:
        self.path = path
        path.write_text(f"#!/bin/sh\n{command}\n")
        path.chmod(0o755)
        self._descriptor = -1

    @contextlib.contextmanager
    def signals_ignored(self) -> Iterator[None]:
        """Where `be_silent` is called later, and by another thread: the kernel sends a lease's owner SIGIO."""
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGIO, before)

    def __enter__(self) -> SilentProgram:
        self._ignored = self.signals_ignored()
        self._ignored.__enter__()
        self.be_silent()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.answer()
        self._ignored.__exit__(None, None, None)

    def be_silent(self) -> None:
        self._ends_s = time.monotonic() + int(Path("/proc/sys/fs/lease-break-time").read_text())
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def answer(self) -> None:
        """AssertionError where the silence has ended by itself: what waited for that has not been tested."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            assert time.monotonic() < self._ends_s

    def wait_until_opened(self) -> None:
        """Until a process waits for the file: the kernel is taking the lease away."""
        wait_until(
            lambda: fcntl.fcntl(self._descriptor, fcntl.F_GETLEASE) != fcntl.F_WRLCK,
            what="the program is being opened",
            timeout_s=20,
        )
