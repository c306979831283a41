# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's journal, and tracebacks in it. What keepers log without systemd is in the kernel's log: klog.py."""

from __future__ import annotations

from vmtest.machine import Machine
from vmtest.outcome import GuestFailedError

TRACEBACK = "Traceback (most recent call last)"
# Not at the beginning of a line: keeper and nbdkit put a text of their own before what others print.
COUNT_TRACEBACKS = f"journalctl -b -q --no-pager -o cat | grep -cF '{TRACEBACK}'"

_TIMEOUT_S = 400


def keep_on_disk(machine: Machine) -> None:
    """Have the journal outlive a boot, and lose nothing while /run, where it lies otherwise, is full."""
    machine.run("mkdir -p /var/log/journal && journalctl --flush", _TIMEOUT_S)


def refuse_tracebacks(machine: Machine) -> None:
    """GuestFailedError when this boot's journal has a traceback, of whichever process, with the lines after it; or when
    it cannot be read."""
    command = (
        "journalctl -b -q --no-pager -n 1 >/dev/null || exit 2; "
        f"journalctl -b -q --no-pager -o short-monotonic | grep -F -A 20 '{TRACEBACK}'"
    )
    found = machine.run(command, _TIMEOUT_S, check=False)
    if found.status != 1:  # grep(1): no line is selected
        raise GuestFailedError(f"there is a traceback in the journal:\n{found.stdout}{found.stderr}")
