# SPDX-License-Identifier: LGPL-2.1-or-later
"""When the keeper tries again, how soon, and the errors of what no further try can mend."""

from __future__ import annotations

import os

from nbdnfs.errors import NbdnfsError, OwnedError

# How long to wait before the next try, after so many failures in a row. There is no last try.
PAUSES_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

# Exit statuses of a worker or helper that another try may mend, sysexits(3). So may any signal.
_TEMPORARY = frozenset({os.EX_UNAVAILABLE, os.EX_TEMPFAIL, os.EX_NOHOST, os.EX_IOERR})


def pause_s(failures: int) -> float:
    """After so many failures in a row."""
    return PAUSES_S[min(failures, len(PAUSES_S) - 1)]


def is_final(status: int) -> bool:
    """Whether a process with that exit status (minus the signal) fails in the same way when it is started again."""
    return status > 0 and status not in _TEMPORARY


def failed(what: str, status: int) -> NbdnfsError:
    """A process has printed what is wrong on the same stderr: this error adds its exit status, and no details."""
    error = NbdnfsError(f"{what.replace('_', ' ')} failed, see above")
    error.exit_code = status
    return error


def stolen(name: str) -> OwnedError:
    """Another machine has taken the device's file. While the device is in use as swap it stays, and every request
    fails."""
    return OwnedError(
        f"{name}: another machine has taken the backing file: swap has ended here",
        "what was swapped out is lost: reboot this machine",
    )
