# SPDX-License-Identifier: LGPL-2.1-or-later
"""A keeper connects a device to its own region, and to no other one that systemd has stored."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fake_kernel import FakeKernel
from support.fake_nfs import FakeNfsServer
from support.fake_systemd import FakeSystemd, wait_until_ended
from support.keeper_run import FakeSwap, run_keeper, until

from nbdnfs import region
from nbdnfs.config import Config
from nbdnfs.errors import BusyError
from nbdnfs.keeper import device_region
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier

PAGE = 4096
# Not zeros, and not one word again and again: such a page takes no slot.
CONTENT = {number: bytes([number + 1]) * 2048 + bytes([number + 2]) * 2048 for number in range(40)}


class Machine:
    """A server, a kernel and a PID 1, on which keepers of one device come and go: the unit's, and those of a person,
    which systemd does not know."""

    def __init__(self, server: FakeNfsServer, root: Path) -> None:
        self.kernel = FakeKernel()
        self.systemd = FakeSystemd(root)
        self.records = Records("t", run=root)
        self.over = threading.Event()
        self._config = Config("t", server.url(), lock="off", owner=False, region_pages=1024)
        self.work = self._new_work()
        self.kernel.use = lambda: "as swap" if self.work.on else ""

    def _new_work(self) -> FakeSwap:
        return FakeSwap(self._config, self._config.url, "127.0.0.1")

    def encrypt(self, is_wanted: bool) -> None:
        self._config = dataclasses.replace(self._config, encrypt=is_wanted)

    def run(self, scenario: Callable[[Keeper], None], *, by_hand: bool = False) -> None:
        """A keeper until `scenario` has ended, which hands over."""
        stored = {} if by_hand else self.systemd.hand_over()
        notifier = Notifier({} if by_hand else self.systemd.environment)
        self.records = Records("t", run=self.records.path.parent)
        self.records.make()
        is_on, self.work = self.work.on, self._new_work()
        self.work.on = is_on
        try:
            keeper = Keeper(self.kernel, self.work, self.records, Reporter(self.records, notifier), stored=stored)
            run_keeper(keeper, scenario, self.over, join_s=60)
        finally:
            notifier.close()
        if keeper._mapping is not None:
            keeper._mapping.close()

    def kill(self, key: str) -> None:
        record = self.records.living(key)
        if record is not None:
            os.kill(record.pid, signal.SIGKILL)
            wait_until_ended(record.pid)

    def down(self) -> None:
        """What `nbdnfs down` does once its keeper has ended. systemd keeps its store."""
        self.work.on = False
        if self.kernel.attached is not None:
            self.kernel.fail_requests(self.kernel.attached)
        self.kill(Records.STANDBY)
        self.kill(Records.WORKER)
        self.records.remove()

    def end(self) -> None:
        self.down()
        self.kernel.destroy()
        self.systemd.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with FakeNfsServer(bytes(4 << 20)) as server:
        made = Machine(server, tmp_path)
        yield made
        made.end()


def parked(machine: Machine) -> Callable[[Keeper], None]:
    """A scenario: the unit's keeper watches, and systemd has its region and its standby."""

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper.is_swap_on and keeper.standby.is_parked)
        assert machine.systemd.names() == ["region", "standby"]

    return scenario


def writes(machine: Machine) -> Callable[[Keeper], None]:
    """A scenario: the device gets what is to be read later."""

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper.is_swap_on)
        for number, data in CONTENT.items():
            machine.kernel.write(number * PAGE, data)
        machine.kernel.flush()

    return scenario


def reads_after_its_worker_was_killed(machine: Machine) -> Callable[[Keeper], None]:
    """A scenario: the keeper has the worker that it found, and its successor has all pages."""

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper.is_swap_on and keeper.standby.is_parked)
        assert machine.kernel.links == machine.kernel.attaches  # the worker has not been replaced
        machine.kill(Records.WORKER)
        for number, data in CONTENT.items():
            assert machine.kernel.read(number * PAGE, PAGE) == data, f"page {number}"
        until(lambda: machine.systemd.names() == ["region", "standby"])
        with_systemd = machine.systemd.hand_over()
        assert region.identity(with_systemd["region"]) == region.identity(keeper._region)
        for descriptor in with_systemd.values():
            os.close(descriptor)

    return scenario


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_stored_region_of_an_earlier_start(machine: Machine, encrypt: bool) -> None:
    """`nbdnfs down` leaves it in the store; the device has another one, of a keeper that a person has started and
    ended. The unit's next keeper takes the worker's, and stores that."""
    machine.encrypt(encrypt)
    machine.run(parked(machine))
    machine.down()
    machine.run(writes(machine), by_hand=True)
    machine.run(reads_after_its_worker_was_killed(machine))


def test_a_stored_region_when_the_worker_has_ended(machine: Machine) -> None:
    """The device's own region is gone with its worker: the other one is not taken for it, and stays stored."""
    machine.run(parked(machine))
    machine.down()
    machine.run(writes(machine), by_hand=True)
    machine.kill(Records.WORKER)
    with pytest.raises(BusyError, match="its region no longer exists"):
        machine.run(lambda keeper: until(lambda: keeper.is_swap_on))
    assert machine.systemd.names() == ["region"]
    assert machine.kernel.attached is not None


def test_a_stored_region_without_a_device(machine: Machine) -> None:
    """It is dropped: the device that is attached next gets a new one, which is stored in its place."""
    machine.run(parked(machine))
    before = machine.systemd.hand_over()
    machine.down()

    def scenario(keeper: Keeper) -> None:
        parked(machine)(keeper)
        after = machine.systemd.hand_over()
        assert region.identity(after["region"]) == region.identity(keeper._region)
        assert region.identity(after["region"]) != region.identity(before["region"])
        for descriptor in (*before.values(), *after.values()):
            os.close(descriptor)

    machine.run(scenario)


@pytest.mark.parametrize("lives", [True, False], ids=["with its worker", "without a worker"])
def test_an_upgrade_from_a_version_without_the_record(machine: Machine, lives: bool) -> None:
    """The stored region is the device's where the worker has the same one, or there is none to ask."""
    machine.run(parked(machine))
    machine.run(writes(machine))
    (machine.records.path / Records.REGION).unlink()
    if not lives:
        machine.kill(Records.WORKER)

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper.is_swap_on and keeper.standby.is_parked)
        assert machine.kernel.links == machine.kernel.attaches + (not lives)
        for number, data in CONTENT.items():
            assert machine.kernel.read(number * PAGE, PAGE) == data, f"page {number}"
        assert machine.records.read(Records.REGION) == region.identity(keeper._region)

    machine.run(scenario)


def test_an_upgrade_with_a_stored_region_of_an_earlier_start(machine: Machine) -> None:
    """There is no record, and the worker has another region than the stored one: the worker's is used."""
    machine.run(parked(machine))
    machine.down()
    machine.run(writes(machine), by_hand=True)
    (machine.records.path / Records.REGION).unlink()
    machine.run(reads_after_its_worker_was_killed(machine))


def test_the_record_is_there_before_the_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that is killed as soon as the device is attached has recorded its region."""
    recorded: list[str | None] = []
    attach = machine.kernel.attach

    def look_and_attach(*args: object) -> object:
        recorded.append(machine.records.read(Records.REGION))
        return attach(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(machine.kernel, "attach", look_and_attach)
    machine.run(lambda keeper: until(lambda: keeper.is_swap_on))
    assert recorded == [machine.records.read(Records.REGION)]
    assert recorded[0]


def test_two_regions_are_told_apart(tmp_path: Path) -> None:
    """By a copy of the descriptor, too."""
    records = Records("t", run=tmp_path)
    one, other = region.create(), region.create()
    copy = os.dup(one)
    try:
        device_region.record(records, one)
        assert device_region.find(records, copy) == copy
        assert device_region.find(records, other) is None
        assert device_region.find(records, None) is None
    finally:
        for descriptor in (one, other, copy):
            os.close(descriptor)
