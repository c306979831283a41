# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs down`: which machine owns the file before and after, on a real server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.nfs_server import LOOPBACK, FileOnServer, Ganesha
from support.owner_records import (
    HOLDER,
    beside,
    machine,
    record_of,
    record_path,
)

from nbdnfs import config
from nbdnfs.commands import up_down
from nbdnfs.errors import UsageError
from nbdnfs.keeper.records import Records
from nbdnfs.nas import owner_record, ownership


def test_down_releases_the_file(swap_file: FileOnServer, tmp_path: Path) -> None:
    """`down` releases the file by the records alone, and leaves a file that another machine owns."""
    ownership.claim(swap_file.url(), HOLDER, owner_record.identity())
    records = Records("swap0", run=tmp_path)
    records.make()
    up_down._release_file(records)  # a device that did not get as far as an address
    assert record_path(swap_file).exists()
    records.write(Records.ADDRESS, f"{swap_file.url()}\n{LOOPBACK}")
    up_down._release_file(records)
    assert beside(swap_file) == []

    ownership.claim(swap_file.url(), HOLDER, machine("box2"))
    up_down._release_file(records)
    assert record_of(swap_file).host == "box2"


def test_down_does_not_wait_for_a_server(
    own_ganesha: Ganesha, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an answer the record stays, which is reported; the next boot takes it over."""
    records = Records("swap0", run=tmp_path)
    records.make()
    records.write(Records.ADDRESS, f"{own_ganesha.url('swap')}\n{LOOPBACK}")
    own_ganesha.kill()
    up_down._release_file(records)
    assert "the owner record stays: no answer" in capsys.readouterr().err


def test_what_is_made_meanwhile_may_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By other users, for `status`, whatever umask the caller has; which it has again afterwards."""

    def look(name: str) -> None:
        (tmp_path / "nbdnfs").mkdir(mode=0o755, exist_ok=True)
        raise UsageError("that is enough")

    monkeypatch.setattr(config, "check_name", look)
    before = os.umask(0o077)
    try:
        for command in (lambda: up_down.up("swap0"), lambda: up_down.down("swap0", lambda left, total: None)):
            with pytest.raises(UsageError, match="enough"):
                command()
            assert (tmp_path / "nbdnfs").stat().st_mode & 0o777 == 0o755
            (tmp_path / "nbdnfs").rmdir()
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
