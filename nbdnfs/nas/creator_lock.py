# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lock of this machine for creating, growing or removing one file: flock(2) on a file that other users cannot open.

It lies in /run/nbdnfs for root, and in the user's own runtime directory for others. The kernel drops it when its holder
dies. Machines are kept apart by the owner record and by hard links.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nbdnfs.errors import BusyError, CannotCreateError
from nbdnfs.nfs_url import NfsUrl

_NFS_PORT = 2049
_ROOTS_FOLDER = Path("/run/nbdnfs")
_ATTEMPTS = 100


@contextlib.contextmanager
def held(target: NfsUrl, address: str) -> Iterator[None]:
    """Hold the lock of the file. BusyError: another process has it. CannotCreateError: there is no place for it."""
    path = _path(target, address)
    descriptor = _locked(path, target)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is released: the next holder makes a new one
        os.close(descriptor)


def _path(target: NfsUrl, address: str) -> Path:
    """One path for one file, whatever the URL calls the server."""
    port = target.options.get("nfsport", _NFS_PORT)
    key = "\0".join((address, str(port), target.path)).encode(errors="surrogateescape")
    return _folder() / f".create-{hashlib.sha256(key).hexdigest()[:32]}.lock"


def _folder() -> Path:
    """A folder that only this user may write, made where it is missing."""
    user = os.geteuid()
    if user == 0:
        folder = _ROOTS_FOLDER
    else:
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        folder = Path(runtime) / "nbdnfs" if runtime.startswith("/") else Path(f"/tmp/nbdnfs-{user}")
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=user == 0)
            if user == 0:
                folder.chmod(0o755)  # whatever the umask is: a keeper's records for `status` come here, too
        found = folder.lstat()
    except OSError as error:
        raise _no_lock(folder, error) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise CannotCreateError(
            f"{folder} is not a folder that only uid {user} may write: no place for a lock",
            "remove it" if user == 0 else "remove it, or set XDG_RUNTIME_DIR to a folder of yours",
        )
    return folder


def _no_lock(path: Path, error: OSError) -> CannotCreateError:
    """The error for a folder or file that could not be made. Only root's folder is fixed."""
    match error.errno:
        case errno.EROFS:
            hint = f"make {path.parent} writable: it is on a file system that is mounted read-only"
        case errno.ENOSPC | errno.EDQUOT:
            hint = f"free space in {path.parent}"
        case errno.EEXIST | errno.ENOTDIR | errno.ELOOP:
            hint = "remove what is in the way there"
        case _:
            hint = f"see why {path.parent} takes no file"
    if os.geteuid() != 0:
        hint += "; or set XDG_RUNTIME_DIR to a folder of yours"
    return CannotCreateError(f"cannot make {path} for a lock: {error.strerror}", hint)


def _locked(path: Path, target: NfsUrl) -> int:
    """A descriptor of the file that has the name now, locked."""
    for _ in range(_ATTEMPTS):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _no_lock(path, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            break
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == path.lstat().st_ino:
                return descriptor
        os.close(descriptor)  # its last holder has just removed it
    raise BusyError(
        f"another process on this machine is creating {target.path} on {target.host}", "wait until it has finished"
    )
