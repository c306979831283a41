# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only place that starts other programs. Every command is logged, quoted for a shell, at debug level."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import socket
from collections.abc import Mapping, Sequence

from nbdnfs.errors import NbdnfsError, UnavailableError

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    import subprocess  # where it is needed, at run time: keepers have this module too, and start again and again

log = logging.getLogger(__name__)

# systemd's socket activation protocol: the first descriptor handed down, sd_listen_fds(3).
_LISTEN_FD = 3


def find_program(name: str, package: str) -> str:
    """The path of `name`, also where only root looks. UnavailableError names the Debian package to install."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        raise UnavailableError(f"the program '{name}' is not installed", f"install it (Debian: apt install {package})")
    return path


def run(argv: Sequence[str], *, what: str, timeout_s: float = 60.0, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return what it printed on stdout.

    NbdnfsError, with `what` and the program's last line, when it fails or takes longer than `timeout_s`.
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
        raise NbdnfsError(f"{what}: no answer from {argv[0]} within {timeout_s:g} s") from None
    except OSError as error:
        raise NbdnfsError(f"{what}: cannot start {argv[0]}: {error.strerror}") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise NbdnfsError(f"{what}: {said[-1]}", f"the command was: {shlex.join(argv)}")
    return done.stdout


def start_listening(argv: Sequence[str], listener: socket.socket, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a socket-activated program: it finds `listener` as descriptor 3 (sd_listen_fds(3)).

    LISTEN_PID must be the program's own pid, which only the process that becomes the program can say: not for
    programs that have threads (subprocess, preexec_fn).
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
