# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks in /run/nbdnfs, between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.want import no_descriptors

from nbdnfs import name_lock
from nbdnfs.errors import BusyError

# Takes the lock, starts a child as the keeper does (with Spawn) and one as commands do, and says so.
HOLDER = """
import os, sys, time
from pathlib import Path
from nbdnfs import name_lock, programs
name_lock.take("swap0", name_lock.KEEPER, run=Path(sys.argv[1]))
null = os.open(os.devnull, os.O_RDWR)
spawn = programs.Spawn("/bin/sleep", ["sleep", "60"], {}, dict.fromkeys(range(3), null))
while not spawn.is_over():
    time.sleep(0.01)
first = spawn.pid
second = programs.start(["/bin/sleep", "60"], {}).pid
print(first, second, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the keeper's lock of swap0, with two children."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        yield process
        process.kill()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    assert len(children) == 2


def take(run: Path, what: str = name_lock.KEEPER, name: str = "swap0") -> None:
    os.close(name_lock.take(name, what, run=run))


def test_a_second_process_is_refused(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """With the process that has the lock; another device, and another lock of the same one, are free."""
    with pytest.raises(BusyError, match=rf"by process {holder.pid}\b"):
        take(tmp_path)
    assert name_lock.holder("swap0", name_lock.KEEPER, run=tmp_path) == holder.pid
    assert name_lock.holder("swap1", name_lock.KEEPER, run=tmp_path) is None
    take(tmp_path, name="swap1")
    take(tmp_path, name_lock.COMMAND)
    assert name_lock.holder("swap1", name_lock.KEEPER, run=tmp_path) is None


def test_a_stopped_process_keeps_the_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """SIGSTOP: it may go on at any time."""
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(BusyError, match=rf"by process {holder.pid}\b"):
        take(tmp_path)


def test_the_lock_of_a_dead_process_is_free_at_once(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """Although its children live."""
    holder.kill()
    holder.wait()
    take(tmp_path)


def test_a_removed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a file that was removed between open and flock is worth nothing: it is taken again."""
    real: Callable[[Path], int] = name_lock._open
    opened: list[int] = []

    def removed_at_first(path: Path) -> int:
        opened.append(real(path))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(name_lock, "_open", removed_at_first)
    descriptor = name_lock.take("swap0", name_lock.KEEPER, run=tmp_path)
    assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / ".swap0.keeper"))
    assert len(opened) == 2
    os.close(descriptor)


def test_waits_for_the_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """For as long as the caller says."""
    assert holder.stdin is not None
    holder.stdin.close()  # it ends soon
    os.close(name_lock.take("swap0", name_lock.KEEPER, wait_s=20, run=tmp_path))


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Another user who could open it could lock it."""
    take(tmp_path / "new")
    assert (tmp_path / "new/.swap0.keeper").stat().st_mode & 0o777 == 0o600
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new/.swap0.keeper"]


def test_a_holder_that_cannot_be_seen(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/locks calls the file by another device, as for one on overlayfs: that a process has the lock is known."""
    monkeypatch.setattr(name_lock, "_holder_of", lambda file: None)
    assert name_lock.holder("swap0", name_lock.KEEPER, run=tmp_path) == 0
    assert name_lock.holder("swap1", name_lock.KEEPER, run=tmp_path) is None
    with pytest.raises(BusyError, match="by another process"):
        take(tmp_path)
    holder.kill()
    holder.wait()
    assert name_lock.holder("swap0", name_lock.KEEPER, run=tmp_path) is None
    take(tmp_path)


def test_one_that_looks_for_a_moment_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may try the lock just when this one does."""
    take(tmp_path)
    looks: list[bool] = [True, True]
    monkeypatch.setattr(name_lock, "_is_locked", lambda path: bool(looks) and looks.pop())
    assert name_lock.holder("swap0", name_lock.KEEPER, run=tmp_path) is None
    assert looks == []


def test_no_descriptor_to_look_with(tmp_path: Path) -> None:
    """Whether a process has the lock is not known then."""
    take(tmp_path)
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        name_lock.holder("swap0", name_lock.KEEPER, run=tmp_path)
