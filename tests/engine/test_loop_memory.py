# SPDX-License-Identifier: LGPL-2.1-or-later
"""The loop where the kernel has no memory for a socket, now and then: nothing ends because of that."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.preloaded import compiled, run_with

HERE = Path(__file__).parent
# What moves much, with many requests under way, and a client that leaves.
TESTS = "test_model or test_many_at_once or does_not_receive or to_a_full_socket or test_disconnect or hangs_up"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def poor_socket(tmp_path: Path) -> Path:
    """poor_socket.c, compiled."""
    return compiled(HERE / "poor_socket.c", tmp_path)


def test_sockets_that_fail(poor_socket: Path) -> None:
    """The loop's own tests pass while every third send and receive fails with ENOBUFS or ENOMEM, the handshake's sends
    among them, and other sends are cut short."""
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
