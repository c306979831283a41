# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a worker that root has started may still do once it serves."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.nbd_client import NbdClient
from support.nfs_server import FileOnServer
from support.proxy import TcpProxy
from support.waiting import DEADLINE_S
from support.worker_process import serving

from nbdnfs import region

PAGE = 4096
ROOT = Path(__file__).resolve().parents[2]
# include/uapi/linux/capability.h
NET_BIND_SERVICE, IPC_LOCK = 1 << 10, 1 << 14
FIRST_OTHER_PORT = 1024
ESTABLISHED = "01"


def threads(pid: int) -> list[dict[str, str]]:
    """The lines of proc_pid_status(5) of each thread."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/status"):
        pairs = (line.partition(":") for line in path.read_text().splitlines())
        found.append({key: value.strip() for key, _, value in pairs})
    return found


def local_ports(server_port: int) -> set[int]:
    """Of this machine's connections to a port of this machine, proc_net_tcp(5)."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    ends = (line.split()[1:4] for line in lines)
    there = (ours for ours, theirs, state in ends if (theirs[-4:], state) == (f"{server_port:04X}", ESTABLISHED))
    return {int(ours.split(":")[1], 16) for ours in there}


def test_what_stays(backing_file: FileOnServer, tmp_path: Path) -> None:
    """Every thread, those of the engine and of nbdkit, may bind a reserved port and lock memory, and nothing else; no
    program that it would start gets more."""
    assert os.geteuid() == 0, "run as root: what is given up is root's"
    with serving(backing_file.url(), tmp_path) as worker, NbdClient(worker.socket, DEADLINE_S) as client:
        client.write(0, bytes(PAGE), fua=True)
        found = threads(worker.pid)
    assert len(found) > 3
    for thread in found:
        for key in ("CapPrm", "CapEff"):
            assert int(thread[key], 16) & ~(NET_BIND_SERVICE | IPC_LOCK) == 0, thread["Name"]
            assert int(thread[key], 16) & NET_BIND_SERVICE, thread["Name"]
        assert thread["CapInh"].strip("0") == ""
        assert thread["NoNewPrivs"] == "1"


def test_the_region(backing_file: FileOnServer, tmp_path: Path) -> None:
    """No other user's process can open it through /proc, and nobody can change its size under the worker."""
    with serving(backing_file.url(), tmp_path) as worker:
        descriptor = region.take_from(worker.pid)
        assert descriptor is not None
        try:
            assert os.fstat(descriptor).st_mode & 0o777 == 0o600
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            assert seals == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 4096)
        finally:
            os.close(descriptor)


def test_reserved_ports_after_a_reconnection(backing_file: FileOnServer, proxy: TcpProxy, tmp_path: Path) -> None:
    """Servers ask for a port below 1024 (exports(5), "secure"), also of the second connection."""
    url = backing_file.url(nfsport=proxy.port)
    with serving(url, tmp_path) as worker, NbdClient(worker.socket, DEADLINE_S) as client:
        client.write(0, bytes(PAGE), fua=True)
        before = proxy.accepted
        proxy.reset()
        client.write(PAGE, bytes(PAGE), fua=True)
        assert proxy.accepted > before
        ports = local_ports(proxy.port)
        assert ports
        assert max(ports) < FIRST_OTHER_PORT


def test_a_program_that_only_its_capability_can_read(tmp_path: Path) -> None:
    """A checkout in the home of another user: an error is still explained, which loads more of the program."""
    home = tmp_path / "home"
    shutil.copytree(ROOT / "nbdnfs", home / "nbdnfs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "plugin", home / "plugin")
    for path in (home, *home.rglob("*")):
        os.chown(path, 65534, 65534)
    home.chmod(0o700)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nbdnfs", "serve", "--no-owner", "--socket", str(tmp_path / "socket")),
            f"nfs://127.0.0.1/export/x?nfsport={port}&mountport={port}",
        ],
        env={**os.environ, "PYTHONPATH": str(home)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "127.0.0.1" in done.stderr
    assert done.returncode == os.EX_UNAVAILABLE, done.stderr
