# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs serve URL --socket PATH`: one worker in the foreground, on a Unix socket, without root or a kernel device."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, MappingProxyType

from nbdnfs import defaults, programs
from nbdnfs.commands import claiming, where
from nbdnfs.errors import BusyError, CannotCreateError, NbdnfsError, UsageError
from nbdnfs.nas import old_name, owner_record, ownership
from nbdnfs.nas.patience import Interrupted
from nbdnfs.worker import life, nbdkit

log = logging.getLogger(__name__)

# A Unix socket's path in sockaddr_un, unix(7)
_SOCKET_PATH_BYTES = 107
_BACKLOG = 16

# How long a worker may take to end before the log says what it waits for.
_PATIENCE_S = 1.0


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

    After the first signal the worker ends once its clients have disconnected (nbdkit(1)); after a second one at once,
    also while it waits for an unreachable server. While the file is being claimed, the first signal ends it within two
    seconds. The worker reports errors in a setting, the server or the file on stderr itself. `settings` are additional
    ones for the plugin, which checks them.

    With `owned` this machine claims the file for as long: OwnedError when another machine has it. The reference engine
    does not support that.
    """
    nbdkit.check_nbdkit()
    text, address = life.check_url(url)
    owned = owned and engine == "c"
    more = nbdkit.owner_settings(text) if owned else {}
    argv = nbdkit.serve_argv({"url": text, "address": address, "engine": engine, **more, **settings}, threads=threads)
    worker: subprocess.Popen[bytes] | None = None
    signals = 0
    stop = threading.Event()  # a signal has come
    patience = threading.Timer(
        _PATIENCE_S, log.warning, ["waiting for the clients to disconnect; a second signal ends at once"]
    )
    patience.daemon = True

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        stop.set()
        if signals == 1 and worker is not None:
            patience.start()
        if worker is not None:
            worker.send_signal(signal.SIGTERM if signals == 1 else signal.SIGKILL)

    # before there is anything that a signal could leave behind
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    with listening(socket_path) as listener, _owning(url, address, stop) if owned else contextlib.nullcontext():
        if signals:
            return 0
        worker = programs.start_listening(argv, listener, nbdkit.worker_environment())
        if signals:
            worker.send_signal(signal.SIGTERM)
        listener.close()  # only the worker has it now: when that ends, connecting fails instead of hanging
        status = worker.wait()
        patience.cancel()
        return 0 if signals else status if status >= 0 else 128 - status


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
def _owning(url: str, address: str, stop: threading.Event) -> Iterator[None]:
    """This machine and process own the file meanwhile, unless `stop` is set. Raises as ownership.claim."""
    me, holder = owner_record.identity(), ownership.serve_holder()
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
            ownership.release(url, holder, me, address=address)
        except NbdnfsError as error:
            log.warning("the owner record stays: %s", error.message)
