# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a guest's kernel log for what must not be in it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# What each kind looks like. The texts are the kernel's own; the file that prints them stands beside them.
_KINDS: dict[str, str] = {
    # kernel/panic.c, arch/x86/kernel/traps.c, lib/bug.c
    "panic": r"Kernel panic - not syncing",
    "oops": r"\bOops:|\bBUG: |kernel BUG at|general protection fault|Unable to handle kernel|double fault",
    "warning": r"WARNING: (CPU|possible|suspicious)",
    # kernel/hung_task.c, kernel/watchdog.c, kernel/workqueue.c, kernel/rcu/tree_stall.h
    "hung": r"blocked for more than \d+ seconds",
    "stall": r"soft lockup|hard LOCKUP|workqueue lockup|rcu.* (self-)?detected .*stall",
    # mm/oom_kill.c, mm/page_alloc.c
    "oom": r"oom-kill:|[Oo]ut of memory: Killed|\binvoked oom-killer",
    "nomem": r"page allocation failure|page allocation stalls",
    # block/blk-core.c, mm/page_io.c, fs/buffer.c
    "io": r"^(?!.*\bdm-\d).*(I/O error|(Read|Write)-error on swap-device|lost async page write)",
    # the same of a device-mapper target, which may be there to make errors; one of what lies under it is an "io"
    "dm": r"\bdm-\d.*(I/O error|lost async page write)|(I/O error|lost async page write).*\bdm-\d",
    # drivers/block/nbd.c; "shutting down sockets" is not an error, every detach ends with it
    "nbd": r"\bnbd\d*: .*(error|failed|[Tt]imed out|timeout|Dead connection|invalid socket)",
    # drivers/block/nbd.c: a request has taken longer than queue/io_timeout, not an error while there is no TIMEOUT
    "slow": r"\bnbd\d*: Possible stuck request",
    # mm/swapfile.c, mm/memory.c: a page table that holds no page
    "swap": r"swap_info_get: |Bad swap (file|offset) entry|Bad page (map|state)|swap_free: ",
    # what a keeper without systemd writes to /dev/kmsg
    "traceback": r"Traceback \(most recent call last\)",
    # kernel/locking/lockdep.c
    "lockdep": r"(possible recursive|possible circular|inconsistent) lock|lock held when returning to user space",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}

KINDS = frozenset(_KINDS)


@dataclass(frozen=True)
class Finding:
    """One line of a kernel log that reports a problem."""

    kind: str
    line: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.line}"


def scan(log: str, allow: Collection[str] = ()) -> list[Finding]:
    """What `log` holds of the KINDS, less those in `allow`; one finding a line, in the log's order.

    ValueError for an allowance that is not a kind: it would allow nothing, silently.
    """
    if unknown := set(allow) - KINDS:
        raise ValueError(f"no such kind: {', '.join(sorted(unknown))}")
    return [
        Finding(kind, line.strip())
        for line in log.splitlines()
        for kind, pattern in _PATTERNS.items()
        if kind not in allow and pattern.search(line)
    ]
