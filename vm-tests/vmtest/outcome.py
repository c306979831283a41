# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can become of a test in a guest.

It *passed*, it *failed* (the guest lives and reports it: a wrong page, a command's exit status, a line in its kernel
log), or the guest is *lost* (it died, or it is silent). Lost is never counted as failed, because what a lost guest
would have reported is unknown, and never as passed.
"""

from __future__ import annotations


class HarnessError(Exception):
    """The harness itself cannot work: a program is missing, an image does not build. `hint` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message}\n{hint}")
        self.message = message
        self.hint = hint


class GuestFailedError(AssertionError):
    """The guest lives, and what it reports is not what the test asked for."""


class LostGuestError(Exception):
    """The guest died, or has been silent for longer than a living one would be."""


class HungBootError(LostGuestError):
    """The guest's kernel reports a task that hangs before the agent is there."""


class HungBootWarning(Warning):
    """A boot has hung, in which nothing of the project's runs."""
