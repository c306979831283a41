# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking up the server's name again: what is printed, recorded and returned."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdnfs import nfs_url
from nbdnfs.keeper.helpers import resolve_server
from nbdnfs.keeper.records import Records

LOOPBACK = "127.0.0.1"


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """The records of swap0, whose server had 192.0.2.7."""
    found = Records("swap0", run=tmp_path)
    found.make()
    found.write(Records.ADDRESS, "x\n192.0.2.7")
    monkeypatch.setitem(Records.__init__.__kwdefaults__, "run", tmp_path)
    return found


@pytest.fixture
def port() -> Iterator[int]:
    """One that accepts connections."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(autouse=True)
def _oom_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process is not to be the first that is killed."""
    monkeypatch.setattr("builtins.open", _no_proc(open))


def _no_proc(real: Callable[..., Any]) -> Callable[..., Any]:
    def open_it(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == "/proc/self/oom_score_adj":
            raise PermissionError
        return real(path, *arguments, **options)

    return open_it


def test_another_address(
    records: Records, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes connections: printed, recorded beside the URL as it was, status 0."""
    monkeypatch.setattr(nfs_url.NfsUrl, "resolve", lambda self: LOOPBACK)
    text = f"nfs://nas/export/100%.swap?nfsport={port}"
    assert resolve_server.main(["swap0", text, "192.0.2.7"]) == 0
    assert capsys.readouterr().out == f"{LOOPBACK}\n"
    assert records.read(Records.ADDRESS) == f"{text}\n{LOOPBACK}"


def test_another_address_that_does_not_answer(
    records: Records, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left alone: the old one may come back."""
    monkeypatch.setattr(nfs_url.NfsUrl, "resolve", lambda self: LOOPBACK)
    assert resolve_server.main(["swap0", "nfs://nas/export/x?nfsport=1", "192.0.2.7"]) != 0
    assert capsys.readouterr().out == ""
    assert records.read(Records.ADDRESS) == "x\n192.0.2.7"


def test_the_same_address(records: Records, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is said."""
    assert resolve_server.main(["swap0", f"nfs://{LOOPBACK}/export/x?nfsport={port}", LOOPBACK]) != 0
    assert capsys.readouterr().out == ""


def test_no_such_name(records: Records, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed; the exit status says it."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert resolve_server.main(["swap0", "nfs://nas/export/x", "192.0.2.7"]) == os.EX_NOHOST
    assert capsys.readouterr().out == ""
