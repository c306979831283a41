# SPDX-License-Identifier: LGPL-2.1-or-later
"""NFSv4: the lease of an idle device, state that the server has forgotten, and its grace period."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.engines import PAGE, OpenEngine, read_pages
from support.nfs_server import Ganesha
from support.proxy import TcpProxy
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

from nbdnfs.engine import Engine, libnfs_version

pytestmark = pytest.mark.skipif(
    int(libnfs_version.split(".")[0]) < 5, reason="libnfs 4.0 cannot write over NFSv4 (sahlberg/libnfs#319)"
)

MIB = 1 << 20
LEASE_S = 10

StartServer = Callable[..., Ganesha]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """`start_server(...)`: a server for NFSv4 with a file `swap` of 1 MiB of zeros; options as Ganesha."""
    servers: list[Ganesha] = []

    def start(**options: int) -> Ganesha:
        servers.append(Ganesha(tmp_path / "ganesha", protocols=(4,), lease_s=LEASE_S, **options))
        servers[-1].start()
        (servers[-1].export_path / "swap").write_bytes(bytes(MIB))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def engine_options() -> dict[str, int]:
    """A small region."""
    return {"region_pages": 256}


def exchange(engine: Engine, path: Path, page: int) -> None:
    """One write that is on the server, and one read that comes from there."""
    data = os.urandom(PAGE)
    engine.pwrite(data, page * PAGE, True)
    assert path.read_bytes()[page * PAGE : (page + 1) * PAGE] == data
    assert read_pages(engine, 200) == bytes(PAGE)


def test_idle_for_three_leases(
    start_server: StartServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody asks for anything for so long; then a read and a write are done, over the same connection. Each lease is
    renewed on the way, whether this server insists on that or not.
    """
    server = start_server()
    with TcpProxy(server.nfs_port) as proxy:
        engine = open_engine(server.url("swap", 4, nfsport=proxy.port))
        said = SaidOnStderr(capfd)
        exchange(engine, server.export_path / "swap", 1)
        for _ in range(6):
            before = proxy.passed_bytes
            time.sleep(LEASE_S / 2 + 0.1)  # the time is what is promised
            assert min(now - then for now, then in zip(proxy.passed_bytes, before, strict=True)) > 0
        in_background(exchange, engine, server.export_path / "swap", 2).result(DEADLINE_S)
        assert engine.counters()["reconnects"] == 0
        assert said.lines == []
        in_background(engine.close).result(DEADLINE_S)


def test_a_lease_that_has_run_out(start_server: StartServer, open_engine: OpenEngine) -> None:
    """The network hangs for longer than the lease, on a connection that stays: the file is opened again."""
    server = start_server()
    with TcpProxy(server.nfs_port) as proxy:
        engine = open_engine(server.url("swap", 4, nfsport=proxy.port))
        exchange(engine, server.export_path / "swap", 1)
        proxy.black_hole = True
        time.sleep(2.5 * LEASE_S)
        proxy.black_hole = False
        in_background(exchange, engine, server.export_path / "swap", 2).result(DEADLINE_S)
        in_background(engine.close).result(DEADLINE_S)


def test_a_server_in_its_grace_period(start_server: StartServer, open_engine: OpenEngine) -> None:
    """Killed and started again it lets nobody open a file for a while: requests wait, and then go on."""
    server = start_server(grace_s=5)
    # Ganesha has a grace period after its first start, too
    opened: list[Engine] = []

    def is_open() -> bool:
        try:
            opened.append(open_engine(server.url("swap", 4)))
        except OSError:
            return False
        return True

    wait_until(is_open, "the first grace period is over")
    exchange(opened[0], server.export_path / "swap", 1)
    server.kill()
    server.start()
    in_background(exchange, opened[0], server.export_path / "swap", 2).result(DEADLINE_S)
    assert opened[0].counters()["write_errors"] == 0
