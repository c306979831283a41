# SPDX-License-Identifier: LGPL-2.1-or-later
"""A standby in systemd's store, for the next keeper: taken, refused, ended, and never mistaken for a worker."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from support.fake_kernel import FakeKernel
from support.fake_nbd_netlink import BACKEND, FakeNbdNetlink
from support.fake_nfs import NFS3_OK, NFS3ERR_NOSPC, FakeNfsServer
from support.fake_systemd import FakeSystemd, wait_until_ended
from support.heir_run import keeper_with_heir
from support.keeper_run import FakeSwap, run_keeper, until
from support.waiting import SaidOnStderr
from support.want import no_descriptors

from nbdnfs import proc_stat, region
from nbdnfs.commands import up_down
from nbdnfs.config import Config
from nbdnfs.errors import UnavailableError
from nbdnfs.keeper import device_region, only_keeper, worker_handle
from nbdnfs.keeper import keeper as keeper_module
from nbdnfs.keeper import records as records_module
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from nbdnfs.keeper.worker_handle import WorkerHandle, recipe
from nbdnfs.kernel import nbd_handshake
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.worker import nbdkit

if TYPE_CHECKING:
    from nbdnfs.keeper.heir import Heir

PAGE = 4096
DEVICE_BYTES = 4 << 20


class FakeHeir:
    """What a keeper tells its heir: the pids of worker and standby, 0 for none, and whether it has ended it."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.has_ended = False

    def keep(
        self, now: float, device: Attached, worker: WorkerHandle | None, standby: WorkerHandle | None, address: str
    ) -> None:
        found = (worker.pid if worker is not None else 0, standby.pid if standby is not None else 0)
        if self.told[-1:] != [found]:
            self.told.append(found)

    def descriptors(self) -> list[int]:
        return []

    def end(self) -> None:
        self.has_ended = True


class Setup:
    """A server, a kernel and a PID 1, on which keepers come and go."""

    def __init__(self, server: FakeNfsServer, root: Path) -> None:
        self.server = server
        self.kernel = FakeKernel()
        self.systemd = FakeSystemd(root)
        self.records = Records("t", run=root)
        self.records.make()
        self.work = self.new_work()
        self.kernel.use = lambda: "as swap" if self.work.on else ""
        self.over = threading.Event()
        self.heir: FakeHeir | None = None

    def new_work(self, **settings: int) -> FakeSwap:
        """As the next keeper makes it, perhaps with other settings. Not encrypted: the server is to show its pages."""
        url = self.server.url()
        plain = Config("t", url, lock="off", owner=False, region_pages=1024, encrypt=False)
        config = dataclasses.replace(plain, **settings)  # type: ignore[arg-type]
        return FakeSwap(config, url, "127.0.0.1")

    def run(self, scenario: Callable[[Keeper], None], *, stored: dict[str, int] | None = None) -> None:
        """A keeper in this thread, which gets what is stored, until `scenario` in another one has ended. It then closes
        what it has and does no more, which is what SIGKILL leaves behind."""
        found = self.systemd.hand_over() if stored is None else stored
        notifier = Notifier(self.systemd.environment)
        reporter, heir = Reporter(self.records, notifier), cast("Heir | None", self.heir)
        keeper = Keeper(self.kernel, self.work, self.records, reporter, stored=found, heir=heir)
        try:
            run_keeper(keeper, scenario, self.over, join_s=60)
        finally:
            keeper._notifier.close()
            if keeper._mapping is not None:
                keeper._mapping.close()

    def kill_worker(self) -> None:
        record = self.records.living(Records.WORKER)
        if record is not None:
            os.kill(record.pid, signal.SIGKILL)
            wait_until_ended(record.pid)

    def end(self) -> None:
        self.kernel.destroy()
        self.systemd.close()
        self.kill_worker()


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        made = Setup(server, tmp_path)
        yield made
        made.end()


def ready(keeper: Keeper) -> int:
    """The keeper watches, and has parked a standby; the pid of that."""
    until(lambda: keeper.is_swap_on and keeper.standby.is_parked)
    assert keeper.standby.worker is not None
    return keeper.standby.worker.pid


def parked_by_a_killed_keeper(setup: Setup, *, worker_too: bool = True) -> int:
    """Dirty pages, a worker that is dead, a keeper that is; the pid of the standby that waits."""
    pids: list[int] = []

    def scenario(keeper: Keeper) -> None:
        pids.append(ready(keeper))
        setup.server.fail("WRITE", NFS3ERR_NOSPC)
        for number in range(100):
            setup.kernel.write(number * PAGE, bytes([number + 1]) * PAGE)

    setup.run(scenario)
    if worker_too:
        setup.kill_worker()
    assert setup.systemd.names() == ["region", "standby"]
    return pids[0]


def descriptors() -> list[str]:
    """What this process has open, but for the connections of the server's, which come and go on their own."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            kind = os.readlink(f"/proc/self/fd/{number}").partition(":")[0]
            if kind == "socket":
                with socket.socket(fileno=os.dup(number)) as sock:
                    kind += sock.family.name
            if kind != "socketAF_INET":
                found.append(kind)
    return sorted(found)


def test_messages_that_systemd_does_not_take(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that nothing else makes up for are sent again: that swap is on, and what is to be kept."""
    refused = dict.fromkeys(("READY=1", "FDNAME=region", "FDNAME=standby"), 2)
    send = Notifier.send

    def poor_send(self: Notifier, *lines: str, descriptors: Sequence[int] = ()) -> bool:
        for kind in refused.keys() & set(lines):
            if refused[kind] > 0:
                refused[kind] -= 1
                return False
        return send(self, *lines, descriptors=descriptors)

    monkeypatch.setattr(Notifier, "send", poor_send)

    def scenario(keeper: Keeper) -> None:
        until(lambda: setup.systemd.names() == ["region", "standby"] and setup.systemd.is_ready)

    setup.run(scenario)


def test_processes_that_cannot_be_looked_up_at_first(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are recorded once /proc can be read: `down` and the next keeper look there."""
    looked: dict[int, int] = {}

    def look(pid: int, root: Path) -> int | None:
        looked[pid] = looked.get(pid, 0) + 1
        return proc_stat.start_time_ticks(pid, root) if looked[pid] > 2 else None

    monkeypatch.setattr(records_module, "start_time_ticks", look)
    monkeypatch.setattr(keeper_module, "_RECORDS_EVERY_S", 0.1)

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        until(lambda: all(setup.records.living(key) for key in (Records.KEEPER, Records.WORKER, Records.STANDBY)))

    setup.run(scenario)


def test_a_worker_that_cannot_be_looked_up_at_first(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper that comes starts another one, which ends, since the region is locked; then it finds this one."""
    parked_by_a_killed_keeper(setup, worker_too=False)
    serving = setup.records.living(Records.WORKER)
    assert serving is not None
    is_held_by, refused = region.is_held_by, [serving.pid]

    def look(descriptor: int, pid: int) -> bool:
        if pid in refused:
            refused.remove(pid)
            return False
        return is_held_by(descriptor, pid)

    monkeypatch.setattr(region, "is_held_by", look)

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == serving.pid
        assert setup.kernel.links == 1
        assert setup.kernel.read(0, PAGE) == b"\1" * PAGE

    setup.run(scenario)
    assert refused == []


def test_both_killed_at_once(setup: Setup) -> None:
    """The next keeper activates the parked standby, and starts none before swap moves: all pages are there. It is
    the same with the keeper after that one, and none of them leaves a descriptor behind."""
    standby = parked_by_a_killed_keeper(setup)
    before = descriptors()
    for links in (2, 3):
        starts = setup.work.starts
        successors: list[int] = []

        def scenario(
            keeper: Keeper, links: int = links, starts: int = starts, taken: int = standby, into: list[int] = successors
        ) -> None:
            setup.kernel.wait_for_link(links)
            until(lambda: keeper.serving.worker is not None and keeper.serving.is_connected)
            assert keeper.serving.worker is not None
            assert keeper.serving.worker.pid == taken
            assert setup.work.starts <= starts + 1
            for number in range(100):
                assert setup.kernel.read(number * PAGE, PAGE) == bytes([number + 1]) * PAGE
            into.append(ready(keeper))

        setup.run(scenario)
        setup.systemd.names()  # it has closed what it was to forget
        assert descriptors() == before
        setup.kill_worker()
        (standby,) = successors

    def last(keeper: Keeper) -> None:
        ready(keeper)
        setup.server.fail("WRITE", NFS3_OK)
        setup.kernel.flush()

    setup.run(last)
    assert bytes(setup.server.on_disk)[: 100 * PAGE] == b"".join(bytes([n + 1]) * PAGE for n in range(100))


def test_the_worker_lives(setup: Setup) -> None:
    """A keeper killed alone: worker and standby both go on as they are, one serving and one waiting, also through
    keepers that do nothing but take over; then the standby serves."""
    standby = parked_by_a_killed_keeper(setup, worker_too=False)
    record = setup.records.living(Records.WORKER)
    assert record is not None
    starts = setup.work.starts
    for _ in range(3):

        def same(keeper: Keeper) -> None:
            assert ready(keeper) == standby
            assert keeper.serving.worker is not None
            assert keeper.serving.worker.pid == record.pid

        setup.run(same)
    assert setup.work.starts == starts

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        setup.kill_worker()
        setup.kernel.wait_for_link(2)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == standby
        assert setup.kernel.read(0, PAGE) == b"\1" * PAGE

    setup.run(scenario)


def test_an_heir_has_connected_it(setup: Setup, tmp_path: Path) -> None:
    """Keeper and worker are killed, and the standby serves before there is a next keeper. That one adopts it, as a
    worker of its version, and has another standby."""
    standby = parked_by_a_killed_keeper(setup, worker_too=False)
    record = setup.records.living(Records.WORKER)
    assert record is not None
    (setup.records.path / Records.KEEPER).unlink()  # it would be this process
    backend = tmp_path / "backend"
    backend.write_text(f"{BACKEND}\n")
    device = setup.kernel.attached
    assert device is not None
    netlink = FakeNbdNetlink(lambda sock: setup.kernel.reconnect(device, sock) or 0)
    stored = setup.systemd.hand_over()
    killed = keeper_with_heir("t", tmp_path, netlink, backend, record.pid, stored["standby"])
    for descriptor in stored.values():
        os.close(descriptor)
    with killed:
        killed.kill()
        setup.kill_worker()
    setup.kernel.wait_for_link(2)
    for number in range(100):
        assert setup.kernel.read(number * PAGE, PAGE) == bytes([number + 1]) * PAGE
    os.close(only_keeper.become(setup.records))
    netlink.close()

    def scenario(keeper: Keeper) -> None:
        assert ready(keeper) != standby
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == standby
        assert setup.kernel.links == 2
        assert not keeper._is_new_worker_wanted
        assert setup.kernel.read(0, PAGE) == b"\1" * PAGE

    setup.run(scenario)
    record = setup.records.living(Records.WORKER)
    assert record is not None
    assert record.pid == standby


def test_what_an_heir_is_told(setup: Setup) -> None:
    """The worker, and the standby once it is parked. A standby that takes over is the worker, and then there is none
    for a while. An orderly end with the device attached leaves the heir as it is."""
    setup.heir = told = FakeHeir()
    pids: list[int] = []

    def scenario(keeper: Keeper) -> None:
        pids.append(ready(keeper))
        until(lambda: (told.told[-1:] or [(0, 0)])[0][1] == pids[0])
        pids.insert(0, told.told[-1][0])
        setup.kill_worker()
        setup.kernel.wait_for_link(2)
        until(lambda: keeper.serving.is_connected)
        pids.append(ready(keeper))
        until(lambda: told.told[-1] == (pids[1], pids[2]))

    setup.run(scenario)
    worker, first, second = pids
    expected = [(worker, 0), (worker, first), (first, 0), (first, second)]
    # a standby that is parked before the keeper comes to tell of its worker is told of with it
    seen = list(dict.fromkeys(told.told))
    assert [one for one in seen if one in expected] == [one for one in expected if one in seen]
    assert {(worker, first), (first, second)} <= set(seen)
    assert not told.has_ended


def test_a_device_that_is_detached_has_no_heir(setup: Setup) -> None:
    """A keeper that gives up, and has taken its device down, ends it."""
    setup.heir = told = FakeHeir()

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        setup.kernel.attached = None
        setup.kernel.close()
        setup.over.wait(30)

    with pytest.raises(UnavailableError):
        setup.run(scenario)
    assert told.has_ended


def test_a_worker_without_a_record_is_not_confused_with_the_standby(setup: Setup) -> None:
    """Both have the region; the one that has it locked serves."""
    standby = parked_by_a_killed_keeper(setup, worker_too=False)
    record = setup.records.living(Records.WORKER)
    assert record is not None
    (setup.records.path / Records.WORKER).unlink()
    setup.records = Records(setup.records.name, run=setup.records.path.parent)  # the next keeper's own

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper.is_swap_on)
        assert setup.kernel.links in (1, 2)  # a worker whose version is not known is replaced
        setup.kernel.wait_for_link(2)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == standby

    setup.run(scenario)
    wait_until_ended(record.pid)


@pytest.mark.parametrize("what", ["version", "settings"])
def test_a_standby_of_another_recipe_exits(setup: Setup, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live upgrade, or another configuration: the parked one is not taken, and exits although systemd is slow to
    remove it; a new one serves."""
    standby = parked_by_a_killed_keeper(setup)
    setup.systemd.loses = True
    if what == "version":
        monkeypatch.setattr(worker_handle, "__version__", "99")
    else:
        setup.work = setup.new_work(connections=2)
        setup.work.on = True

    def scenario(keeper: Keeper) -> None:
        wait_until_ended(standby)
        setup.kernel.wait_for_link(2)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid != standby
        assert setup.kernel.read(0, PAGE) == b"\1" * PAGE
        assert ready(keeper) != standby

    setup.run(scenario)


@pytest.mark.parametrize("worker_too", [True, False])
def test_a_standby_that_died_while_there_was_no_keeper(setup: Setup, worker_too: bool) -> None:
    """It is not taken, although its socket lay in the store when the next keeper was started."""
    standby = parked_by_a_killed_keeper(setup, worker_too=worker_too)
    stored = setup.systemd.hand_over()
    assert set(stored) == {"region", "standby"}
    os.kill(standby, signal.SIGKILL)
    wait_until_ended(standby)

    def scenario(keeper: Keeper) -> None:
        assert ready(keeper) != standby
        assert setup.kernel.links == 1 + worker_too
        assert setup.kernel.read(0, PAGE) == b"\1" * PAGE

    setup.run(scenario, stored=stored)
    assert "standby" in setup.systemd.hand_over()


def test_the_store_drops_a_standby_that_died(setup: Setup) -> None:
    """By itself: the socket is stored with a poll for its hang-up, the region is not."""
    standby = parked_by_a_killed_keeper(setup)
    os.kill(standby, signal.SIGKILL)
    wait_until_ended(standby)
    stored = setup.systemd.hand_over()
    assert set(stored) == {"region"}
    for descriptor in stored.values():
        os.close(descriptor)


def test_a_stop_ends_the_standby(setup: Setup) -> None:
    """systemd drops the store when the unit stops, and that is all it takes."""
    standby = parked_by_a_killed_keeper(setup)
    setup.systemd.drop()
    wait_until_ended(standby)


def test_down_ends_the_standby(setup: Setup) -> None:
    """By its record, with a systemd that keeps the store of a stopped unit."""
    standby = parked_by_a_killed_keeper(setup)
    (setup.records.path / Records.KEEPER).unlink()  # it would be this process
    up_down._take_down(setup.records, None, frozenset())
    wait_until_ended(standby)


def test_an_error_ends_the_standby(setup: Setup) -> None:
    """A keeper that ends for good leaves no standby in the store, although swap stays on."""
    standby = parked_by_a_killed_keeper(setup)

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        setup.kernel.attached = None
        setup.kernel.close()
        setup.over.wait(30)

    with pytest.raises(UnavailableError, match="detached by another program"):
        setup.run(scenario)
    wait_until_ended(standby)
    assert "standby" not in setup.systemd.names()


def test_no_device_no_standby(setup: Setup) -> None:
    """Nothing of a device that no longer exists is used: the standby's region is another one."""
    standby = parked_by_a_killed_keeper(setup)
    setup.work.on = False
    setup.kernel.disconnect(Attached(7, DEVICE_BYTES))
    setup.server.fail("WRITE", NFS3_OK)

    def scenario(keeper: Keeper) -> None:
        wait_until_ended(standby)
        assert ready(keeper) != standby

    setup.run(scenario)


def test_a_standby_of_another_region_is_not_taken(setup: Setup) -> None:
    """What it would map is not what the last worker wrote to."""
    standby = parked_by_a_killed_keeper(setup)
    stored = setup.systemd.hand_over()
    copy = region.create()
    os.write(copy, os.pread(stored["region"], os.fstat(stored["region"]).st_size, 0))
    os.dup2(copy, stored["region"], inheritable=False)
    os.close(copy)
    device_region.record(setup.records, stored["region"])

    def scenario(keeper: Keeper) -> None:
        wait_until_ended(standby)
        assert ready(keeper) != standby
        assert setup.kernel.read(0, PAGE) == b"\1" * PAGE

    setup.run(scenario, stored=stored)


def test_sighup_parks_the_next_one(setup: Setup) -> None:
    """A fresh standby takes the place of the parked one, which ends, and so once more in the store."""
    standby = parked_by_a_killed_keeper(setup, worker_too=False)

    def scenario(keeper: Keeper) -> None:
        assert ready(keeper) == standby
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until_ended(standby)
        setup.kernel.wait_for_link(2)
        until(lambda: keeper.standby.is_parked)
        assert "standby" in setup.systemd.names()

    setup.run(scenario)


def test_a_standby_is_activated_once(setup: Setup) -> None:
    """A keeper that ended right after activating, with a store that never got the message to remove the standby: the
    next keeper does not take it for a standby, and the worker that it has become is none the worse for that."""
    setup.systemd.loses = True
    standby = parked_by_a_killed_keeper(setup)

    def first(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(2)
        until(lambda: keeper.serving.is_connected and setup.records.living(Records.WORKER) is not None)

    stored = setup.systemd.hand_over()
    late = {name: os.dup(descriptor) for name, descriptor in stored.items()}
    setup.run(first, stored=stored)

    def second(keeper: Keeper) -> None:
        assert ready(keeper) != standby
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == standby
        assert setup.kernel.links == 2
        assert setup.kernel.read(0, PAGE) == b"\1" * PAGE

    setup.run(second, stored=late)


def start(server: FakeNfsServer, region_fd: int) -> tuple[WorkerHandle, bytes]:
    """A standby that is ready, and its recipe."""
    program, argv = nbdkit.standby_command({"url": server.url(), "address": "127.0.0.1", "lock": "off"}, threads=2)
    standby = WorkerHandle.start(program, argv, nbdkit.worker_environment(), region_fd)
    until(standby.check_ready)
    return standby, recipe(argv)


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_the_hang_up_tells_while_the_store_has_a_copy(taken: bool, kept: bool) -> None:
    """Whether the kernel has kept the worker's socket is seen at once, although the control socket of that worker still
    lies in a slow systemd's store; with the keeper that has started it, and with the next."""
    region_fd = region.create()
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        standby, made = start(server, region_fd)
        copies = [os.dup(standby.make_parkable()) for _ in range(2)]
        pid = standby.pid
        if taken:
            standby.close()
            found = WorkerHandle.take(copies.pop(), made)
            assert found is not None
            standby = found
        standby.activate()
        until(standby.has_greeted)
        assert standby.socket is not None
        nbd_handshake.negotiate(standby.socket)
        kernels = os.dup(standby.socket.fileno()) if kept else -1
        assert standby.release_to_kernel() == kept
        if kept:
            os.close(kernels)
        wait_until_ended(pid)
        assert os.waitpid(pid, 0) == (pid, 0)
        standby.close()
        for copy in copies:
            os.close(copy)
    os.close(region_fd)


def test_a_keeper_that_died_just_before_it_activated() -> None:
    """The standby's socket in the store is empty: it is not taken, and exits, whichever processes have a copy."""
    region_fd = region.create()
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        standby, made = start(server, region_fd)
        copies = [os.dup(standby.make_parkable()) for _ in range(2)]
        assert standby._control is not None
        standby._control.recv(1 << 16)
        assert WorkerHandle.take(copies[0], made) is None
        wait_until_ended(standby.pid)
        assert standby.has_ended()
        assert standby.status == 0
        os.close(copies[1])
    os.close(region_fd)


def take_and_end(standby: WorkerHandle, parked: int, made: bytes) -> None:
    """It is there to be taken, and ends."""
    taken = WorkerHandle.take(parked, made)
    assert taken is not None
    taken.kill()
    wait_until_ended(standby.pid)
    assert standby.has_ended()
    taken.close()


@pytest.mark.parametrize("room", [0, 1, 2])
def test_one_that_cannot_be_taken_for_want_of_descriptors(room: int) -> None:
    """It is not given up: it waits, and is taken when there are descriptors again. It is not known either whose the
    region is."""
    region_fd = region.create()
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        standby, made = start(server, region_fd)
        parked = os.dup(standby.make_parkable())
        with no_descriptors(but=room), pytest.raises(OSError, match="Too many open files"):
            WorkerHandle.take(parked, made)
        assert not standby.has_ended()
        for look in (lambda: region.is_held_by(region_fd, standby.pid), lambda: region.take_from(standby.pid)):
            with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
                look()
        with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
            WorkerHandle.adopt(standby.pid)
        take_and_end(standby, parked, made)
    os.close(region_fd)


def no_memory(*_: object) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


class PoorPoll:
    """A fake of select.poll that fails for want of memory."""

    def register(self, descriptor: int, events: int) -> None:
        pass

    def poll(self, timeout_ms: float) -> None:
        no_memory()


@pytest.mark.parametrize(("call", "poor"), [("socket.socket.recvmsg", no_memory), ("select.poll", PoorPoll)])
def test_one_that_cannot_be_taken_for_want_of_memory(call: str, poor: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call fails, it is not given up: it waits, and is taken when there is memory again."""
    region_fd = region.create()
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        standby, made = start(server, region_fd)
        parked = os.dup(standby.make_parkable())
        with monkeypatch.context() as patched:
            patched.setattr(call, poor)
            with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
                WorkerHandle.take(parked, made)
        take_and_end(standby, parked, made)
    os.close(region_fd)


def test_a_standby_that_cannot_be_looked_at_at_first(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that comes without descriptors looks again: the parked standby serves."""
    standby = parked_by_a_killed_keeper(setup)
    refusals = [OSError(errno.EMFILE, "Too many open files")] * 2
    is_held_by = region.is_held_by

    def look(descriptor: int, pid: int) -> bool:
        if refusals:
            raise refusals.pop()
        return is_held_by(descriptor, pid)

    def scenario(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(2)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == standby

    monkeypatch.setattr(region, "is_held_by", look)
    setup.run(scenario)
    assert refusals == []


def test_one_that_has_ended_is_not_taken() -> None:
    """What lies in its control socket is as it was, and its pidfd is readable."""
    region_fd = region.create()
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        standby, made = start(server, region_fd)
        parked = os.dup(standby.make_parkable())
        standby.kill()
        wait_until_ended(standby.pid)
        assert WorkerHandle.take(parked, made) is None
        assert standby.has_ended()
    os.close(region_fd)


def test_an_activated_one_exits_with_its_keeper(capfd: pytest.CaptureFixture[str]) -> None:
    """The keeper dies while the worker waits for its server: the kernel never gets that worker's socket, and the worker
    exits instead of trying for ever."""
    said = SaidOnStderr(capfd)
    region_fd = region.create()
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        standby, _ = start(server, region_fd)
    assert not _answers(server)
    parked = os.dup(standby.make_parkable())
    standby.activate()
    said.wait_for("trying again until it does")
    assert not standby.has_ended()
    os.close(parked)
    pid = standby.pid
    standby.close()
    wait_until_ended(pid)
    assert os.waitpid(pid, 0) == (pid, 0)
    os.close(region_fd)


def _answers(server: FakeNfsServer) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(server.url().partition("nfsport=")[2].partition("&")[0]))) == 0


def test_a_parked_standby_outlives_a_killed_keeper() -> None:
    """It gets no signal when the process that started it is killed (PR_SET_PDEATHSIG). It is taken in another process,
    twice, since taking changes nothing; it is activated, serves, and exits with its connection."""
    region_fd = region.create()
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            keeper = subprocess.Popen(
                [sys.executable, "-c", _SHORT_LIVED_KEEPER, server.url(), str(theirs.fileno()), str(region_fd)],
                pass_fds=[theirs.fileno(), region_fd],
                cwd=Path(__file__).parents[2],
            )
            with keeper:
                made, (parked,), _, _ = socket.recv_fds(ours, 4096, 1)
                keeper.kill()
        again = os.dup(parked)
        first = WorkerHandle.take(parked, made)
        assert first is not None
        first.close()
        standby = WorkerHandle.take(again, made)
        assert standby is not None
        assert not standby.has_ended()
        assert region.is_held_by(region_fd, standby.pid)
        assert standby.how_it_ended == ""
        standby.activate()
        until(standby.has_greeted)
        assert standby.socket is not None
        kernel = FakeKernel()
        kernel.attach(standby.socket, nbd_handshake.negotiate(standby.socket))
        assert standby.release_to_kernel()
        for number in range(8):
            assert kernel.read(number * PAGE, PAGE) == bytes(PAGE)
        pid = standby.pid
        kernel.close()
        standby.close()
        wait_until_ended(pid)
    os.close(region_fd)


_SHORT_LIVED_KEEPER = """
import socket, sys, time
from nbdnfs.keeper.worker_handle import WorkerHandle, recipe
from nbdnfs.worker import nbdkit

program, argv = nbdkit.standby_command({"url": sys.argv[1], "address": "127.0.0.1", "lock": "off"}, threads=2)
standby = WorkerHandle.start(program, argv, nbdkit.worker_environment(), int(sys.argv[3]))
while not standby.check_ready():
    time.sleep(0.01)
with socket.socket(fileno=int(sys.argv[2])) as out:
    socket.send_fds(out, [recipe(argv)], [standby.make_parkable()])
time.sleep(60)
"""


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": "@nbdnfs-test-unused"}])
def test_without_systemd_nothing_is_parked(setup: Setup, environment: dict[str, str]) -> None:
    """A standby exits with its keeper then, as no other process has its control socket; also after `nbdnfs up`, which
    reads a keeper's messages only until it is ready."""
    pids: list[int] = []
    setup.systemd.environment = environment

    def scenario(keeper: Keeper) -> None:
        until(lambda: keeper.is_swap_on and keeper.standby.is_ready)
        assert keeper.standby.worker is not None
        assert not keeper.standby.is_parked
        pids.append(keeper.standby.worker.pid)

    setup.run(scenario, stored={})
    wait_until_ended(pids[0])
