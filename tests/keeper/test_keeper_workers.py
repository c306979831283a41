# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper with real workers (nbdkit, plugin, engine) against a fake kernel and a fake server: nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_kernel import FakeKernel
from support.fake_nfs import NFS3_OK, NFS3ERR_NOSPC, FakeNfsServer
from support.keeper_run import FakeSwap, run_keeper, until
from support.nfs_server import Ganesha
from support.waiting import SaidOnStderr

from nbdnfs import proc_stat, region
from nbdnfs.config import Config
from nbdnfs.errors import OwnedError
from nbdnfs.keeper import serving as serving_module
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.real_work import RealWork
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from nbdnfs.kernel.nbd_handshake import Export, TransmissionFlags
from nbdnfs.nas import owner_record, ownership
from nbdnfs.nas.owner_record import Identity, Timing

PAGE = 4096
DEVICE_BYTES = 16 << 20
SLOTS = 1024


class Setup:
    """A server, a kernel, and the keepers that come and go on them."""

    def __init__(
        self,
        server: Any,
        root: Path,
        *,
        url: str | None = None,
        timing: Timing | None = None,
        encrypt: bool = False,
        loop: bool = False,
    ) -> None:
        """With `timing` the file at `url` has been claimed, and the workers keep its record."""
        url = url or server.url()
        settings = Config("t", url, region_pages=SLOTS, lock="off", owner=False, encrypt=encrypt, loop=loop)
        self.server = server
        self.kernel = FakeKernel()
        self.work = FakeSwap(settings, url, "127.0.0.1")
        self.kernel.use = lambda: "as swap" if self.work.on else ""
        if timing is not None:
            name = url.partition("?")[0].rpartition("/")[2]
            more = owner_record.plugin_settings(name, owner_record.boot_id(), timing)
            self.work._argv += [f"{key}={value}" for key, value in more.items()]
        self.records = Records("t", run=root)
        self.records.make()
        self.parked: dict[str, int] = {}
        self.over = threading.Event()

    def run(self, scenario: Callable[[Keeper], None]) -> int:
        """A keeper in this thread until `scenario`, in another one, has ended."""
        records = Records(self.records.name, run=self.records.path.parent)
        keeper = Keeper(
            self.kernel,
            self.work,
            records,
            Reporter(records, Notifier({})),
            stored={name: os.dup(descriptor) for name, descriptor in self.parked.items()},
        )
        self.parked = {"region": os.dup(keeper._region)}  # what systemd's store does
        return run_keeper(keeper, scenario, self.over, join_s=60)

    def kill_worker(self) -> int:
        """SIGKILL for the worker that serves; returns its pid."""
        record = self.records.living(Records.WORKER)
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        return record.pid

    def counters(self) -> dict[str, int]:
        return {k: v for k, v in region.read_counters(self.parked["region"]).items() if isinstance(v, int)}

    def end(self) -> None:
        self.kernel.destroy()
        with contextlib.suppress(AssertionError, ProcessLookupError):
            self.kill_worker()


@pytest.fixture
def setup(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Setup]:
    """Workers with nbdkit's threads, or those that a test asks for with WITH_AND_WITHOUT_LOOP."""
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        made = Setup(server, tmp_path, loop=getattr(request, "param", False))
        yield made
        made.end()


WITH_AND_WITHOUT_LOOP = pytest.mark.parametrize("setup", [False, True], ids=["threads", "loop"], indirect=True)


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Setup]:
    """With pages that are encrypted on the server."""
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        made = Setup(server, tmp_path, encrypt=True)
        yield made
        made.end()


def page_of(number: int, generation: int) -> bytes:
    return random.Random(number << 32 | generation).randbytes(PAGE)


def ready(keeper: Keeper) -> None:
    """The keeper watches, and has a standby."""
    until(lambda: keeper.is_swap_on and keeper.standby.is_ready)


@WITH_AND_WITHOUT_LOOP
def test_nothing_is_lost_when_a_dirty_worker_is_killed(setup: Setup) -> None:
    """Pages that the server has refused so far come from the next worker, and reach the server through it."""
    pages = {number: page_of(number, 1) for number in range(800)}

    def scenario(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(1)
        ready(keeper)
        setup.server.fail("WRITE", NFS3ERR_NOSPC)
        for number, data in pages.items():
            setup.kernel.write(number * PAGE, data)
        setup.kill_worker()
        setup.kernel.wait_for_link(2)
        assert setup.counters()["replayed_pages"] >= 800
        for number, data in pages.items():
            assert setup.kernel.read(number * PAGE, PAGE) == data, number
        setup.server.fail("WRITE", NFS3_OK)
        setup.kernel.flush()

    assert setup.run(scenario) == 0
    content = bytes(setup.server.on_disk)
    assert all(content[number * PAGE : (number + 1) * PAGE] == data for number, data in pages.items())


@WITH_AND_WITHOUT_LOOP
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_a_worker_is_no_io_error(setup: Setup, number: signal.Signals) -> None:
    """It ends at once, as by SIGKILL, and its standby goes on with what it had. nbdkit would fail requests first."""
    pages = {page: page_of(page, 1) for page in range(64)}

    def scenario(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(1)
        ready(keeper)
        record = setup.records.living(Records.WORKER)
        assert record is not None
        setup.kernel.write(0, pages[0])
        os.kill(record.pid, number)
        for page, data in pages.items():
            if page:
                setup.kernel.write(page * PAGE, data)
        setup.kernel.wait_for_link(2)
        assert {page: setup.kernel.read(page * PAGE, PAGE) for page in pages} == pages

    setup.run(scenario)


def test_a_signal_to_a_standby(setup: Setup) -> None:
    """It ends, rather than to take over later and to fail requests; another one is started."""

    def scenario(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(1)
        ready(keeper)
        assert keeper.standby.worker is not None
        first = keeper.standby.worker.pid
        os.kill(first, signal.SIGTERM)

        def is_replaced() -> bool:
            now = keeper.standby.worker
            return now is not None and keeper.standby.is_ready and now.pid != first

        until(is_replaced)
        setup.kill_worker()
        setup.kernel.wait_for_link(2)
        for page in range(64):
            setup.kernel.write(page * PAGE, page_of(page, 1))
        assert all(setup.kernel.read(page * PAGE, PAGE) == page_of(page, 1) for page in range(64))

    setup.run(scenario)


def test_the_keys_outlive_worker_and_keeper(encrypted: Setup) -> None:
    """Pages on the server and pages in slots, read by the next worker and by that of the next keeper. On the server
    nothing is readable."""
    setup = encrypted
    pages = {number: page_of(number, 1) for number in range(1, 1600)}

    def first(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(1)
        ready(keeper)
        for number, data in pages.items():
            setup.kernel.write(number * PAGE, data)
        setup.kernel.flush()
        setup.server.fail("WRITE", NFS3ERR_NOSPC)
        for number in range(1, 800):
            pages[number] = page_of(number, 2)
            setup.kernel.write(number * PAGE, pages[number])
        setup.kill_worker()
        setup.kernel.wait_for_link(2)
        ready(keeper)
        for number, data in pages.items():
            assert setup.kernel.read(number * PAGE, PAGE) == data, number

    def second(keeper: Keeper) -> None:
        ready(keeper)
        setup.kill_worker()
        setup.kernel.wait_for_link(3)
        setup.server.fail("WRITE", NFS3_OK)
        setup.kernel.flush()
        for number, data in pages.items():
            assert setup.kernel.read(number * PAGE, PAGE) == data, number

    assert setup.run(first) == 0
    assert region.version_of(setup.parked["region"]) in region.ENCRYPTED
    assert setup.run(second) == 0
    assert setup.counters()["checksum_failures"] == 0
    content = bytes(setup.server.on_disk)
    clear = {page_of(number, generation) for number in pages for generation in (1, 2)}
    assert not [at for at in range(PAGE, len(content), PAGE) if content[at : at + PAGE] in clear]


def test_an_upgrade_to_encryption(setup: Setup) -> None:
    """A device that runs unencrypted, and a next keeper whose configuration asks for encryption, which is the default
    by then: the pages stay readable, through the next worker too, and are not encrypted. The device's next start is,
    on the same file, with the swap header that is there. And the other way round."""
    pages = {number: page_of(number, 1) for number in range(1600)}

    def configured(encrypt: bool) -> None:
        setup.work._argv = [
            f"encrypt={int(encrypt)}" if word.startswith("encrypt=") else word for word in setup.work._argv
        ]

    def write_all(keeper: Keeper) -> None:
        ready(keeper)
        for number, data in pages.items():
            setup.kernel.write(number * PAGE, data)
        setup.kernel.flush()

    def read_all(keeper: Keeper) -> None:
        ready(keeper)
        links = setup.kernel.links
        for number in range(0, 1600, 2):
            pages[number] = page_of(number, 2)
            setup.kernel.write(number * PAGE, pages[number])
        setup.kill_worker()
        setup.kernel.wait_for_link(links + 1)
        setup.kernel.flush()
        for number, data in pages.items():
            assert setup.kernel.read(number * PAGE, PAGE) == data, number

    def is_encrypted() -> bool:
        return region.version_of(setup.parked["region"]) in region.ENCRYPTED

    def clear_pages() -> int:
        content = bytes(setup.server.on_disk)
        return sum(content[number * PAGE : (number + 1) * PAGE] == data for number, data in pages.items())

    def take_down() -> None:
        assert setup.kernel.attached is not None
        setup.work.on = False
        setup.kernel.disconnect(setup.kernel.attached)

    configured(False)
    assert setup.run(write_all) == 0
    configured(True)
    assert setup.run(read_all) == 0
    assert (is_encrypted(), clear_pages()) == (False, 1600)
    take_down()

    def first_page_only(keeper: Keeper) -> None:
        ready(keeper)
        assert setup.kernel.read(0, 3 * PAGE) == pages[0] + bytes(2 * PAGE)
        write_all(keeper)

    assert setup.run(first_page_only) == 0
    configured(False)
    assert setup.run(read_all) == 0
    assert (is_encrypted(), clear_pages()) == (True, 1)
    take_down()
    assert setup.run(write_all) == 0
    assert (is_encrypted(), clear_pages()) == (False, 1600)


def test_a_change_to_the_loop_and_back(setup: Setup) -> None:
    """A device that runs, and a next keeper whose configuration has another `loop`: the next worker is of that kind,
    on the same connection and region, and nothing that the server has not taken yet is lost."""
    pages: dict[int, bytes] = {}
    setup.server.fail("WRITE", NFS3ERR_NOSPC)

    def threads() -> int:
        until(lambda: setup.records.living(Records.WORKER) is not None)  # the keeper writes it once the worker serves
        record = setup.records.living(Records.WORKER)
        assert record is not None
        return len(os.listdir(f"/proc/{record.pid}/task"))

    def write(keeper: Keeper) -> None:
        ready(keeper)
        for number in range(600):
            pages[number] = page_of(number, 1)
            setup.kernel.write(number * PAGE, pages[number])

    def replace(keeper: Keeper) -> None:
        ready(keeper)
        links, before = setup.kernel.links, threads()
        setup.kill_worker()
        setup.kernel.wait_for_link(links + 1)
        until(lambda: (threads() < before) == has_loop())
        for number in range(0, 600, 3):
            assert setup.kernel.read(number * PAGE, PAGE) == pages[number]
            pages[number] = page_of(number, links + 1)
            setup.kernel.write(number * PAGE, pages[number])
        for number, data in pages.items():
            assert setup.kernel.read(number * PAGE, PAGE) == data, number

    def has_loop() -> bool:
        return "loop=1" in setup.work._argv

    assert setup.run(write) == 0
    setup.work._argv.append("loop=1")
    assert setup.run(replace) == 0
    setup.work._argv.remove("loop=1")
    assert setup.run(replace) == 0
    setup.server.fail("WRITE", NFS3_OK)

    def flush(keeper: Keeper) -> None:
        ready(keeper)
        setup.kernel.flush()

    assert setup.run(flush) == 0
    content = bytes(setup.server.on_disk)
    assert all(content[number * PAGE : (number + 1) * PAGE] == data for number, data in pages.items())


@pytest.mark.timeout(300)
@WITH_AND_WITHOUT_LOOP
def test_fifty_kills_with_a_dirty_region(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty times the worker dies with nine tenths of the region dirty and requests under way: no wrong page."""
    dice = random.Random(1)
    dirty = SLOTS * 9 // 10
    monkeypatch.setattr(serving_module, "LASTED_S", 0.0)  # fifty times in a row is no crash of its own doing here
    written: dict[int, bytes] = {}
    resumed_s: list[float] = []

    def scenario(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(1)
        ready(keeper)
        setup.server.fail("WRITE", NFS3ERR_NOSPC)
        numbers = dice.sample(range(DEVICE_BYTES // PAGE), dirty)
        for number in numbers:
            written[number] = page_of(number, 0)
            setup.kernel.write(number * PAGE, written[number])
        for generation in range(1, 51):
            until(lambda: keeper.standby.is_ready)
            assert setup.counters()["unstable_pages"] >= dirty
            killer = threading.Timer(dice.uniform(0, 0.02), setup.kill_worker)
            killer.start()
            changing = dice.sample(numbers, 100)
            for number in changing:
                written[number] = page_of(number, generation)
                setup.kernel.write(number * PAGE, written[number])
            killer.join()
            setup.kernel.wait_for_link(generation + 1)
            resumed_s.append(setup.kernel.last_outage_s)
            for number in dice.sample(numbers, 200):
                assert setup.kernel.read(number * PAGE, PAGE) == written[number], (generation, number)
        for number in numbers:
            assert setup.kernel.read(number * PAGE, PAGE) == written[number], number
        setup.server.fail("WRITE", NFS3_OK)
        setup.kernel.flush()

    assert setup.run(scenario) == 0
    content = bytes(setup.server.on_disk)
    assert not [number for number, data in written.items() if content[number * PAGE : (number + 1) * PAGE] != data]
    resumed_s.sort()
    print(f"resumed after {resumed_s[25] * 1000:.0f} ms (median), {resumed_s[-1] * 1000:.0f} ms (longest)")


@WITH_AND_WITHOUT_LOOP
def test_a_keeper_takes_over_from_a_killed_one(setup: Setup, capfd: pytest.CaptureFixture[str]) -> None:
    """The next keeper adopts the worker that lives; the device and its connection stay as they are. The exit status
    of an adopted worker is unknown."""
    pids = []

    def first(keeper: Keeper) -> None:
        ready(keeper)
        setup.kernel.write(0, page_of(0, 1))
        record = setup.records.living(Records.WORKER)
        assert record is not None
        pids.append(record.pid)

    def second(keeper: Keeper) -> None:
        ready(keeper)
        assert keeper.serving.worker is not None
        assert keeper.serving.worker.pid == pids[0]
        assert setup.kernel.read(0, PAGE) == page_of(0, 1)
        setup.kill_worker()
        setup.kernel.wait_for_link(2)
        assert setup.kernel.read(0, PAGE) == page_of(0, 1)

    setup.run(first)
    setup.run(second)
    assert (setup.kernel.attaches, setup.kernel.reconnects, setup.kernel.disconnects) == (1, 1, 0)
    assert f"worker {pids[0]} has ended\n" in capfd.readouterr().err


@WITH_AND_WITHOUT_LOOP
def test_both_at_once(setup: Setup) -> None:
    """With keeper and worker dead, the parked region and the device are enough to go on."""

    def first(keeper: Keeper) -> None:
        ready(keeper)
        setup.server.fail("WRITE", NFS3ERR_NOSPC)
        for number in range(700):
            setup.kernel.write(number * PAGE, page_of(number, 1))

    def second(keeper: Keeper) -> None:
        setup.kernel.wait_for_link(2)
        for number in range(700):
            assert setup.kernel.read(number * PAGE, PAGE) == page_of(number, 1)
        ready(keeper)

    setup.run(first)
    setup.kill_worker()
    setup.run(second)


@WITH_AND_WITHOUT_LOOP
def test_a_worker_without_a_record_is_found(setup: Setup) -> None:
    """A keeper that died before it had written the record leaves a worker that is found by its region."""
    pids = []

    def first(keeper: Keeper) -> None:
        ready(keeper)
        record = setup.records.process(Records.WORKER)
        assert record is not None
        pids.append(record.pid)

    def second(keeper: Keeper) -> None:
        ready(keeper)
        assert keeper.serving.worker is not None
        # a version that is not known is replaced
        until(lambda: keeper.serving.worker is not None and keeper.serving.worker.pid != pids[0])
        setup.kernel.wait_for_link(2)

    setup.run(first)
    (setup.records.path / Records.WORKER).unlink()
    setup.run(second)


@WITH_AND_WITHOUT_LOOP
def test_sighup_replaces_the_worker(setup: Setup) -> None:
    """A fresh standby first, then the worker goes, and no write is lost."""

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        assert keeper.serving.worker is not None
        before = keeper.serving.worker.pid
        setup.kernel.write(0, page_of(0, 1))
        os.kill(os.getpid(), signal.SIGHUP)
        setup.kernel.wait_for_link(2)
        assert setup.kernel.read(0, PAGE) == page_of(0, 1)
        until(lambda: keeper.serving.worker is not None and keeper.serving.worker.pid != before)

    setup.run(scenario)


@WITH_AND_WITHOUT_LOOP
def test_a_server_that_is_away_is_waited_for(setup: Setup) -> None:
    """A worker that takes over while the server does not answer goes on trying; the kernel's requests wait."""

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        setup.kernel.write(0, page_of(0, 1))
        setup.server.hold("NULL")  # what a worker that knows the file asks first
        setup.kill_worker()
        setup.server.wait_for(1, timeout_s=20)
        assert setup.kernel.links == 1
        setup.server.release()
        setup.kernel.wait_for_link(2)
        assert setup.kernel.read(0, PAGE) == page_of(0, 1)

    setup.run(scenario)


def test_a_worker_outlives_its_keeper(tmp_path: Path) -> None:
    """A worker that serves goes on when the process that started it ends; a standby exits."""
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            keeper = subprocess.Popen(
                [sys.executable, "-c", _SHORT_LIVED_KEEPER, server.url(), str(theirs.fileno())],
                stdout=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                text=True,
                cwd=Path(__file__).parents[2],
            )
            with keeper:
                assert keeper.stdout is not None
                serving, standby = map(int, keeper.stdout.readline().split())
                _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
                keeper.kill()
            kernel = FakeKernel()
            with socket.socket(fileno=descriptor) as sock:
                kernel.attach(sock, Export(DEVICE_BYTES, TransmissionFlags(0)))
            until(lambda: proc_stat.start_time_ticks(standby) is None)
            for number in range(8):
                assert kernel.read(number * PAGE, PAGE) == bytes(PAGE)
            assert proc_stat.start_time_ticks(serving) is not None
            kernel.close()
            until(lambda: proc_stat.start_time_ticks(serving) is None)


_SHORT_LIVED_KEEPER = """
import socket, sys, time
from nbdnfs import region
from nbdnfs.keeper.worker_handle import WorkerHandle
from nbdnfs.kernel import nbd_handshake
from nbdnfs.worker import nbdkit

program, argv = nbdkit.standby_command({"url": sys.argv[1], "address": "127.0.0.1", "lock": "off"}, threads=4)
region_fd = region.create()
serving = WorkerHandle.start(program, argv, nbdkit.worker_environment(), region_fd)
serving.activate()
while not serving.has_greeted():
    time.sleep(0.01)
nbd_handshake.negotiate(serving.socket)
standby = WorkerHandle.start(program, argv, nbdkit.worker_environment(), region_fd)
while not standby.check_ready():
    time.sleep(0.01)
with socket.socket(fileno=int(sys.argv[2])) as out:
    socket.send_fds(out, [b"x"], [serving.socket.fileno()])
print(serving.pid, standby.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_of_another_region_version_is_no_standby(setup: Setup, capfd: pytest.CaptureFixture[str]) -> None:
    """A worker of a version with another layout does not replace the old worker: it says so and exits."""

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        assert keeper.serving.worker is not None
        pid = keeper.serving.worker.pid
        version = os.pread(setup.parked["region"], 4, 8)
        os.pwrite(setup.parked["region"], b"\xff\0\0\0", 8)
        said = SaidOnStderr(capfd)
        os.kill(os.getpid(), signal.SIGHUP)
        said.wait_for("has version 255, this nbdnfs knows")
        time.sleep(0.5)
        assert keeper.serving.worker.pid == pid
        os.pwrite(setup.parked["region"], version, 8)
        setup.kernel.wait_for_link(2)

    setup.run(scenario)


def test_a_file_that_comes_later(ganesha: Ganesha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without its file, or without the directory: waited for and shown, not made while the boot lasts, and
    used within 15 s of its return."""
    monkeypatch.setattr(FakeSwap, "provision", RealWork.provision)
    folder = ganesha.export_path / "disk"
    folder.mkdir()
    (folder / "later").write_bytes(bytes(DEVICE_BYTES))
    away = folder.rename(ganesha.export_path.parent / "away")
    setup = Setup(ganesha, tmp_path, url=ganesha.url("disk/later"))
    setup.work._settings = dataclasses.replace(setup.work._settings, size_bytes=DEVICE_BYTES)
    setup.work._new_file_after_s = 150.0
    took_s: list[float] = []

    def waiting() -> str:
        return setup.records.read(Records.WAITING) or ""

    def scenario(keeper: Keeper) -> None:
        until(lambda: waiting().endswith("(a typo, or the server's disks are not mounted yet)"))
        folder.mkdir()  # the mount point
        until(lambda: "disk/later on " in waiting())
        folder.rmdir()
        away.rename(folder)
        returned_s = time.monotonic()
        ready(keeper)
        took_s.append(time.monotonic() - returned_s)

    assert setup.run(scenario) == 0
    print(f"ready {took_s[0]:.1f} s after the file's return")
    assert took_s[0] < 15.0
    assert waiting() == ""
    setup.end()


def test_a_stolen_file_ends_the_keeper(ganesha: Ganesha, tmp_path: Path) -> None:
    """Another machine takes it under the keeper's feet: no write of this one's after that, the kernel's requests fail
    instead of waiting, and no worker is started again and again. The record, made before, was no obstacle."""
    path = ganesha.export_path / "stolen"
    path.write_bytes(bytes(DEVICE_BYTES))
    url = ganesha.url("stolen")
    timing = Timing(refresh_ms=300, in_flight_ms=300)
    holder = owner_record.keeper_holder("t")
    ownership.claim(url, holder, owner_record.identity(), timing=timing)
    setup = Setup(ganesha, tmp_path, url=url, timing=timing)
    box2 = Identity("d" * 32, "e" * 32, "-", "box2")
    page = page_of(0, 2)

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        for number in range(800):
            setup.kernel.write(number * PAGE, page_of(number, 1))
        ownership.claim(url, holder, box2, steal=True, timing=timing)
        path.write_bytes(page * (DEVICE_BYTES // PAGE))
        assert setup.over.wait(30)

    with pytest.raises(OwnedError, match="another machine has taken"):
        setup.run(scenario)
    assert setup.kernel.reconnects == 0
    assert setup.records.read(Records.STATE) == Records.STOLEN
    assert path.read_bytes() == page * (DEVICE_BYTES // PAGE)
    assert not ownership.release(url, holder, owner_record.identity())
    setup.end()
    for left in path.parent.glob("*stolen*"):
        left.unlink()
