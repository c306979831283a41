# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which `nbdnfs down` takes a device down, and what it refuses before it changes anything."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from nbdnfs import name_lock
from nbdnfs.commands import systemd_unit, up_down
from nbdnfs.errors import BusyError, NbdnfsError, UnavailableError, UnreadableError
from nbdnfs.keeper.records import ProcessRecord, Records
from nbdnfs.kernel import nbd_device, swap_area
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.state import Swap
from nbdnfs.proc_stat import start_time_ticks


class Machine:
    """A device with a keeper, swapped on, without a unit. `calls` are what `down` does, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
        self.calls: list[str] = []
        self.run = run
        self.attached: Attached | None = Attached(0, 4096)
        self.swap: Swap | None = Swap("/dev/nbd0", "partition", 4096, 0, -2)
        self.other_use = ""
        self.job = "stop"
        Records("swap0", run=run).make()
        monkeypatch.setattr(Records.__init__, "__kwdefaults__", {"run": run})
        monkeypatch.setattr(name_lock.take, "__kwdefaults__", {"wait_s": 0.0, "root": Path("/"), "run": run})
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(nbd_device, "find", lambda backend: self.attached)
        monkeypatch.setattr(swap_area, "find", lambda path: self.swap)
        monkeypatch.setattr(up_down.kernel_state, "nbd_device", lambda name: object())
        monkeypatch.setattr(up_down.device_in_use, "refuse_other_uses", self.refuse_other_uses)
        monkeypatch.setattr(up_down.device_in_use, "disconnect", self.disconnect)
        monkeypatch.setattr(up_down.NbdNetlink, "open", open_nothing)
        monkeypatch.setattr(up_down, "_must_fit", lambda name: False)
        monkeypatch.setattr(swap_area, "disable", self.disable)
        monkeypatch.setattr(up_down, "_keeper", lambda records: ProcessRecord(os.getpid(), 1, "1"))
        monkeypatch.setattr(up_down, "_end", lambda record, number, what: self.calls.append(f"end {what}"))
        monkeypatch.setattr(systemd_unit, "is_active", lambda name: False)
        monkeypatch.setattr(systemd_unit, "job", lambda name: self.job)
        monkeypatch.setattr(systemd_unit, "is_shutting_down", lambda: False)
        monkeypatch.setattr(systemd_unit, "start_after_stop", lambda name: self.calls.append("start again"))

    def refuse_other_uses(self, device: object, *, ours: frozenset[int]) -> None:
        assert os.getpid() in ours, "the keeper's helpers do not count"
        if self.other_use:
            raise BusyError(self.other_use)

    def disable(self, swap: Swap, report: object) -> None:
        self.calls.append("swapoff")
        self.swap = None

    def disconnect(self, kernel: object, index: int, *, ours: frozenset[int]) -> None:
        with pytest.raises(BusyError):
            os.close(name_lock.take("swap0", name_lock.KEEPER, run=self.run))
        self.calls.append("disconnect")
        self.attached = None


def open_nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def report(left_bytes: int, total_bytes: int) -> None: ...


def test_the_order(machine: Machine) -> None:
    """No keeper can start while the device is taken down; the locks are free at the end."""
    up_down.down("swap0", report)
    steps = list(dict.fromkeys(machine.calls))  # the worker is waited for first
    assert steps == ["swapoff", "end the keeper", "disconnect", "end the worker", "end the standby"]
    assert not (machine.run / "swap0").exists()
    for what in (name_lock.KEEPER, name_lock.COMMAND):
        os.close(name_lock.take("swap0", what, run=machine.run))


def test_a_worker_that_cannot_be_looked_at(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not killed: it has not had its time to end by itself."""

    def end(record: ProcessRecord | None, number: int, what: str) -> None:
        machine.calls.append(f"end {what} {number}")
        if what == "the worker":
            raise UnreadableError("cannot look at process 7: Too many open files")

    monkeypatch.setattr(up_down, "_end", end)
    with pytest.raises(UnreadableError):
        up_down.down("swap0", report)
    assert machine.calls[-2:] == ["disconnect", "end the worker 0"]


def test_an_end_that_cannot_be_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is looked at again, and has its time."""
    refusals = [UnreadableError("cannot look at process: Too many open files")] * 3
    is_alive = ProcessRecord.is_alive

    def look(record: ProcessRecord) -> bool:
        if refusals:
            raise refusals.pop()
        return is_alive(record)

    monkeypatch.setattr(ProcessRecord, "is_alive", look)
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        started = start_time_ticks(process.pid)
        assert started is not None
        up_down._end(ProcessRecord(process.pid, started, "1"), signal.SIGTERM, "it")
        assert process.wait() == -signal.SIGTERM


@pytest.mark.parametrize("service", [False, True])
def test_what_is_in_use_stays_as_it_is(machine: Machine, service: bool) -> None:
    """dm-crypt on top: swap is not turned off, and the keeper goes on; the unit gets its keeper back."""
    machine.other_use = "/dev/nbd0 is in use by dm-0"
    with pytest.raises(BusyError, match="dm-0"):
        up_down.down("swap0", report, service=service)
    assert machine.calls == (["start again"] if service else [])
    assert (machine.run / "swap0").exists()


def test_without_proc(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is in use as swap cannot be seen: nothing is done on a guess."""
    monkeypatch.setattr(up_down.kernel_state.require_proc, "__defaults__", (tmp_path,))
    machine.swap = None
    with pytest.raises(UnavailableError, match="/proc is not mounted"):
        up_down.down("swap0", report)
    assert machine.calls == []
    assert (machine.run / "swap0").exists()


def test_a_restart_is_no_stop(machine: Machine) -> None:
    """Nothing is looked at, and no lock is needed."""
    machine.job = "restart"
    lock = name_lock.take("swap0", name_lock.COMMAND, run=machine.run)
    up_down.down("swap0", report, service=True)
    assert machine.calls == []
    os.close(lock)


def test_systemd_that_does_not_say_what_it_does(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is short of memory may take long to answer. Nothing is taken down, and the unit gets its keeper
    back."""

    def job(name: str) -> str:
        raise NbdnfsError("asking systemd for its jobs: systemctl did not end within 60 s")

    monkeypatch.setattr(systemd_unit, "job", job)
    with pytest.raises(NbdnfsError, match="asking systemd"):
        up_down.down("swap0", report, service=True)
    assert machine.calls == ["start again"]
    assert (machine.run / "swap0").exists()


@pytest.mark.parametrize("service", [False, True])
def test_one_command_at_a_time(machine: Machine, monkeypatch: pytest.MonkeyPatch, service: bool) -> None:
    """A second one is refused, with the first one's process; the unit gets its keeper back."""
    monkeypatch.setattr(up_down, "_COMMAND_WAITS_S", 0.05)
    monkeypatch.setattr(up_down, "_SERVICE_WAITS_S", 0.05)
    lock = name_lock.take("swap0", name_lock.COMMAND, run=machine.run)
    with pytest.raises(BusyError, match=f"swap0 is being started or stopped, by process {os.getpid()}"):
        up_down.down("swap0", report, service=service)
    assert machine.calls == (["start again"] if service else [])
    os.close(lock)


def test_a_keeper_that_starts_meanwhile(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the device then, and that stays."""
    lock = name_lock.take("swap0", name_lock.KEEPER, run=machine.run)
    with pytest.raises(NbdnfsError, match="already has a keeper"):
        up_down.down("swap0", report)
    assert machine.calls == ["swapoff", "end the keeper"]
    assert machine.attached is not None
    os.close(lock)
