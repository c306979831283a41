# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks of `nbdnfs doctor` that concern one process, a worker or a keeper.

Is its memory locked, is it safe from the OOM killer, marked as an IO flusher, and scheduled before others?
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nbdnfs import memlock, quantities, region
from nbdnfs.commands.findings import Finding, judge, read_text
from nbdnfs.kernel import processes
from nbdnfs.kernel.processes import Process

_KIB, _MIB = 1 << 10, 1 << 20

_REALTIME = {1: "SCHED_FIFO", 2: "SCHED_RR"}  # include/uapi/linux/sched.h
_BUDGET_BYTES = 64 * _MIB

_RESTART = "start it as root, without lock=off and without="


def workers_by_hand(root: Path) -> list[int]:
    """The pids of all nbdkit processes with our plugin, whatever started them."""
    folders = (root / "proc").glob("[0-9]*")
    return sorted(int(folder.name) for folder in folders if _is_worker(folder))


def _is_worker(folder: Path) -> bool:
    """Whether /proc/PID is that of an nbdkit with our plugin.

    A command line is in the process's own memory. Where that has been swapped out to a device that stands still,
    reading it waits for ever, and doctor is run just then. So it is read of an nbdkit only, which has nothing swapped
    out: of another one only that it has a region counts.
    """
    if read_text(folder / "comm") != "nbdkit":
        return False
    if re.search(r"(?m)^VmSwap:\s+[1-9]", read_text(folder / "status") or ""):
        return _has_region(folder)
    words = (read_text(folder / "cmdline") or "").split("\0")
    return any(word.endswith("nbdnfs_plugin.py") for word in words)


def _has_region(folder: Path) -> bool:
    try:
        descriptor = region.take_from(int(folder.name), folder.parents[1])
    except OSError:
        return False
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def process(subject: str, pid: int, root: Path, *, realtime: bool) -> Iterator[Finding]:
    """The checks of the process `pid`; none when it has ended. `realtime`: whether it should have such a policy."""
    found = processes.process(pid, root)
    if found is None:
        return
    yield _locked(subject, found, root)
    yield Finding(
        f"{subject}, faults",
        True,
        f"{found.major_faults} from disk and {found.minor_faults} others since it started"
        " (these should not grow while it swaps)",
    )
    yield judge(
        f"{subject}, OOM score",
        found.oom_score_adj == memlock.OOM_IMMUNE,
        f"oom_score_adj {found.oom_score_adj}",
        f"{_RESTART} (oom)",
    )
    flushers = sum(task.io_flusher for task in found.tasks)
    yield judge(
        f"{subject}, IO flusher",
        flushers == len(found.tasks),
        f"{flushers} of {len(found.tasks)} threads",
        f"allocations of the other threads may wait for swap: {_RESTART} (io flusher)",
    )
    policies = {_REALTIME.get(task.policy, "ordinary") for task in found.tasks}
    yield judge(
        f"{subject}, scheduling",
        "ordinary" not in policies or not realtime,
        ", ".join(sorted(policies)),
        f"it may wait for a CPU, and for the last free pages: {_RESTART} (realtime)",
    )


def _locked(subject: str, process: Process, root: Path) -> Finding:
    """VmLck is the size of the locked mappings, touched or not (mm/mlock.c). "Locked" in smaps_rollup counts the pages
    that are resident (fs/proc/task_mmu.c: smaps_account); only root may read it.
    """
    rollup_path = root / "proc" / str(process.pid) / "smaps_rollup"
    rollup = dict(re.findall(r"^(Rss|Locked): +(\d+) kB", read_text(rollup_path) or "", re.MULTILINE))
    size = quantities.format_size
    if not process.locked_bytes:
        return Finding(f"{subject}, memory", False, f"not locked, {size(process.resident_bytes)} resident", _RESTART)
    if len(rollup) < 2:
        return Finding(f"{subject}, memory", True, f"VmLck {size(process.locked_bytes)} (root sees more)")
    locked, resident = (int(rollup[key]) * _KIB for key in ("Locked", "Rss"))
    return judge(
        f"{subject}, memory",
        resident <= _BUDGET_BYTES,
        f"{size(locked)} of {size(resident)} resident are locked (VmLck {size(process.locked_bytes)})",
        f"more than the {size(_BUDGET_BYTES)} that it should need: configure a smaller region, fewer threads,"
        " or a smaller file (each GiB of it takes a little over 2 MiB, half of that with encrypt = false)",
    )
