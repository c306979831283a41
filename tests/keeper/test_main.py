# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `nbdnfs run` does around the keeper, on a real server."""

from __future__ import annotations

import os

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


def test_starts_again_with_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd has set stays; of the caller's Python settings, nothing does."""
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.setenv("PYTHONPATH", ":/somewhere")
    main._start_again("swap0", ["--steal"])
    ((program, command, environment),) = calls
    assert command == [program, "-P", "-m", "nbdnfs", "run", "swap0", "--steal"]
    assert (environment["PYTHONMALLOC"], environment["NOTIFY_SOCKET"]) == ("malloc", "/run/x")
    assert "somewhere" not in environment["PYTHONPATH"]
    assert all(map(os.path.isabs, environment["PYTHONPATH"].split(":")))
