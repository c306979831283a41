# SPDX-License-Identifier: LGPL-2.1-or-later
"""A root without the root's server: for the thread of a keeper's loop while swap is on, and for a worker.

Each path begins at "/". Where that is an NFS mount, the kernel asks its server, when what it knows is some seconds old,
whether the process may pass "/" and whether "proc" is still there (fs/nfs/dir.c: nfs_permission and
nfs_lookup_revalidate): a look at /proc/swaps waits for a root whose server is away. So the thread gets a mount
namespace of its own, with a tmpfs as "/" that has /dev, /proc, /run and /sys, and nothing else. Other mounts are not in
it, so it keeps none busy.

Threads that were there before keep the root: the one that starts programs among them (nbdnfs/_spawner.c).
"""

from __future__ import annotations

import contextlib

from nbdnfs import _own_root

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Callable


class OwnRoot:
    """Used by one thread. `say` is given the reason, where there can be no such root."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: int | None = None

    def enter(self) -> None:
        """From here on what is imported, or opened elsewhere, does not exist."""
        if self._before is not None:
            return
        try:
            self._before = _own_root.enter()
        except OSError as error:
            self._say(
                f"cannot leave the root file system ({error.strerror}): where that is on NFS, and its server does not"
                " answer, a worker that dies is not replaced"
            )

    def leave(self) -> None:
        """Have everything again: to take a device down, and to explain an error."""
        if self._before is not None:
            with contextlib.suppress(OSError):
                _own_root.leave(self._before)
            self._before = None
