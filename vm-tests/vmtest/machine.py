# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a scenario asks of the machine that it runs on: a guest (guest.py) or this very machine (local.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vmtest.verdict import Progress, Verdict


@dataclass(frozen=True)
class Result:
    """What a shell command came to. `status` is minus the signal that ended it."""

    command: str
    status: int
    stdout: str
    stderr: str


class Job(Protocol):
    """A shell command that runs."""

    command: str

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""

    @property
    def stdout(self) -> str:
        """What it printed so far."""

    @property
    def stderr(self) -> str:
        """What it complained about so far."""

    def wait(self) -> Result:
        """Wait for its end, which comes by the time that `start` was given."""

    def kill(self) -> None:
        """SIGKILL for its process group."""


class Machine(Protocol):
    """Runs shell commands. The names `nbdnfs` and `hog` mean the ones under test.

    `disposable` machines need no tidying up after something went wrong: they end with the test.
    """

    disposable: bool
    verdict_target: str
    """The file that a program on the machine writes its verdict to."""

    def start(self, command: str, timeout_s: float = 3600) -> Job:
        """Start a command; it is killed after `timeout_s`."""

    def run(self, command: str, timeout_s: float = 60, *, check: bool = True) -> Result:
        """Run a command to its end. GuestFailedError when it takes longer, or fails and `check` is set."""

    def wait_verdict(
        self, job: Job, timeout_s: float, on_progress: Callable[[Progress], None] | None = None
    ) -> Verdict:
        """The verdict of the stress program that runs as `job`."""
