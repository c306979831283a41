# SPDX-License-Identifier: LGPL-2.1-or-later
"""A suite of tests, and how one of its tests runs in a guest and is judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from vmtest import klog, swap
from vmtest.guest import Guest
from vmtest.machine import Result
from vmtest.outcome import GuestFailedError

CGROUP = "/sys/fs/cgroup/world"
# Of a guest on a busy host, and of a NAS that is slow: neither is an error.
HARMLESS = frozenset({"slow", "hung", "stall"})

Judge = Callable[[Result], tuple[str, str]]
"""The result, one of outcomes.RESULTS, and the reason."""


def last_words(result: Result) -> str:
    """The last line that a program printed, on stderr if it did so there."""
    lines = result.stderr.strip().splitlines() or result.stdout.strip().splitlines()
    return lines[-1].strip() if lines else f"exit status {result.status}"


def by_status(result: Result) -> tuple[str, str]:
    """0 is all right, anything else is not."""
    return ("passed", "") if result.status == 0 else ("failed", f"exit status {result.status}: {last_words(result)}")


@dataclass(frozen=True)
class Test:
    """A shell command. It is killed after `timeout_s`. `allow`: kinds of kernel log lines that it may cause."""

    __test__ = False  # not one of pytest's

    name: str
    command: str
    timeout_s: float
    judge: Judge = by_status
    allow: Collection[str] = frozenset()


@dataclass(frozen=True)
class Bench:
    """A guest that is ready for tests. `devices`: ours."""

    guest: Guest
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Tests that use the same guest, one after the other.

    prepare      boots a guest and gets it ready; again after a guest was lost, for the tests that are left
    tests        those that there are
    inapplicable names of tests, as the suite has them, and why they do not apply here
    """

    name: str
    prepare: Callable[[], AbstractContextManager[Bench]]
    tests: Callable[[Bench], Sequence[Test]]
    inapplicable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """`missing`: why it cannot run at all; empty if it can."""

    name: str
    parts: Sequence[Part]
    missing: str = ""


def limited(command: str) -> str:
    """The command in the memory cgroup that `limit` made."""
    return f"echo $$ > {CGROUP}/cgroup.procs; {command}"


def limit(guest: Guest, mib: int) -> None:
    """Make the memory cgroup of `limited`, as large as this; swap does not count."""
    guest.run(
        "grep -qw memory /sys/fs/cgroup/cgroup.subtree_control || echo +memory > /sys/fs/cgroup/cgroup.subtree_control;"
        f" mkdir -p {CGROUP} && echo {mib}M > {CGROUP}/memory.max"
    )


def attempt(guest: Guest, test: Test) -> tuple[str, str, float, int]:
    """Run it: result, reason, seconds, and pages that went to swap. LostGuestError when the guest is lost.

    A kernel that complains has failed, whatever the test says of itself.
    """
    allow = HARMLESS | set(test.allow)
    before = len(klog.scan(guest.kernel_log, allow))
    out = swap.counters(guest)["pswpout"]
    started = time.monotonic()
    try:
        found, why = test.judge(guest.start(test.command, test.timeout_s).wait())
    except GuestFailedError as error:
        found, why = "failed", str(error).splitlines()[0]
    seconds = time.monotonic() - started
    if complaints := klog.scan(guest.kernel_log, allow)[before:]:
        found, why = "failed", f"the kernel's log: {complaints[0]}"
    return found, why, seconds, swap.counters(guest)["pswpout"] - out
