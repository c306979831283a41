# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each behaviour of the fake worker."""

from __future__ import annotations

import socket
import subprocess

import pytest

from nbdnfs.kernel import nbd_handshake
from support.fake_worker_process import fake_worker
from support.nbd_client import NbdClient
from support.waiting import DEADLINE_S

MIB = 1 << 20


def test_serve() -> None:
    """Once activated it greets, serves zeros, and ends when its connection does."""
    with fake_worker("serve") as worker:
        worker.activate()
        assert nbd_handshake.negotiate(worker.nbd, timeout_s=DEADLINE_S).size_bytes == MIB
        client = NbdClient.over(worker.nbd, DEADLINE_S)
        client.write(0, b"x" * 4096)
        assert client.read(MIB - 4096, 4096) == bytes(4096)
        client.close()
        assert worker.process.wait(DEADLINE_S) == 0


def test_a_standby_ends_with_its_keeper() -> None:
    """An end of file instead of an activation: status 0."""
    with fake_worker("serve") as worker:
        assert worker.control.recv(1) == b"r"
        worker.control.close()
        assert worker.process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(("behaviour", "is_activated"), [("exit:77", True), ("early:77", False)])
def test_ends_with_a_status(behaviour: str, is_activated: bool) -> None:
    """When it is activated, or before."""
    with fake_worker(behaviour) as worker:
        if is_activated:
            worker.activate()
        assert worker.process.wait(DEADLINE_S) == 77


def test_mute() -> None:
    """It is activated and never greets."""
    with fake_worker("mute") as worker:
        worker.activate()
        worker.nbd.settimeout(0.2)
        with pytest.raises(TimeoutError):
            worker.nbd.recv(1)


def test_deaf() -> None:
    """It lives on after its connection."""
    with fake_worker("deaf") as worker:
        worker.activate()
        nbd_handshake.negotiate(worker.nbd, timeout_s=DEADLINE_S)
        worker.nbd.shutdown(socket.SHUT_RDWR)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(0.5)
