# SPDX-License-Identifier: LGPL-2.1-or-later
"""When the keeper tries again, how soon, and the errors of what no further try can mend.

An error is final where only a person can mend it, and nothing is lost by waiting for one. So nothing is final while the
device is attached, and nothing that a server answers before its disks are mounted. docs/decisions/0023.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

from nbdnfs.errors import NbdnfsError, OwnedError, UnavailableError, UnreadableError, is_of_want

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from nbdnfs.keeper.records import Records

    T = TypeVar("T")

# How long to wait before the next try, after so many failures in a row. There is no last try.
PAUSES_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

# A keeper that was killed is started again at once, by the unit. One that ends by itself sees to it that the next one
# is not started earlier than so long after it was, and the later time where it fails as the one before it did.
KEEPER_PACE_S, KEEPER_PACE_AGAIN_S = 1.0, 10.0

# How often, and how soon again, a keeper that comes asks what it must know before it does anything.
_LOOKS, _LOOK_AGAIN_S = 50, 0.1

# What a keeper ends with when no other try can mend it: RestartPreventExitStatus= of systemd/nbdnfs@.service.
FINAL_STATUSES = frozenset(
    {
        os.EX_USAGE,
        os.EX_NOINPUT,
        os.EX_OSFILE,
        os.EX_CANTCREAT,
        os.EX_TEMPFAIL,
        os.EX_NOPERM,
        os.EX_CONFIG,
    }
)
# How a worker or helper exits while a server's disks are not mounted yet: there is no such file, directory or export,
# or the directory that is there instead belongs to somebody else.
MISSING_STATUS, FORBIDDEN_STATUS = os.EX_NOINPUT, os.EX_NOPERM
# How `nbdnfs claim` exits where another machine, or another device of this one, owns the file: not a status of
# sysexits(3), so that it is not taken for a server that forbids something. The keeper then ends with EX_NOPERM.
OWNED_STATUS = 81
# How a line of a helper begins that says what it waits for.
WAITING = "waiting: "
# Exit statuses that another try may mend, sysexits(3). So may any signal.
_TEMPORARY = frozenset({os.EX_UNAVAILABLE, os.EX_TEMPFAIL, os.EX_NOHOST, os.EX_IOERR})
_TEMPORARY_ON_SERVER = _TEMPORARY | {MISSING_STATUS, FORBIDDEN_STATUS}


def pause_s(failures: int) -> float:
    """After so many failures in a row."""
    return PAUSES_S[min(failures, len(PAUSES_S) - 1)]


def is_final(status: int, *, on_server: bool) -> bool:
    """Whether a process with that exit status (minus the signal) fails in the same way when it is started again.

    on_server  its errors of a missing file and of a permission are about the file on the server
    """
    return status > 0 and status not in (_TEMPORARY_ON_SERVER if on_server else _TEMPORARY)


def waiting_for(status: int, error: str) -> str:
    """What the keeper waits for: a process has exited with `status` and said `error`, or would do so if it did not try
    again; one sentence."""
    text = error.removeprefix("nbdnfs: ") or f"the server cannot be used (exit status {status})"
    if status == MISSING_STATUS:
        return f"{text} (a typo, or the server's disks are not mounted yet)"
    if status == FORBIDDEN_STATUS:
        return f"{text} (or the server's disks are not mounted yet)"
    return text


def failed(what: str, status: int, lines: list[str] | None = None) -> NbdnfsError:
    """Of a process that has exited with `status`. `lines`: the last ones that it has printed, which are as of
    NbdnfsError.lines; without them, they are in the journal."""
    text, *hints = [line.removeprefix("nbdnfs: ") for line in lines or ()] or [f"exit status {status}; see its journal"]
    error = NbdnfsError(f"{what.replace('_', ' ')} failed: {text}", hints[0] if hints else "")
    error.exit_code = os.EX_NOPERM if status == OWNED_STATUS else status
    return error


def patiently(look: Callable[[], T]) -> T:
    """What `look` returns about what an earlier keeper has left. It is called again after a pause when memory or
    descriptors have run out: a wrong answer would cost swap, and another keeper needs more memory than this one.

    OSError, UnreadableError: not within five seconds.
    """
    for _ in range(_LOOKS - 1):
        try:
            return look()
        except UnreadableError:
            pass
        except OSError as error:
            if not is_of_want(error):
                raise
        time.sleep(_LOOK_AGAIN_S)
    return look()


def read_patiently(records: Records, key: str) -> str | None:
    """`Records.read`, patiently."""
    return patiently(lambda: records.read(key))


@contextlib.contextmanager
def of_machine(name: str) -> Iterator[None]:
    """UnavailableError in place of an OSError: a call has failed that the keeper cannot do without, for want of memory
    or descriptors. What is attached and in use stays."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(
            f"{name}: the keeper cannot go on: {error.strerror or error}",
            "a device that is in use stays, with its worker; the unit starts the next keeper",
        ) from None


def room_in_run(error: OSError) -> str:
    """What to do where nothing can be written in /run."""
    return "make /run writable: it is mounted read-only" if error.errno == errno.EROFS else "make room in /run"


def stolen(name: str) -> OwnedError:
    """Another machine has taken the device's file. While the device is in use as swap it stays, and every request
    fails."""
    return OwnedError(
        f"{name}: another machine has taken the backing file: swap has ended here",
        "what was swapped out is lost: reboot this machine",
    )
