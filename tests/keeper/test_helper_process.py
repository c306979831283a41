# SPDX-License-Identifier: LGPL-2.1-or-later
"""Helpers and workers that cannot be started, or are ended before they have been."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from support.waiting import wait_until

from nbdnfs import programs
from nbdnfs.keeper.helper_process import HelperProcess
from nbdnfs.keeper.worker_handle import WorkerHandle


@pytest.fixture(autouse=True)
def _spawner() -> None:
    programs.prepare_to_spawn()


@pytest.fixture
def region() -> Iterator[int]:
    descriptor = os.memfd_create("region")
    yield descriptor
    os.close(descriptor)


def no_room(*_: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_helper_that_cannot_be_started() -> None:
    """That is told once it is known, and no descriptor stays open."""
    before = open_descriptors()
    helper = HelperProcess(["/nowhere/helper"], {})
    errors: list[int | None] = []

    def failed() -> bool:
        try:
            return helper.status() is not None
        except OSError as error:
            errors.append(error.errno)
            return True

    wait_until(failed, "its failure")
    assert errors == [errno.ENOENT]
    assert helper.has_ended
    assert helper.lines() == []
    wait_until(lambda: open_descriptors() == before, "all descriptors are closed")


def test_the_status_of_a_helper_stays() -> None:
    """It is asked for again and again."""
    helper = HelperProcess(["/bin/sh", "-c", "exit 7"], {})
    wait_until(lambda: helper.status() is not None, "its end")
    assert (helper.status(), helper.status()) == (7, 7)
    helper.lines()
    helper.terminate()


def test_a_helper_that_is_not_wanted_any_more() -> None:
    """At any time: right after it was asked for, and while it runs. It leaves no descriptor."""
    before = open_descriptors()
    HelperProcess(["/bin/sleep", "60"], {}).terminate()
    helper = HelperProcess(["/bin/sleep", "60"], {})
    wait_until(lambda: helper.status() is None and helper.descriptors()[0] == helper.pidfd, "its start")
    helper.terminate()
    wait_until(lambda: helper.status() == -signal.SIGTERM, "its end")
    wait_until(lambda: open_descriptors() == before, "all descriptors are closed")


def test_a_helper_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at once, and what was opened is closed."""
    before = open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", no_room)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            HelperProcess(["/bin/true"], {})
    wait_until(lambda: open_descriptors() == before, "all descriptors are closed")


def test_a_worker_that_cannot_be_started(region: int) -> None:
    """It has ended, and says why; to activate or to kill it is nothing."""
    before = open_descriptors()
    worker = WorkerHandle.start("/nowhere/worker", ["worker"], {}, region)
    wait_until(worker.has_ended, "its failure")
    assert worker.start_error == os.strerror(errno.ENOENT)
    assert worker.status == 0
    worker.activate()
    worker.kill()
    worker.close()
    wait_until(lambda: open_descriptors() == before, "all descriptors are closed")


def test_a_worker_that_is_killed_before_it_runs(region: int) -> None:
    """It counts as killed, and its program is not started, or ends at once."""
    before = open_descriptors()
    worker = WorkerHandle.start(sys.executable, [sys.executable, "-c", "input()"], {}, region)
    worker.kill()
    wait_until(worker.has_ended, "its end")
    assert worker.status == -signal.SIGKILL
    wait_until(lambda: open_descriptors() == before, "all descriptors are closed")


def test_a_worker_without_a_descriptor_of_its_own(region: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none to be had for the process that was started: it is killed, and not left to serve unseen."""
    started: list[int] = []
    kill = os.kill
    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", no_room)
        patched.setattr(os, "kill", lambda pid, number: started.append(pid) or kill(pid, number))
        worker = WorkerHandle.start("/bin/sleep", ["sleep", "60"], {}, region)
        wait_until(worker.has_ended, "its failure")
    assert worker.start_error == os.strerror(errno.EMFILE)
    assert len(started) == 1
    with pytest.raises(ProcessLookupError):
        kill(started[0], 0)


def test_adopting_a_worker_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none then; where no descriptor is to be had, it is not known."""
    pid = os.spawnv(os.P_NOWAIT, "/bin/true", ["true"])
    os.waitpid(pid, 0)
    assert WorkerHandle.adopt(pid) is None
    monkeypatch.setattr(os, "pidfd_open", no_room)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        WorkerHandle.adopt(pid)
