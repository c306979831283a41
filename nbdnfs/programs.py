# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only place that starts other programs. Every command is logged, quoted for a shell, at debug level.

`run` waits for the end and wants success, `status` hands the terminal over, `output` wants the answer whatever the
exit status, `watch` reports progress; `start`, `start_listening` and `spawn` return while the program runs.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

import nbdnfs
from nbdnfs.errors import NbdnfsError, UnavailableError

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    import subprocess  # at run time only where it is used: the resident keeper has this module too
    from typing import Any

log = logging.getLogger(__name__)

# systemd's socket activation protocol: the first descriptor handed down, sd_listen_fds(3).
_LISTEN_FD = 3

# Signals that nbdnfs handles or ignores, and that a spawned program finds as they are by default.
_OWN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def find_program(name: str, package: str) -> str:
    """The path of `name`, in $PATH or in root's folders. UnavailableError names the Debian package to install.

    Relative folders in $PATH do not count: what they mean depends on where the caller stands.
    """
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(folder)]
    path = shutil.which(name, path=os.pathsep.join(folders)) or shutil.which(
        name, path="/usr/sbin:/sbin:/usr/local/sbin"
    )
    if path is None:
        raise UnavailableError(f"the program '{name}' is not installed", f"install it (Debian: apt install {package})")
    return path


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package with this interpreter. It needs `python_environment`.

    -P: without the current directory in sys.path, where a folder `nbdnfs` may lie that is not ours.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment() -> dict[str, str]:
    """The environment in which an interpreter finds this very package, and runs no code that the caller's environment
    or current directory names: of the variables PYTHON* it has only ours."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {
        **inherited,
        "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(nbdnfs.__file__))),
        "PYTHONSAFEPATH": "1",
        "PYTHONNOUSERSITE": "1",
    }


def run(argv: Sequence[str], *, what: str, timeout_s: float = 60.0, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return what it printed on stdout.

    NbdnfsError, with `what` and the last line of the program's output, when it fails or takes longer than `timeout_s`.
    """
    import subprocess

    log.debug("run: %s", shlex.join(argv))
    try:
        done = subprocess.run(
            argv,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=env,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise NbdnfsError(f"{what}: {argv[0]} did not end within {timeout_s:g} s") from None
    except OSError as error:
        raise NbdnfsError(f"{what}: cannot start {argv[0]}: {error.strerror}") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise NbdnfsError(f"{what}: {said[-1]}", f"the command was: {shlex.join(argv)}")
    return done.stdout


def status(argv: Sequence[str]) -> int:
    """Run a program to its end, with the terminal of this one; the exit status."""
    import subprocess

    log.debug("run: %s", shlex.join(argv))
    return subprocess.run(argv, check=False).returncode


def output(argv: Sequence[str]) -> str:
    """Run a program to its end and return what it printed on stdout, whatever its exit status. stderr is inherited."""
    import subprocess

    log.debug("run: %s", shlex.join(argv))
    return subprocess.run(argv, check=False, stdout=subprocess.PIPE, text=True).stdout


def watch(argv: Sequence[str], progress: Callable[[], None], *, every_s: float) -> tuple[int, str]:
    """Run a program to its end, however long that takes, and call `progress` meanwhile, about every `every_s` seconds.

    Returns the exit status and what the program printed on stderr. An exception here (Ctrl-C) ends it with SIGTERM.
    """
    import subprocess

    log.debug("run: %s", shlex.join(argv))
    running = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while True:
            try:
                _, errors = running.communicate(timeout=every_s)
                return running.returncode, errors
            except subprocess.TimeoutExpired:
                progress()
    except BaseException:
        running.terminate()
        running.communicate()
        raise


def start(argv: Sequence[str], env: Mapping[str, str], *, output: int | None = None) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own: Ctrl-C at the terminal is not meant for it.

    `output` is a descriptor for its stdout and stderr; without one it has those of this process.
    """
    import subprocess

    log.debug("start: %s", shlex.join(argv))
    return subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )


def start_listening(argv: Sequence[str], listener: socket.socket, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a socket-activated program: it finds `listener` as descriptor 3 (sd_listen_fds(3)).

    LISTEN_PID must be the pid of the program itself, which is known only between fork and exec: this process may have
    no other threads (subprocess, preexec_fn).
    """
    import subprocess

    log.debug("start: %s", shlex.join(argv))

    def become_ready() -> None:
        os.environ.clear()
        os.environ.update(env, LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
        os.dup2(listener.fileno(), _LISTEN_FD)
        os.set_inheritable(_LISTEN_FD, True)

    # all other descriptors of ours are close-on-exec (PEP 446)
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=become_ready, close_fds=False)


def spawn(
    program: str,
    argv: list[str],
    env: Mapping[str, str],
    file_actions: Sequence[tuple[Any, ...]],
    *,
    new_session: bool = False,
    ordinary_priority: bool = False,
) -> int:
    """Start `program` with posix_spawn(3), and return its pid. OSError where the kernel cannot.

    For the keeper: neither a copy of its page tables nor memory of its size is needed. `argv` begins with the name that
    the process is to have, `file_actions` are those of os.posix_spawn. No signal is blocked or ignored in it. With
    `ordinary_priority` it does not inherit a real-time one.
    """
    if log.isEnabledFor(logging.DEBUG):
        log.debug("start: %s", shlex.join(argv))
    scheduler: dict[str, Any] = {"scheduler": (os.SCHED_OTHER, os.sched_param(0))} if ordinary_priority else {}
    return os.posix_spawn(
        program,
        argv,
        env,
        file_actions=file_actions,
        setsid=new_session,
        setsigmask=(),
        setsigdef=_OWN_SIGNALS,
        **scheduler,
    )
