# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on names that are tried again when the connection breaks, on a server in memory."""

from __future__ import annotations

import contextlib

import pytest
from support import fake_files
from support.fake_files import SIZE, URL, FakeServer
from support.fake_nas import FakeNas
from support.nfs_server import LOOPBACK

from nbdnfs.nas import backing_file, remote_file


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """As fake_files.install."""
    return fake_files.install(monkeypatch)


@pytest.mark.parametrize("has_links", [True, False])
def test_missing_answers_to_name_operations(server: FakeServer, has_links: bool) -> None:
    """A link, rename or unlink was done although its answer was lost with the connection."""
    server.has_links = has_links
    server.lost_answers = ["link", "rename", "unlink", "unlink"]
    backing_file.create(URL, SIZE)
    assert list(server.files) == ["swap0"]
    assert bytes(server.files["swap0"].data) == bytes(SIZE)


def test_a_lost_answer_to_create(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has made the file: the next try opens it, if nothing else makes files of that name."""
    monkeypatch.setattr(remote_file, "_EXCLUSIVE_TIMEOUT_S", 1)
    with FakeNas() as nas:
        nas.drop("CREATE")
        with contextlib.closing(
            remote_file.create_exclusively(nas.url("/export/.part"), LOOPBACK, 0o600, own_name=True)
        ) as file:
            file.pwrite(b"content", 0)
        assert nas.content("/export/.part") == b"content"
        # without that, there is no telling whose it is
        with pytest.raises(OSError, match="NFS3ERR_EXIST"):
            remote_file.create_exclusively(nas.url("/export/.part"), LOOPBACK, 0o600)
