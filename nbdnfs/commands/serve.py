# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs serve URL --socket PATH`: one worker in the foreground, on a Unix socket, without root or a kernel device."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import logging
import os
import select
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, MappingProxyType

from nbdnfs import defaults, memlock, programs
from nbdnfs.commands import claiming, where
from nbdnfs.errors import BusyError, CannotCreateError, NbdnfsError, UsageError
from nbdnfs.nas import old_name, owner_record, ownership
from nbdnfs.nas.patience import Interrupted
from nbdnfs.worker import life, nbdkit, protocol

log = logging.getLogger(__name__)

# A Unix socket's path in sockaddr_un, unix(7)
_SOCKET_PATH_BYTES = 107
_BACKLOG = 16

# How long a worker may take to end before the log says what it waits for.
_PATIENCE_S = 1.0
_CLIENTS, _SERVER = "the clients to disconnect", "the server"
# Notes about clients that are read at once.
_NOTES = 256
# The worker's end of the pipe for them has at least this number: sd_listen_fds(3) has 3.
_NOTES_FD_MIN = 10


def run(args: argparse.Namespace) -> int:
    """Serve until the worker ends; its exit status. UsageError, or as `where.refuse_if_attached` and `serve`."""
    if not 1 <= args.threads <= 64:
        raise UsageError(f"--threads {args.threads} is out of range", "give 1 to 64; more than 16 are hardly faster")
    settings = {"encrypt": "1"} if args.encrypt else {}
    for setting in args.plugin_setting:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--plugin-setting {setting} has no value", "write it as KEY=VALUE")
        settings[key] = value
    # also for --no-owner, and where the device keeps no owner record
    where.refuse_if_attached(args.url, f"nbdnfs serve {args.url} --socket {args.socket}")
    return serve(
        args.url,
        args.socket,
        engine=args.engine,
        threads=args.threads,
        settings=settings,
        owned=not args.no_owner,
    )


def serve(
    url: str,
    socket_path: Path,
    *,
    engine: str = "c",
    threads: int = defaults.THREADS,
    settings: Mapping[str, str] = MappingProxyType({}),
    owned: bool = True,
) -> int:
    """Run a worker in the foreground until SIGINT, SIGTERM or its own end. Returns the exit status.

    After the first signal it goes on serving until no client is connected, and until the server has what they wrote;
    after a second one it ends at once, with 128 + SIGKILL, also while it waits for an unreachable server: what was
    written and not flushed may be lost then. While the file is being claimed, the first signal ends it within two
    seconds; while it is being released, the next one does. The worker reports errors in a setting, the server or the
    file on stderr itself. `settings` are additional ones for the plugin, which checks them.

    With `owned` this machine claims the file for as long: OwnedError when another machine has it. The reference engine
    does not support that.
    """
    nbdkit.check_nbdkit()
    text, address = life.check_url(url)
    owned = owned and engine == "c"
    more = nbdkit.owner_settings(text) if owned else {}
    notes_fd, clients_fd = _pipe()
    given = {"url": text, "address": address, "engine": engine, "clients_fd": str(clients_fd), **more, **settings}
    argv = nbdkit.serve_argv(given, threads=threads)
    # before there is anything that a signal could leave behind
    ending = _Ending(keeps=settings.get("encrypt", "0") == "0")
    with listening(socket_path) as listener, _owning(url, address, ending) if owned else contextlib.nullcontext():
        if ending.stop.is_set():
            return 0
        _protect()
        worker = programs.start_listening(argv, listener, nbdkit.worker_environment(), inherited=clients_fd)
        # only the worker has them now: when that ends, connecting fails instead of hanging, and there are no more notes
        listener.close()
        os.close(clients_fd)
        return ending.wait(worker, notes_fd)


def _protect() -> None:
    """The worker ends with this process: the OOM killer must spare both. Without the right to say so, nothing happens;
    the worker warns of its own."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(memlock.OOM_IMMUNE))


class _Ending:
    """What signals do, SIGINT and SIGTERM: from its creation on, they do this alone.

    Once nbdkit has been told to end, it closes each connection at the next request, which would lose swap on it. So it
    is not told until its clients have disconnected.
    """

    def __init__(self, *, keeps: bool) -> None:
        """`keeps`: the file is to have what the clients have written, also after the end."""
        self.stop = threading.Event()  # a signal has come, since `next_signal` where that was called
        self._loss = ", and what was not flushed may be lost" if keeps else ""
        self._signals = 0
        self._clients = 0
        self._waits_for = ""  # since the first signal
        self._say_at_s: float | None = None  # when to say so
        self._wake, self._wakes = socket.socketpair()  # readable once a signal has come
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._count)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self.stop.set()

    def next_signal(self) -> threading.Event:
        """Is set by a signal that comes from now on."""
        self.stop = threading.Event()
        return self.stop

    def wait(self, worker: subprocess.Popen[bytes], notes_fd: int) -> int:
        """Until the worker has ended; the exit status of the command."""
        self._act(worker)
        while self._hear(notes_fd):
            self._act(worker)
        status = worker.wait()
        if self._signals > 1 and status == -signal.SIGKILL:
            log.warning("ended at once%s", self._loss)
            return 128 + signal.SIGKILL
        return 0 if self._signals else status if status >= 0 else 128 - status

    def _hear(self, notes_fd: int) -> bool:
        """Wait for a note about clients, a signal, or the time to speak. False: the worker has ended."""
        timeout_s = None if self._say_at_s is None else max(0.0, self._say_at_s - time.monotonic())
        readable, _, _ = select.select([notes_fd, self._wake.fileno()], [], [], timeout_s)
        if self._wake.fileno() in readable:
            self._wake.recv(_NOTES)
        if notes_fd not in readable:
            return True
        notes = os.read(notes_fd, _NOTES)
        self._clients += notes.count(protocol.CLIENT_CAME) - notes.count(protocol.CLIENT_WENT)
        return notes != b""

    def _act(self, worker: subprocess.Popen[bytes]) -> None:
        if self._signals > 1:
            worker.kill()
        elif self._signals and self._waits_for != _SERVER:
            if self._clients == 0:
                worker.terminate()
            self._wait_for(_SERVER if self._clients == 0 else _CLIENTS)
        if self._say_at_s is not None and time.monotonic() >= self._say_at_s:
            self._say_at_s = None
            log.warning("waiting for %s; a second signal ends at once%s", self._waits_for, self._loss)

    def _wait_for(self, what: str) -> None:
        if self._waits_for != what:
            self._waits_for, self._say_at_s = what, time.monotonic() + _PATIENCE_S


def _pipe() -> tuple[int, int]:
    """The two ends of a pipe, to read and to write; the second has a number that a worker can have it under."""
    reading, writing = os.pipe()
    moved = fcntl.fcntl(writing, fcntl.F_DUPFD_CLOEXEC, _NOTES_FD_MIN)
    os.close(writing)
    return reading, moved


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening Unix socket at `path`, mode 0600, removed at the end.

    A stale socket file is replaced. BusyError when a process listens on it. CannotCreateError when there is another
    kind of file, or the directory cannot be written.
    """
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise UsageError(
            f"the socket path {path} is longer than {_SOCKET_PATH_BYTES} bytes",
            "choose a shorter one, in /run",
        )
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotCreateError(
            f"cannot make the socket {path}: {error.strerror}", "choose a directory that exists and is yours"
        ) from None
    try:
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise CannotCreateError(f"{path} exists and is not a socket", "choose another path for --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                log.info("removing the stale socket %s", path)
                path.unlink(missing_ok=True)
                return
            if error.errno in (errno.EACCES, errno.EPERM):
                raise CannotCreateError(f"the socket {path} belongs to another user", "choose another path") from None
    raise BusyError(f"{path} is already being served", "end that worker first, or choose another path for --socket")


@contextlib.contextmanager
def _owning(url: str, address: str, ending: _Ending) -> Iterator[None]:
    """This machine and process own the file meanwhile, unless a signal comes first. Raises as ownership.claim."""
    me, holder, stop = owner_record.identity(), ownership.serve_holder(), ending.stop
    try:
        claiming.run(lambda: old_name.adopt(url, holder, stop=stop), stop)
        claiming.run(lambda: ownership.claim(url, holder, me, stop=stop), stop)
    except Interrupted:
        yield
        return
    try:
        yield
    finally:
        try:
            ownership.release(url, holder, me, address=address, stop=ending.next_signal())
        except NbdnfsError as error:
            log.warning("the owner record stays: %s", error.message)
