# SPDX-License-Identifier: LGPL-2.1-or-later
"""Readers of /proc/PID on golden trees, in the formats of Linux 6.1 and 6.12."""

import os
from pathlib import Path

from nbdnfs.kernel import processes
from nbdnfs.kernel.processes import Process, Task


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def stat_line(pid: int, name: str, *, flags: int, minor: int, major: int, rt_priority: int, policy: int) -> str:
    """A line of /proc/PID/stat with 52 fields, of which those that are read have values of their own."""
    fields = ["0"] * 52
    fields[0], fields[1], fields[2] = str(pid), f"({name})", "S"
    # proc_pid_stat(5) counts from 1
    fields[9 - 1], fields[10 - 1], fields[12 - 1] = str(flags), str(minor), str(major)
    fields[40 - 1], fields[41 - 1] = str(rt_priority), str(policy)
    return " ".join(fields) + "\n"


def test_a_process(tmp_path: Path) -> None:
    """Memory from status, faults of all threads from stat, flags and policy thread by thread."""
    name = "nbdkit ) (x"
    status = f"Name:\t{name}\nVmLck:\t   14336 kB\nVmRSS:\t   14400 kB\nThreads:\t2\n"
    write(
        tmp_path,
        {
            "proc/7/status": status,
            "proc/7/oom_score_adj": "-1000\n",
            "proc/7/stat": stat_line(7, name, flags=0x40, minor=30, major=3, rt_priority=0, policy=0),
            "proc/7/task/7/stat": stat_line(7, name, flags=0x40_0040, minor=10, major=1, rt_priority=0, policy=0),
            "proc/7/task/12/stat": stat_line(12, "io", flags=0x58_0040, minor=20, major=2, rt_priority=5, policy=1),
        },
    )
    process = processes.process(7, tmp_path)
    assert process == Process(
        pid=7,
        name=name,
        locked_bytes=14336 << 10,
        resident_bytes=14400 << 10,
        minor_faults=30,
        major_faults=3,
        oom_score_adj=-1000,
        tasks=(Task(7, name, 10, 1, 0x40_0040, 0, 0), Task(12, "io", 20, 2, 0x58_0040, 5, 1)),
    )
    assert [task.io_flusher for task in process.tasks] == [False, True]


def test_a_process_that_ended(tmp_path: Path) -> None:
    """Is None, and so is one that ends between two reads."""
    assert processes.process(7, tmp_path) is None
    write(tmp_path, {"proc/7/status": "Name:\tx\n", "proc/7/stat": ""})
    assert processes.process(7, tmp_path) is None


def test_a_process_without_memory(tmp_path: Path) -> None:
    """A zombie or kernel thread has no Vm lines."""
    stat = stat_line(7, "x", flags=0, minor=0, major=0, rt_priority=0, policy=0)
    process = processes.process(7, write(tmp_path, {"proc/7/status": "Name:\tx\n", "proc/7/stat": stat}))
    assert process is not None
    assert (process.locked_bytes, process.resident_bytes, process.oom_score_adj, process.tasks) == (0, 0, 0, ())


def test_this_process() -> None:
    """On the running kernel: ourselves, with the faults that getrusage counts too."""
    process = processes.process(os.getpid())
    assert process is not None
    assert process.resident_bytes > 1 << 20
    assert process.minor_faults > 100
    assert os.getpid() in [task.tid for task in process.tasks]
