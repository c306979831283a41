# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records, and the region's descriptor in other processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small_filesystem import fill, small_tmpfs
from support.want import no_descriptors

from nbdnfs import name_lock, proc_stat, region
from nbdnfs.errors import UnreadableError
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
    assert (records.path / "state").read_text() == "attach\n"
    records.write("state", "provision")
    records.write("state", "on")
    assert (records.path / "state").read_text() == "on\n"
    records.remove()
    assert records.read("state") is None


def test_reserved_records_are_no_records(records: Records) -> None:
    """They are there, with a byte each, and hold nothing; what one holds already stays."""
    records.write(Records.OWNER, "yes")
    records.reserve()
    assert {key: records.read(key) for key in Records.KEYS if records.read(key)} == {Records.OWNER: "yes"}
    assert all(records._file(key).stat().st_size for key in Records.KEYS)
    records.write(Records.STATE, "")
    assert records.read(Records.STATE) is None


@pytest.mark.parametrize("data", [b"\xff\xfe", b"swap\x80"])
def test_a_damaged_record(records: Records, data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """What is not text is as good as none, and is reported once."""
    (records.path / Records.ADDRESS).write_bytes(data)
    (records.path / Records.WORKER).write_bytes(b"1 1 " + data)
    for _ in range(2):
        assert records.read(Records.ADDRESS) is None
        assert records.living(Records.WORKER) is None
    assert capfd.readouterr().err.splitlines() == [
        f"nbdnfs: swap0: the record {records.path / key} is damaged, and is ignored"
        for key in (Records.ADDRESS, Records.WORKER)
    ]


@pytest.fixture
def small_run(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that takes next to nothing."""
    with small_tmpfs(tmp_path, 128 << 10):
        yield tmp_path


@pytest.mark.server
def test_a_full_run(small_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Reserved records are written all the same; others are kept, reported once, and written when there is room."""
    records, other = Records("swap0", run=small_run), Records("swap1", run=small_run)
    records.reserve()
    filler = fill(small_run)
    for text in ("x" * 1000, "y", "z" * 3000):
        records.write(Records.STATE, text)
        assert records.read(Records.STATE) == text
    with pytest.raises(OSError, match="No space left"):
        other.reserve()
    assert capfd.readouterr().err == ""
    for _ in range(3):
        other.put(Records.STATE, "watch")
        other.put_process(Records.KEEPER, os.getpid(), "1")
    assert other.read(Records.STATE) is None
    lines = capfd.readouterr().err.splitlines()
    assert [line.rpartition("/")[2] for line in lines] == [
        f"{key}: No space left on device; trying again until it can" for key in ("state", "keeper")
    ]
    filler.unlink()
    other.retry()
    assert other.read(Records.STATE) == "watch"
    assert other.living(Records.KEEPER) is not None


def test_what_cannot_be_read_is_not_missing(records: Records) -> None:
    """For want of descriptors: neither is there no such record, nor has its process ended, nor is there no lock."""
    records.put_process(Records.WORKER, os.getpid(), "1")
    lock = name_lock.take(records.name, name_lock.KEEPER, root=records.root, run=records.run)
    found = records.process(Records.WORKER)
    assert found is not None
    with no_descriptors():
        with pytest.raises(UnreadableError, match=r"cannot read the record \S*worker: Too many open files"):
            records.read(Records.WORKER)
        with pytest.raises(UnreadableError, match="cannot look at process"):
            found.is_alive()
        with pytest.raises(OSError, match="Too many open files"):
            name_lock.holder(records.name, name_lock.KEEPER, root=records.root, run=records.run)
        assert not records.put_process(Records.WORKER, os.getpid(), "1")
    assert records.living(Records.WORKER) == found
    os.close(lock)


def test_a_record_that_is_written_again_and_again(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read until it is the same twice; one that never is, as it was in the end."""
    records.write(Records.STATE, "")
    texts = [b"att", b"attach", b"attach", b"on", b"watch", b"swap_on"]
    monkeypatch.setattr(os, "pread", lambda *_: texts.pop(0))
    assert records.read(Records.STATE) == "attach"
    assert records.read(Records.STATE) == "swap_on"
    assert texts == []


def test_records_that_an_administrator_removes(records: Records) -> None:
    """A keeper writes them again; after its own `remove` it does not."""
    records.put(Records.DEVICE, "nbd0")
    records.put(Records.WAITING, "")
    shutil.rmtree(records.path)
    records.retry()
    assert records.read(Records.DEVICE) == "nbd0"
    records.remove()
    records.retry()
    assert not records.path.exists()


@pytest.mark.server
def test_a_read_only_run(small_run: Path) -> None:
    """What is there can be read; what is to be written waits until it can."""
    records = Records("swap0", run=small_run)
    records.reserve()
    subprocess.run(["mount", "-o", "remount,ro", small_run], check=True)
    records.put(Records.STATE, "watch")
    assert records.read(Records.STATE) is None
    subprocess.run(["mount", "-o", "remount,rw", small_run], check=True)
    records.retry()
    assert records.read(Records.STATE) == "watch"


def test_an_earlier_version_wrote_lost(records: Records) -> None:
    """It is the state that is called stolen now; other keys are not touched."""
    (records.path / "state").write_text("lost\n")
    (records.path / "device").write_text("lost\n")
    assert records.read(Records.STATE) == Records.STOLEN == "stolen"
    assert records.read(Records.DEVICE) == "lost"


@pytest.mark.parametrize("key", [Records.SAID, Records.REFUSED])
def test_no_record_has_the_name_of_another_device(tmp_path: Path, key: str) -> None:
    """What stays beside a device's folder is not where a device called NAME.said has its own."""
    Records("swap0", run=tmp_path).reserve()
    other = Records(f"swap0.{key}", run=tmp_path)
    other.reserve()
    other.write(Records.STATE, "watch")
    assert other.read(Records.STATE) == "watch"


def test_process(records: Records) -> None:
    """A living process is found; an ended one is not, nor one with another start time, nor nonsense."""
    with subprocess.Popen(["/bin/sleep", "60"]) as sleep:
        assert records.put_process("worker", sleep.pid, "1.2")
        found = records.living("worker")
        assert found is not None
        assert (found.pid, found.version) == (sleep.pid, "1.2")
        records.write("keeper", f"{sleep.pid} {found.start_time_ticks + 1} 1.2")
        assert records.living("keeper") is None
        sleep.kill()
    assert records.living("worker") is None
    assert records.process("worker") == found
    assert not records.put_process("worker", sleep.pid, "1.2")
    for text in ("", "x 1 2", "1 2", "-1 5 6", "\u00b2 1 1", f"{'9' * 5000} 1 1"):
        records.write("worker", text)
        assert records.process("worker") is None


def test_a_zombie_does_not_live(records: Records) -> None:
    """It has ended; only its parent has not looked yet."""
    child = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert proc_stat.start_time_ticks(child.pid) is None
    child.wait()


def test_no_memory_of_others_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line is in the memory of its process, which may be swapped out to the device that waits for a worker:
    it is read only of those that have the region locked."""
    seen: list[str] = []
    read = region._read

    def note_and_read(path: str) -> bytes:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(region, "_read", note_and_read)
    region_fd = region.create()
    with subprocess.Popen(["@holder", "60"], executable="/bin/sleep", pass_fds=[region_fd]) as holder:
        assert region.holder(region_fd, "@holder") is None
        assert [path for path in seen if "/fdinfo/" not in path] == []
        fcntl.flock(region_fd, fcntl.LOCK_EX)  # of the open file, which is the holder's too
        assert region.holder(region_fd, "@holder") == holder.pid
        holder.kill()
    os.close(region_fd)
    lockers = {f"/proc/{pid}/cmdline" for pid in (os.getpid(), holder.pid)}
    assert {path for path in seen if "/fdinfo/" not in path} <= lockers


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
