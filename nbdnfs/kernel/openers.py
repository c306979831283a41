# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which processes have a device open, and which descend from which. The keeper has this module in locked memory."""

from __future__ import annotations

import os
from pathlib import Path

from nbdnfs import proc_stat
from nbdnfs.errors import UnreadableError, is_of_want
from nbdnfs.kernel.state import ROOT, names_in, read_text

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Iterator


def openers(device_path: str, root: Path = ROOT) -> list[tuple[int, str]]:
    """The processes (pid, name) that hold `device_path` open, by the names under /proc/PID/fd.

    readlink only, no stat: a descriptor may lead to a file on a share that hangs. Without root it sees the
    caller's own processes only. UnreadableError: there is no memory or descriptor to look.
    """
    return sorted(
        (int(folder.name), (read_text(folder / "comm") or "?").strip())
        for folder in _process_folders(root)
        if device_path in _open_files(folder / "fd")
    )


def descendants(pid: int, root: Path = ROOT) -> frozenset[int]:
    """The process `pid`, its children, their children and so on, as far as their parents live."""
    parents: dict[int, int] = {}
    for folder in _process_folders(root):
        field = proc_stat.fields(read_text(folder / "stat") or "")
        if proc_stat.PARENT in field:
            parents[int(folder.name)] = int(field[proc_stat.PARENT])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return frozenset(found)


def _open_files(folder: Path) -> Iterator[str]:
    """Where the symbolic links in /proc/PID/fd lead; none when the process has ended or belongs to another user."""
    for name in names_in(folder):
        try:
            yield os.readlink(folder / name)
        except OSError as error:
            if is_of_want(error):
                raise UnreadableError(f"cannot read {folder / name}: {error.strerror}") from None
            # closed meanwhile


def _process_folders(root: Path) -> Iterator[Path]:
    return (root / "proc" / name for name in names_in(root / "proc") if name.isdigit())
