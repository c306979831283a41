# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs status` on a golden tree: when a device is green, which problems are named, and the JSON form."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from nbdnfs.commands import counters, status
from nbdnfs.errors import NoInputError, UsageError
from nbdnfs.keeper.records import Records


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """swap0 is configured and up: keeper 10, worker 11, /dev/nbd3."""
    files = {
        "etc/nbdnfs/swap0.toml": 'url = "nfs://nas/export/x.swap"\n',
        "sys/block/nbd3/size": "131072\n",
        "sys/block/nbd3/pid": "9\n",
        "sys/block/nbd3/backend": "nbdnfs:swap0\n",
        "proc/swaps": "Filename Type Size Used Priority\n/dev/nbd3 partition 65532 1024 100\n",
        "run/nbdnfs/swap0/keeper": "10 100 1.0\n",
        "run/nbdnfs/swap0/worker": "11 200 1.0\n",
        "run/nbdnfs/swap0/state": "watch\n",
        "run/nbdnfs/swap0/address": "nfs://nas/export/x.swap\n192.0.2.7\n",
    }
    for pid, started in ((10, 100), (11, 200)):
        files[f"proc/{pid}/stat"] = f"{pid} (a b) S " + " ".join(["0"] * 18) + f" {started} 0 0\n"
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_green(root: Path) -> None:
    """A healthy device: every field is known, and there is no problem."""
    found = status.read("swap0", root)
    assert found.is_green
    assert (found.device, found.keeper_pid, found.worker_pid, found.server) == ("/dev/nbd3", 10, 11, "192.0.2.7")
    assert (found.swap_bytes, found.swap_used_bytes) == (65532 * 1024, 1 << 20)
    assert found.text().startswith("swap0: ok\n")
    assert json.loads(json.dumps(found.to_json()))["green"] is True


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("proc/10/stat", "no keeper is running"),
        ("proc/11/stat", "no worker is running"),
        ("proc/swaps", "not in use as swap"),
        ("sys/block/nbd3/pid", "not up"),
    ],
)
def test_problems(root: Path, missing: str, problem: str) -> None:
    """Each missing part is named."""
    (root / missing).unlink()
    found = status.read("swap0", root)
    assert found.problems == (problem,)
    assert not found.is_green
    assert problem in found.text()


@pytest.mark.parametrize(
    ("counter", "value", "words"),
    [
        ("disconnected", 1, "the server does not answer"),
        ("file_state", 1, "was deleted"),
        ("file_state", 2, "was replaced"),
        ("file_state", 3, "was truncated"),
        ("write_back_error", errno.ENOSPC, "No space left on device"),
        ("write_back_error", errno.EDQUOT, "quota exceeded"),
        ("checksum_failures", 1, "is the export 'async'?"),
    ],
)
def test_problems_in_the_region(
    root: Path, monkeypatch: pytest.MonkeyPatch, counter: str, value: int, words: str
) -> None:
    """Each bad state of the server and of the file is named."""
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: {counter: value})
    (problem,) = status.read("swap0", root).problems
    assert words in problem


def test_a_stolen_file(root: Path) -> None:
    """The keeper took the device down and ended: the theft is reported, and not that the device is down."""
    (root / "sys/block/nbd3/pid").unlink()
    (root / "run/nbdnfs/swap0/state").write_text("lost\n")
    (problem,) = status.read("swap0", root).problems
    assert problem.startswith("another machine has stolen the backing file")


@pytest.mark.parametrize(
    ("state", "problem"), [(1, None), (2, "writes wait"), (3, "another machine has stolen the backing file")]
)
def test_owner_state(root: Path, monkeypatch: pytest.MonkeyPatch, state: int, problem: str | None) -> None:
    """The states of enum owner_state, as the region's counters hold them."""
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: {"owner_state": state})
    problems = status.read("swap0", root).problems
    assert problem in problems[0] if problem else not problems


def test_a_refusal(root: Path) -> None:
    """The reason why a device did not get its file is shown until it gets it."""
    (root / "sys/block/nbd3/pid").unlink()
    Records.write_refusal("swap0", "x is in use as swap by box2", root)
    assert status.read("swap0", root).problems == ("not up", "x is in use as swap by box2")
    assert status.names(root) == ["swap0"]
    Records.write_refusal("swap0", None, root)
    assert status.read("swap0", root).problems == ("not up",)


def test_names(root: Path) -> None:
    """Devices that are configured, and devices that are up without a configuration."""
    (root / "run/nbdnfs/old").mkdir()
    assert status.names(root) == ["old", "swap0"]


def test_no_such_device(root: Path) -> None:
    """A name that is neither configured nor up: the error lists the devices that exist."""
    with pytest.raises(NoInputError) as caught:
        status.read("swapO", root)
    assert caught.value.hint == "there are: swap0"
    with pytest.raises(UsageError):
        status.read("../swap0", root)
