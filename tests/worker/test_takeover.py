# SPDX-License-Identifier: LGPL-2.1-or-later
"""A standby that takes over needs nothing that is not in its memory: the root may be on a server that is away."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.fake_kernel import FakeKernel
from support.fake_nfs import FakeNfsServer
from support.keeper_run import until
from support.resident import grown, resident_kib

from nbdnfs import programs, region
from nbdnfs.config import Config
from nbdnfs.keeper.real_work import RealWork
from nbdnfs.kernel import nbd_handshake


@pytest.mark.parametrize("loop", [False, True])
def test_it_opens_no_file_and_binds_no_function(tmp_path: Path, loop: bool) -> None:
    """From READY until it greets: no path but the region's in /proc, and nothing that ld.so looks up in libraries. Its
    "/" has the kernel's own file systems alone: an NFS root's server is asked whether "/" may be passed, for any path,
    and glibc looks for nscd(8) by connect(2)."""
    with FakeNfsServer(bytes(1 << 20)) as server:
        settings = Config("t", server.url(), region_pages=256, lock="wanted", realtime=False, owner=False, loop=loop)
        work = RealWork(settings, server.url(), "127.0.0.1")
        work._environment.update(LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "ld"))
        region_fd = region.create()
        worker = work.start_worker(region_fd)
        try:
            until(worker.check_ready)
            assert set(os.listdir(f"/proc/{worker.pid}/root/")) == {"dev", "proc", "run", "sys"}
            bindings = tmp_path / f"ld.{worker.pid}"
            bound = bindings.read_text(errors="replace") if bindings.exists() else ""
            trace = tmp_path / "strace"
            strace = programs.find_program("strace", "strace")
            with subprocess.Popen(
                [strace, "-f", "-e", "trace=%file", "-o", str(trace), "-p", str(worker.pid)], stderr=subprocess.PIPE
            ) as tracer:
                assert tracer.stderr is not None
                assert b"attached" in tracer.stderr.readline()
                worker.activate()
                until(worker.has_greeted)
                worker.kill()
                until(worker.has_ended)
        finally:
            worker.kill()
            os.close(region_fd)
        paths = [line.split('"')[1] for line in trace.read_text().splitlines() if '"' in line]
        assert {path for path in paths if not path.startswith("/proc/")} <= {""}
        assert bindings.read_text(errors="replace").removeprefix(bound) == ""


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("loop", [False, True])
def test_it_reads_no_library_for_the_first_time(loop: bool, encrypt: bool) -> None:
    """From READY on, through the takeover, 600 pages each way, a server that disconnects and one that crashes: of none
    of the files that it has mapped, those for TLS, XML and compression included, is a page more in memory than before,
    nor than after the takeover, which has dropped what only the linker needs. Its code is."""
    with FakeNfsServer(bytes(4 << 20)) as server:
        settings = Config(
            "t",
            server.url(),
            region_pages=256,
            lock="wanted",
            realtime=False,
            owner=False,
            loop=loop,
            encrypt=encrypt,
        )
        work = RealWork(settings, server.url(), "127.0.0.1")
        region_fd = region.create()
        kernel = FakeKernel()
        worker = work.start_worker(region_fd)
        try:
            until(worker.check_ready)
            before = resident_kib(worker.pid)
            worker.activate()
            until(worker.has_greeted)
            assert worker.socket is not None
            kernel.attach(worker.socket, nbd_handshake.negotiate(worker.socket, timeout_s=20))
            taken_over = resident_kib(worker.pid)
            for generation, disturb in enumerate((lambda: None, server.disconnect, server.crash)):
                disturb()
                for number in range(600):
                    kernel.write(number * 4096, bytes([generation + 1]) * 4096)
                kernel.flush()
                for number in range(600):
                    assert kernel.read(number * 4096, 4096) == bytes([generation + 1]) * 4096
            after = resident_kib(worker.pid)
            assert grown(before, after) == {}
            assert grown(taken_over, after) == {}
        finally:
            worker.kill()
            until(worker.has_ended)
            kernel.destroy()
            os.close(region_fd)
