# SPDX-License-Identifier: LGPL-2.1-or-later
"""The region's memfd as its keeper handles it: made, found again, kept in memory. Its content is the engine's."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

from nbdnfs.sizes import SLOT_BYTES

_NAME = "nbdnfs-region"


def create() -> int:
    """An empty region; the first worker lays it out. Not inherited by children unless handed down."""
    return os.memfd_create(_NAME, os.MFD_CLOEXEC)


def take_from(pid: int, root: Path = Path("/")) -> int | None:
    """A descriptor of the region that a process holds, through /proc/PID/fd; None when it holds none.

    proc_pid_fd(5): needs the rights of ptrace(2) over the process.
    """
    for path in _links_of(pid, root):
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # closed meanwhile
    return None


def is_held_by(descriptor: int, pid: int, root: Path = Path("/")) -> bool:
    """Whether a living process has this very region."""
    wanted = os.fstat(descriptor)
    for path in _links_of(pid, root):
        try:
            found = os.stat(path)
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def holder(descriptor: int, process_name: str, root: Path = Path("/")) -> int | None:
    """The process called `process_name` (its argv[0]) that has this region locked, as a worker that serves has and a
    standby has not; None when none has."""
    for folder in (root / "proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        if name == process_name and _is_locked_by(descriptor, int(folder.name), root):
            return int(folder.name)
    return None


def _is_locked_by(descriptor: int, pid: int, root: Path) -> bool:
    """proc_pid_fdinfo(5): a line "lock:" stands with the very open file that has the lock."""
    wanted = os.fstat(descriptor)
    for path in _links_of(pid, root):
        with contextlib.suppress(OSError):  # closed meanwhile
            found = os.stat(path)
            info = (path.parent.parent / "fdinfo" / path.name).read_text()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino) and "\nlock:" in info:
                return True
    return False


def _links_of(pid: int, root: Path) -> list[Path]:
    """A process's descriptors of regions."""
    folder = root / "proc" / str(pid) / "fd"
    found = []
    with contextlib.suppress(OSError):
        for number in os.listdir(folder):
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(folder / number).startswith(f"/memfd:{_NAME}"):
                    found.append(folder / number)
    return found


def is_made(descriptor: int) -> bool:
    """Whether a worker has laid it out."""
    return os.fstat(descriptor).st_size > 0


def hold_in_memory(descriptor: int) -> mmap.mmap:
    """Map all of it and touch each page, so that a process that has locked its memory (mlockall(2), FUTURE) keeps
    it there while no worker does. The pages of a memfd are swappable."""
    mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)
    for offset in range(0, len(mapping), SLOT_BYTES):
        mapping[offset]
    return mapping
