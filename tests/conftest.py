# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests share: one NFS server for the session, fresh files on it, a proxy before it, engines.

Nothing here skips a test: a missing program is an error that names the package to install.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support import needs, sanitizer_reports
from support.engines import OpenEngine, opening
from support.nfs_server import FileOnServer, Ganesha
from support.proxy import TcpProxy

from nbdnfs import region

MIB = 1 << 20

# How fast the machine is, is not tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """A shell that starts pytest in the background ignores SIGINT (sh(1)), and children would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sanitizer_reports.register(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The markers `server` and `fake`, which `make unit` leaves out."""
    needs.mark(items)


@pytest.fixture(scope="session")
def ganesha(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ganesha]:
    """The session's NFS server. A test that stops or pauses one takes `own_ganesha`."""
    with Ganesha(tmp_path_factory.mktemp("ganesha")) as server:
        yield server


@pytest.fixture
def own_ganesha(tmp_path: Path) -> Iterator[Ganesha]:
    """An NFS server of the test's own, which it may stop, kill, pause and restart."""
    with Ganesha(tmp_path / "ganesha") as server:
        yield server


@pytest.fixture(scope="session")
def _file_numbers() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def new_file(ganesha: Ganesha, _file_numbers: Iterator[int]) -> Iterator[Callable[..., FileOnServer]]:
    """`new_file(size_bytes)`: a fresh file of random bytes on the session's server, or of `content`."""
    made: list[FileOnServer] = []

    def make(size_bytes: int = 16 * MIB, content: bytes | None = None) -> FileOnServer:
        content = os.urandom(size_bytes) if content is None else content
        file = FileOnServer(ganesha, f"file{next(_file_numbers)}", len(content))
        file.path.write_bytes(content)
        made.append(file)
        return file

    yield make
    for file in made:
        file.path.unlink(missing_ok=True)


@pytest.fixture
def backing_file(new_file: Callable[..., FileOnServer]) -> FileOnServer:
    """A fresh 16 MiB file of zeros on the session's server."""
    return new_file(content=bytes(16 * MIB))


@pytest.fixture
def swap_file(new_file: Callable[..., FileOnServer]) -> Iterator[FileOnServer]:
    """A file of zeros; what is left beside it is removed."""
    file = new_file(content=bytes(4 * MIB))
    yield file
    for path in file.path.parent.glob(f".{file.name}.*"):
        path.unlink()


@pytest.fixture
def proxy(ganesha: Ganesha) -> Iterator[TcpProxy]:
    """A proxy before the session's server: `backing_file.url(nfsport=proxy.port)`."""
    with TcpProxy(ganesha.nfs_port) as proxy:
        yield proxy


@pytest.fixture
def region_fd() -> Iterator[int]:
    """An empty region, as a keeper makes it."""
    descriptor = region.create()
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def engine_options() -> dict[str, int]:
    """What `open_engine` gives each engine; a module with other needs has a fixture of this name."""
    return {}


@pytest.fixture
def open_engine(request: pytest.FixtureRequest, engine_options: dict[str, int]) -> Iterator[OpenEngine]:
    """`open_engine(url, **options)`: an engine on the loopback address, closed at the end of the test.

    All other fixtures of the test come first: engines are closed while their servers still answer.
    """
    for name in request.fixturenames:
        if name != request.fixturename:
            request.getfixturevalue(name)
    with opening(**engine_options) as open_engine:
        yield open_engine
