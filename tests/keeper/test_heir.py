# SPDX-License-Identifier: LGPL-2.1-or-later
"""The heir: what goes on when keeper and worker are killed, with real processes and a kernel made for tests."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fake_kernel import FakeKernel
from support.fake_nbd_netlink import BACKEND, FakeNbdNetlink, Prepared
from support.fake_systemd import wait_until_ended
from support.heir_run import keeper_with_heir
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs import name_lock, programs, region
from nbdnfs.errors import BusyError
from nbdnfs.keeper import heir, only_keeper
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from nbdnfs.keeper.worker_handle import WorkerHandle
from nbdnfs.kernel import nbd_handshake, nbd_netlink
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.own_root import OwnRoot
from nbdnfs.worker import protocol

TESTS = Path(__file__).resolve().parents[1]
DEVICE = Attached(7, 1 << 20)


class Scene:
    """A kernel with a worker, a parked standby, and a process that stands for their keeper and has an heir.

    refusals  what the kernel answers to RECONFIGURE, one errno each; without any, it does what FakeKernel does
    ignored   how often the kernel ignores it, because it has not seen yet that the old socket is dead
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = Records("t", run=folder)
        self.kernel = FakeKernel()
        self.kernel.attached = DEVICE
        self.netlink = FakeNbdNetlink(self._reconnect)
        self.refusals: list[int] = []
        self.ignored = 0
        self.keeper: subprocess.Popen[str] | None = None
        self.heir = 0
        self.worker = 0
        self.standby = 0
        self.control = -1
        self._region = region.create()
        self._backend = folder / "backend"
        self._backend.write_text(f"{BACKEND}\n")
        self._pids: list[int] = []

    def serve(self) -> None:
        """Have a worker that the kernel has connected."""
        handle = self._start("serve")
        self.worker = handle.pid
        handle.activate()
        wait_until(handle.has_greeted, "the worker's greeting")
        assert handle.socket is not None
        nbd_handshake.negotiate(handle.socket)
        self.kernel.reconnect(DEVICE, handle.socket)
        assert handle.release_to_kernel()
        os.close(handle.pidfd)
        handle.pidfd = -1

    def park(self, behaviour: str = "serve") -> None:
        """Have a standby, of which nobody has anything but `control`, as systemd has it."""
        handle = self._start(behaviour)
        self.standby = handle.pid
        self.control = os.dup(handle.make_parkable())
        handle.close()

    def keep(self, address: str = "") -> None:
        """Have the keeper, and its heir, which knows worker and standby."""
        self.keeper = keeper_with_heir(
            "t", self.folder, self.netlink, self._backend, self.worker, self.control, address
        )
        self._heir_is(self.netlink.pid)

    def tell(self, line: str) -> None:
        assert self.keeper is not None
        assert self.keeper.stdin is not None
        self.keeper.stdin.write(f"{line}\n")
        self.keeper.stdin.flush()

    def read_pid(self) -> None:
        assert self.keeper is not None
        assert self.keeper.stdout is not None
        self._heir_is(int(self.keeper.stdout.readline()))

    def all_there(self, behaviour: str = "serve", address: str = "") -> None:
        self.serve()
        self.park(behaviour)
        self.keep(address)

    def kill_keeper(self) -> None:
        assert self.keeper is not None
        self.keeper.kill()
        self.keeper.wait(DEADLINE_S)

    def kill_worker(self) -> None:
        os.kill(self.worker, signal.SIGKILL)

    def kill_both(self) -> None:
        self.kill_worker()
        self.kill_keeper()

    def detach(self) -> None:
        """As the kernel does: the attribute of sysfs, which the heir has open, is no more."""
        self._backend.write_text("")

    def wait_for_heir(self) -> None:
        wait_until_ended(self.heir)

    def activation(self, control: socket.socket) -> bytes:
        """What a standby that is held has been activated with."""
        control.settimeout(DEADLINE_S)
        wait_until(lambda: control.recv(1, socket.MSG_PEEK) == b"g", "the heir to activate the standby")
        return control.recv(128)

    def is_waiting(self) -> bool:
        """Whether the standby has been told nothing, and has been released by nobody."""
        with socket.socket(fileno=os.dup(self.control)) as control:
            message = control.recv(1 << 14, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return message.startswith(str(self.standby).encode()) and Path(f"/proc/{self.standby}").exists()

    def end(self) -> None:
        if self.keeper is not None:
            self.keeper.kill()
            self.keeper.wait(DEADLINE_S)
            for pipe in (self.keeper.stdin, self.keeper.stdout):
                assert pipe is not None
                pipe.close()
        for pid in self._pids:
            if heir.is_heir(pid) or pid in (self.worker, self.standby):
                os.kill(pid, signal.SIGKILL)
                if pid in (self.worker, self.standby):
                    os.waitpid(pid, 0)
        self.netlink.close()
        self.kernel.destroy()
        if self.control >= 0:
            os.close(self.control)
        os.close(self._region)

    def _heir_is(self, pid: int) -> None:
        self.heir = self.netlink.pid = pid
        self._pids.append(pid)

    def _start(self, behaviour: str) -> WorkerHandle:
        command = [sys.executable, str(TESTS / "support/fake_worker.py"), behaviour]
        handle = WorkerHandle.start(sys.executable, command, {}, self._region)
        wait_until(handle.check_ready, "a worker that waits")
        self._pids.append(handle.pid)
        return handle

    def _reconnect(self, sock: socket.socket) -> int:
        if self.refusals:
            return self.refusals.pop(0)
        if self.ignored:
            self.ignored -= 1
        else:
            self.kernel.reconnect(DEVICE, sock)
        return 0


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    programs.prepare_to_spawn()
    made = Scene(tmp_path)
    yield made
    made.end()


@pytest.fixture
def keeping(scene: Scene) -> Iterator[heir.Heir]:
    """What a keeper has of its heir, in this process, which has the lock."""
    records = Records("t", run=scene.folder)
    prepared: Any = Prepared(scene.netlink.peer.fileno(), scene.netlink.peer.fileno())
    lock = only_keeper.become(records)
    made = heir.Heir(records, Reporter(records, Notifier({})), lambda device: prepared)
    yield made
    made.close()
    os.close(lock)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """No process is started as heir: the heirs' ends of their channels are here, and they are ready. The pids of these
    heirs are 1, 2, ..."""
    made: list[socket.socket] = []

    def start(descriptors: tuple[int, ...], *_: object) -> int:
        made.append(socket.socket(fileno=os.dup(descriptors[0])))
        made[-1].setblocking(False)
        made[-1].send(b"r")
        return len(made)

    monkeypatch.setattr(heir._heir, "start", start)
    yield made
    for end in made:
        end.close()


def keeper_first(scene: Scene) -> None:
    """The worker goes on for a while, and serves."""
    scene.kill_keeper()
    scene.kernel.read(0, 4096)
    scene.kill_worker()


def worker_first(scene: Scene) -> None:
    scene.kill_worker()
    wait_until_ended(scene.worker)
    scene.kill_keeper()


@pytest.mark.parametrize("kill", [keeper_first, worker_first, Scene.kill_both])
def test_keeper_and_worker_are_killed(
    scene: Scene, kill: Callable[[Scene], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """In either order, and at once: the standby serves the kernel, and the heir says so, frees the lock, and exits."""
    scene.all_there()
    kill(scene)
    scene.kernel.wait_for_link(2)
    assert scene.kernel.read(0, 4096) == bytes(4096)
    scene.wait_for_heir()
    assert scene.kernel.read(0, 4096) == bytes(4096)
    os.close(only_keeper.become(scene.records))
    text = f"keeper and worker had ended: the heir has connected the standby, process {scene.standby}"
    assert capfd.readouterr().err.splitlines() == [f"nbdnfs: t: {text}"]


def test_the_standby_is_told_the_address(scene: Scene) -> None:
    """The server's new one, as the keeper would have told it; and its server may be away for a while."""
    scene.all_there("held", address="192.0.2.7")
    scene.kill_both()
    with socket.socket(fileno=os.dup(scene.control)) as control:
        assert scene.activation(control) == b"g192.0.2.7"
        assert scene.kernel.links == 1
        control.send(b"!")
    scene.kernel.wait_for_link(2)


@pytest.mark.parametrize("call", ["send", "recv", "recvmsg", "pread", "flock"])
def test_no_memory(scene: Scene, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The heir goes on until it has taken and activated the standby, shaken hands, and given the socket to the kernel:
    there is no other one of either."""
    library = scene.folder / "poor_calls.so"
    source = TESTS / "support/poor_calls.c"
    subprocess.run(["cc", "-std=c11", "-Wall", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    scene.serve()
    scene.park()
    with monkeypatch.context() as patched:
        before = os.environ.get("LD_PRELOAD", "")  # a sanitizer's, which must be the first
        patched.setenv("POOR_CALL", call)
        patched.setenv("LD_PRELOAD", f"{before} {library}".strip())
        scene.keep()
    scene.kill_both()
    scene.kernel.wait_for_link(2)
    assert scene.kernel.read(0, 4096) == bytes(4096)


def test_the_keeper_ends_alone(scene: Scene) -> None:
    """The worker serves, the standby waits; the next keeper has lock and standby, and the heir is gone."""
    scene.all_there()
    scene.kill_keeper()
    lock = only_keeper.become(scene.records)
    scene.wait_for_heir()
    os.close(lock)
    assert scene.is_waiting()
    assert scene.netlink.requests == []
    assert scene.kernel.read(0, 4096) == bytes(4096)


def test_the_worker_ends_alone(scene: Scene) -> None:
    """That is the keeper's to mend. It tells the heir what is there then, which is what counts."""
    scene.all_there()
    scene.kill_worker()
    wait_until_ended(scene.worker)
    with pytest.raises(BusyError):
        only_keeper.become(scene.records)
    assert scene.is_waiting()
    scene.tell("0 0")
    scene.read_pid()
    scene.kill_keeper()
    scene.wait_for_heir()
    assert scene.is_waiting()


def test_nothing_to_guard(scene: Scene) -> None:
    """A keeper that takes its device down ends the heir."""
    scene.all_there()
    scene.tell("end")
    scene.wait_for_heir()
    assert scene.is_waiting()


def test_no_standby(scene: Scene) -> None:
    """None is parked: the heir has nothing to do without its keeper, and ends with it, while the worker serves."""
    scene.serve()
    scene.keep()
    scene.kill_keeper()
    scene.wait_for_heir()
    assert scene.kernel.read(0, 4096) == bytes(4096)


def test_a_standby_that_is_taken(scene: Scene) -> None:
    """Its keeper, or systemd's next one, has taken the message out of its socket: it is theirs to activate."""
    scene.all_there("held")
    with socket.socket(fileno=os.dup(scene.control)) as control:
        control.recv(1 << 14)
        scene.kill_both()
        scene.wait_for_heir()
        with pytest.raises(BlockingIOError):
            control.recv(128, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("has_worker", [True, False])
def test_a_device_that_is_gone(scene: Scene, has_worker: bool) -> None:
    """`down` has ended the keeper: with the device, the heir's task is over."""
    scene.all_there()
    scene.detach()
    if has_worker:
        scene.kill_keeper()
    else:
        worker_first(scene)
    scene.wait_for_heir()
    assert scene.is_waiting()


def test_another_process_has_the_device(scene: Scene) -> None:
    """A next keeper, or `down`, in the very moment: nothing is activated."""
    scene.all_there()
    scene.kill_keeper()
    with open(scene.folder / ".t.keeper") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scene.kill_worker()
        scene.wait_for_heir()
    assert scene.is_waiting()


def test_a_lock_that_is_worthless(scene: Scene) -> None:
    """Its file has been removed: a next keeper may have another one."""
    scene.all_there()
    (scene.folder / ".t.keeper").unlink()
    scene.kill_both()
    scene.wait_for_heir()
    assert scene.is_waiting()


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("rude", "it does not greet as an NBD server"),
        ("refuse", "it refuses the export"),
        ("breaks", "it breaks the NBD handshake off"),
        ("exit:3", "it has ended"),
    ],
)
def test_a_standby_that_cannot_serve(
    scene: Scene, behaviour: str, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is ended, and the device is left to the next keeper."""
    scene.all_there(behaviour)
    scene.kill_both()
    scene.wait_for_heir()
    wait_until_ended(scene.standby)
    assert scene.netlink.requests == []
    assert f"the heir cannot connect the standby: {text}\n" in capfd.readouterr().err
    os.close(only_keeper.become(scene.records))


def test_the_kernel_sees_late_that_the_worker_is_dead(scene: Scene) -> None:
    """It ignores what is offered before that, and acknowledges it all the same."""
    scene.all_there()
    scene.ignored = 3
    scene.refusals = [errno.ENOMEM]
    scene.kill_both()
    scene.kernel.wait_for_link(2)
    assert scene.kernel.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize(
    ("refusals", "text"), [([], "the kernel has not taken its socket"), ([errno.EINVAL], "the kernel refuses it")]
)
def test_the_kernel_does_not_take_the_socket(
    scene: Scene, refusals: list[int], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The standby is ended: it would wait for ever, and have the region."""
    scene.all_there()
    scene.ignored, scene.refusals = 1 << 30, refusals
    scene.kill_both()
    scene.wait_for_heir()
    wait_until_ended(scene.standby)
    assert f"the heir cannot connect the standby: {text}" in capfd.readouterr().err


def test_the_next_keeper_waits_for_an_heir(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It says so. An heir whose standby waits for its server for too long is ended, and its standby with it."""
    monkeypatch.setattr(only_keeper, "_WAIT_S", 0.1)
    monkeypatch.setattr(only_keeper, "_HEIR_WAIT_S", 1.0)
    scene.all_there("held")
    scene.kill_both()
    with socket.socket(fileno=os.dup(scene.control)) as control:
        scene.activation(control)
        assert only_keeper.keeper_of(scene.records) is None
        os.close(only_keeper.become(scene.records))
        control.shutdown(socket.SHUT_RDWR)  # as the next keeper does, which finds no message in it
    wait_until_ended(scene.standby)
    scene.wait_for_heir()
    said = f"nbdnfs: t: waiting for the heir of the last keeper, process {scene.heir}"
    assert capfd.readouterr().err.splitlines() == [said]


def test_it_has_nothing_of_its_keeper(scene: Scene) -> None:
    """No descriptor but its own: others wait for a keeper's to be closed. It catches no signal but SIGKILL, has no
    place in the load average, and is told from a keeper by its name."""
    scene.all_there()

    def has_all() -> bool:
        found = [os.readlink(one) for one in Path(f"/proc/{scene.heir}/fd").iterdir()]
        assert {str(scene.folder / "backend"), str(scene.folder / ".t.keeper")} <= set(found)
        pidfds = len([name for name in found if "pidfd" in name])  # keeper and worker
        sockets = len([name for name in found if name.startswith("socket:")])  # keeper, netlink, standby
        return (pidfds, sockets, len(found)) == (2, 3, 2 + 2 + 3 + 1)  # and stderr

    wait_until(has_all, "the heir has read what it was told")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(scene.heir, number)
    assert heir.is_heir(scene.heir)
    assert scene.keeper is not None
    assert not heir.is_heir(scene.keeper.pid)
    for stat in Path(f"/proc/{scene.keeper.pid}/task").glob("*/stat"):
        assert stat.read_text().rpartition(")")[2].split()[0] != "D"
    assert Path(f"/proc/{scene.heir}/cmdline").read_bytes() == Path(f"/proc/{scene.keeper.pid}/cmdline").read_bytes()


def test_the_keepers_heap_is_given_back(scene: Scene) -> None:
    """When the keeper has ended: it is most of its memory, and the next one needs as much."""

    def heap_kib() -> int:
        part = Path(f"/proc/{scene.heir}/smaps").read_text().partition(" [heap]\n")[2]
        return int(part.partition("\nRss:")[2].split()[0]) if part else 0

    scene.all_there()
    assert heap_kib() > 1024
    scene.kill_keeper()
    wait_until(lambda: heap_kib() == 0, "the heir to give the heap back")
    assert heir.is_heir(scene.heir)
    scene.kill_worker()
    scene.kernel.wait_for_link(2)


def test_its_functions_are_bound_at_the_start() -> None:
    """Whatever the environment says: the dynamic linker has what it needs to bind one later in that heap."""
    shown = subprocess.run(["readelf", "-d", heir._heir.__file__], capture_output=True, text=True, check=True).stdout
    assert "NOW" in shown


def test_another_one_is_started(scene: Scene) -> None:
    """When it has been killed; that one knows what there is."""
    scene.all_there()
    first = scene.heir
    os.kill(first, signal.SIGKILL)
    wait_until_ended(first)
    wait_until(lambda: not Path(f"/proc/{first}").exists(), "the thread to collect it")
    scene.tell(f"{scene.worker} {scene.control}")
    scene.read_pid()
    assert scene.heir not in (0, first)
    scene.kill_both()
    scene.kernel.wait_for_link(2)


def test_another_one_is_started_after_a_pause(
    keeping: heir.Heir, ends: list[socket.socket], capfd: pytest.CaptureFixture[str]
) -> None:
    """That the one before has ended is said."""
    keeping.keep(0.0, DEVICE, None, None, "")
    assert keeping.descriptors() != []
    ends[0].close()
    for now_s in (1.0, 10.9):
        keeping.keep(now_s, DEVICE, None, None, "")
        assert keeping.descriptors() == []
    keeping.keep(11.0, DEVICE, None, None, "")
    assert (keeping.pid, len(ends)) == (2, 2)
    assert keeping.descriptors() != []
    for _ in range(2):
        keeping.end()
        assert keeping.descriptors() == []
    text = "the heir, process 1, has ended: starting another one"
    assert capfd.readouterr().err.splitlines() == [f"nbdnfs: t: {text}"]


@pytest.mark.parametrize("hangs_up", [True, False])
def test_one_that_does_not_answer(
    keeping: heir.Heir, hangs_up: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It may have copies of descriptors that are not its own: it is none, and that is said."""
    silent: list[int] = []

    def start(descriptors: tuple[int, ...], *_: object) -> int:
        if not hangs_up:
            silent.append(os.dup(descriptors[0]))
        return 1

    monkeypatch.setattr(heir, "_READY_TIMEOUT_S", 0.0)
    monkeypatch.setattr(heir._heir, "start", start)
    keeping.keep(0.0, DEVICE, None, None, "")
    assert keeping.descriptors() == []
    assert capfd.readouterr().err.splitlines() == ["nbdnfs: t: cannot start an heir: it does not answer"]
    for end in silent:
        os.close(end)


def test_one_that_does_not_answer_is_ended(keeping: heir.Heir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would know nothing, and keep another one from being started."""
    program = tmp_path / heir.COMMAND
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "1000"]) as process:
        while not heir.is_heir(process.pid):  # until it has its own name
            assert process.poll() is None
        monkeypatch.setattr(heir, "_READY_TIMEOUT_S", 0.0)
        monkeypatch.setattr(heir._heir, "start", lambda *_: process.pid)
        keeping.keep(0.0, DEVICE, None, None, "")
        assert process.wait(DEADLINE_S) == -signal.SIGKILL


def test_what_it_is_told(keeping: heir.Heir, ends: list[socket.socket], scene: Scene) -> None:
    """The worker once that has a process, the parked standby, and the address; all of it when one of them changes, and
    nothing when none does."""

    def told() -> list[tuple[bytes, list[str]]]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while (received := socket.recv_fds(ends[0], 128, 3))[0]:
                found.append((received[0], [os.readlink(f"/proc/self/fd/{one}") for one in received[1]]))
                for descriptor in received[1]:
                    os.close(descriptor)
        return found

    def keep(worker: Any, standby: Any, address: str = "") -> list[tuple[bytes, list[str]]]:
        keeping.keep(0.0, DEVICE, worker, standby, address)
        return told()

    control = scene.netlink.peer.fileno()
    link = os.readlink(f"/proc/self/fd/{control}")
    has_worker, has_standby = heir._heir.HAS_WORKER, heir._heir.HAS_STANDBY
    worker = SimpleNamespace(pid=os.getpid(), pidfd=os.open(os.devnull, os.O_RDONLY))
    standby = SimpleNamespace(pid=1, make_parkable=lambda: control)
    assert keep(None, None) == [(b"\0" + protocol.activation(), [])]
    assert keep(SimpleNamespace(pidfd=-1), None) == []
    assert keep(worker, None) == [(bytes([has_worker]) + protocol.activation(), [os.devnull])]
    both = [(bytes([has_worker | has_standby]) + protocol.activation("192.0.2.7"), [os.devnull, link])]
    assert keep(worker, standby, "192.0.2.7") == both
    assert keep(worker, standby, "192.0.2.7") == []
    assert keep(None, standby) == [(bytes([has_standby]) + protocol.activation(), [link])]
    keeping.end()
    assert told() == [(bytes([heir._heir.END]), [])]
    os.close(worker.pidfd)


def test_another_process_than_an_heir_is_not_ended() -> None:
    """Where the pid has got another meaning."""
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        heir.end(other.pid)
        other.terminate()
        assert other.wait(DEADLINE_S) == -signal.SIGTERM


def test_the_keeper_returns_to_its_root(scene: Scene) -> None:
    """The heir has the root of its keeper's loop, which has no server, and does not keep the loop in it."""
    said: list[str] = []
    found: list[set[str]] = []

    def loop(run: Path) -> None:
        records = Records("t", run=run)
        lock = only_keeper.become(records)
        root = OwnRoot(said.append)
        root.enter()
        prepared: Any = Prepared(scene.netlink.peer.fileno(), lock)
        started = heir.Heir(records, Reporter(records, Notifier({})), lambda device: prepared)
        started.keep(0.0, DEVICE, None, None, "")
        found.append(set(os.listdir(f"/proc/{started.pid}/root")))
        root.leave()
        found.append(set(os.listdir("/")))
        started.end()
        wait_until_ended(started.pid)
        os.close(lock)

    with tempfile.TemporaryDirectory(dir="/run") as folder:
        in_background(loop, Path(folder)).result(DEADLINE_S)
    assert said == []
    assert found == [{"dev", "proc", "run", "sys"}, set(os.listdir("/"))]


def test_a_keeper_without_a_lock_has_no_heir(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    """It could not know whether there is another keeper. That is said once, and tried again."""
    records = Records("t", run=scene.folder)
    prepared: Any = Prepared(scene.netlink.peer.fileno(), scene.netlink.peer.fileno())
    made = heir.Heir(records, Reporter(records, Notifier({})), lambda device: prepared)
    for now_s in (0.0, 100.0):
        made.keep(now_s, DEVICE, None, None, "")
        assert made.descriptors() == []
    assert capfd.readouterr().err.splitlines() == ["nbdnfs: t: cannot start an heir: this keeper has no lock"]
    lock = only_keeper.become(records)
    made.keep(200.0, DEVICE, None, None, "")
    assert heir.is_heir(made.pid)
    made.end()
    wait_until_ended(made.pid)
    os.close(lock)


def test_the_request(scene: Scene) -> None:
    """RECONFIGURE as the keeper itself sends it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        sent = threading.Thread(
            target=lambda: nbd_netlink.NbdNetlink(ours, 42).reconfigure(7, [0x01020304], backend=BACKEND)
        )
        sent.start()
        expected = theirs.recv(4096)
        theirs.send(b"\x24\0\0\0\x02\0\0\0\x01\0\0\0" + bytes(24))
        sent.join(10)
        request, at = nbd_netlink.NbdNetlink(ours, 42).reconfigure_request(7, backend=BACKEND)
    made = bytearray(request)
    made[at : at + 4] = (0x01020304).to_bytes(4, sys.byteorder)
    assert made[:8] + made[16:] == expected[:8] + expected[16:]  # but for the sequence number
    assert name_lock.holder("t", name_lock.KEEPER, run=scene.folder) is None
