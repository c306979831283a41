# SPDX-License-Identifier: LGPL-2.1-or-later
"""The loop where the kernel has no memory for a socket, now and then: nothing ends because of that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What moves much, with many requests under way, and a client that leaves.
TESTS = "test_model or test_many_at_once or does_not_receive or to_a_full_socket or test_disconnect or hangs_up"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def poor_socket(tmp_path: Path) -> Path:
    """poor_socket.c, compiled."""
    library = tmp_path / "poor_socket.so"
    source = HERE / "poor_socket.c"
    subprocess.run(["cc", "-std=c11", "-Wall", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


def run_with(library: Path, *arguments: str | Path, **environment: str) -> None:
    """Python, with a library before all others; AssertionError where it fails."""
    before = os.environ.get("LD_PRELOAD", "")  # a sanitizer's, which must be the first
    path = os.pathsep.join(map(str, (HERE.parent, HERE.parents[1])))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, **environment, "LD_PRELOAD": f"{before} {library}".strip(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_sockets_that_fail(poor_socket: Path) -> None:
    """The loop's own tests pass while every third send and receive fails with ENOBUFS or ENOMEM, and other sends are
    cut short."""
    run_with(poor_socket, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS, HERE / "test_loop.py")


@pytest.mark.parametrize("watched", [0, 6])
def test_epoll_that_fails(poor_socket: Path, watched: int) -> None:
    """The same where epoll(7) is out of memory or watches, at once or with the next connection: poll(2) does then."""
    tests = f"{TESTS} or test_a_server_that_restarts"
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, HERE / "test_loop.py")
    run_with(poor_socket, *arguments, LAST_WATCHED=str(watched))


def test_it_receives_while_it_cannot_send(poor_socket: Path) -> None:
    """Requests lie in the kernel's memory until they are received: for want of it, that is not to wait for a send."""
    run_with(poor_socket, HERE / "starved_loop.py", poor_socket)
