# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on names that are tried again when the connection breaks, on a server in memory."""

from __future__ import annotations

import pytest
from support import fake_files
from support.fake_files import SIZE, URL, FakeServer

from nbdnfs.nas import backing_file


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
