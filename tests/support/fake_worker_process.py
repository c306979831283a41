# SPDX-License-Identifier: LGPL-2.1-or-later
"""fake_worker.py in a process of its own, with the descriptors that a keeper gives a worker."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.waiting import DEADLINE_S

_PROGRAM = Path(__file__).parent / "fake_worker.py"
# fake_worker.py has the same number
_CONTROL_FD = 201


@dataclass(frozen=True)
class FakeWorkerProcess:
    """`nbd` is the socket on which it serves, `control` the one on which it waits to be activated."""

    nbd: socket.socket
    control: socket.socket
    process: subprocess.Popen[bytes]

    def activate(self) -> None:
        """Wait until it is ready, and activate it. AssertionError when it ends instead."""
        assert self.control.recv(1) == b"r"
        self.control.sendall(b"g")


@contextlib.contextmanager
def fake_worker(behaviour: str) -> Iterator[FakeWorkerProcess]:
    """A worker that waits to be activated; killed at the end if it is still there. One at a time in a process."""
    with contextlib.ExitStack() as stack:
        nbd, theirs = socket.socketpair()
        control, their_control = socket.socketpair()
        for end in (nbd, theirs, control, their_control):
            stack.enter_context(end)
        for end in (nbd, control):
            end.settimeout(DEADLINE_S)
        os.dup2(their_control.fileno(), _CONTROL_FD)
        try:
            process = subprocess.Popen(
                [sys.executable, str(_PROGRAM), behaviour], stdin=theirs.fileno(), pass_fds=[_CONTROL_FD], env={}
            )
        finally:
            os.close(_CONTROL_FD)
        stack.callback(process.wait, DEADLINE_S)
        stack.callback(process.kill)
        # what it has is its own, so that its end is seen
        theirs.close()
        their_control.close()
        yield FakeWorkerProcess(nbd, control, process)
