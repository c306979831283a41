# SPDX-License-Identifier: LGPL-2.1-or-later
"""This machine as the machine under test, for a demo where the kernel has nbd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vmtest import host, verdict
from vmtest.chroot import COMPILER_FLAGS, INSIDE
from vmtest.machine import Job, Result
from vmtest.outcome import GuestFailedError, HarnessError

_TICK_S = 0.2


def check_here() -> None:
    """HarnessError, with what to do, unless this machine can swap onto nbd."""
    host.need_root("swapping on this machine itself")
    if not _has_nbd():
        raise HarnessError(
            f"this kernel ({os.uname().release}) has no nbd, or its module is not installed",
            "run it in a guest instead: make demo, without HERE=1",
        )
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    if not controllers.exists() or "memory" not in controllers.read_text().split():
        raise HarnessError(
            "there is no memory controller in /sys/fs/cgroup (cgroup v2)",
            "boot with systemd.unified_cgroup_hierarchy=1, or run it in a guest: make demo, without HERE=1",
        )


def _has_nbd() -> bool:
    if Path("/sys/module/nbd").exists():
        return True
    modprobe = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    command = [modprobe or "modprobe", "--dry-run", "--quiet", "nbd"]
    return modprobe is not None and subprocess.run(command, check=False, timeout=30).returncode == 0


class LocalJob:
    """A command on this machine. Its output goes to files, so that no thread has to read it."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str], timeout_s: float) -> None:
        self.command = command
        self._files = [Path(tempfile.mkstemp(prefix=name, dir=folder)[1]) for name in ("stdout-", "stderr-")]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )
        self._timed_out = threading.Event()
        self._timer = threading.Timer(timeout_s, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def stdout(self) -> str:
        return self._files[0].read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._files[1].read_text(errors="replace")

    def wait(self) -> Result:
        status = self._process.wait()
        self._timer.cancel()
        if self._timed_out.is_set():
            raise GuestFailedError(f"timed out: {self.command}\n{self.stdout}{self.stderr}")
        return Result(self.command, status, self.stdout, self.stderr)

    def kill(self) -> None:
        if self.running:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _give_up(self) -> None:
        if self.running:
            self._timed_out.set()
            self.kill()


class LocalMachine:
    """`with LocalMachine() as machine:` has the stress program built for it, and ends what it started."""

    disposable = False

    def __init__(self) -> None:
        self._jobs: list[LocalJob] = []

    def __enter__(self) -> LocalMachine:
        check_here()
        self._temporary = tempfile.TemporaryDirectory(prefix="nbdnfs-here-")
        self._folder = Path(self._temporary.name)
        self.verdict_target = str(self._folder / "verdict")
        Path(self.verdict_target).touch()
        host.run(
            [host.find_program("cc", "gcc"), *COMPILER_FLAGS, "-o", self._folder / "hog", INSIDE / "hog.c"],
            what="compiling hog.c",
            timeout_s=120,
        )
        # The interpreter's folder, unresolved: that of the virtual environment with the command nbdnfs.
        path = [str(self._folder), str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
        self._environment = {**os.environ, "PATH": os.pathsep.join(path)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for job in self._jobs:
            job.kill()
        self._temporary.cleanup()

    def start(self, command: str, timeout_s: float = 3600) -> LocalJob:
        """As Machine.start."""
        job = LocalJob(command, self._folder, self._environment, timeout_s)
        self._jobs.append(job)
        return job

    def run(self, command: str, timeout_s: float = 60, *, check: bool = True) -> Result:
        """As Machine.run."""
        result = self.start(command, timeout_s).wait()
        if check and result.status != 0:
            raise GuestFailedError(f"exit status {result.status}: {command}\n{result.stdout}{result.stderr}")
        return result

    def wait_verdict(
        self, job: Job, timeout_s: float, on_progress: Callable[[verdict.Progress], None] | None = None
    ) -> verdict.Verdict:
        """As Machine.wait_verdict."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = not job.running
            progress, found = verdict.parse(Path(self.verdict_target).read_text())
            if progress is not None and on_progress is not None:
                on_progress(progress)
            if found is not None:
                return found
            if ended or time.monotonic() > deadline:
                raise GuestFailedError(f"no verdict from the stress program\n{job.stderr}")
            time.sleep(_TICK_S)
