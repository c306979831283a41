# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/stat: fields by number, and when a process began."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.want import no_descriptors

from nbdnfs import proc_stat


@pytest.mark.parametrize("name", ["cat", "a b", "x) S 1 (", ")"])
def test_fields(name: str) -> None:
    """Numbers are those of the manual page, whatever the name has in it."""
    numbers = " ".join(str(number) for number in range(4, 53))
    found = proc_stat.fields(f"17 ({name}) S {numbers}\n")
    assert (found[proc_stat.PID], found[proc_stat.NAME], found[proc_stat.STATE]) == ("17", name, "S")
    assert all(found[number] == str(number) for number in range(4, 53))


def test_empty_file() -> None:
    """What a process that has just ended may leave: no state."""
    assert proc_stat.STATE not in proc_stat.fields("")


@pytest.mark.parametrize(
    ("flags", "expected"), [(0, False), (0x0008_0000, False), (0x0010_0000, False), (0x0058_0140, True)]
)
def test_io_flusher_needs_both_flags(flags: int, expected: bool) -> None:
    """PF_MEMALLOC_NOIO alone is what any task has inside memalloc_noio_save()."""
    assert proc_stat.is_io_flusher(flags) is expected


def test_start_time() -> None:
    """Of a running process the same each time and later than init's; of a zombie and of an ended one, None."""
    ticks = proc_stat.start_time_ticks(os.getpid())
    assert ticks is not None
    assert proc_stat.start_time_ticks(os.getpid()) == ticks
    assert 0 < ticks <= time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
    child = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert proc_stat.start_time_ticks(child.pid) is None
    child.wait()
    assert proc_stat.start_time_ticks(child.pid) is None
    assert proc_stat.start_time_ticks(10**300) is None, "a number that no process has, from a damaged record"


def test_start_time_that_cannot_be_read() -> None:
    """Not None: the process has not ended."""
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        proc_stat.start_time_ticks(os.getpid())


def test_start_time_in_another_root(tmp_path: Path) -> None:
    """An empty file is a process that has ended."""
    folder = tmp_path / "proc/7"
    folder.mkdir(parents=True)
    (folder / "stat").write_text("")
    assert proc_stat.start_time_ticks(7, tmp_path) is None
    (folder / "stat").write_text("7 (x) S " + "0 " * 18 + "1234 0\n")
    assert proc_stat.start_time_ticks(7, tmp_path) == 1234


def test_imports_nothing() -> None:
    """The locked worker pays for every import."""
    code = "import sys, nbdnfs; before = set(sys.modules); import nbdnfs.proc_stat; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "{'nbdnfs.proc_stat'}\n"
