# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes and their threads, as /proc shows them. Readers only; the folder that stands for "/" is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbdnfs import proc_stat
from nbdnfs.kernel.state import ROOT, read_int, read_text


@dataclass(frozen=True)
class Task:
    """One thread: /proc/PID/task/TID/stat, proc_pid_stat(5)."""

    tid: int
    name: str
    minor_faults: int
    major_faults: int
    flags: int
    rt_priority: int
    policy: int

    @property
    def io_flusher(self) -> bool:
        """Whether prctl(PR_SET_IO_FLUSHER) is in force: its allocations do not enter I/O."""
        return proc_stat.is_io_flusher(self.flags)


@dataclass(frozen=True)
class Process:
    """/proc/PID: status, stat, oom_score_adj. The faults are those of all threads, ended ones too."""

    pid: int
    name: str
    locked_bytes: int
    resident_bytes: int
    minor_faults: int
    major_faults: int
    oom_score_adj: int
    tasks: tuple[Task, ...]


def process(pid: int, root: Path = ROOT) -> Process | None:
    """The process `pid` now, or None when it has ended."""
    folder = root / "proc" / str(pid)
    status = read_text(folder / "status")
    whole = _read_task(folder / "stat")
    if status is None or whole is None:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines())
    tids = sorted(int(path.name) for path in (folder / "task").glob("[0-9]*"))
    tasks = (_read_task(folder / "task" / str(tid) / "stat") for tid in tids)
    return Process(
        pid=pid,
        name=whole.name,
        # a process that is ending, or a kernel thread, has no memory and no such lines
        locked_bytes=int(fields.get("VmLck", "0").split()[0]) * 1024,
        resident_bytes=int(fields.get("VmRSS", "0").split()[0]) * 1024,
        minor_faults=whole.minor_faults,
        major_faults=whole.major_faults,
        oom_score_adj=read_int(folder / "oom_score_adj") or 0,
        tasks=tuple(task for task in tasks if task is not None),
    )


def _read_task(path: Path) -> Task | None:
    text = read_text(path)
    if not text:
        return None
    field = proc_stat.fields(text)
    return Task(
        tid=int(field[proc_stat.PID]),
        name=field[proc_stat.NAME],
        minor_faults=int(field[proc_stat.MINOR_FAULTS]),
        major_faults=int(field[proc_stat.MAJOR_FAULTS]),
        flags=int(field[proc_stat.FLAGS]),
        rt_priority=int(field[proc_stat.REALTIME_PRIORITY]),
        policy=int(field[proc_stat.POLICY]),
    )
