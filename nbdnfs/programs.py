# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only place that starts other programs. Every command is logged, quoted for a shell, at debug level.

`run` waits for the end and wants success, `status` hands the terminal over, `output` wants the answer whatever the
exit status, `watch` reports progress; `start` and `start_listening` return while the program runs, `Spawn` before it
does.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import nbdnfs
from nbdnfs import _spawner
from nbdnfs.errors import NbdnfsError, UnavailableError

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    import subprocess  # at run time only where it is used: the resident keeper has this module too

log = logging.getLogger(__name__)

# systemd's socket activation protocol: the first descriptor handed down, sd_listen_fds(3).
_LISTEN_FD = 3

# systemd.exec(5): UMask=. With a stricter one, other users could not read what a keeper leaves in /run for `status`.
SYSTEM_UMASK = 0o022

# Set by a keeper for a helper that may take long: what it does, for the lines about its progress on stdout.
STATUS_VARIABLE = "NBDNFS_STATUS"

# How long the start of a program may take before it is worth a word.
SPAWN_LATE_AFTER_S = 5.0
# What _spawner sends: a pid, or minus an errno.
_ANSWER_BYTES = 4


def find_program(name: str, package: str) -> str:
    """The path of `name`, in $PATH or in root's folders. UnavailableError names the Debian package to install.

    Relative folders in $PATH do not count: what they mean depends on where the caller stands.
    """
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(folder)]
    # not shutil.which(): with shutil, the keeper has half a megabyte more in locked memory
    for folder in (*folders, "/usr/sbin", "/sbin", "/usr/local/sbin"):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise UnavailableError(f"the program '{name}' is not installed", f"install it (Debian: apt install {package})")


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
    """Start a program in a session of its own: Ctrl-C at the terminal is not meant for it. Its working directory and
    its umask are those that systemd would give it: it holds up no umount(8), and what it makes may be read.

    `output` is a descriptor for its stdout and stderr; without one it has those of this process.
    """
    import subprocess

    log.debug("start: %s", shlex.join(argv))
    return subprocess.Popen(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        cwd="/",
        umask=SYSTEM_UMASK,
    )


def start_listening(
    argv: Sequence[str], listener: socket.socket, env: Mapping[str, str], *, inherited: int
) -> subprocess.Popen[bytes]:
    """Start a socket-activated program: it finds `listener` as descriptor 3 (sd_listen_fds(3)), and `inherited`, which
    is above that, under its own number. A terminal's signals do not reach it: its process group is one of its own.

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
        os.set_inheritable(inherited, True)

    assert inherited > _LISTEN_FD
    # all other descriptors of ours are close-on-exec (PEP 446)
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=become_ready, close_fds=False, process_group=0)


class Spawn:
    """A program that is being started. Used by the keeper's loop alone: the start itself happens in another thread,
    since it takes as long as the file system of the program takes to open it. nbdnfs/_spawner.c.

    pid    0 until it has started
    error  why it cannot be started; None while it may be
    """

    def __init__(
        self,
        program: str,
        argv: list[str],
        env: Mapping[str, str],
        descriptors: Mapping[int, int],
        *,
        new_session: bool = False,
        ordinary_priority: bool = False,
    ) -> None:
        """Begin to start `program` with posix_spawn(3). OSError when there are too many descriptors already.

        For the keeper: neither a copy of its page tables nor memory of its size is needed. `argv` begins with the name
        that the process is to have. It finds copies of this process's `descriptors` (its number ▸ the one here), and
        of 0, 1 and 2, and no other ones. No signal is blocked or ignored in it. With `ordinary_priority` it does not
        inherit a real-time one.
        """
        if log.isEnabledFor(logging.DEBUG):
            log.debug("start: %s", shlex.join(argv))
        self.pid = 0
        self.error: OSError | None = None
        self.began_s = time.monotonic()
        self._answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._answer.setblocking(False)
        try:
            _spawner.prepare()
            _spawner.submit(
                os.fsencode(program),
                [os.fsencode(argument) for argument in argv],
                [os.fsencode(f"{key}={value}") for key, value in env.items()],
                [(ours, number) for number, ours in descriptors.items()],
                theirs.fileno(),
                new_session,
                ordinary_priority,
            )
        except BaseException:
            self._answer.close()
            raise
        finally:
            theirs.close()

    def fileno(self) -> int:
        """What to poll for input: `is_over` has news. -1 when it is over."""
        return self._answer.fileno()

    def is_over(self) -> bool:
        """Whether it has started, or cannot be started. It is this process's child then."""
        if self._answer.fileno() >= 0:
            try:
                answer = self._answer.recv(_ANSWER_BYTES)
            except BlockingIOError:
                return False
            self._answer.close()
            result = int.from_bytes(answer, sys.byteorder, signed=True)
            if result > 0:
                self.pid = result
            else:
                self.error = OSError(-result, os.strerror(-result))
        return True

    def is_late(self, now: float) -> bool:
        """Of one that is not over: whether that is so for SPAWN_LATE_AFTER_S. `now` is time.monotonic()."""
        return now >= self.began_s + SPAWN_LATE_AFTER_S

    def cancel(self) -> None:
        """It is not to be started, or killed where it is just being started. One that has started goes on."""
        if self._answer.fileno() < 0:
            return
        self._answer.shutdown(socket.SHUT_RDWR)  # from here on the thread kills what it starts
        if self.is_over() and self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.pid = 0


def prepare_to_spawn() -> None:
    """Start the thread that starts programs, which has the priority of the caller. OSError where the kernel cannot."""
    _spawner.prepare()
