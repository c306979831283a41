# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs claim`, which a keeper starts, on a real server."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.nfs_server import FileOnServer, Ganesha
from support.owner_records import HOLDER, machine, record_of
from support.waiting import DEADLINE_S

from nbdnfs import backing_size, cli
from nbdnfs.commands import claim
from nbdnfs.keeper import failures
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


@contextlib.contextmanager
def waiting(url: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """As a keeper starts it."""
    command = [sys.executable, "-m", "nbdnfs", "claim", url, "--wait", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as helper:
        try:
            yield helper
        finally:
            helper.kill()


def line_of(helper: subprocess.Popen[str]) -> str:
    """The next one on its stdout."""
    assert helper.stdout is not None
    readable, _, _ = select.select([helper.stdout], [], [], DEADLINE_S)
    assert readable, "it says nothing"
    return helper.stdout.readline()


def test_one_process_waits_for_the_file(ganesha: Ganesha) -> None:
    """The server has no directory, then no file, then both: the reason is said once, by the same process, which claims
    the file when it is there."""
    folder = ganesha.export_path / "unmounted"
    with waiting(ganesha.url("unmounted/later.swap"), f"--holder={HOLDER}") as helper:
        assert line_of(helper).startswith("waiting: there is no file ")
        folder.mkdir()
        (folder / "later.swap").write_bytes(bytes(4 << 20))
        output, errors = helper.communicate(timeout=DEADLINE_S)
    assert (helper.returncode, output) == (0, "")
    assert errors.count("there is no file") == 1
    assert (folder / ".later.swap.owner").exists()


def test_a_new_file_after_a_while(ganesha: Ganesha) -> None:
    """One that is missing is not made before the time has passed."""
    path = ganesha.export_path / "boot.swap"
    with waiting(ganesha.url(path.name), "--size=4M", "--new-file-after=1s") as helper:
        assert "there is no file" in line_of(helper)
        helper.communicate(timeout=DEADLINE_S)
    assert helper.returncode == 0
    assert path.stat().st_size == 4 << 20


def test_what_is_final_is_not_waited_for(swap_file: FileOnServer) -> None:
    """Another machine's file ends it at once."""
    ownership.claim(swap_file.url(), HOLDER, machine("box2"))
    with waiting(swap_file.url(), f"--holder={HOLDER}") as helper:
        output, _ = helper.communicate(timeout=DEADLINE_S)
    assert (helper.returncode, output) == (failures.OWNED_STATUS, "")


def test_it_does_not_outlive_its_keeper(ganesha: Ganesha) -> None:
    """A keeper that was killed reads no more: then nothing is claimed for it."""
    with waiting(ganesha.url("never.swap"), f"--holder={HOLDER}") as helper:
        assert "there is no file" in line_of(helper)
        assert helper.stdout is not None
        helper.stdout.close()
        assert helper.wait(DEADLINE_S) == os.EX_UNAVAILABLE


def test_it_ends_after_its_life(ganesha: Ganesha, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the status of what it waits for, so that the keeper starts another one."""
    monkeypatch.setattr(claim, "_LIFE_S", 0.0)
    with pytest.raises(SystemExit) as ended:
        cli.main(["claim", ganesha.url("never.swap"), "--wait"])
    assert ended.value.code == os.EX_NOINPUT


def test_another_machines_file(swap_file: FileOnServer, capfd: pytest.CaptureFixture[str]) -> None:
    """A keeper's helper exits with a status that stops the unit from trying again. The keeper leaves the reason for
    `status`."""
    ownership.claim(swap_file.url(), HOLDER, machine("box2"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["claim", swap_file.url(), f"--holder={HOLDER}"])
    assert ended.value.code == failures.OWNED_STATUS
    assert "in use as swap by box2" in capfd.readouterr().err


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
