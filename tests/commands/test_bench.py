# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs bench` on a real server: it checks what it reads, leaves nothing behind, and overwrites no file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from support.fake_nas import FakeNas
from support.nfs_server import FileOnServer, Ganesha
from support.waiting import DEADLINE_S, wait_until

from nbdnfs import cli
from nbdnfs.commands import bench
from nbdnfs.engine import Engine
from nbdnfs.errors import CannotCreateError, IOFailureError, UsageError

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _small_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 4 MiB are large enough then."""
    monkeypatch.setattr(bench, "REGION_PAGES", 256)


def test_rows(ganesha: Ganesha, capsys: pytest.CaptureFixture[str]) -> None:
    """There is a row for each kind of load, and the file is removed."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", ganesha.url("bench.swap"), "--size", "4M", "--time", "200ms", "--json"])
    assert caught.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["title"].partition(",")[0] for row in rows] == [
        *("sequential writes", "sequential reads", "random writes", "random reads", "random reads"),
    ]
    assert all(0 < row["pages"] <= 1024 and row["pages_per_second"] > 0 for row in rows)
    assert not (ganesha.export_path / "bench.swap").exists()


@pytest.mark.parametrize(("options", "encrypt"), [([], True), (["--no-encrypt"], False)])
def test_pages_are_as_those_of_a_device(
    ganesha: Ganesha, monkeypatch: pytest.MonkeyPatch, options: list[str], encrypt: bool
) -> None:
    """Encrypted by default, as a device's are."""
    found = []
    opened = bench._open

    def noting(*arguments: object) -> Engine:
        engine = opened(*arguments)  # type: ignore[arg-type]
        found.append(engine.is_encrypted)
        return engine

    monkeypatch.setattr(bench, "_open", noting)
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", ganesha.url("kind.swap"), "--size", "4M", "--time", "10ms", *options])
    assert (caught.value.code, found) == (0, [encrypt])


def test_wrong_page(ganesha: Ganesha, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page with other bytes ends it with an error, and the file is removed."""

    write = bench._Device.write

    def forgetful_write(device: bench._Device, page: int) -> None:
        write(device, page)
        if page == 1:
            device.engine.pwrite(bytes(4096), 4096)

    monkeypatch.setattr(bench._Device, "write", forgetful_write)
    with pytest.raises(IOFailureError, match="page 1 "):
        bench.measure(ganesha.url("wrong.swap"), MIB, 5.0)
    assert not (ganesha.export_path / "wrong.swap").exists()


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Callable[[str], subprocess.Popen[str]]:
    """Start `nbdnfs bench` with loads that last for long; its output is a pipe."""

    def run(url: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nbdnfs", "bench", url, "--time", "30s"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        request.addfinalizer(process.communicate)
        request.addfinalizer(process.kill)
        return process

    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(start: Callable[[str], subprocess.Popen[str]], number: int) -> None:
    """It ends the command, and the file is removed."""
    with FakeNas() as nas:
        nas.add("/export/other", b"")
        process = start(nas.url("/export/bench.swap"))
        wait_until(lambda: "bench.swap" in nas.names("/export"), "the file is there")
        written = len(nas.calls("WRITE"))
        wait_until(lambda: len(nas.calls("WRITE")) > written, "it is written to")
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == -number
        assert nas.names("/export") == ["other"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_server_hangs(start: Callable[[str], subprocess.Popen[str]], number: int) -> None:
    """It ends the command all the same, which says what it leaves behind."""
    with FakeNas() as nas:
        nas.add("/export/other", b"")
        process = start(nas.url("/export/bench.swap"))
        wait_until(lambda: nas.names("/export") == ["bench.swap", "other"], "the file is there, and no part of it")
        for op in ("NULL", "GETATTR", "LOOKUP", "REMOVE", "READ", "WRITE", "COMMIT"):
            nas.drop(op, times=None, executed=False)
        wait_until(lambda: nas.struck("READ") or nas.struck("WRITE"), "a transfer is not answered")
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == -number
        assert process.stdout is not None
        assert "bench.swap stays: the server has not removed it in time" in process.stdout.read()
        assert nas.names("/export") == ["bench.swap", "other"]


def test_an_existing_file_is_refused(new_file: Callable[..., FileOnServer]) -> None:
    """A file that exists is not written to."""
    file = new_file(content=(content := os.urandom(MIB)))
    with pytest.raises(CannotCreateError):
        bench.measure(file.url(), MIB, 0.1)
    assert file.path.read_bytes() == content


def test_a_file_that_fits_into_the_region(ganesha: Ganesha, capsys: pytest.CaptureFixture[str]) -> None:
    """It is made four times as large as the region, and a line says so."""
    rows = bench.measure(ganesha.url("tiny.swap"), MIB, 10.0)
    assert capsys.readouterr().err == "nbdnfs: 1 MiB would measure this machine's memory: the file is 4 MiB large\n"
    assert rows[0].pages == 1024


def test_too_small(ganesha: Ganesha) -> None:
    """A file of less than 1 MiB is refused."""
    with pytest.raises(UsageError):
        bench.measure(ganesha.url("small.swap"), 4096, 0.1)
