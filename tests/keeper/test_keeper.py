# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper's steps and its connection, with a fake kernel and fake workers, which are real processes."""

from __future__ import annotations

import errno
import functools
import itertools
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.fake_journal import FakeJournal
from support.fake_kernel import FakeKernel
from support.keeper_run import run_keeper
from support.small_filesystem import fill, small_tmpfs
from support.waiting import wait_until

from nbdnfs import proc_stat
from nbdnfs.errors import (
    BusyError,
    NbdnfsError,
    NoMemoryError,
    OwnedError,
    PermissionDeniedError,
    UnavailableError,
    UnreadableError,
)
from nbdnfs.keeper import events, failures, silence
from nbdnfs.keeper import keeper as keeper_module
from nbdnfs.keeper import serving as serving_module
from nbdnfs.keeper.helper_process import HelperProcess
from nbdnfs.keeper.journal import Journal
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from nbdnfs.keeper.standby import Standby
from nbdnfs.keeper.worker_handle import WorkerHandle, recipe
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.nbd_handshake import Export
from nbdnfs.worker.protocol import STOLEN_STATUS

FAKE_WORKER = str(Path(__file__).resolve().parents[1] / "support/fake_worker.py")
SIZE_BYTES = 1 << 20


class FakeWork:
    """keeper.Work. Behaviours and exit statuses are taken from the lists, the last of each again and again."""

    def __init__(self) -> None:
        self.behaviours = ["serve"]
        self.provisions: list[int] = []
        self.provision_again = False
        self.says: tuple[str, ...] = ()
        self.progresses: list[str] = []
        self.swap_ons = [0]
        self.on = False
        self.away = False
        self.times = (0, 0)
        self.addresses = [""]
        self.resolves = 0
        self.started: list[WorkerHandle] = []

    def start_worker(self, region_fd: int) -> WorkerHandle:
        behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        if behaviour == "none":
            raise OSError(12, "Cannot allocate memory")
        if os.fstat(region_fd).st_size == 0:
            os.ftruncate(region_fd, 8192)
        process = WorkerHandle.start(sys.executable, ["@fake", FAKE_WORKER, behaviour], dict(os.environ), region_fd)
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Of the workers whose processes the keeper has seen to have started."""
        return [process.pid for process in self.started if process._pid]

    def take_worker(self, parked: int) -> WorkerHandle | None:
        return WorkerHandle.take(parked, recipe(["@fake", FAKE_WORKER, self.behaviours[0]]))

    def provision(self) -> HelperProcess | None:
        if self.provision_again and len(self.provisions) == 1:
            return self._exits(self.provisions[0])
        return self._exits(self.provisions.pop(0)) if self.provisions else None

    def progress(self) -> str:
        return self.progresses.pop(0) if self.progresses else ""

    def swap_on(self, attached: Attached) -> HelperProcess:
        status = self.swap_ons.pop(0) if len(self.swap_ons) > 1 else self.swap_ons[0]
        self.on = status == 0
        return self._exits(status)

    def is_swapped_on(self, attached: Attached) -> bool:
        return self.on

    def is_server_away(self, region: mmap.mmap) -> bool:
        return self.away

    def server_times(self, region: mmap.mmap) -> tuple[int, int]:
        return self.times

    def resolve(self) -> HelperProcess:
        self.resolves += 1
        return self._exits(0)

    def resolved(self) -> str:
        return self.addresses.pop(0) if self.addresses else ""

    def _exits(self, status: int) -> HelperProcess:
        printed = "".join(f"echo '{line}'; " for line in self.says) if status else ""
        return HelperProcess(["/bin/sh", "-c", f"{printed}exit {status}"], {})


class Setup:
    """What a keeper is made of, and `run`."""

    def __init__(self, tmp_path: Path) -> None:
        self.kernel = FakeKernel(timeout_s=15)
        self.work = FakeWork()
        self.kernel.use = lambda: "as swap" if self.work.on else ""
        self.records = Records("t", run=tmp_path)
        self.records.make()
        self.turns = 0
        self.over = threading.Event()

    def make(self, stored: dict[str, int] | None = None, journal: Journal | None = None) -> Keeper:
        reporter = Reporter(self.records, Notifier({}), journal)
        return Keeper(self.kernel, self.work, self.records, reporter, stored=stored or {})

    def run(self, scenario: Callable[[Keeper], None] | None, keeper: Keeper | None = None) -> int:
        """The keeper in this thread, until `scenario` in another has ended; without one until it ends by itself."""
        made = keeper or self.make()
        if scenario is None:
            return made.run()
        return run_keeper(made, scenario, self.over, join_s=30)


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.kernel.destroy()
    for pid in made.work.pids():
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


until = functools.partial(wait_until, what="it is so", timeout_s=15.0)


def watches(keeper: Keeper) -> None:
    until(lambda: keeper.is_swap_on and keeper.standby.is_ready)


def test_all_steps(setup: Setup) -> None:
    """Provision, attach, warm up, swap on, watch; at the end all stays as it is but the standby."""
    setup.work.provisions = [0]

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        assert setup.records.read(Records.STATE) == "watch"
        assert setup.records.read("device") == "nbd7"

    assert setup.run(scenario) == 0
    assert setup.work.on
    assert setup.kernel.find() is not None
    serving, standby = setup.work.started
    until(lambda: proc_stat.start_time_ticks(standby.pid) is None)
    assert proc_stat.start_time_ticks(serving.pid) is not None
    assert setup.kernel.read(0, 4096) == bytes(4096)


def test_each_change_of_state_is_an_event(setup: Setup, tmp_path: Path) -> None:
    """In the journal, in order: the steps, swap on, a worker that is killed, and the one that takes its place."""
    journal = FakeJournal(tmp_path)
    found: list[dict[str, str]] = []

    def has_come(event: str) -> bool:
        found.extend(journal.entries())
        return any(one.get("MESSAGE_ID") == event for one in found)

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        until(lambda: has_come(events.SWAP_ON))
        before, killed = len(found), setup.work.started[0].pid
        os.kill(killed, signal.SIGKILL)
        until(lambda: has_come(events.WORKER_ENDED) and sum(is_serving(one) for one in found) == 2)
        changes = [
            one for one in found[before:] if one.get("MESSAGE_ID") in (events.WORKER_ENDED, events.WORKER_SERVES)
        ]
        ended, serves = changes
        assert (ended["NBDNFS_PID"], ended["NBDNFS_STATUS"]) == (str(killed), "-9")
        assert serves["NBDNFS_PID"] == str(setup.work.started[1].pid)
        assert int(serves["NBDNFS_OUTAGE_MS"]) >= 0

    def is_serving(one: dict[str, str]) -> bool:
        return one.get("MESSAGE_ID") == events.WORKER_SERVES

    opened = journal.open()
    assert setup.run(scenario, setup.make(journal=opened)) == 0
    found.extend(journal.entries())
    steps = [one["NBDNFS_STATE"] for one in found if one.get("MESSAGE_ID") == events.STEP]
    assert steps == ["provision", "attach", "warm_up", "swap_on", "watch"]
    assert found[-1]["MESSAGE_ID"] == events.HANDED_OVER
    assert {one["NBDNFS_NAME"] for one in found} == {"t"}
    opened.close()
    journal.close()


@pytest.mark.parametrize("status", [os.EX_CANTCREAT, os.EX_CONFIG, failures.OWNED_STATUS])
def test_provision_fails_for_good(setup: Setup, status: int) -> None:
    """Its exit status is the keeper's, and so are the two lines of its error; nothing was attached."""
    setup.work.provisions = [status]
    setup.work.says = ("nbdnfs: 10%", "nbdnfs: the server has no room", "nbdnfs: ask for less")
    with pytest.raises(NbdnfsError) as caught:
        setup.run(None)
    assert (caught.value.message, caught.value.hint) == ("provision failed: the server has no room", "ask for less")
    assert caught.value.exit_code == (os.EX_NOPERM if status == failures.OWNED_STATUS else status)
    assert setup.kernel.attaches == 0
    assert not setup.records.path.exists()


class PoorSocket(socket.socket):
    """Has no memory to send anything, so often."""

    refusals: ClassVar[list[int]] = []

    def send(self, data: Any, flags: int = 0) -> int:
        if self.refusals:
            raise OSError(self.refusals.pop(0), "no memory")
        return super().send(data, flags)


def test_no_memory_to_activate(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The worker is told to serve until it has been: it waits for nothing else, and neither does swap."""
    start = setup.work.start_worker

    def start_poor(region_fd: int) -> WorkerHandle:
        handle = start(region_fd)
        assert handle._control is not None
        handle._control = PoorSocket(fileno=handle._control.detach())
        handle._control.setblocking(False)
        return handle

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        PoorSocket.refusals[:] = [errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN]
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)
        assert setup.kernel.read(0, 4096) == bytes(4096)

    monkeypatch.setattr(setup.work, "start_worker", start_poor)
    PoorSocket.refusals[:] = [errno.ENOBUFS]
    assert setup.run(scenario) == 0
    assert PoorSocket.refusals == []
    text = "nbdnfs: t: cannot activate a worker: no memory; trying again until it can"
    assert capfd.readouterr().err.splitlines().count(text) == 2


def test_a_worker_is_not_offered_before_its_time(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else wakes the loop: a kernel without memory is left alone for a moment."""
    keep = serving_module.Serving.keep
    left: list[tuple[int, int]] = []

    def keep_twice(serving: serving_module.Serving, now: float) -> None:
        keep(serving, now)
        if serving._unoffered is not None:
            before = len(setup.kernel.refuses)
            keep(serving, now)
            left.append((before, len(setup.kernel.refuses)))

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        setup.kernel.refuses = [NoMemoryError("cannot: Cannot allocate memory") for _ in range(3)]
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)

    monkeypatch.setattr(serving_module.Serving, "keep", keep_twice)
    assert setup.run(scenario) == 0
    assert set(left) == {(2, 2), (1, 1), (0, 0)}


def test_no_memory_to_reconnect(setup: Setup, capfd: pytest.CaptureFixture[str]) -> None:
    """The kernel is offered the worker until it can take it: there may be no other one."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        standby = setup.work.started[1].pid
        setup.kernel.refuses = [NoMemoryError("cannot: Cannot allocate memory") for _ in range(3)]
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)
        assert setup.kernel.read(0, 4096) == bytes(4096)
        until(lambda: keeper.serving.is_connected)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == standby

    assert setup.run(scenario) == 0
    assert setup.kernel.refuses == []
    text = "nbdnfs: t: /dev/nbd7: cannot: Cannot allocate memory; trying again until it can"
    assert capfd.readouterr().err.splitlines().count(text) == 1


def test_provision_fails_for_now(setup: Setup) -> None:
    """A server that is away, or a helper that was killed, is tried again."""
    setup.work.provisions = [os.EX_UNAVAILABLE, os.EX_NOHOST, 0]
    setup.run(watches)


def test_a_server_whose_disks_are_not_mounted_yet(setup: Setup, capfd: pytest.CaptureFixture[str]) -> None:
    """No file, then no permission, from helpers that have ended: shown while it lasts, each reason said once, and swap
    is on when the file is back."""
    error = ("nbdnfs: there is no file /export/swap on nas", "nbdnfs: create it")
    setup.work.provisions = [os.EX_NOINPUT] * 3 + [os.EX_NOPERM]
    setup.work.says = error
    no_file = "there is no file /export/swap on nas"

    def scenario(keeper: Keeper) -> None:
        for reason in ("a typo, or", "or"):
            text = f"{no_file} ({reason} the server's disks are not mounted yet)"
            until(lambda text=text: setup.records.read(Records.WAITING) == text)  # type: ignore[misc]
        setup.work.provisions = [0]
        watches(keeper)

    setup.work.provision_again = True
    assert setup.run(scenario) == 0
    assert setup.records.read(Records.WAITING) is None
    said = capfd.readouterr().err.splitlines()
    assert [said.count(line) for line in error] == [1, 1]


def test_the_progress_of_a_helper_is_shown(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the unit's status, while the helper runs: creating a file takes long."""
    sent: list[str] = []
    monkeypatch.setattr(Notifier, "send", lambda self, *lines, descriptors=(): sent.extend(lines))
    setup.work.provisions = [0]
    setup.work.progresses = ["", "creating the backing file: 40%"]
    monkeypatch.setattr(setup.work, "_exits", lambda status: HelperProcess(["/bin/sleep", "2"], {}))

    def scenario(keeper: Keeper) -> None:
        until(lambda: "STATUS=creating the backing file: 40%" in sent)
        monkeypatch.undo()

    setup.run(scenario)
    assert "STATUS=provision" in sent


def test_what_a_helper_waits_for_is_shown(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one helper, which goes on: as the record and the unit's status, until it does something else."""
    sent: list[str] = []
    monkeypatch.setattr(Notifier, "send", lambda self, *lines, descriptors=(): sent.extend(lines))
    setup.work.provisions = [0]
    setup.work.progresses = ["waiting: there is no file"]
    go_on = setup.records.path / "go_on"
    script = f"while [ ! -e {go_on} ]; do sleep 0.1; done"
    helpers: list[HelperProcess] = []

    def helper() -> HelperProcess:
        helpers.append(HelperProcess(["/bin/sh", "-c", script], {}))
        return helpers[-1]

    monkeypatch.setattr(setup.work, "provision", helper)

    def scenario(keeper: Keeper) -> None:
        until(lambda: setup.records.read(Records.WAITING) == "there is no file")
        assert "STATUS=waiting: there is no file" in sent
        setup.work.progresses = ["creating the backing file: 0%"]
        until(lambda: "STATUS=creating the backing file: 0%" in sent)
        assert setup.records.read(Records.WAITING) is None
        setup.work.progresses = ["waiting: the server is away"]
        until(lambda: setup.records.read(Records.WAITING) == "the server is away")
        go_on.touch()
        watches(keeper)

    assert setup.run(scenario) == 0
    assert setup.records.read(Records.WAITING) is None
    assert len(helpers) == 1


def test_first_worker_fails_for_good(setup: Setup) -> None:
    """What is wrong with the file for the first worker is wrong for all."""
    setup.work.behaviours = [f"exit:{os.EX_CONFIG}"]
    with pytest.raises(NbdnfsError) as caught:
        setup.run(None)
    assert caught.value.exit_code == os.EX_CONFIG


@pytest.mark.server
def test_a_new_keeper_with_a_full_run(setup: Setup, tmp_path: Path) -> None:
    """It takes over what the keeper before has left, one of a version that has reserved no records: it records what has
    a record already at once, and the rest when there is room."""
    folder = tmp_path / "run"
    folder.mkdir()
    with small_tmpfs(folder, 128 << 10):
        setup.records = Records("t", run=folder)
        setup.records.make()
        setup.run(watches)
        first = setup.records.living(Records.WORKER)
        filler = fill(folder)

        def scenario(keeper: Keeper) -> None:
            watches(keeper)
            assert first is not None
            assert keeper.serving.worker is not None
            assert keeper.serving.worker.pid == first.pid
            os.kill(first.pid, signal.SIGKILL)
            until(lambda: setup.records.living(Records.WORKER) not in (None, first))
            assert setup.records.read(Records.STATE) == "watch"
            assert setup.records.read(Records.CONFIG) is None
            filler.unlink()
            until(lambda: setup.records.read(Records.CONFIG) == "x" * 100)

        keeper = setup.make()
        keeper._config_text = "x" * 100
        assert setup.run(scenario, keeper) == 0
        for pid in setup.work.pids():
            os.kill(pid, signal.SIGKILL)


def test_a_full_run_ends_no_keeper(setup: Setup, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No record can be written: the keeper goes on, says so once for each, and writes them when it can."""
    setup.records.path.rmdir()
    setup.records.path.write_text("a file in place of the folder")

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        assert setup.records.read(Records.STATE) is None
        setup.records.path.unlink()
        until(lambda: setup.records.read(Records.STATE) == "watch" and setup.records.living(Records.WORKER) is not None)

    assert setup.run(scenario) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot write the record" in line]
    assert len(said) == len(set(said)) >= 3
    assert "Traceback" not in "".join(said)


def test_first_worker_fails_for_now(setup: Setup) -> None:
    """Until one has_greeted; also when none can be started."""
    setup.work.behaviours = [f"exit:{os.EX_UNAVAILABLE}", "early:69", "none", "none", "serve"]
    setup.run(watches)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_worker_whose_program_cannot_be_started(
    setup: Setup, failing: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The one that is to serve, or its standby: why is said, and another one is started."""
    start, starts = setup.work.start_worker, itertools.count()

    def start_or_not(region_fd: int) -> WorkerHandle:
        if next(starts) == failing:
            return WorkerHandle.start("/nowhere/worker", ["worker"], {}, region_fd)
        return start(region_fd)

    monkeypatch.setattr(setup.work, "start_worker", start_or_not)
    assert setup.run(watches) == 0
    text = f"nbdnfs: t: cannot start a worker: {os.strerror(errno.ENOENT)}"
    assert capfd.readouterr().err.splitlines().count(text) == 1


def test_a_standby_that_cannot_be_started(setup: Setup) -> None:
    """There is a pause before the next try, a longer one each time."""
    setup.work.behaviours = ["none"] * 3 + ["serve"]
    notifier = Notifier({})
    standby = Standby(setup.work, setup.records, notifier, Reporter(setup.records, notifier), {})
    for now, due_s, left in ((0.0, 0.0, 3), (0.0, 0.1, 2), (0.05, 0.1, 2), (0.1, 0.3, 1), (0.2, 0.3, 1)):
        standby.keep(now, may_start=True)
        assert (standby.due_s, len(setup.work.behaviours)) == (pytest.approx(due_s), left)


def test_a_standby_that_is_late(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does not hold up swap for ever."""
    monkeypatch.setattr(keeper_module, "_STANDBY_TIMEOUT_S", 0.0)
    setup.work.behaviours = ["serve", "none"]

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper.is_swap_on)
        assert not keeper.standby.is_ready

    assert setup.run(scenario) == 0
    assert "nbdnfs: t: there is no standby yet; going on without it" in capfd.readouterr().err.splitlines()


def test_device_in_use(setup: Setup) -> None:
    """CONNECT is refused: an error, no device, no worker left."""
    setup.kernel.refuses = [BusyError("the device is in use")]
    with pytest.raises(BusyError):
        setup.run(None)
    until(lambda: all(proc_stat.start_time_ticks(pid) is None for pid in setup.work.pids()))


def attach_fails(setup: Setup, monkeypatch: pytest.MonkeyPatch, error: NbdnfsError) -> None:
    """The kernel attaches the device, and its answer is lost: nothing but /sys says that it is there."""
    attach = setup.kernel.attach

    def attach_without_an_answer(sock: socket.socket, export: Export) -> Attached:
        attach(sock, export)
        monkeypatch.setattr(setup.kernel, "attach", attach)
        raise error

    monkeypatch.setattr(setup.kernel, "attach", attach_without_an_answer)


def test_attach_without_an_answer(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is taken down, and the next keeper attaches one: it has nothing to serve the first with."""
    attach_fails(setup, monkeypatch, NoMemoryError("cannot attach a device: No buffer space available"))
    with pytest.raises(NoMemoryError):
        setup.run(None)
    assert (setup.kernel.disconnects, setup.kernel.attached) == (1, None)
    assert setup.run(watches) == 0
    assert setup.kernel.attaches == 2


def test_attach_without_an_answer_and_no_look(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where /sys cannot be read either, worker and records stay as with a device in use."""
    attach_fails(setup, monkeypatch, NoMemoryError("cannot attach a device: No buffer space available"))
    monkeypatch.setattr(failures, "_LOOKS", 1)
    attach = setup.kernel.attach

    def attach_and_be_unreadable(sock: socket.socket, export: Export) -> Attached:
        setup.kernel.unreadable = 1
        return attach(sock, export)

    monkeypatch.setattr(setup.kernel, "attach", attach_and_be_unreadable)
    with pytest.raises(NoMemoryError):
        setup.run(None)
    assert setup.kernel.disconnects == 0
    assert setup.records.read(Records.REGION)
    assert "a device that may be there stays attached: cannot read /sys/block" in capfd.readouterr().err


def test_mkswap_is_refused(setup: Setup) -> None:
    """Data in the file: the device is taken down again, with the helper's status."""
    setup.work.swap_ons = [os.EX_CANTCREAT]
    with pytest.raises(NbdnfsError) as caught:
        setup.run(None)
    assert caught.value.exit_code == os.EX_CANTCREAT
    assert setup.kernel.disconnects == 1
    assert setup.kernel.find() is None


def test_an_error_leaves_a_device_in_use(setup: Setup) -> None:
    """What uses it need not be swap: dm-crypt on top of it. Worker, region and records are for the next keeper."""
    setup.work.swap_ons = [os.EX_CANTCREAT]
    setup.kernel.use = lambda: "by dm-0"
    with pytest.raises(NbdnfsError) as caught:
        setup.run(None)
    assert caught.value.exit_code == os.EX_CANTCREAT
    assert setup.kernel.disconnects == 0
    assert setup.kernel.read(0, 4096) == bytes(4096)
    assert setup.records.living(Records.WORKER) is not None


def test_a_device_with_something_on_top(setup: Setup, capfd: pytest.CaptureFixture[str]) -> None:
    """A keeper that takes it over keeps it, and does not try to swap to it, which could only fail."""
    stored: dict[str, int] = {}

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        stored["region"] = os.dup(keeper._region)

    setup.run(scenario)
    setup.work.on, setup.work.swap_ons = False, [os.EX_CANTCREAT]
    setup.kernel.use = lambda: "by dm-0"

    def later(keeper: Keeper) -> None:
        watches(keeper)
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)

    assert setup.run(later, setup.make(stored)) == 0
    assert not setup.work.on
    assert setup.kernel.disconnects == 0
    assert setup.kernel.read(0, 4096) == bytes(4096)
    assert "its own swap is off: /dev/nbd7 is in use by dm-0" in capfd.readouterr().err


def test_workers_that_fail_later_are_no_reason_to_end(setup: Setup) -> None:
    """With the device attached there is no last try, whatever their status is."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        setup.work.behaviours = [f"exit:{os.EX_CONFIG}"] * 3 + ["early:1", "none", "serve"]
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        os.kill(setup.work.started[1].pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)
        watches(keeper)

    setup.run(scenario)


@pytest.mark.parametrize(("swapped_on", "use"), [(True, "as swap"), (False, ""), (False, "by dm-0")])
def test_another_machine_has_taken_the_file(setup: Setup, swapped_on: bool, use: str) -> None:
    """The next worker finds it so: the device is taken down, so that what waits for it fails, and the keeper ends for
    good, without one more worker."""
    if not swapped_on:
        setup.work.swap_ons = [os.EX_UNAVAILABLE]
    setup.kernel.use = lambda: use

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper.standby.is_ready)
        if swapped_on:
            watches(keeper)
        for pid in setup.work.pids():
            os.kill(pid, signal.SIGKILL)
        assert setup.over.wait(30)

    setup.work.behaviours = ["serve", "serve", f"exit:{STOLEN_STATUS}", "serve"]
    with pytest.raises(OwnedError) as caught:
        setup.run(scenario)
    assert caught.value.exit_code == os.EX_NOPERM
    assert setup.kernel.find() is None
    assert len(setup.work.started) == 3
    assert setup.records.read(Records.STATE) == (Records.STOLEN if use else None)


def test_another_machine_has_the_file_before_there_is_a_device(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker finds it so: the keeper ends for good, and the kernel is asked nothing."""
    asked: list[Attached] = []
    monkeypatch.setattr(setup.kernel, "refuse_if_used", asked.append)
    setup.work.behaviours = [f"exit:{STOLEN_STATUS}", "serve"]
    with pytest.raises(OwnedError) as caught:
        setup.run(None)
    assert caught.value.exit_code == os.EX_NOPERM
    assert (len(setup.work.started), setup.kernel.attaches, asked) == (1, 0, [])


def test_standbys_that_fail_do_not_disturb_the_connection(setup: Setup) -> None:
    """They are started again, slower and slower."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        setup.work.behaviours = ["early:1", "early:1", "early:1", "serve"]
        os.kill(setup.work.started[1].pid, signal.SIGKILL)
        until(lambda: len(setup.work.started) >= 6)
        watches(keeper)
        assert setup.kernel.links == 1

    setup.run(scenario)


def test_the_kernel_does_not_take_the_socket(setup: Setup) -> None:
    """RECONFIGURE reports success while the old connection lives: the keeper notices, and tries with another worker."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        keeper.serving.worker, serving = None, keeper.serving.worker  # it believes that there is none
        assert serving is not None
        until(lambda: setup.kernel.dropped >= 2)
        os.kill(serving.pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)
        serving.has_ended()
        serving.close()

    setup.run(scenario)


def test_what_is_tried_again_is_said_once(setup: Setup, capfd: pytest.CaptureFixture[str]) -> None:
    """RECONFIGURE is forbidden again and again: one line, not one for each try; a second line when it is back."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        capfd.readouterr()
        setup.kernel.refuses = [PermissionDeniedError("cannot: Operation not permitted") for _ in range(4)]
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)
        watches(keeper)
        assert setup.kernel.refuses == []

    setup.run(scenario)
    assert setup.records.read(Records.SAID) is None
    killed, forbidden, back, *_ = capfd.readouterr().err.splitlines()
    assert killed.endswith("has ended (killed by signal 9)")
    assert forbidden == "nbdnfs: t: /dev/nbd7: cannot: Operation not permitted"
    assert " serves, " in back


def test_detached_by_another_program(setup: Setup) -> None:
    """A device that was detached on purpose is not attached again."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        setup.kernel.attached = None
        setup.kernel.close()
        time.sleep(4)

    with pytest.raises(UnavailableError, match="detached by another program"):
        setup.run(scenario)


def test_a_device_that_cannot_be_looked_up(setup: Setup) -> None:
    """The kernel refuses a worker, and there is no memory to see whether the device is still there: the next worker
    serves it, and its region is the same."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        setup.kernel.refuses = [NbdnfsError("cannot: Cannot allocate memory")]
        setup.kernel.unreadable = 1
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)
        assert setup.kernel.unreadable == 0

    assert setup.run(scenario) == 0


def test_a_new_keeper_that_cannot_look_its_device_up(setup: Setup) -> None:
    """It looks again before it does anything, and adopts the worker."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == setup.work.started[0].pid

    assert setup.run(watches) == 0
    setup.kernel.unreadable = 2
    assert setup.run(scenario) == 0
    assert setup.kernel.links == 1


def test_a_new_keeper_whose_first_worker_fails(setup: Setup) -> None:
    """The last keeper has left none: it looks again, and starts another one, on the same region."""
    stored: dict[str, int] = {}

    def first(keeper: Keeper) -> None:
        watches(keeper)
        stored["region"] = os.dup(keeper._region)

    def second(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(2)
        assert setup.kernel.read(0, 4096) == bytes(4096)
        assert os.path.sameopenfile(keeper._region, region.fileno())

    assert setup.run(first) == 0
    with open(os.dup(stored["region"]), "rb") as region:
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        until(lambda: proc_stat.start_time_ticks(setup.work.started[0].pid) is None)
        setup.work.behaviours = ["none", "serve"]
        assert setup.run(second, setup.make(stored)) == 0
    assert (setup.kernel.attaches, setup.kernel.reconnects) == (1, 1)


def test_swap_that_cannot_be_looked_up(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is done again; swap is not turned on a second time."""
    refusals = [UnreadableError("cannot read /proc/swaps: Too many open files")] * 3
    is_swapped_on = setup.work.is_swapped_on

    def look(attached: Attached) -> bool:
        if refusals:
            raise refusals.pop()
        return is_swapped_on(attached)

    monkeypatch.setattr(setup.work, "is_swapped_on", look)
    monkeypatch.setattr(keeper_module, "_TICK_S", 0.05)
    assert setup.run(watches) == 0
    assert refusals == []


def test_a_kernel_that_cannot_be_read_while_attaching(setup: Setup) -> None:
    """The next worker is attached."""
    setup.kernel.refuses = [UnreadableError("cannot read /sys/block: Cannot allocate memory")]
    assert setup.run(watches) == 0
    assert (setup.kernel.attaches, setup.kernel.refuses) == (1, [])


def test_serving_that_cannot_be_looked_after(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done again, as a step is."""
    refusals = [UnreadableError("cannot read /sys/block: Too many open files")] * 3
    keep = serving_module.Serving.keep

    def refuse(serving: serving_module.Serving, now: float) -> None:
        if refusals:
            raise refusals.pop()
        keep(serving, now)

    monkeypatch.setattr(serving_module.Serving, "keep", refuse)
    monkeypatch.setattr(keeper_module, "_TICK_S", 0.05)
    assert setup.run(watches) == 0
    assert refusals == []


def test_a_device_that_cannot_be_read_is_taken_down(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error: once it can be."""
    refusals = [UnreadableError("cannot read /proc/swaps: Too many open files")] * 3
    disconnect = setup.kernel.disconnect

    def refuse(attached: Attached) -> None:
        if refusals:
            raise refusals.pop()
        disconnect(attached)

    def fail(attached: Attached) -> bool:
        raise NbdnfsError("it fails")

    monkeypatch.setattr(setup.kernel, "disconnect", refuse)
    monkeypatch.setattr(setup.work, "is_swapped_on", fail)
    with pytest.raises(NbdnfsError, match="it fails"):
        setup.run(None)
    assert (setup.kernel.disconnects, setup.kernel.attached) == (1, None)


def test_stuck_worker(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """LINK_DEAD for a worker that does not end: it is killed, and the next one serves."""
    monkeypatch.setattr(serving_module, "STUCK_S", 0.2)
    setup.work.behaviours = ["deaf", "serve"]

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        time.sleep(1.1)  # what comes earlier may be the last worker's
        setup.kernel.send_link_dead(3)
        time.sleep(0.5)
        assert setup.kernel.links == 1, "another device's link is none of ours"
        setup.kernel.close()
        setup.kernel.send_link_dead(7)
        setup.kernel.wait_for_link(2)

    setup.run(scenario)


def test_a_missing_region_is_never_replaced(setup: Setup) -> None:
    """A device in use whose region no longer exists is left alone: its pages on the server may be old ones."""
    setup.run(watches)
    setup.kernel.close()
    for pid in setup.work.pids():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with pytest.raises(BusyError, match="its region no longer exists"):
        setup.make()


def test_a_keeper_at_rest_rests(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor keeps it spinning: about one turn a second; also while a worker waits for its server."""
    turns = []
    real = Keeper._turn
    monkeypatch.setattr(Keeper, "_turn", lambda self: (turns.append(1), real(self)))

    def at_rest() -> int:
        time.sleep(0.5)
        before = len(turns)
        time.sleep(2)
        return len(turns) - before

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        assert at_rest() <= 5
        setup.work.behaviours = ["serve"]
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        setup.kernel.wait_for_link(2)
        watches(keeper)
        assert at_rest() <= 5

    setup.run(scenario)
    setup.work.behaviours = ["mute"]
    setup.kernel.attached = None

    def waiting(keeper: Keeper) -> None:
        until(lambda: keeper.serving.worker is not None)
        assert at_rest() <= 5

    setup.run(waiting)


def test_a_server_that_falls_silent(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is up, and it owes an answer: a line and the unit's status say so until it is heard again. systemd
    does not take the status each time."""
    monkeypatch.setattr(silence, "REPORTED_AFTER_MS", 500)
    journal, tries = FakeJournal(tmp_path), list[str]()
    opened = journal.open()

    def send(self: Notifier, *lines: str, descriptors: object = ()) -> bool:
        tries.extend(lines)
        return tries.count(lines[-1]) > 1

    monkeypatch.setattr(Notifier, "send", send)
    found: list[dict[str, str]] = []

    def of(event: str) -> list[dict[str, str]]:
        found.extend(journal.entries())
        return [one for one in found if one.get("MESSAGE_ID") == event]

    def shows(status: str, times: int) -> None:
        until(lambda: tries.count(f"STATUS={status}") == times)

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        shows("swap is on: /dev/nbd7", 2)
        since_ms = time.monotonic_ns() // 1_000_000
        setup.work.times = (since_ms, since_ms)
        shows(silence.STATUS, 2)
        setup.work.times = (since_ms + 60_000, 0)
        shows("swap is on: /dev/nbd7", 3)

    assert setup.run(scenario, setup.make(journal=opened)) == 0
    (silent,), (answers,) = of(events.SERVER_SILENT), of(events.SERVER_ANSWERS)
    assert silent["PRIORITY"] == "4"
    assert 0 < int(answers["NBDNFS_SILENT_MS"]) <= 60_000
    opened.close()
    journal.close()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The address with which each worker is activated."""
    found: list[str] = []
    activate = WorkerHandle.activate

    def note_and_activate(self: WorkerHandle, address: str = "") -> None:
        found.append(address)
        activate(self, address)

    monkeypatch.setattr(WorkerHandle, "activate", note_and_activate)
    return found


def test_a_server_with_a_new_address(setup: Setup, sent: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Away for long: its name is looked up, again and again; when it means another address, the standby is sent there,
    and so are all that come after it. With the server back, the lookups end.
    """
    setup.work.addresses = ["", "192.0.2.9"]

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        monkeypatch.setattr(keeper_module, "RESOLVE_AFTER_S", 0.1)
        monkeypatch.setattr(keeper_module, "RESOLVE_EVERY_S", 0.1)
        assert setup.work.resolves == 0
        setup.work.away = True
        until(lambda: sent == ["", "192.0.2.9"])
        setup.work.away = False
        watches(keeper)
        asked = setup.work.resolves
        assert keeper.serving.worker is not None
        os.kill(keeper.serving.worker.pid, signal.SIGKILL)
        until(lambda: len(sent) == 3)
        watches(keeper)
        time.sleep(1.2)  # a turn of the loop and more
        assert setup.work.resolves <= asked + 1  # one may have been due while no worker served

    assert setup.run(scenario) == 0
    assert sent == ["", "192.0.2.9", "192.0.2.9"]


def test_a_server_with_a_new_address_and_no_worker(
    setup: Setup, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None can be started at the moment: the next one is sent there."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        monkeypatch.setattr(keeper_module, "RESOLVE_AFTER_S", 0.0)
        monkeypatch.setattr(keeper_module, "RESOLVE_EVERY_S", 0.1)
        setup.work.behaviours = ["none"]
        os.kill(setup.work.started[1].pid, signal.SIGKILL)
        until(lambda: keeper.standby.worker is None)
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
        until(lambda: keeper.serving.worker is None)
        setup.work.addresses = ["192.0.2.9"]
        until(lambda: keeper.serving.address == "192.0.2.9")
        setup.work.behaviours = ["serve"]
        setup.kernel.wait_for_link(2)

    setup.work.addresses = [""]
    assert setup.run(scenario) == 0
    assert sent == ["", "192.0.2.9"]


def looks_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "RESOLVE_AFTER_S", 0.5)
    monkeypatch.setattr(keeper_module, "RESOLVE_EVERY_S", 0.5)


@pytest.mark.parametrize("is_first", [True, False], ids=["first start", "next keeper"])
def test_a_server_with_a_new_address_at_the_start(
    setup: Setup, sent: list[str], monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """The first worker waits at the old address, whether the device is attached, by a keeper that has ended with its
    worker, or is to be: it is ended, and another one is sent to the new address."""
    looks_soon(monkeypatch)
    stored: dict[str, int] = {}

    def before(keeper: Keeper) -> None:
        watches(keeper)
        stored["region"] = os.dup(keeper._region)

    if not is_first:
        assert setup.run(before) == 0
        os.kill(setup.work.started[0].pid, signal.SIGKILL)
    sent.clear()
    setup.work.behaviours = ["held", "serve"]
    setup.work.addresses = ["", "192.0.2.9"]
    assert setup.run(watches, setup.make(stored)) == 0
    assert sent == ["", "192.0.2.9"]
    assert setup.kernel.attaches == 1
    assert setup.kernel.links == (1 if is_first else 2)


@pytest.mark.parametrize("step", ["warm_up", "swap_on"])
def test_a_server_with_a_new_address_before_swap_is_on(
    setup: Setup, sent: list[str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It moves while the keeper waits for a standby, or for mkswap and swapon, which wait for the device."""
    looks_soon(monkeypatch)
    if step == "warm_up":
        setup.work.behaviours = ["serve", "none"]
    sleeping: list[HelperProcess] = []

    def swap_on_waits(device: Attached) -> HelperProcess:
        sleeping.append(HelperProcess(["/bin/sleep", "60"], {}))
        return sleeping[0]

    swap_on = setup.work.swap_on
    if step == "swap_on":
        monkeypatch.setattr(setup.work, "swap_on", swap_on_waits)

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper._step == step)
        setup.work.away = True
        setup.work.addresses = ["192.0.2.9"]
        until(lambda: keeper.serving.address == "192.0.2.9")
        setup.work.behaviours, setup.work.away = ["serve"], False
        setup.kernel.wait_for_link(2)
        monkeypatch.setattr(setup.work, "swap_on", swap_on)
        for helper in sleeping:
            os.kill(helper._pid, signal.SIGTERM)
        watches(keeper)

    assert setup.run(scenario) == 0
    assert sent == ["", "192.0.2.9"]


def server_goes_away(setup: Setup, how: str) -> None:
    """What is started from now on waits for it."""
    setup.work.behaviours = ["held"]
    setup.work.away = how == "disconnected"
    if how == "silent":
        setup.work.times = (1, time.monotonic_ns() // 1_000_000 - silence.REPORTED_AFTER_MS)


def server_is_back(setup: Setup) -> None:
    setup.work.behaviours = ["serve"]
    setup.work.away = False
    setup.work.times = (time.monotonic_ns() // 1_000_000 + 1, 0)


def turns(keeper: Keeper, count: int) -> None:
    """Until the loop has turned so often."""
    turned = itertools.count()
    do = keeper._do

    def count_and_do(now: float) -> str:
        next(turned)
        return do(now)

    keeper._do = count_and_do  # type: ignore[method-assign]
    until(lambda: next(turned) >= count)


@pytest.mark.parametrize("how", ["disconnected", "silent"])
def test_a_reload_while_the_server_is_away(setup: Setup, capfd: pytest.CaptureFixture[str], how: str) -> None:
    """The worker that waits for it stays, and so does the standby: without a socket, the kernel fails all requests when
    the device's dead_conn_timeout is over. Both are replaced when the server is back."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        serving, standby = setup.work.pids()
        server_goes_away(setup, how)
        until(lambda: how == "disconnected" or keeper._silence.is_on)
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: keeper._shown.endswith("; the worker is replaced when the server is back"))
        turns(keeper, 3)
        assert setup.work.pids() == [serving, standby]
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == serving
        assert keeper.serving.is_connected
        server_is_back(setup)
        setup.kernel.wait_for_link(2)
        until(lambda: keeper.serving.is_connected)
        assert keeper.serving.worker.pid not in (serving, standby)
        until(lambda: keeper._shown == "swap is on: /dev/nbd7")

    sent = Notifier.send
    try:
        Notifier.send = lambda *_, **__: True  # type: ignore[method-assign,assignment]
        assert setup.run(scenario) == 0
    finally:
        Notifier.send = sent  # type: ignore[method-assign]
    lines = capfd.readouterr().err.splitlines()
    text = "the server is away: the worker is replaced when the server is back; a second SIGHUP replaces it now"
    assert lines.count(f"nbdnfs: t: {text}") == 1


def test_a_second_reload_while_the_server_is_away(setup: Setup) -> None:
    """The worker may be what is wrong, and not the server: whoever asks twice gets another one."""

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        serving, _ = setup.work.pids()
        server_goes_away(setup, "disconnected")
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: keeper._is_put_off)
        setup.work.behaviours = ["serve"]
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: keeper.serving.worker is not None and keeper.serving.worker.pid != serving)
        until(lambda: keeper.serving.is_connected)

    assert setup.run(scenario) == 0


def test_an_upgrade_while_the_server_is_away(setup: Setup) -> None:
    """The worker of the version before stays until the server is back."""
    stored: dict[str, int] = {}

    def before(keeper: Keeper) -> None:
        watches(keeper)
        stored["region"] = os.dup(keeper._region)

    def scenario(keeper: Keeper) -> None:
        watches(keeper)
        turns(keeper, 3)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == serving
        server_is_back(setup)
        setup.kernel.wait_for_link(2)

    assert setup.run(before) == 0
    serving = setup.work.started[0].pid
    assert setup.records.put_process(Records.WORKER, serving, "0.0.1")
    setup.work.away = True
    assert setup.run(scenario, setup.make(stored)) == 0
