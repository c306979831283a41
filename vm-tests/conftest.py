# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for tests in a real kernel. What they hand out is described in vmtest/."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.nfs_server import Ganesha
from vmtest import diskless, initramfs
from vmtest import image as images
from vmtest.guest import Guest
from vmtest.payload import payload
from vmtest.report import (  # noqa: F401
    pytest_report_teststatus,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)


def pytest_configure(config: pytest.Config) -> None:
    """The markers of this folder."""
    config.addinivalue_line("markers", "smoke: the whole path in one guest; part of `make test`")
    config.addinivalue_line("markers", "meta: about the harness itself, without a guest; part of `make test`")
    config.addinivalue_line("markers", "negative_control: what happens without; with --negative-control only")
    config.addinivalue_line("filterwarnings", "default::vmtest.outcome.HungBootWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What makes the tests of memory pressure take longer, or less long where the machine is slow."""
    parser.addoption("--memory-rounds", type=int, default=1, metavar="N", help="pressure N times in a row (1)")
    parser.addoption("--memory-hog", type=int, default=384, metavar="MIB", help="pages under pressure in 256 MiB (384)")
    parser.addoption("--negative-control", action="store_true", help="pressure without each of the measures as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is opt-in is left out, not skipped: a skip is something that went missing."""
    if not config.option.negative_control:
        left_out = [item for item in items if item.get_closest_marker("negative_control")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def image() -> images.Image:
    """The image of $SUITE. Built outside of any test's time limit by `pytest_collection_finish`."""
    return images.default_image()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the tests need before the first one's clock starts."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if session.config.option.collectonly or not wanted & {"image", "boot"}:
        return
    built = images.default_image()
    initramfs.initrd(built)
    payload(built, project=False)


@pytest.fixture
def boot(image: images.Image, tmp_path: Path) -> Callable[..., Guest]:
    """`with boot(project=True, memory_mib=256, allow={"oom"}) as guest:` - see vmtest.guest.Guest.

    `project` is whether nbdnfs is installed in the guest, from the tree as it is now.
    """

    def make(*, project: bool = False, **options: object) -> Guest:
        return Guest(image, payload(image, project=project), tmp_path, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def ganesha(tmp_path: Path) -> Iterator[Ganesha]:
    """A throwaway NFS server on the host's loopback; see `vmtest.guest.seen_from_guest` for its URLs."""
    with Ganesha(tmp_path / "nas") as server:
        yield server


@pytest.fixture
def root_server(tmp_path: Path) -> Iterator[Ganesha]:
    """A second server, for the root of a guest without a disk. A root is large: it is removed at once."""
    with Ganesha(tmp_path / "root-nas", attr_cache_s=60) as server:
        yield server
    shutil.rmtree(server.export_path)


@pytest.fixture
def boot_diskless(image: images.Image, tmp_path: Path, root_server: Ganesha) -> Callable[..., Guest]:
    """`with boot_diskless("nfs", memory_mib=256) as guest:` - a guest with its root on `root_server`, of one of
    diskless.KINDS. The project and its units are installed there.
    """

    def make(kind: str, **options: object) -> Guest:
        disk = payload(image, project=True)
        root = diskless.export(kind, image, disk, root_server)
        return Guest(image, disk, tmp_path, root=root, **options)  # type: ignore[arg-type]

    return make
