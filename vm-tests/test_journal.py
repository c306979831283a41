# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness on a journal: a traceback is found wherever it stands in a line, and whichever process has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from vmtest import journal
from vmtest.machine import Result
from vmtest.outcome import GuestFailedError

pytestmark = pytest.mark.meta

_ORDINARY = "[ 12.1] box nbdnfs[311]: nbdnfs: swap0: swap is on: /dev/nbd0\n"
_TRACEBACKS = (
    "[ 12.2] box nbdnfs[311]: Traceback (most recent call last):\n",
    "[ 12.2] box nbdnfs[311]: nbdnfs: swap0: Traceback (most recent call last):\n",
    "[ 12.2] box nbdkit[312]: nbdkit: error: /plugin.py: pread: error: Traceback (most recent call last):\n",
)


class Host:
    """A Machine on which journalctl(1) prints a file."""

    def __init__(self, folder: Path, text: str, status: int = 0) -> None:
        (folder / "text").write_text(text)
        program = folder / "journalctl"
        program.write_text(f"#!/bin/sh\ncat {folder}/text\nexit {status}\n")
        program.chmod(0o755)
        self._environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    def run(self, command: str, timeout_s: float = 60, *, check: bool = True) -> Result:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=check,
        )
        return Result(command, done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("line", _TRACEBACKS)
def test_a_traceback(tmp_path: Path, line: str) -> None:
    """It is found and counted; the lines after it are in the error."""
    host = Host(tmp_path, _ORDINARY + line + "[ 12.2] box nbdnfs[311]: ValueError: of all things\n")
    with pytest.raises(GuestFailedError, match="of all things"):
        journal.refuse_tracebacks(host)  # type: ignore[arg-type]
    assert host.run(journal.COUNT_TRACEBACKS).stdout == "1\n"


def test_none(tmp_path: Path) -> None:
    """An ordinary journal, and an empty one."""
    for text in (_ORDINARY, ""):
        host = Host(tmp_path, text)
        journal.refuse_tracebacks(host)  # type: ignore[arg-type]
        assert host.run(journal.COUNT_TRACEBACKS, check=False).stdout == "0\n"


def test_a_journal_that_cannot_be_read(tmp_path: Path) -> None:
    """It is not one without tracebacks."""
    with pytest.raises(GuestFailedError):
        journal.refuse_tracebacks(Host(tmp_path, "", status=1))  # type: ignore[arg-type]
