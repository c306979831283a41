# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception tree: what is wrong, what to do about it, and the exit status of sysexits(3).

`cli.main` is the only place that turns one of these into two lines on stderr and a `sys.exit`.
Standard library only: the worker imports this module too.
"""

from __future__ import annotations

import os


class NbdnfsError(Exception):
    """Something the user can understand and, mostly, mend.

    `message` says in one line what is wrong, `hint` in one line what to do ("" where nothing can be said),
    `exit_code` is one of sysexits(3).
    """

    exit_code: int = os.EX_SOFTWARE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def lines(self) -> list[str]:
        """What to print on stderr: one line, or two where there is a hint."""
        return [f"nbdnfs: {text}" for text in (self.message, self.hint) if text]


class UsageError(NbdnfsError):
    """The command line or a value in it is wrong."""

    exit_code = os.EX_USAGE


class ConfigError(NbdnfsError):
    """A configuration file or the installation does not fit."""

    exit_code = os.EX_CONFIG


class NoInputError(NbdnfsError):
    """A file that should be there is not, or is something else than a regular file."""

    exit_code = os.EX_NOINPUT


class NoHostError(NbdnfsError):
    """The server's name does not resolve."""

    exit_code = os.EX_NOHOST


class UnavailableError(NbdnfsError):
    """A server, a program or a kernel feature is not there; it may be later."""

    exit_code = os.EX_UNAVAILABLE


class CannotCreateError(NbdnfsError):
    """An output file cannot be made: it exists, the NAS is full, a quota is used up."""

    exit_code = os.EX_CANTCREAT


class IOFailureError(NbdnfsError):
    """A transfer failed for good."""

    exit_code = os.EX_IOERR


class PermissionDeniedError(NbdnfsError):
    """The kernel or the NAS refuses."""

    exit_code = os.EX_NOPERM


class OwnedError(PermissionDeniedError):
    """Another machine owns the backing file, or something else on this one. Trying again does not help."""


class BusyError(NbdnfsError):
    """The thing is in use; try again when it is not."""

    exit_code = os.EX_TEMPFAIL
