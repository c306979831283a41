# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception tree: what is wrong, what to do about it, and the exit status of sysexits(3).

    NbdnfsError                   EX_SOFTWARE
    ├─ UsageError                 EX_USAGE
    ├─ ConfigError                EX_CONFIG
    ├─ NoInputError               EX_NOINPUT
    ├─ NoHostError                EX_NOHOST
    ├─ UnavailableError           EX_UNAVAILABLE
    │  ├─ NoMemoryError
    │  └─ UnreadableError
    ├─ CannotCreateError          EX_CANTCREAT
    ├─ IOFailureError             EX_IOERR
    ├─ PermissionDeniedError      EX_NOPERM
    │  └─ OwnedError
    └─ BusyError                  EX_TEMPFAIL

`cli.main` prints one of these and exits with its status; the programs in keeper/helpers do so for themselves. Imports
the standard library only: the worker has this module too.
"""

from __future__ import annotations

import errno
import os

_OF_WANT = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EAGAIN, errno.EINTR})


def is_of_want(error: OSError) -> bool:
    """Whether a call has failed for want of memory or descriptors: it says nothing of what it was asked for, and may go
    well the next time."""
    return error.errno in _OF_WANT


class EndedBySignal(KeyboardInterrupt):
    """The signal `number`, SIGINT or SIGTERM, has ended what the command did. It unwinds, so that what has been begun
    is brought to its end, and `cli.main` then ends the process by that signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


class NbdnfsError(Exception):
    """An error that the user can understand and, in most cases, fix.

    message    one line: what is wrong
    hint       one line: what to do; "" where there is nothing to say
    exit_code  one of sysexits(3)
    """

    exit_code: int = os.EX_SOFTWARE

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = _printable(message)
        self.hint = _printable(hint)
        super().__init__(self.message)

    def lines(self) -> list[str]:
        """What to print on stderr: one line, or two where there is a hint."""
        return [f"nbdnfs: {text}" for text in (self.message, self.hint) if text]


def _printable(text: str) -> str:
    """On one line, whatever name the text quotes: a file's may have any byte."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


class UsageError(NbdnfsError):
    """The command line, or a value in it, is not valid."""

    exit_code = os.EX_USAGE


class ConfigError(NbdnfsError):
    """A configuration file, the installation or the machine is not fit for use."""

    exit_code = os.EX_CONFIG


class NoInputError(NbdnfsError):
    """An input does not exist, or is not of the expected kind: a file, a socket, a device."""

    exit_code = os.EX_NOINPUT


class NoHostError(NbdnfsError):
    """The server's name does not resolve."""

    exit_code = os.EX_NOHOST


class UnavailableError(NbdnfsError):
    """A server, a program or a kernel feature is not available; it may be later."""

    exit_code = os.EX_UNAVAILABLE


class NoMemoryError(UnavailableError):
    """The kernel had no memory or descriptors for a request: `is_of_want`. The same one may go well the next time."""


class UnreadableError(UnavailableError):
    """What the kernel has to say cannot be read now: `is_of_want`, or /sys is not mounted. It is not known, neither so
    nor otherwise."""


class CannotCreateError(NbdnfsError):
    """An output file cannot be created: it exists, the NAS is full, or a quota is used up."""

    exit_code = os.EX_CANTCREAT


class IOFailureError(NbdnfsError):
    """A transfer failed, and is not retried."""

    exit_code = os.EX_IOERR


class PermissionDeniedError(NbdnfsError):
    """The kernel or the NAS denies access."""

    exit_code = os.EX_NOPERM


class OwnedError(PermissionDeniedError):
    """Another machine owns the backing file, or another user of it on this machine. A retry does not help."""


class BusyError(NbdnfsError):
    """A device or file is in use; a retry helps once it is not."""

    exit_code = os.EX_TEMPFAIL
