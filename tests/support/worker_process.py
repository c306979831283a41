# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker as `nbdnfs serve` runs it, for the time of a `with`."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import proc_stat
from nbdnfs.errors import UnavailableError
from support.nbd_client import NbdClient

_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Worker:
    """A running worker: its socket, the process of `serve`, and the file that has its stderr."""

    socket: Path
    serve: subprocess.Popen[bytes]
    stderr: Path

    @property
    def pid(self) -> int:
        """nbdkit's process, the child of `serve`."""
        (child,) = Path(f"/proc/{self.serve.pid}/task/{self.serve.pid}/children").read_text().split()
        return int(child)

    def faults(self) -> tuple[int, int]:
        """Minor and major page faults of all of its threads, the ended ones too (proc_pid_stat(5))."""
        fields = proc_stat.fields(Path(f"/proc/{self.pid}/stat").read_text())
        return int(fields[proc_stat.MINOR_FAULTS]), int(fields[proc_stat.MAJOR_FAULTS])

    def memory_kib(self, key: str) -> int:
        """A figure of /proc/PID/smaps_rollup, "Rss" or "Locked"."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
        assert found is not None, text
        return int(found[1])


def _is_served(path: Path, deadline_s: float) -> bool:
    """Whether the worker completes a handshake.

    nbdkit listens before it forks, so that a connection alone proves nothing. It answers once the engine has opened
    the file, and exits if the server is away by then.
    """
    try:
        NbdClient(path, deadline_s).close()
    except (OSError, UnavailableError):
        return False
    return True


_LOOP_SERVER = Path(__file__).parents[2] / "bench/loop_server.py"


@contextlib.contextmanager
def serving_by_loop(url: str, directory: Path, *settings: str) -> Iterator[Worker]:
    """The engine's loop for one client after the other, without nbdkit; the plugin's settings, KEY=VALUE. `serve` is
    the process that serves, which is killed at the end: what the server does not have then is gone."""
    socket_path, stderr_path = directory / "loop.sock", directory / "loop.err"
    with stderr_path.open("wb") as stderr:
        server = subprocess.Popen(
            [sys.executable, str(_LOOP_SERVER), str(socket_path), url, *settings],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
    deadline = time.monotonic() + _DEADLINE_S
    try:
        while not socket_path.exists():
            assert server.poll() is None, stderr_path.read_text()
            assert time.monotonic() < deadline, stderr_path.read_text()
            time.sleep(0.01)
        yield Worker(socket_path, server, stderr_path)
        assert server.poll() is None, stderr_path.read_text()
    finally:
        server.kill()
        server.wait(_DEADLINE_S)


@contextlib.contextmanager
def serving(url: str, directory: Path, *options: str) -> Iterator[Worker]:
    """`nbdnfs serve URL --socket ...`, ended with SIGTERM; it serves when the block begins.

    AssertionError with its stderr when it ends early or with an error.
    """
    socket_path, stderr_path = directory / "worker.sock", directory / "worker.err"
    with stderr_path.open("wb") as stderr:
        serve = subprocess.Popen(
            [sys.executable, "-m", "nbdnfs", "serve", url, "--socket", str(socket_path), *options],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
    worker = Worker(socket_path, serve, stderr_path)
    deadline = time.monotonic() + _DEADLINE_S
    try:
        while not _is_served(socket_path, _DEADLINE_S):
            assert serve.poll() is None, stderr_path.read_text()
            assert time.monotonic() < deadline, stderr_path.read_text()
            time.sleep(0.01)
        yield worker
    finally:
        serve.send_signal(signal.SIGTERM)
        try:
            status = serve.wait(_DEADLINE_S)
        except subprocess.TimeoutExpired:
            serve.send_signal(signal.SIGTERM)  # the second kills a worker that waits for its server
            status = serve.wait(_DEADLINE_S)
            assert status == 128 + signal.SIGKILL, stderr_path.read_text()
            status = 0
    assert status == 0, stderr_path.read_text()
