# SPDX-License-Identifier: LGPL-2.1-or-later
"""A keeper's worker with loop = true: nbdkit starts it, and the engine serves the kernel in nbdkit's place."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_nfs import FakeNfsServer
from support.keeper_run import until
from support.nbd_client import READ, WRITE, NbdClient, Request

from nbdnfs import proc_stat
from nbdnfs.config import Config
from nbdnfs.errors import ConfigError, NoInputError
from nbdnfs.keeper.real_work import RealWork
from nbdnfs.keeper.worker_handle import WorkerHandle
from nbdnfs.kernel import nbd_handshake
from nbdnfs.worker import life, nbdkit, settings

PAGE = 4096
PAGES = 1024
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[FakeNfsServer]:
    """A server with 4 MiB of random bytes."""
    with FakeNfsServer(os.urandom(PAGES * PAGE)) as fake:
        yield fake


@contextlib.contextmanager
def worker(
    server: FakeNfsServer, region_fd: int, *, loop: bool = True, encrypt: bool = False
) -> Iterator[tuple[WorkerHandle, NbdClient]]:
    """One that serves, and its client."""
    config = Config(
        "t", server.url(), region_pages=256, lock="wanted", realtime=False, owner=False, encrypt=encrypt, loop=loop
    )
    handle = RealWork(config, server.url(), "127.0.0.1").start_worker(region_fd)
    try:
        until(handle.check_ready)
        handle.activate()
        until(handle.has_greeted)
        assert handle.socket is not None
        nbd_handshake.negotiate(handle.socket, timeout_s=20)
        yield handle, NbdClient.over(handle.socket)
    finally:
        handle.kill()
        until(handle.has_ended)


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def minor_faults(pid: int) -> int:
    fields = proc_stat.fields(Path(f"/proc/{pid}/stat").read_text())
    return int(fields[proc_stat.MINOR_FAULTS])


def test_it_serves_and_ends(server: FakeNfsServer, region_fd: int) -> None:
    """It has none of nbdkit's threads, returns what was written, and exits in order when its client disconnects."""
    data = os.urandom(PAGE)
    with worker(server, region_fd) as (handle, client):
        # the loop, its three waiters, the flusher, and one for each connection to the server. One that was joined
        # may be listed for a moment longer: pthread_join(3) returns before the kernel has let go of it
        until(lambda: threads(handle.pid) == 1 + 3 + 1 + 4)
        client.write(5 * PAGE, data)
        assert client.read(5 * PAGE, PAGE) == data
        client.flush()
        client.close()
        handle._close_socket_peer()
        until(handle.has_ended)
        assert handle.status == 0
    assert server.on_disk[5 * PAGE : 6 * PAGE] == data


def test_the_next_worker_finds_what_it_acknowledged(server: FakeNfsServer, region_fd: int) -> None:
    """Killed with pages that the server does not have: the next one writes them."""
    data = os.urandom(PAGE)
    server.hold("WRITE")
    with worker(server, region_fd) as (handle, client):
        client.write(7 * PAGE, data)
        handle.kill()
        until(handle.has_ended)
    server.release()
    with worker(server, region_fd) as (_, client):
        assert client.read(7 * PAGE, PAGE) == data
        client.flush()
    assert server.on_disk[7 * PAGE : 8 * PAGE] == data


def test_it_faults_no_page(server: FakeNfsServer, region_fd: int) -> None:
    """Once it has served each kind of request, also after a connection that broke, and with many under way."""

    def load(client: NbdClient) -> None:
        requests = [Request(WRITE, page * PAGE, PAGE, os.urandom(PAGE)) for page in range(PAGES)]
        requests += [Request(READ, page * PAGE, PAGE) for page in range(PAGES)]
        requests += [Request(READ, page * PAGE, 32 * PAGE) for page in range(0, PAGES, 32)]
        assert all(reply.error == 0 for reply in client.run(requests, depth=16))
        client.flush()

    with worker(server, region_fd) as (handle, client):
        load(client)
        before = minor_faults(handle.pid)
        load(client)
        server.disconnect()
        load(client)
        assert minor_faults(handle.pid) == before


@pytest.mark.parametrize("loop", [False, True])
def test_no_file_has_pages_that_it_does_not_need(server: FakeNfsServer, region_fd: int, loop: bool) -> None:
    """The dynamic linker looks into all libraries for each that is loaded, also after memory has been locked."""
    with worker(server, region_fd, loop=loop, encrypt=True) as (handle, client):
        client.write(0, bytes(range(256)) * 16)
        client.flush()
        needed = (*life.CODE, *life._CIPHERS)
        mappings = {}
        with Path(f"/proc/{handle.pid}/smaps").open() as smaps:
            for line in smaps:
                words = line.split(maxsplit=5)
                if not words[0].endswith(":"):
                    mapping = words
                elif words[0] == "Rss:":
                    resident_kib = int(words[1])
                elif words[0] == "Anonymous:" and mapping[-1][0] == "/" and words[1] == "0" and mapping[1][1] != "w":
                    mappings[mapping[0], mapping[5].strip().rpartition("/")[2]] = resident_kib
    assert any(name.startswith("libgnutls") for _, name in mappings), "nbdkit has libraries that no worker needs"
    assert {name: kib for (_, name), kib in mappings.items() if kib and not name.startswith(needed)} == {}


def test_names_that_are_not_ascii(server: FakeNfsServer, tmp_path: Path) -> None:
    """A worker whose package lies in such a folder reads its own maps, and its messages have such names."""
    folder = tmp_path / "größe"
    for name in ("nbdnfs", "plugin"):
        shutil.copytree(ROOT / name, folder / name)
    program = (
        "import subprocess, sys\n"
        "from nbdnfs.worker import nbdkit\n"
        "argv = nbdkit.serve_argv(dict(word.split('=', 1) for word in sys.argv[1:]))\n"
        "sys.exit(subprocess.run(argv, env=nbdkit.worker_environment(), stdin=subprocess.DEVNULL).returncode)\n"
    )
    url = server.url().replace("/swap?", "/größe?")
    done = subprocess.run(
        [sys.executable, "-c", program, f"url={url}", "address=127.0.0.1", "lock=wanted", "realtime=no"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == NoInputError.exit_code, done.stderr
    assert "größe" in done.stderr


def test_not_without_nbdkit_s(server: FakeNfsServer) -> None:
    """nbdkit that listens has many clients: it says so, and does not start."""
    argv = nbdkit.serve_argv({"url": server.url(), "address": "127.0.0.1", "lock": "off", "loop": "1"})
    done = subprocess.run(
        argv, env=nbdkit.worker_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == ConfigError.exit_code
    assert "loop=1 serves the one client of nbdkit -s" in done.stderr


def test_not_with_the_reference_engine() -> None:
    """It has nothing but calls that wait."""
    with pytest.raises(ConfigError, match="no loop"):
        settings.parse({"url": "nfs://nas/export/box.swap", "engine": "libnfs-python", "loop": "1"})
