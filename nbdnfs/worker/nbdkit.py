# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts and watches one worker: nbdkit with our plugin, over a socket that we have bound."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING

import nbdnfs
from nbdnfs import programs
from nbdnfs.errors import BusyError, CannotCreateError, ConfigError, NbdnfsError, UnavailableError, UsageError
from nbdnfs.nas import owner_record
from nbdnfs.worker import settings as worker_settings

if TYPE_CHECKING:
    import subprocess

log = logging.getLogger(__name__)

# As many requests are under way as there are threads. See docs/decisions/0017.
THREADS = 12

# A Unix socket's path in sockaddr_un, unix(7)
_SOCKET_PATH_BYTES = 107
_BACKLOG = 16

# When to say what an ending worker waits for.
_PATIENCE_S = 1.0


def nbdkit_argv(plugin_settings: dict[str, str], *, threads: int = THREADS) -> list[str]:
    """The command that runs the worker in the foreground on a socket that it inherits."""
    return [
        programs.find_program("nbdkit", "nbdkit"),
        "--foreground",
        "--exit-with-parent",
        f"--threads={threads}",
        "python",
        str(plugin_path()),
        *(f"{key}={value}" for key, value in plugin_settings.items()),
    ]


def worker_environment() -> dict[str, str]:
    """The environment in which nbdkit's Python finds this very package, and writes nothing to the disk."""
    paths = [str(Path(nbdnfs.__file__).parents[1])]
    reference = importlib.util.find_spec("libnfs")
    if reference is not None and reference.origin is not None:
        paths.append(str(Path(reference.origin).parents[1]))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONMALLOC": "malloc",
        "PYTHONNOUSERSITE": "1",
    }


def plugin_path() -> Path:
    """Where the plugin lies: in the installed package, or beside it in a checkout. ConfigError when it does not."""
    package = Path(nbdnfs.__file__).parent
    for folder in (package, package.parent):
        path = folder / "plugin" / "nbdnfs_plugin.py"
        if path.exists():
            return path
    raise ConfigError("nbdnfs_plugin.py is missing from this installation", "install the package nbdnfs again")


def check_nbdkit(version_info: Sequence[int] = sys.version_info[:2]) -> None:
    """Make sure that nbdkit has its Python plugin, with a Python that can load ours.

    Raises UnavailableError or ConfigError. A Python of another minor version than this one is fine (the
    extension uses the limited API of 3.11) and said at info level.
    """
    nbdkit = programs.find_program("nbdkit", "nbdkit")
    try:
        dump = programs.run([nbdkit, "python", "--dump-plugin"], what="asking nbdkit for its Python plugin")
    except NbdnfsError:
        raise UnavailableError(
            "nbdkit has no Python plugin", "install it (Debian: apt install nbdkit-plugin-python)"
        ) from None
    said = dict(line.split("=", 1) for line in dump.splitlines() if "=" in line).get("python_version", "")
    theirs = tuple(int(word) for word in said.split(".")[:2] if word.isdigit())
    if len(theirs) < 2 or theirs < (3, 11):
        raise ConfigError(
            f"nbdkit embeds Python {said or 'of unknown version'}; nbdnfs needs 3.11 or newer",
            "use nbdkit of Debian 12 or newer",
        )
    if theirs != tuple(version_info[:2]):
        log.warning(
            "nbdkit embeds Python %s, this is Python %s.%s: make the venv with /usr/bin/python3 -m venv",
            said,
            *version_info[:2],
        )


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening Unix socket at `path`, mode 0600, removed at the end.

    A socket file that nobody listens on any more is replaced. BusyError when somebody does, CannotCreateError
    when something else is there or the directory does not let us.
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
        raise CannotCreateError(f"{path} is there and is no socket", "choose another path for --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                log.info("removing the socket %s, which nobody listens on any more", path)
                path.unlink(missing_ok=True)
                return
            if error.errno in (errno.EACCES, errno.EPERM):
                raise CannotCreateError(f"the socket {path} is somebody else's", "choose another path") from None
    raise BusyError(f"somebody serves on {path} already", "end that one first, or choose another path for --socket")


def serve(
    url: str,
    socket_path: Path,
    *,
    engine: str = "c",
    threads: int = THREADS,
    settings: Mapping[str, str] = MappingProxyType({}),
    owned: bool = True,
) -> int:
    """Run a worker in the foreground until SIGINT, SIGTERM or its own end. Returns the exit status.

    On a signal the worker ends when its clients have disconnected (nbdkit(1)); on a second one at once, also
    when it waits for an unreachable server. What the worker has to say about a setting, the server or the file
    it says on stderr itself. `settings` are further ones of the plugin's, which checks them.

    With `owned` the file is claimed for this machine meanwhile: OwnedError when another one has it. The engine for
    comparison knows nothing of that.
    """
    check_nbdkit()
    text, address = worker_settings.check_url(url)
    owned = owned and engine == "c"
    more = owner_settings(text) if owned else {}
    argv = nbdkit_argv({"url": text, "address": address, "engine": engine, **more, **settings}, threads=threads)
    worker: subprocess.Popen[bytes] | None = None
    signals = 0
    patience = threading.Timer(
        _PATIENCE_S, log.warning, ["waiting for the clients to disconnect; a second signal ends at once"]
    )
    patience.daemon = True

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            patience.start()
        if worker is not None:
            worker.send_signal(signal.SIGTERM if signals == 1 else signal.SIGKILL)

    # before there is anything that a signal could leave behind
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    with listening(socket_path) as listener, _owning(url, address) if owned else contextlib.nullcontext():
        if signals:
            patience.cancel()
            return 0
        worker = programs.start_listening(argv, listener, worker_environment())
        if signals:
            worker.send_signal(signal.SIGTERM)
        listener.close()  # the worker's alone now: when it dies, connecting fails instead of hanging
        status = worker.wait()
        patience.cancel()
        return 0 if signals else status if status >= 0 else 128 - status


@contextlib.contextmanager
def _owning(url: str, address: str) -> Iterator[None]:
    """Have the file for this machine and process meanwhile. Raises as owner.claim."""
    from nbdnfs.nas import ownership  # not for keepers, which have this module in locked memory

    me, holder = owner_record.identity(), ownership.serve_holder()
    ownership.claim(url, holder, me)
    try:
        yield
    finally:
        try:
            ownership.release(url, holder, me, address=address)
        except NbdnfsError as error:
            log.warning("the owner record stays: %s", error.message)


def owner_settings(text: str) -> dict[str, str]:
    """The plugin's settings for a file that has been claimed; `text` is its URL as libnfs is to get it."""
    return owner_record.plugin_settings(text.partition("?")[0].rpartition("/")[2], owner_record.boot_id())
