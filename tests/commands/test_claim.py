# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs claim`, which a keeper starts, on a real server."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.nfs_server import FileOnServer, Ganesha
from support.owner_records import HOLDER, machine, record_of
from support.waiting import DEADLINE_S

from nbdnfs import backing_size, cli
from nbdnfs.keeper import failures
from nbdnfs.keeper.records import Records
from nbdnfs.nas import owner_record, ownership


def test_claim_twice(swap_file: FileOnServer) -> None:
    """As a process of its own: the first call makes this machine the owner, the second changes nothing."""
    command = [sys.executable, "-m", "nbdnfs", "claim", swap_file.url(), "--size=4M", f"--holder={HOLDER}"]
    for _ in range(2):
        subprocess.run(command, check=True, timeout=DEADLINE_S)
        found = record_of(swap_file)
        assert (found.boot, found.holder, found.generation) == (owner_record.boot_id(), HOLDER, 1)


def test_a_missing_file_is_created(ganesha: Ganesha) -> None:
    """With --size a missing file is created; without a holder it gets no owner."""
    path = ganesha.export_path / "claimed.swap"
    with pytest.raises(SystemExit) as ended:
        cli.main(["claim", ganesha.url(path.name), "--size=4M"])
    assert ended.value.code == 0
    assert path.stat().st_size == 4 << 20
    path.unlink()
    assert not list(ganesha.export_path.glob(f".{path.name}.*"))


@pytest.mark.parametrize("options", [[], [f"--holder={HOLDER}"]])
def test_a_missing_file_is_looked_for(swap_file: FileOnServer, options: list[str]) -> None:
    """Without --size it is not made, whether it is to be claimed or not: a status that a keeper waits upon."""
    for url, status in ((swap_file.url().replace(swap_file.path.name, "missing"), os.EX_NOINPUT), (swap_file.url(), 0)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["claim", url, *options])
        assert ended.value.code == status


def test_a_refusal_is_recorded(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is left for `nbdnfs status`, and the exit status stops the unit from trying again."""
    ownership.claim(swap_file.url(), HOLDER, machine("box2"))
    refusals: list[tuple[str, str | None]] = []
    monkeypatch.setattr(Records, "write_refusal", lambda name, text: refusals.append((name, text)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["claim", swap_file.url(), f"--holder={HOLDER}"])
    assert ended.value.code == failures.OWNED_STATUS
    ((name, text),) = refusals
    assert name == "swap0"
    assert "in use as swap by box2" in str(text)


def test_a_size_that_is_not_the_configured_one(swap_file: FileOnServer, caplog: pytest.LogCaptureFixture) -> None:
    """The file is used as it is. A line says so, unless the difference is that of a kernel or two."""
    size_bytes = swap_file.path.stat().st_size
    for wanted_bytes, lines in ((size_bytes, 0), (size_bytes + size_bytes // 16, 0), (2 * size_bytes, 1)):
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            cli.main(["claim", swap_file.url(), f"--size={wanted_bytes // 4096 * 4096}"])
        assert ended.value.code == 0
        assert len([record for record in caplog.records if "it is used as it is" in record.message]) == lines
        assert swap_file.path.stat().st_size == size_bytes


def test_a_size_that_this_machine_cannot_use(ganesha: Ganesha, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker would refuse the file: it is refused before hours are spent on it."""
    monkeypatch.setattr(backing_size, "memory_bytes", lambda root: 256 << 20)
    with pytest.raises(SystemExit) as ended:
        cli.main(["claim", ganesha.url("large.swap"), f"--size={1 << 40}"])
    assert ended.value.code == os.EX_CONFIG
    assert not list(ganesha.export_path.glob("*large.swap*"))
