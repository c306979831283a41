# SPDX-License-Identifier: LGPL-2.1-or-later
"""Helpers that need the real server or root: the second reader, the small file system, a worker's process."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from support import second_reader
from support.nbd_client import NbdClient
from support.nfs_server import FileOnServer
from support.small_filesystem import small_filesystem
from support.worker_process import serving

PAGE = 4096
MIB = 1 << 20


@pytest.mark.skipif(not second_reader.IS_POSSIBLE, reason=second_reader.WHY_NOT)
def test_second_reader(backing_file: FileOnServer) -> None:
    """It reads what is on the server's disk, in several pieces, from any offset; fewer bytes at the end."""
    content = os.urandom(MIB)
    backing_file.path.write_bytes(content)
    assert second_reader.read(backing_file.url(), 0, MIB) == content
    assert second_reader.read(backing_file.url(), 4097, 3) == content[4097:4100]
    assert second_reader.read(backing_file.url(), MIB - 5, 100) == content[-5:]


def write_unbuffered(path: Path, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, 64 * 1024):
            file.write(bytes(64 * 1024))


def test_small_filesystem(tmp_path: Path) -> None:
    """It fills up, also for root, near the size that was asked for; afterwards nothing is mounted or left."""
    with small_filesystem(tmp_path, 4 * MIB) as folder:
        assert os.path.ismount(folder)
        file = folder / "file"
        with pytest.raises(OSError, match="No space left") as caught:
            write_unbuffered(file, 8 * MIB)
        assert caught.value.errno == errno.ENOSPC
        assert 2 * MIB < file.stat().st_size < 4 * MIB
    assert not os.path.ismount(folder)
    assert not (tmp_path / "small.img").exists()


def test_small_filesystem_is_unmounted_after_a_failure(tmp_path: Path) -> None:
    """A test that fails leaves no mount."""
    with pytest.raises(ZeroDivisionError), small_filesystem(tmp_path, 4 * MIB) as folder:
        raise ZeroDivisionError
    assert not os.path.ismount(tmp_path / "small")
    assert folder == tmp_path / "small"


def test_a_worker_serves(backing_file: FileOnServer, tmp_path: Path) -> None:
    """The socket answers when the block begins; pid and figures are nbdkit's; nothing runs afterwards."""
    backing_file.path.write_bytes(bytes(PAGE) + b"x" * PAGE)
    with serving(backing_file.url(), tmp_path) as worker:
        pid = worker.pid
        assert Path(f"/proc/{pid}/comm").read_text().strip() == "nbdkit"
        with NbdClient(worker.socket) as client:
            assert client.export.size_bytes == 2 * PAGE
            assert client.read(PAGE, PAGE) == b"x" * PAGE
        minor, _ = worker.faults()
        assert minor > 0
        assert worker.memory_kib("Rss") >= worker.memory_kib("Locked") > 0
    assert not Path(f"/proc/{pid}").exists()


def test_a_worker_that_does_not_start(tmp_path: Path) -> None:
    """The failure has what it said."""
    with (
        pytest.raises(AssertionError, match=re.escape("nfs://nas/export/?version=3")),
        serving("nfs://nas/export/?version=3", tmp_path),
    ):
        pass
