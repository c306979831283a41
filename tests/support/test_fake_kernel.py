# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fake kernel treats sockets and requests as the real one does."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

import pytest

from nbdnfs.errors import NbdnfsError, UnavailableError
from nbdnfs.kernel import nbd_handshake
from support.fake_kernel import FakeKernel, FakeLinkError
from support.fake_worker_process import FakeWorkerProcess, fake_worker
from support.waiting import DEADLINE_S, in_background

PAGE = 4096


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    kernel = FakeKernel(timeout_s=DEADLINE_S)
    yield kernel
    kernel.destroy()


@contextlib.contextmanager
def serving_worker() -> Iterator[tuple[FakeWorkerProcess, nbd_handshake.Export]]:
    """A fake worker that is activated, after the handshake."""
    with fake_worker("serve") as worker:
        worker.activate()
        yield worker, nbd_handshake.negotiate(worker.nbd, timeout_s=DEADLINE_S)


def test_requests_reach_the_worker(kernel: FakeKernel) -> None:
    """Reads, writes and flushes are done over the socket that it was given; the device has the export's size."""
    with serving_worker() as (worker, export):
        attached = kernel.attach(worker.nbd, export)
        worker.nbd.close()
        assert kernel.find() == attached
        assert (attached.size_bytes, kernel.attaches, kernel.links) == (export.size_bytes, 1, 1)
        kernel.write(0, b"x" * PAGE)
        kernel.flush()
        assert kernel.read(0, PAGE) == bytes(PAGE)
        kernel.disconnect(attached)
        assert kernel.find() is None
        assert worker.process.wait(DEADLINE_S) == 0


def test_a_living_socket_is_not_replaced(kernel: FakeKernel) -> None:
    """Success is reported and the new socket dropped: nbd_reconnect_socket()."""
    with serving_worker() as (worker, export):
        attached = kernel.attach(worker.nbd, export)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            kernel.reconnect(attached, ours)
        assert (kernel.reconnects, kernel.dropped, kernel.links) == (1, 1, 1)
        assert kernel.read(0, PAGE) == bytes(PAGE)


def test_a_request_is_sent_again_over_the_next_socket(kernel: FakeKernel) -> None:
    """What was under way when the connection ended is done by the next worker."""
    with serving_worker() as (worker, export):
        ours, silent = socket.socketpair()
        with ours, silent:
            attached = kernel.attach(ours, export)
            reading = in_background(kernel.read, 0, PAGE)
            assert silent.recv(28)
        kernel.reconnect(attached, worker.nbd)
        assert reading.result(DEADLINE_S) == bytes(PAGE)
        assert (kernel.dropped, kernel.links) == (0, 2)
        assert kernel.last_outage_s > 0
        kernel.wait_for_link(2)


def test_no_socket_in_time(kernel: FakeKernel) -> None:
    """Both waits end with an error."""
    kernel = FakeKernel(timeout_s=0.1)
    with pytest.raises(FakeLinkError, match="no new link"):
        kernel.read(0, PAGE)
    with pytest.raises(FakeLinkError, match="0 links"):
        kernel.wait_for_link(1)
    kernel.destroy()


def test_it_refuses_what_it_is_told_to(kernel: FakeKernel) -> None:
    """Each error once, on attach or on reconnect."""
    kernel.refuses = [UnavailableError("no device"), NbdnfsError("not now")]
    with serving_worker() as (worker, export):
        with pytest.raises(UnavailableError, match="no device"):
            kernel.attach(worker.nbd, export)
        with pytest.raises(NbdnfsError, match="not now"):
            kernel.attach(worker.nbd, export)
        kernel.attach(worker.nbd, export)


def test_link_dead_is_announced_once(kernel: FakeKernel) -> None:
    """The descriptor is readable until the device's number has been taken."""
    kernel.send_link_dead(7)
    assert select.select([kernel], [], [], 0)[0]
    assert kernel.dead_links() == [7]
    assert not select.select([kernel], [], [], 0)[0]
    assert kernel.dead_links() == []
