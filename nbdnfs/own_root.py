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

import _thread

from nbdnfs import _own_root, memlock

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdnfs.errors import NbdnfsError


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
        """Have everything again, at the end."""
        if self._before is not None:
            try:
                _own_root.leave(self._before)
            except OSError as error:
                self._say(f"cannot return to the root file system: {error.strerror}")
            self._before = None


class Outside:
    """A thread that keeps the root that a standby leaves, for the one thing that is imported later: what explains an
    error. OSError where it cannot give up its privileges: it has none that the others have not."""

    def __init__(self) -> None:
        self._wanted, self._done = _thread.allocate_lock(), _thread.allocate_lock()
        self._work: Callable[[], NbdnfsError] | None = None
        self._result: NbdnfsError | None = None
        self._failure: BaseException | None = None
        self._wanted.acquire()
        self._done.acquire()
        _thread.start_new_thread(self._wait, ())
        self._done.acquire()  # it has given up its privileges, or has failed to; each is soon
        if self._failure is not None:
            raise self._failure

    def run(self, work: Callable[[], NbdnfsError]) -> NbdnfsError:
        """Call `work` there. Once; it takes as long as `work` does."""
        self._work = work
        self.end()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure
        assert self._result is not None
        return self._result

    def end(self) -> None:
        """It is not needed any more."""
        self._wanted.release()

    def _wait(self) -> None:
        try:
            memlock.drop_privileges()
        except OSError as error:
            self._failure = error
            self._done.release()
            return
        self._done.release()
        self._wanted.acquire()  # for ever: until there is an error to explain, or the engine is open
        try:
            if self._work is not None:
                self._result = self._work()
        except BaseException as error:
            self._failure = error
        self._done.release()
