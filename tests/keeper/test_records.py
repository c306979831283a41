# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records, and the region's descriptor in other processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from nbdnfs import proc_stat, region
from nbdnfs.keeper.records import Records


@pytest.fixture
def records(tmp_path: Path) -> Records:
    made = Records("swap0", run=tmp_path)
    made.make()
    return made


def test_text(records: Records) -> None:
    """What is written is read; what is not there is None; `remove` removes all."""
    assert records.read("state") is None
    records.write("state", "watch")
    records.write("state", "attach")
    assert records.read("state") == "attach"
    assert os.listdir(records.path) == ["state"]
    records.remove()
    assert records.read("state") is None


def test_an_earlier_version_wrote_lost(records: Records) -> None:
    """It is the state that is called stolen now; other keys are not touched."""
    (records.path / "state").write_text("lost\n")
    (records.path / "device").write_text("lost\n")
    assert records.read(Records.STATE) == Records.STOLEN == "stolen"
    assert records.read(Records.DEVICE) == "lost"


def test_process(records: Records) -> None:
    """A living process is found; an ended one is not, nor one with another start time, nor nonsense."""
    with subprocess.Popen(["/bin/sleep", "60"]) as sleep:
        records.write_process("worker", sleep.pid, "1.2")
        found = records.living("worker")
        assert found is not None
        assert (found.pid, found.version) == (sleep.pid, "1.2")
        records.write("keeper", f"{sleep.pid} {found.start_time_ticks + 1} 1.2")
        assert records.living("keeper") is None
        sleep.kill()
    assert records.living("worker") is None
    assert records.process("worker") == found
    with pytest.raises(ProcessLookupError):
        records.write_process("worker", sleep.pid, "1.2")
    for text in ("", "x 1 2", "1 2", "-1 5 6"):
        records.write("worker", text)
        assert records.process("worker") is None


def test_a_zombie_does_not_live(records: Records) -> None:
    """It has ended; only its parent has not looked yet."""
    child = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert proc_stat.start_time_ticks(child.pid) is None
    child.wait()


def test_region_in_another_process() -> None:
    """Found in /proc, distinguished from another region, taken, and looked up by the process's name and lock."""
    region_fd, other = region.create(), region.create()
    os.ftruncate(region_fd, 8192)
    with subprocess.Popen(["@holder", "60"], executable="/bin/sleep", pass_fds=[region_fd]) as holder:
        assert region.is_held_by(region_fd, holder.pid)
        assert not region.is_held_by(other, holder.pid)
        assert region.holder(region_fd, "@holder") is None
        fcntl.flock(region_fd, fcntl.LOCK_EX)  # of the open file, which is the holder's too
        assert region.holder(region_fd, "@holder") == holder.pid
        assert region.holder(other, "@holder") is None
        taken = region.take_from(holder.pid)
        holder.kill()
    assert taken is not None
    assert os.fstat(taken).st_ino == os.fstat(region_fd).st_ino
    assert not os.get_inheritable(taken)
    assert region.take_from(holder.pid) is None
    for descriptor in (region_fd, other, taken):
        os.close(descriptor)


def test_hold_in_memory() -> None:
    """All of it is mapped and resident in this process."""
    region_fd = region.create()
    assert not region.is_made(region_fd)
    os.ftruncate(region_fd, 64 * 4096)
    assert region.is_made(region_fd)
    with region.hold_in_memory(region_fd) as mapping:
        assert len(mapping) == 64 * 4096
        assert os.fstat(region_fd).st_blocks * 512 == 64 * 4096
    os.close(region_fd)
