# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connecting again is part of the path that frees memory: it maps nothing, faults nothing, starts no thread, and
opens no file.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.nbd_client import NbdClient
from support.nfs_server import FileOnServer
from support.proxy import TcpProxy
from support.waiting import wait_until
from support.worker_process import Worker, serving
from test_memory_discipline import DEVICE_BYTES, TRACED_CALLS, run_requests, start_trace

from nbdnfs import region

ROUNDS = 40


def reconnects(worker: Worker) -> int:
    descriptor = region.take_from(worker.pid)
    assert descriptor is not None
    try:
        count = region.read_counters(descriptor)["reconnects"]
    finally:
        os.close(descriptor)
    assert isinstance(count, int)
    return count


def strike(worker: Worker, client: NbdClient, proxy: TcpProxy, rounds: int) -> None:
    """Resets, and a server that is away for a moment, under load."""
    for number in range(rounds):
        before = reconnects(worker)
        proxy.refuse = number % 8 == 0
        proxy.reset()
        if proxy.refuse:
            time.sleep(0.3)
            proxy.refuse = False
        run_requests(client, 200, seed=number)
        wait_until(lambda before=before: reconnects(worker) > before, "it has connected again")


@pytest.mark.timeout(300)
def test_connecting_again_needs_no_memory(
    new_file: object, proxy: TcpProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty resets under load: +0 faults, the same size, no call that maps memory, starts a thread or opens a file."""
    monkeypatch.setattr("test_memory_discipline.TRACED_CALLS", f"{TRACED_CALLS},open,openat,stat,newfstatat,access")
    file = new_file(content=bytes(DEVICE_BYTES))  # type: ignore[operator]
    assert isinstance(file, FileOnServer)
    with serving(file.url(nfsport=proxy.port), tmp_path) as worker, NbdClient(worker.socket) as client:
        run_requests(client, 2_000, seed=1)
        before = worker.faults(), worker.memory_kib("Rss")
        strike(worker, client, proxy, ROUNDS)
        assert (worker.faults(), worker.memory_kib("Rss")) == before

        log = tmp_path / "trace"
        trace = start_trace(worker, log)
        strike(worker, client, proxy, 4)
        trace.send_signal(signal.SIGINT)
        trace.wait(20)
        calls = [line for line in log.read_text().splitlines() if "(" in line]
        assert calls == [], "\n".join(calls[:50])
