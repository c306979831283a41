# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker whose NAS is away: its CPU time, and its log."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from support.nbd_client import NbdClient
from support.nfs_server import Ganesha
from support.proxy import TcpProxy
from support.waiting import DEADLINE_S, in_background
from support.worker_process import Worker, serving

from nbdnfs import proc_stat

PAGE = 4096
MIB = 1 << 20
CPU_SHARE = 0.02


def cpu_s(worker: Worker) -> float:
    """proc_pid_stat(5): utime and stime."""
    fields = proc_stat.fields(Path(f"/proc/{worker.pid}/stat").read_text())
    return (int(fields[proc_stat.USER_TICKS]) + int(fields[proc_stat.SYSTEM_TICKS])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["closed port", "no answer at all"])
@pytest.mark.parametrize("away_s", [10, pytest.param(120, marks=pytest.mark.long)])
def test_a_nas_that_is_away(own_ganesha: Ganesha, tmp_path: Path, how: str, away_s: int) -> None:
    """Below 2% of a processor, two lines, and both requests that waited are done."""
    path = own_ganesha.export_path / "swap"
    path.write_bytes(bytes(4 * MIB))
    data = os.urandom(PAGE)
    with (
        TcpProxy(own_ganesha.nfs_port) as proxy,
        serving(own_ganesha.url("swap", nfsport=proxy.port), tmp_path) as worker,
        NbdClient(worker.socket, away_s + DEADLINE_S) as reader,
        NbdClient(worker.socket, away_s + DEADLINE_S) as writer,
    ):
        reader.read(0, PAGE)
        before = len(worker.stderr.read_text().splitlines())
        if how == "closed port":
            own_ganesha.kill()
            proxy.refuse = True
        else:
            proxy.black_hole = True
        proxy.cut()
        waiting: list[Future[Any]] = [
            in_background(reader.read, 0, PAGE),
            in_background(lambda: writer.write(PAGE, data, fua=True)),
        ]
        begin_s, begin_cpu_s = time.monotonic(), cpu_s(worker)
        time.sleep(away_s)  # the time is what is measured
        share = (cpu_s(worker) - begin_cpu_s) / (time.monotonic() - begin_s)
        print(f"away for {away_s} s: {share:.2%} of a processor")
        assert share < CPU_SHARE
        if how == "closed port":
            own_ganesha.start()
            proxy.refuse = False
        else:
            proxy.black_hole = False
        for request in waiting:
            request.result(DEADLINE_S)
        said = worker.stderr.read_text().splitlines()[before:]
    assert path.read_bytes()[PAGE : 2 * PAGE] == data
    assert ["no connection" in line for line in said] == [True, False]
    assert "connected again after" in said[1]
