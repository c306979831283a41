# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks in /run/nbdnfs: one keeper for each device, and one command at a time that starts or stops it.

Each is flock(2) on an empty file. The kernel drops it when the process ends, in whatever way; a process that is stopped
or hangs keeps it. The files lie beside the records, which are removed while a device is taken down, and are never
removed themselves: a process that waits for the lock of a removed file would not see who has that of the next one.
No device can have such a name (config.check_name). docs/decisions/0022.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from nbdnfs.errors import BusyError, is_of_want

FOLDER = "run/nbdnfs"

# What there are locks for: to be the keeper of a device, for life; to start or stop it, as long as that takes.
KEEPER = "keeper"
COMMAND = "command"

_POLL_S = 0.02
# How often `holder` looks at a lock that it sees no process of.
_LOOKS = 5


def take(name: str, what: str, *, wait_s: float = 0.0, root: Path = Path("/"), run: Path | None = None) -> int:
    """Lock `what` of the device `name`; the descriptor that has the lock until it is closed, which children do not get.

    BusyError after `wait_s` seconds, with the process that has it. OSError where the file cannot be made or opened.
    `root` and `run` as in Records.
    """
    return _take(_path(name, what, root, run), wait_s, f"{name} is being started or stopped")


def take_all(*, wait_s: float, root: Path = Path("/"), run: Path | None = None) -> int:
    """The lock of what concerns all devices, for a moment. As `take`."""
    return _take(_folder(root, run) / ".all", wait_s, "other devices are being started")


def open_file(name: str, what: str, *, root: Path = Path("/"), run: Path | None = None) -> int:
    """The file of `take`, open and not locked, for another process to lock. OSError as `take`."""
    return _open(_path(name, what, root, run))


def holder(name: str, what: str, *, root: Path = Path("/"), run: Path | None = None) -> int | None:
    """The process that has the lock; None when none has. 0: one that cannot be seen from here. OSError: it is not
    known.

    /proc/locks has no lock of another PID namespace (fs/locks.c: locks_show), and calls the file by another device than
    stat(2) where it lies on a file system such as overlayfs. So the lock itself is asked as well.
    """
    path = _path(name, what, root, run)
    for _ in range(_LOOKS):
        try:
            found = os.stat(path)
        except OSError as error:
            if is_of_want(error):
                raise
            return None
        pid = _holder_of(found)
        if pid is not None or not _is_locked(path):
            return pid
        time.sleep(_POLL_S)  # another probe may hold it for a moment
    return 0


def _path(name: str, what: str, root: Path, run: Path | None) -> Path:
    return _folder(root, run) / f".{name}.{what}"


def _folder(root: Path, run: Path | None) -> Path:
    return root / FOLDER if run is None else run


def _take(path: Path, wait_s: float, refusal: str) -> int:
    until_s = time.monotonic() + wait_s
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_of(path, descriptor):
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= until_s:
                file = os.fstat(descriptor)
                os.close(descriptor)
                found = _holder_of(file)
                raise BusyError(
                    f"{refusal}, by {f'process {found}' if found else 'another process'}", "wait until that has ended"
                ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_POLL_S)


def _open(path: Path) -> int:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        # flock needs no permission to write: an existing file will do on a file system that is read-only
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _is_file_of(path: Path, descriptor: int) -> bool:
    """Whether the open file still has the name: an administrator may have removed it in between."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _is_locked(path: Path) -> bool:
    """Whether a process has it: it is asked for, as a shared one, and let go at once. False where the file cannot be
    opened. OSError: it is not known."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if is_of_want(error):
            raise
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _holder_of(file: os.stat_result) -> int | None:
    """By /proc/locks, proc_locks(5): "1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF", numbers of devices in hex.
    Waiting processes have an arrow in place of the kind."""
    wanted = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    with open("/proc/locks", encoding="utf-8") as locks:
        for line in locks:
            fields = line.split()
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted:
                return max(int(fields[4]), 0)
    return None
