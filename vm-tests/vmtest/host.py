# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only place of the harness that starts programs on the host."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from nbdnfs import programs
from nbdnfs.errors import UnavailableError
from vmtest.outcome import HarnessError

log = logging.getLogger(__name__)


def find_program(name: str, package: str) -> str:
    """As programs.find_program, with a HarnessError that names the Debian package."""
    try:
        return programs.find_program(name, package)
    except UnavailableError as error:
        raise HarnessError(error.message, error.hint) from None


def need_root(what: str) -> None:
    """HarnessError unless this process is root."""
    if os.geteuid() != 0:
        raise HarnessError(f"{what} needs root", "run it again with sudo")


def run(argv: Sequence[str | Path], *, what: str, timeout_s: float, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return its stdout. HarnessError has the last lines of its output."""
    words = [str(word) for word in argv]
    command = f"the command was: {shlex.join(words)}"
    log.debug("run: %s", shlex.join(words))
    try:
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, timeout=timeout_s, env=env, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise HarnessError(f"{what}: timed out after {timeout_s:g} s", command) from None
    except OSError as error:
        raise HarnessError(f"{what}: cannot start {words[0]}: {error.strerror}") from None
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
        raise HarnessError(f"{what}: exit status {done.returncode}\n{said}", command)
    return done.stdout


def nbdnfs_create(url: str, size_mib: int, *, timeout_s: float) -> None:
    """Make a backing file with the checkout's own program."""
    program = Path(sys.executable).with_name("nbdnfs")  # unresolved: in the virtual environment's folder
    run([program, "create", url, "--size", f"{size_mib}M"], what="nbdnfs create", timeout_s=timeout_s)


def listens(port: int) -> bool:
    """Whether a TCP port of loopback accepts connections."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def raise_priority() -> None:
    """Have what this thread starts from now on go before others of its session, where that is permitted."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)


def raise_session_priority(pid: int) -> None:
    """Have a process that leads its session (`start`) go before those of other sessions, where that is permitted.

    Sessions share the processor between them, and nice values count within one: sched(7), "The autogroup feature".
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("-20")


def start(
    argv: Sequence[str | Path], *, output: IO[bytes] | int = subprocess.DEVNULL, pass_fds: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a program that the kernel kills when this thread dies, however it dies: no guest stays behind.

    It has a session of its own: Ctrl-C at the terminal reaches this process, which ends it in order.
    """
    words = [find_program("setpriv", "util-linux"), "--pdeathsig", "KILL", *(str(word) for word in argv)]
    log.debug("start: %s", shlex.join(words))
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
    )
