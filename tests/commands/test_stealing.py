# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs up --steal`: nothing is taken from another machine by one that cannot use it, or does not need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.nfs_server import FileOnServer
from support.owner_records import HOLDER, QUICK, beside, machine, record_of

from nbdnfs import backing_size, config, programs
from nbdnfs.commands import starting, stealing, systemd_unit, up_down
from nbdnfs.errors import BusyError, ConfigError, NbdnfsError, OwnedError, UnavailableError
from nbdnfs.keeper import only_keeper
from nbdnfs.keeper.records import Records
from nbdnfs.kernel import nbd_device
from nbdnfs.nas import owner_record, ownership
from nbdnfs.worker import nbdkit

MIB = 1 << 20


class Machine:
    """One that could use the file, which box2 owns. What is not as it should be is set by a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, swap_file: FileOnServer, run: Path) -> None:
        self.file = swap_file
        self.records = Records("swap0", run=run)
        self.records.make()
        self.attached: nbd_device.Attached | None = None
        self.keeper: int | None = None
        self.is_active = False
        self.settings = config.Config("swap0", swap_file.url(), lock="off")
        self.start: Callable[[], None] = lambda: None
        self.owners: list[str] = []
        ownership.claim(swap_file.url(), HOLDER, machine("box2"), timing=QUICK)
        quick = {**(ownership.claim.__kwdefaults__ or {}), "timing": QUICK}
        monkeypatch.setattr(ownership.claim, "__kwdefaults__", quick)
        monkeypatch.setattr(Records.__init__, "__kwdefaults__", {"run": run})
        monkeypatch.setattr(config, "load", lambda name, root: self.settings)
        monkeypatch.setattr(systemd_unit, "is_loaded", lambda name: False)
        monkeypatch.setattr(systemd_unit, "is_active", lambda name: self.is_active)
        monkeypatch.setattr(nbd_device, "find", lambda backend, root=None: self.attached)
        monkeypatch.setattr(only_keeper, "keeper_of", lambda records: self.keeper)
        monkeypatch.setattr(stealing.nbd_driver, "load", lambda: None)
        monkeypatch.setattr(starting, "in_background", lambda name, timeout_s: self._start())

    def _start(self) -> None:
        self.owners.append(record_of(self.file).host)
        self.start()

    def still_of_box2(self) -> bool:
        return record_of(self.file).host == "box2" and not self.owners


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, swap_file: FileOnServer, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, swap_file, tmp_path)


def test_it_is_taken_before_the_keeper_starts(here: Machine) -> None:
    """And stays this machine's."""
    up_down.up("swap0", steal=True)
    assert here.owners == [owner_record.identity().host]
    assert record_of(here.file).host == owner_record.identity().host


def refuse(error: NbdnfsError) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_a_kernel_without_the_driver(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays the other machine's."""
    monkeypatch.setattr(stealing.nbd_driver, "load", refuse(UnavailableError("the kernel's nbd driver is not there")))
    with pytest.raises(UnavailableError, match="nbd driver"):
        up_down.up("swap0", steal=True)
    assert here.still_of_box2()


def test_without_nbdkit(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays the other machine's."""
    monkeypatch.setattr(nbdkit, "check_nbdkit", refuse(UnavailableError("nbdkit has no Python plugin")))
    with pytest.raises(UnavailableError, match="Python plugin"):
        up_down.up("swap0", steal=True)
    assert here.still_of_box2()


def test_memory_that_cannot_be_locked(
    here: Machine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is tried in another process, with the keeper's environment, and what the configuration leaves out is not."""
    here.settings = config.Config("swap0", here.file.url(), realtime=False)
    code = 'import os, sys; print(sys.argv[1:], os.environ["PYTHONMALLOC"], file=sys.stderr); sys.exit(78)'
    monkeypatch.setattr(programs, "python", lambda *arguments: [programs.sys.executable, "-c", code, *arguments])
    with pytest.raises(ConfigError, match="could not swap safely on this machine"):
        up_down.up("swap0", steal=True)
    assert here.still_of_box2()
    assert "['nbdnfs.commands.lock_check', 'realtime'] malloc" in capfd.readouterr().err


def test_a_file_that_is_too_large_for_this_machine(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker would refuse it."""
    monkeypatch.setattr(backing_size, "_TABLE_BYTES_PER_PAGE", 1 << 30)
    with pytest.raises(ConfigError, match="of locked memory"):
        up_down.up("swap0", steal=True)
    assert here.still_of_box2()


def test_a_device_that_is_up(here: Machine) -> None:
    """Its keeper is named, and nothing is taken."""
    here.keeper = 4711
    with pytest.raises(BusyError, match="already up"):
        up_down.up("swap0", steal=True)
    assert here.still_of_box2()


def test_a_device_whose_file_was_stolen(here: Machine) -> None:
    """What it had swapped out is gone: taking the file back would not bring it back."""
    here.attached = nbd_device.Attached(0, MIB)
    here.records.write(Records.STATE, Records.STOLEN)
    with pytest.raises(OwnedError, match="swap has ended here"):
        up_down.up("swap0", steal=True)
    assert here.still_of_box2()


@pytest.mark.parametrize("error", [UnavailableError("swap0 did not come up"), BusyError("it did not come up")])
def test_a_start_that_fails(here: Machine, error: NbdnfsError) -> None:
    """What was taken is given up, whatever the keeper's exit status was: any machine may have it."""
    here.start = refuse(error)
    with pytest.raises(type(error), match="did not come up"):
        up_down.up("swap0", steal=True)
    assert here.owners == [owner_record.identity().host]
    assert beside(here.file) == []


@pytest.mark.parametrize("why", ["systemd goes on", "the device is attached", "there is a keeper"])
def test_a_start_that_may_go_on(here: Machine, why: str) -> None:
    """What was taken stays taken."""

    def fail() -> None:
        if why == "systemd goes on":
            here.is_active = True
        elif why == "there is a keeper":
            here.keeper = 4711
        else:
            here.attached = nbd_device.Attached(0, MIB)
        raise UnavailableError("swap0 is still starting")

    here.start = fail
    with pytest.raises(UnavailableError, match="still starting"):
        up_down.up("swap0", steal=True)
    assert record_of(here.file).host == owner_record.identity().host
