# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `nbdnfs run` does around the keeper, on a real server."""

from __future__ import annotations

import pytest
from support.nfs_server import LOOPBACK, FileOnServer
from support.owner_records import HOLDER, beside, record_path

from nbdnfs.keeper import main
from nbdnfs.kernel import nbd_device
from nbdnfs.nas import owner_record, ownership


def test_a_failed_keeper_releases_the_file(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that fails releases the file, unless its device is still attached for the next keeper."""
    ownership.claim(swap_file.url(), HOLDER, owner_record.identity())
    monkeypatch.setattr(nbd_device, "find", lambda backend: nbd_device.Attached(0, swap_file.size_bytes))
    main._release_unless_attached("swap0", swap_file.url(), LOOPBACK)
    assert record_path(swap_file).exists()
    monkeypatch.setattr(nbd_device, "find", lambda backend: None)
    main._release_unless_attached("swap0", swap_file.url(), LOOPBACK)
    assert beside(swap_file) == []
