# SPDX-License-Identifier: LGPL-2.1-or-later
"""A keeper that is killed at each of its calls, or of which each call fails, and the next one after it.

A keeper runs in a process of its own (keeper_program.py). What outlives it is here: the kernel's device, systemd's
store, the workers. What must hold in the end is the same in all cases (`Stage.check`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdnfs.errors import NbdnfsError
from nbdnfs.keeper.records import Records
from nbdnfs.kernel.nbd_device import backend_of
from nbdnfs.kernel.nbd_handshake import Export, TransmissionFlags
from support.fake_kernel import FakeKernel
from support.fake_systemd import FakeSystemd, wait_until_ended
from support.nbd_tree import add_device
from support.waiting import wait_until

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parents[1] / "build" / "failing_calls.so"
PAGE = b"\x5a" * 4096
_TIMEOUT_S = 60.0
_EXPLAINED = 10


def library() -> Path:
    """failing_calls.c, compiled."""
    source = HERE / "failing_calls.c"
    LIBRARY.parent.mkdir(exist_ok=True)
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < source.stat().st_mtime:
        part = LIBRARY.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", part, source, "-ldl"], check=True)
        part.rename(LIBRARY)
    return LIBRARY


class Template:
    """keeper_program.py, which forks keepers. One at a time. Used as a context. `patience_s` is how long a keeper's end
    is waited for."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        built = library()
        # as `nbdnfs run` is started: main.py
        environment = {**os.environ, "LD_PRELOAD": str(built), "PYTHONMALLOC": "malloc", "LD_BIND_NOW": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
        command = [sys.executable, str(HERE / "keeper_program.py"), str(theirs.fileno()), str(built)]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self.patience_s = _TIMEOUT_S

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._process.wait(10)

    def start(self, wanted: dict[str, Any], descriptors: list[int]) -> int:
        """The pid of a new keeper."""
        self._control.settimeout(_TIMEOUT_S)
        socket.send_fds(self._control, [json.dumps(wanted).encode()], descriptors)
        return int(json.loads(self._control.recv(4096))["pid"])

    def result(self) -> dict[str, Any]:
        """Of the keeper, which ends soon. TimeoutError: it does not."""
        self._control.settimeout(self.patience_s)
        return dict(json.loads(self._control.recv(4096)))


@dataclass(frozen=True)
class Wanted:
    """What is to happen to a keeper. Nothing, by default."""

    kill_at: int = 0
    fail_at: int = 0
    way: int = 0
    at_once: bool = True  # counting begins with the keeper, and not with SIGUSR2


class Stage:
    """One device from its beginning to its end, and the keepers that come and go."""

    def __init__(self, template: Template, folder: Path) -> None:
        self._template = template
        self.folder = folder
        self.pids = folder / "pids"
        self.pids.mkdir()
        self.kernel = FakeKernel(timeout_s=20)
        self.root = folder / "root"  # /proc and /sys, as a keeper reads them
        for part in ("proc", "sys/block"):
            (self.root / part).mkdir(parents=True)
        (folder / "swaps").write_text("Filename Type Size Used Priority\n/dev/nbd7 partition 1020 0 -2\n")
        self.kernel.use = lambda: "as swap" if (self.root / "proc/swaps").exists() else ""
        self.systemd = FakeSystemd(folder)
        self.records = Records("t", run=folder)
        self.records.make()
        self._log = open(folder / "log", "ab", buffering=0)  # noqa: SIM115
        self._pidfd = -1  # of the keeper that runs; -1: none does
        self._log_begins = 0
        self._answering: threading.Thread | None = None
        self.disconnects_in_use = 0

    # keepers

    def start(self, wanted: Wanted) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stored = self.systemd.hand_over()
        self.systemd.is_ready = False
        self._log_begins = len(self.log())
        message = {
            "folder": str(self.folder),
            "notify": self.systemd.environment["NOTIFY_SOCKET"],
            "worker": [sys.executable, "@nbdkit", "-I", "-S", str(HERE / "page_worker.py"), str(self.pids)],
            "kill_at": wanted.kill_at,
            "fail_at": wanted.fail_at,
            "way": wanted.way,
            "at_once": wanted.at_once,
            "stored": list(stored),
            "is_attached": self.kernel.attached is not None,
        }
        descriptors = [theirs.fileno(), self.kernel.fileno(), self._log.fileno(), *stored.values()]
        pid = self._template.start(message, descriptors)
        with contextlib.suppress(ProcessLookupError):  # it has been killed already
            self._pidfd = os.pidfd_open(pid)
        theirs.close()
        for descriptor in stored.values():
            os.close(descriptor)
        self._answering = threading.Thread(target=self._answer, args=(ours,), daemon=True)
        self._answering.start()

    def wait(self) -> dict[str, Any]:
        """What has become of the keeper, once it has ended. AssertionError: it had to be killed for that; its template
        is free for the next one all the same."""
        try:
            found, is_stuck = self._template.result(), False
        except TimeoutError:
            self.signal(signal.SIGKILL)
            self._template.patience_s = _TIMEOUT_S
            found, is_stuck = self._template.result(), True
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        assert self._answering is not None
        self._answering.join(10)
        if is_stuck:
            raise AssertionError(f"it does not end; the last call was {found['name']}")
        return found

    def signal(self, number: int) -> None:
        """To the keeper, if it has not ended yet."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    @property
    def has_ended(self) -> bool:
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _answer(self, link: socket.socket) -> None:
        """The kernel's part, until the keeper has ended."""
        with link:
            while True:
                try:
                    data, descriptors, _, _ = socket.recv_fds(link, 4096, 4)
                except ConnectionResetError:  # it has not read an answer
                    return
                if not data:
                    return
                name, *words = json.loads(data)
                error, answer = "", None
                try:
                    answer = self._call(name, words, descriptors)
                except NbdnfsError as failed:
                    error = failed.message
                with contextlib.suppress(OSError):
                    link.send(json.dumps([error, answer]).encode())

    def _call(self, name: str, words: list[Any], descriptors: list[int]) -> Any:
        kernel, device = self.kernel, self.kernel.attached
        if name == "dead_links":
            return kernel.dead_links()
        if descriptors:
            with socket.socket(fileno=descriptors[0]) as sock:
                if name == "attach":
                    made = kernel.attach(sock, Export(words[0], TransmissionFlags(0)))
                    add_device(self.root, made.index, size_bytes=made.size_bytes, pid=1, backend=backend_of("t"))
                    return [made.index, made.size_bytes]
                assert device is not None
                return kernel.reconnect(device, sock)
        assert device is not None
        self.disconnects_in_use += name == "fail_requests" and kernel.use() != ""
        getattr(kernel, name)(device)
        (self.root / "sys/block" / device.name / "pid").unlink()
        return None

    # what is there

    def workers(self) -> set[int]:
        """The living ones."""
        found = set()
        for path in self.pids.iterdir():
            with contextlib.suppress(OSError):
                state = (Path("/proc") / path.name / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    found.add(int(path.name))
        return found

    def _facts(self) -> Iterator[tuple[str, bool]]:
        """What holds of a device that is up: swap is on, a worker serves, a standby is parked, systemd knows."""
        yield "swap is on", "swap is on" in self.log()[self._log_begins :]
        yield "the keeper watches", self.records.read(Records.STATE) == "watch"
        yield "the device is in use", self.kernel.use() != ""
        yield "region and standby are stored", self.systemd.names() == ["region", "standby"]
        yield "systemd has been told", self.systemd.is_ready
        standby = self.records.living(Records.STANDBY)
        yield "the standby has a record", standby is not None and standby.pid in self.workers()
        yield "one worker and one standby live", len(self.workers()) == 2
        yield "the worker has a record", self.records.living(Records.WORKER) is not None
        yield "the keeper has a record", self.records.living(Records.KEEPER) is not None

    @property
    def lacks(self) -> str:
        """Why the device is not up; "" where it is."""
        return next((f"it is not so that {fact}" for fact, holds in self._facts() if not holds), "")

    def is_up(self) -> bool:
        return not self.lacks

    def kill_worker(self) -> int:
        record = self.records.living(Records.WORKER)
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        return record.pid

    def goes_on(self) -> bool:
        """It runs until the device is up, unless something else is to happen to it. Was it up? A moment later it may
        not be: a worker that a keeper before this one has started appears, and ends."""
        was_up = False

        def is_settled() -> bool:
            nonlocal was_up
            was_up = self.is_up()
            return was_up or self.has_ended

        try:
            wait_until(is_settled, "the device is up", _TIMEOUT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.lacks}") from None
        return was_up

    def comes_up(self) -> None:
        if not self.goes_on():
            raise AssertionError(f"it has ended, and {self.lacks}")

    def check(self) -> None:
        """A keeper that comes now has the device up, with the page that was written, one worker and one standby; and
        nothing has been taken away from swap meanwhile."""
        self.start(Wanted())
        try:
            self.comes_up()
            if (self.folder / "written").exists() and self.kernel.read(4096, len(PAGE)) != PAGE:
                raise AssertionError("the page is not what was written")
            if self.kernel.attaches != 1 + self.kernel.disconnects or self.disconnects_in_use:
                raise AssertionError("the device was taken from swap")
        finally:
            self.signal(signal.SIGTERM)
            result = self.wait()
        if result["status"] != 0:
            raise AssertionError(f"the next keeper has ended with {result['status']}")
        if "Traceback" in self.log():
            raise AssertionError("a keeper has printed a traceback")

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def end(self) -> None:
        self.kernel.destroy()
        self.systemd.close()
        self._log.close()
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until_ended(pid)


def _brought_up(stage: Stage, wanted: Wanted) -> None:
    stage.start(wanted)
    stage.comes_up()
    stage.kernel.write(4096, PAGE)
    (stage.folder / "written").touch()


def attach(stage: Stage, wanted: Wanted) -> None:
    """From nothing to a device with swap on it and a parked standby, and its end by SIGTERM."""
    stage.start(wanted)
    stage.goes_on()


def hand_over(stage: Stage, wanted: Wanted) -> None:
    """The worker is killed: the standby takes its place, and another one is made ready."""
    _brought_up(stage, Wanted(wanted.kill_at, wanted.fail_at, wanted.way, at_once=False))
    stage.signal(signal.SIGUSR2)
    killed = stage.kill_worker()
    wait_until_ended(killed)
    stage.goes_on()


def replace(stage: Stage, wanted: Wanted) -> None:
    """SIGHUP: the standby is replaced, and then the worker."""
    _brought_up(stage, Wanted(wanted.kill_at, wanted.fail_at, wanted.way, at_once=False))
    before = stage.workers()
    stage.signal(signal.SIGUSR2)
    stage.signal(signal.SIGHUP)
    wait_until(lambda: stage.has_ended or (not before & stage.workers() and stage.is_up()), "all are new", _TIMEOUT_S)


def adoption(stage: Stage, wanted: Wanted) -> None:
    """A keeper after one that was killed: it takes the worker and the standby over."""
    _brought_up(stage, Wanted())
    stage.signal(signal.SIGKILL)
    stage.wait()
    stage.start(wanted)
    stage.goes_on()
    if stage.kernel.reconnects:
        raise AssertionError("the worker has been replaced")


def adoption_without_worker(stage: Stage, wanted: Wanted) -> None:
    """A keeper after one that was killed with its worker: the standby that was parked serves, unless that keeper is
    killed too."""
    _brought_up(stage, Wanted())
    standby = stage.records.living(Records.STANDBY)
    stage.signal(signal.SIGKILL)
    stage.wait()
    wait_until_ended(stage.kill_worker())
    stage.start(wanted)
    was_up = stage.goes_on()
    worker = stage.records.living(Records.WORKER)
    assert standby is not None
    if was_up and (worker is None or worker.pid != standby.pid):
        raise AssertionError(f"standby {standby.pid} does not serve")


SCENES: dict[str, Callable[[Stage, Wanted], None]] = {
    "attach": attach,
    "hand-over": hand_over,
    "replace": replace,
    "adoption": adoption,
    "adoption without its worker": adoption_without_worker,
}


@contextlib.contextmanager
def new_stage(template: Template) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(template, Path(folder))
        try:
            yield stage
        finally:
            stage.end()


class WrongError(AssertionError):
    """`result` is that of the keeper that something was done to."""

    def __init__(self, text: str, result: dict[str, Any]) -> None:
        super().__init__(text)
        self.result = result


def play(template: Template, name: str, wanted: Wanted) -> dict[str, Any]:
    """One scene, and the keeper after it. What the first one's steps were. WrongError: what is said in `check` does not
    hold, or the keeper has ended in a way that it cannot explain."""
    result: dict[str, Any] = {"name": "not known", "status": 0, "failed": False, "ways": 0}
    with new_stage(template) as stage:
        try:
            try:
                SCENES[name](stage, wanted)
            finally:
                stage.signal(signal.SIGTERM)
                result = stage.wait()
            expected = (0, -signal.SIGKILL) if wanted.kill_at else (0, _EXPLAINED)
            if result["status"] not in expected:
                raise AssertionError(f"the keeper has ended with {result['status']}")
            stage.check()
        except (AssertionError, NbdnfsError, OSError, ValueError) as error:
            call = f"call: {result['name']}"
            text = f"{name}, {wanted}, {call}: {type(error).__name__} {error}\n{stage.log()}"
            raise WrongError(text, result) from error
    return result


@dataclass
class Steps:
    """Of one scene: how many there are, the numbers of those that were tried, and how often something was done to one
    of them. `wrong` did not end as they should; `ended` are those after which the keeper said why it ended."""

    there_are: int = 0
    done: list[int] = field(default_factory=list)
    tried: int = 0
    ended: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Enumeration:
    """By scene. It may be that of an earlier process: what was tried then is not tried again."""

    scenes: dict[str, Steps] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return sum(scene.tried for scene in self.scenes.values())

    @property
    def ended(self) -> int:
        return sum(scene.ended for scene in self.scenes.values())

    @property
    def wrong(self) -> list[str]:
        return [text for scene in self.scenes.values() for text in scene.wrong]

    @property
    def left(self) -> int:
        """Steps that were not tried yet."""
        return sum(len(set(range(1, scene.there_are + 1)) - set(scene.done)) for scene in self.scenes.values())


class _Enumerator:
    """Goes through steps with several keepers at once."""

    def __init__(self, found: Enumeration, wanted: Callable[[int, int], Wanted], *, by_points: bool) -> None:
        self.found = found
        self._wanted, self._by_points = wanted, by_points
        self._templates: queue.SimpleQueue[Template] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards `found`

    def _one(self, scene: Steps, name: str, wanted: Wanted) -> int:
        """In how many ways there is such a step."""
        template = self._templates.get()
        wrong = ""
        try:
            result = play(template, name, wanted)
        except WrongError as error:
            result, wrong = error.result, str(error)
        finally:
            self._templates.put(template)
        reached = result["status"] == -signal.SIGKILL if wanted.kill_at else result["failed"]
        with self._lock:
            scene.tried += reached or wrong != ""
            scene.ended += result["status"] == _EXPLAINED
            scene.wrong += [wrong] if wrong else []
        return 1 if wanted.kill_at else int(result["ways"])

    def _at(self, name: str, number: int) -> None:
        scene, way = self.found.scenes[name], 0
        while self._one(scene, name, self._wanted(number, way)) > way + 1:
            way += 1
        with self._lock:
            scene.done.append(number)

    def _count(self, name: str) -> Steps:
        scene = self.found.scenes.setdefault(name, Steps())
        if scene.there_are == 0:
            template = self._templates.get()
            scene.there_are = play(template, name, Wanted())["points" if self._by_points else "calls"]
            self._templates.put(template)
        return scene

    def run(self, names: Sequence[str], jobs: int, every: int, keep: Callable[[], None]) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(jobs):
                self._templates.put(stack.enter_context(Template()))
            pool = stack.enter_context(ThreadPoolExecutor(jobs))
            for name in names:
                scene = self._count(name)
                # another part of them each time that it is called for a part
                numbers = range(1 + os.getpid() % every, scene.there_are + 1, every)
                left = [number for number in numbers if number not in scene.done]
                for _ in pool.map(functools.partial(self._at, name), left):
                    with self._lock:
                        keep()


def killed_at(number: int, _way: int) -> Wanted:
    """For `everywhere`: the keeper is killed before and after each of its calls."""
    return Wanted(kill_at=number)


def failing_at(number: int, way: int) -> Wanted:
    """For `everywhere`: each of its calls fails once, in each way that it can."""
    return Wanted(fail_at=number, way=way)


def everywhere(
    wanted: Callable[[int, int], Wanted],
    names: Sequence[str] = tuple(SCENES),
    *,
    jobs: int = 2,
    every: int = 1,
    found: Enumeration | None = None,
    keep: Callable[[], None] = lambda: None,
) -> Enumeration:
    """Each `every`-th step of these scenes, in `jobs` processes at once. `keep` is called after each of them, when
    `found` has what is new."""
    steps = _Enumerator(found or Enumeration(), wanted, by_points=wanted is killed_at)
    steps.run(names, jobs, every, keep)
    return steps.found
