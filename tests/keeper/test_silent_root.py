# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server of the root file system is away: a keeper's loop goes on, and waits for no file there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fake_kernel import FakeKernel
from support.fake_nfs import FakeNfsServer
from support.keeper_run import FakeSwap, run_keeper, until
from support.resident import grown, resident_kib
from support.silent_program import SilentProgram

from nbdnfs import programs
from nbdnfs.config import Config
from nbdnfs.keeper import keeper as keeper_module
from nbdnfs.keeper.helper_process import HelperProcess
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier

ROOT = Path(__file__).resolve().parents[2]
PAGE = 4096
DEVICE_BYTES = 4 << 20
LATE_S = 0.3


class Messages:
    """What the keeper sends to systemd. `environment` is for the Notifier; the watchdog's period is 0.3 s."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self._seen: list[str] = []
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "300000"}

    def all(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._seen += self._socket.recv(4096).decode().split("\n")
        return self._seen

    def status(self) -> str:
        """The unit's."""
        return [line for line in self.all() if line.startswith("STATUS=")][-1].removeprefix("STATUS=")

    def wait_for_watchdog(self) -> None:
        """The loop turns: five more messages for the watchdog."""
        seen = self.all().count("WATCHDOG=1")
        until(lambda: self.all().count("WATCHDOG=1") >= seen + 5)

    def close(self) -> None:
        self._socket.close()


class Work(FakeSwap):
    """Workers and the resolver are started through `silent`, which may not answer."""

    away = False
    silent: SilentProgram

    def is_server_away(self, region: object) -> bool:
        return self.away

    def resolve(self) -> HelperProcess:
        return HelperProcess([str(self.silent.path), "/bin/true"], {})

    def resolved(self) -> str:
        return ""


class Setup:
    def __init__(self, server: FakeNfsServer, root: Path, silent: SilentProgram) -> None:
        url = server.url()
        self.silent = silent
        self.kernel = FakeKernel()
        self.work = Work(Config("t", url, region_pages=1024, lock="off", owner=False), url, "127.0.0.1")
        self.work.silent = silent
        self.work._argv = ["@nbdkit", self.work._program, *self.work._argv[1:]]
        self.work._program = str(silent.path)
        self.kernel.use = lambda: "as swap" if self.work.on else ""
        self.messages = Messages(root / "notify")
        self.records = Records("t", run=root)
        self.records.make()
        self.over = threading.Event()

    def run(self, scenario: Callable[[Keeper], None]) -> None:
        reporter = Reporter(self.records, Notifier(self.messages.environment))
        keeper = Keeper(self.kernel, self.work, self.records, reporter, stored={})
        region_fd = os.dup(keeper._region)
        try:
            assert run_keeper(keeper, scenario, self.over, join_s=60) == 0
        finally:
            keeper._notifier.close()
            os.close(region_fd)

    def kill_worker(self) -> None:
        record = self.records.living(Records.WORKER)
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    monkeypatch.setattr(programs, "SPAWN_LATE_AFTER_S", LATE_S, raising=False)
    with FakeNfsServer(bytes(DEVICE_BYTES)) as server:
        silent = SilentProgram(tmp_path / "program", 'exec "$@"')
        with silent.signals_ignored():
            made = Setup(server, tmp_path, silent)
            yield made
            silent.answer()
            made.kernel.destroy()
            made.messages.close()


def ready(keeper: Keeper) -> None:
    until(lambda: keeper.is_swap_on and keeper.standby.is_ready)


def test_a_worker_that_dies_is_replaced_and_the_loop_goes_on(setup: Setup, capfd: pytest.CaptureFixture[str]) -> None:
    """The standby serves at once. The next one waits for the root, and the one who dies then is replaced when that
    answers; the keeper says so, and answers the watchdog all the time."""

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        setup.kernel.write(0, b"a" * PAGE)
        setup.silent.be_silent()
        setup.kill_worker()
        setup.kernel.wait_for_link(2)
        assert setup.kernel.read(0, PAGE) == b"a" * PAGE
        setup.kernel.write(PAGE, b"b" * PAGE)
        setup.silent.wait_until_opened()
        setup.messages.wait_for_watchdog()
        until(lambda: any("does not answer" in line and "swap goes on" in line for line in setup.messages.all()))

        until(lambda: keeper.serving.is_connected)
        setup.kill_worker()
        until(lambda: not keeper.serving.is_connected)
        setup.messages.wait_for_watchdog()
        assert setup.kernel.links == 2

        setup.silent.answer()
        setup.kernel.wait_for_link(3)
        assert setup.kernel.read(0, 2 * PAGE) == b"a" * PAGE + b"b" * PAGE
        ready(keeper)
        until(lambda: setup.messages.status().startswith("swap is on"))

    setup.run(scenario)
    said = capfd.readouterr().err
    assert said.count("the root file system does not answer") == 1
    assert said.count("the root file system answers again") == 1


def test_a_root_that_is_silent_from_the_start(setup: Setup) -> None:
    """The first worker waits for it, and the unit's status says so; swap comes up when it answers."""
    setup.silent.be_silent()

    def scenario(keeper: Keeper) -> None:
        text = "the root file system does not answer, so no program starts: swap waits until it does"
        until(lambda: f"STATUS={text}" in setup.messages.all())
        setup.silent.answer()
        ready(keeper)
        until(lambda: setup.messages.status().startswith("swap is on"))

    setup.run(scenario)


def test_a_helper_waits_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's name is to be looked up again while the root is away: the loop does not wait for the helper."""
    monkeypatch.setattr(keeper_module, "RESOLVE_AFTER_S", 0.0)

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        setup.silent.be_silent()
        setup.work.away = True
        setup.silent.wait_until_opened()
        setup.messages.wait_for_watchdog()
        setup.work.away = False
        setup.silent.answer()
        until(lambda: keeper._resolver is None)

    setup.run(scenario)


def test_a_keeper_that_ends_leaves_nothing_behind(setup: Setup) -> None:
    """Also not the worker that was waiting to start."""
    pids: list[int] = []

    def scenario(keeper: Keeper) -> None:
        ready(keeper)
        setup.silent.be_silent()
        setup.kill_worker()
        setup.kernel.wait_for_link(2)
        setup.silent.wait_until_opened()
        until(lambda: keeper.serving.is_connected)
        record = setup.records.living(Records.WORKER)
        assert record is not None
        pids.append(record.pid)

    setup.run(scenario)
    setup.silent.answer()
    setup.kernel.close()
    children = Path(f"/proc/{os.getpid()}/task")

    def is_worker(pid: int) -> bool:
        try:
            return "(@nbdkit)" in Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False  # it has just ended

    def living() -> list[int]:
        found = [int(word) for task in children.iterdir() for word in (task / "children").read_text().split()]
        return [pid for pid in found if is_worker(pid)]

    until(lambda: os.waitpid(pids[0], os.WNOHANG)[0] == pids[0])
    until(lambda: living() == [])


# The keeper of `nbdnfs run`, with real workers and helpers, without a kernel's device. It imports what it imports there
# before it begins. URL, the folder that stands for /run/nbdnfs.
KEEPER = """
import sys, time
from pathlib import Path
from nbdnfs import config, region
from nbdnfs.keeper import keeper, main
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.real_work import RealWork
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from support.fake_kernel import FakeKernel
from support.keeper_run import FakeSwap


class Work(FakeSwap):
    def is_swapped_on(self, attached):
        RealWork.is_swapped_on(self, attached)
        return super().is_swapped_on(attached)


url = sys.argv[1]
keeper.RESOLVE_AFTER_S, keeper.RESOLVE_EVERY_S = 0.5, 3600.0
settings = config.Config("t", url, region_pages=1024, lock="wanted", realtime=False, owner=False)
main._lock_memory(settings)
main.programs.prepare_to_spawn()
records = Records("t", run=Path(sys.argv[2]))
records.reserve()
kernel = FakeKernel()
work = Work(settings, url, "127.0.0.1")
kernel.use = lambda: "as swap" if work.on else ""
own_root = main.OwnRoot(print)


def warm_up():
    main._apply(settings, main.memlock.settle(main.CODE, heap_bytes=main._HEAP_BYTES))
    own_root.enter()


made = keeper.Keeper(kernel, work, records, Reporter(records, Notifier()), stored={}, warm_up=warm_up)
sys.exit(made.run())
"""
OUTSIDE_THE_ROOT = ("/run/", "/proc/", "/sys/", "/dev/")


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """A folder below /run: the keeper's loop sees no other one that a test could make."""
    with tempfile.TemporaryDirectory(dir="/run", prefix="nbdnfs-test-") as folder:
        yield Path(folder)


def test_the_loop_opens_nothing_on_the_root(tmp_path: Path, run_folder: Path) -> None:
    """From swapon on, through the death of a worker, SIGHUP, a server that is away, and its name that is looked up: the
    paths that its thread gives to the kernel, and the code that it reads for the first time. Its "/" has the kernel's
    own file systems alone: an NFS root's server is asked whether "/" may be passed, for any path."""
    records = Records("t", run=run_folder)

    def worker() -> int:
        record = records.living(Records.WORKER)
        return record.pid if record is not None else 0

    environment = {**os.environ, "PYTHONMALLOC": "malloc", "LD_BIND_NOW": "1", "LC_ALL": "C", "PYTHONUTF8": "1"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    trace = tmp_path / "trace"
    with (
        FakeNfsServer(bytes(DEVICE_BYTES)) as server,
        subprocess.Popen([sys.executable, "-c", KEEPER, server.url(), records.path.parent], env=environment) as keeper,
    ):
        try:
            until(lambda: records.read(Records.STATE) == "watch")
            assert set(os.listdir(f"/proc/{keeper.pid}/root/")) == {"dev", "proc", "run", "sys"}
            resident = resident_kib(keeper.pid)
            strace = programs.find_program("strace", "strace")
            with subprocess.Popen(
                [strace, "-e", "trace=%file", "-o", str(trace), "-p", str(keeper.pid)], stderr=subprocess.PIPE
            ) as tracer:
                assert tracer.stderr is not None
                assert b"attached" in tracer.stderr.readline()
                first = worker()
                os.kill(first, signal.SIGKILL)
                until(lambda: worker() not in (0, first))
                second = worker()
                keeper.send_signal(signal.SIGHUP)
                until(lambda: worker() not in (0, second))
                third = worker()
                server.__exit__(None, None, None)
                until(lambda: "resolve_server" in commands_of_children(keeper.pid))
                until(lambda: "resolve_server" not in commands_of_children(keeper.pid))
                os.kill(third, signal.SIGKILL)
                until(lambda: worker() == 0)
                read = grown(resident, resident_kib(keeper.pid))
                tracer.send_signal(signal.SIGINT)
                tracer.wait(20)
        finally:
            keeper.kill()
    paths = {line.split('"')[1].replace("//", "/") for line in trace.read_text().splitlines() if '"' in line}
    paths.discard("")  # a descriptor's own
    assert any(path.startswith("/proc/") for path in paths), "the keeper has been traced"
    assert {path for path in paths if not path.startswith(OUTSIDE_THE_ROOT)} == set()
    assert read == {}


def commands_of_children(pid: int) -> str:
    """The command lines of all processes that a process has started."""
    text = ""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                text += Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return text
