# SPDX-License-Identifier: LGPL-2.1-or-later
"""status from a golden tree: what is green, what is said when it is not, and that it ends in JSON."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from nbdnfs.commands import status
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
    """All that can be known, and no problem."""
    found = status.read("swap0", root)
    assert found.is_green
    assert (found.device, found.keeper_pid, found.worker_pid, found.server) == ("/dev/nbd3", 10, 11, "192.0.2.7")
    assert (found.swap_bytes, found.swap_used_bytes) == (65532 * 1024, 1 << 20)
    assert found.text().startswith("swap0: ok\n")
    assert json.loads(json.dumps(found.to_json()))["green"] is True


@pytest.mark.parametrize(
    ("gone", "problem"),
    [
        ("proc/10/stat", "no keeper watches it"),
        ("proc/11/stat", "no worker serves it"),
        ("proc/swaps", "nobody swaps to it"),
        ("sys/block/nbd3/pid", "it is not up"),
    ],
)
def test_problems(root: Path, gone: str, problem: str) -> None:
    """Each thing that is missing is named."""
    (root / gone).unlink()
    found = status.read("swap0", root)
    assert found.problems == (problem,)
    assert not found.is_green
    assert problem in found.text()


@pytest.mark.parametrize(
    ("counter", "value", "words"),
    [
        ("disconnected", 1, "the server does not answer"),
        ("file_state", 1, "has been removed"),
        ("file_state", 2, "has been replaced"),
        ("file_state", 3, "was cut short"),
        ("write_back_error", errno.ENOSPC, "No space left on device"),
        ("write_back_error", errno.EDQUOT, "quota exceeded"),
        ("checksum_failures", 1, "is the export 'async'?"),
    ],
)
def test_what_the_region_tells(
    root: Path, monkeypatch: pytest.MonkeyPatch, counter: str, value: int, words: str
) -> None:
    """Each state of server and file is a problem, in words."""
    monkeypatch.setattr(status, "_counters", lambda pid, root: {counter: value})
    (problem,) = status.read("swap0", root).problems
    assert words in problem


def test_a_lost_file(root: Path) -> None:
    """The keeper has taken the device down and ended: that is said, rather than that it is not up."""
    (root / "sys/block/nbd3/pid").unlink()
    (root / "run/nbdnfs/swap0/state").write_text("lost\n")
    (problem,) = status.read("swap0", root).problems
    assert problem.startswith("another machine has taken its file")


@pytest.mark.parametrize(
    ("state", "problem"), [(1, None), (2, "writes wait"), (3, "another machine has taken its file")]
)
def test_what_the_worker_knows_of_the_owner(
    root: Path, monkeypatch: pytest.MonkeyPatch, state: int, problem: str | None
) -> None:
    """enum owner_state, through the region's counters."""
    monkeypatch.setattr(status, "_counters", lambda pid, root: {"owner_state": state})
    problems = status.read("swap0", root).problems
    assert problem in problems[0] if problem else not problems


def test_a_refusal(root: Path) -> None:
    """Who has the file is told until the device has got it."""
    (root / "sys/block/nbd3/pid").unlink()
    Records.write_refusal("swap0", "x is in use as swap by box2", root)
    assert status.read("swap0", root).problems == ("it is not up", "x is in use as swap by box2")
    assert status.names(root) == ["swap0"]
    Records.write_refusal("swap0", None, root)
    assert status.read("swap0", root).problems == ("it is not up",)


def test_names(root: Path) -> None:
    """What is configured, and what is up without a configuration."""
    (root / "run/nbdnfs/old").mkdir()
    assert status.names(root) == ["old", "swap0"]


def test_no_such_device(root: Path) -> None:
    """Neither configured nor up: an error that says what there is."""
    with pytest.raises(NoInputError) as caught:
        status.read("swapO", root)
    assert caught.value.hint == "there are: swap0"
    with pytest.raises(UsageError):
        status.read("../swap0", root)
