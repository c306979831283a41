# SPDX-License-Identifier: LGPL-2.1-or-later
"""After warm-up the worker takes no memory: no fault, no call that changes its address space, the same size."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.nbd_client import FLUSH, READ, TRIM, WRITE, NbdClient, Request
from support.nfs_server import Ganesha
from support.worker_process import Worker, serving

MIB = 1 << 20
PAGE = 4096
DEVICE_BYTES = 64 * MIB
BUDGET_KIB, LARGE_BUDGET_KIB = 36 * 1024, 38 * 1024
TRACED_CALLS = "mmap,munmap,mremap,brk,madvise,clone,clone3"


@pytest.fixture(scope="module")
def quick_server() -> Iterator[Ganesha]:
    """A server of the module's own, with one file."""
    with tempfile.TemporaryDirectory() as directory, Ganesha(Path(directory)) as server:
        (server.export_path / "device").write_bytes(bytes(DEVICE_BYTES))
        yield server


def mixed_requests(count: int, seed: int) -> Iterator[Request]:
    """What a swapping kernel sends: mostly single pages, clusters of up to 128 KiB, now and then a flush or trim."""
    draw = random.Random(seed)
    content = os.urandom(128 * 1024)
    for _ in range(count):
        pages = draw.choice((1, 1, 1, 1, 1, 1, 1, 2, 4, 8, 32))
        length = pages * PAGE
        offset = draw.randrange(DEVICE_BYTES // PAGE - pages) * PAGE
        op = draw.choices((READ, WRITE, FLUSH, TRIM), (49, 49, 1, 1))[0]
        if op == FLUSH:
            yield Request(FLUSH, 0, 0)
        else:
            yield Request(op, offset, length, content[:length] if op == WRITE else b"")


def run_requests(client: NbdClient, count: int, seed: int) -> None:
    """AssertionError when one of them fails."""
    for reply in client.run(mixed_requests(count, seed), depth=16):
        assert reply.error == 0, reply.request


def start_trace(worker: Worker, log: Path) -> subprocess.Popen[bytes]:
    """strace on all threads of the worker; returns when it is attached."""
    strace = shutil.which("strace")
    assert strace is not None, "strace is not installed (Debian: apt install strace)"
    trace = subprocess.Popen([strace, "-f", "-e", f"trace={TRACED_CALLS}", "-o", str(log), "-p", str(worker.pid)])
    deadline = time.monotonic() + 20
    for task in Path(f"/proc/{worker.pid}/task").iterdir():
        while "TracerPid:\t0\n" in (task / "status").read_text():
            assert time.monotonic() < deadline, "strace does not attach"
            time.sleep(0.01)
    return trace


def test_real_time_threads_stay_together(quick_server: Ganesha, tmp_path: Path) -> None:
    """With the policy all threads have one CPU, the same; without it (`without=realtime`, no CAP_SYS_NICE) any."""
    may_have_it = subprocess.run(["chrt", "--rr", "1", "true"], check=False, stderr=subprocess.DEVNULL).returncode == 0
    found = []
    for settings in ((), ("--plugin-setting=without=realtime",)):
        with serving(quick_server.url("device"), tmp_path, *settings) as worker, NbdClient(worker.socket) as client:
            run_requests(client, 100, seed=1)
            tids = [int(task.name) for task in Path(f"/proc/{worker.pid}/task").iterdir()]
            assert len(tids) > 8
            found.append({(os.sched_getscheduler(tid), frozenset(os.sched_getaffinity(tid))) for tid in tids})
    anywhere = {(os.sched_getscheduler(0), frozenset(os.sched_getaffinity(0)))}  # a worker's, unless it asks for others
    if may_have_it:
        ((policy, cpus),) = found[0]
        assert (policy, len(cpus)) == (os.SCHED_RR, 1)
    else:
        assert found[0] == anywhere
    assert found[1] == anywhere


def test_a_large_encrypted_device(quick_server: Ganesha, tmp_path: Path) -> None:
    """2 GiB, with 8 bytes for each page: 38 MiB at most."""
    with (quick_server.export_path / "large").open("wb") as file:
        file.truncate(2048 * MIB)
    url = quick_server.url("large")
    with serving(url, tmp_path, "--plugin-setting=encrypt=1") as worker, NbdClient(worker.socket) as client:
        run_requests(client, 2_000, seed=1)
        print(f"resident {worker.memory_kib('Rss')} KiB, locked {worker.memory_kib('Locked')} KiB")
        assert worker.memory_kib("Rss") <= LARGE_BUDGET_KIB


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("encrypt", "requests"), [(0, 200_000), (1, 50_000)])
def test_no_fault_and_no_mapping_after_warm_up(
    quick_server: Ganesha, tmp_path: Path, encrypt: int, requests: int
) -> None:
    """200,000 mixed requests, fewer with encryption: +0 faults, the same size, no call that maps memory or starts a
    thread."""
    setting = f"--plugin-setting=encrypt={encrypt}"
    with serving(quick_server.url("device"), tmp_path, setting) as worker, NbdClient(worker.socket) as client:
        run_requests(client, 2_000, seed=1)

        before = worker.faults(), worker.memory_kib("Rss")
        run_requests(client, requests, seed=2)
        after = worker.faults(), worker.memory_kib("Rss")
        print(f"resident {after[1]} KiB, locked {worker.memory_kib('Locked')} KiB")
        assert after == before
        assert after[1] <= BUDGET_KIB

        log = tmp_path / "trace"
        trace = start_trace(worker, log)
        run_requests(client, 20_000, seed=3)
        trace.send_signal(signal.SIGINT)
        trace.wait(20)
        calls = [line for line in log.read_text().splitlines() if "(" in line]
        assert calls == [], "\n".join(calls[:50])
