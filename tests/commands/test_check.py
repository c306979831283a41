# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs check` on trees of configuration files: what is wrong is named, with file and line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from nbdnfs import config
from nbdnfs.commands import check
from nbdnfs.errors import NoInputError, UsageError

VALID = 'url = "nfs://nas/export/x.swap"\n'


def write(root: Path, **files: str) -> Path:
    (root / "etc/nbdnfs").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / f"etc/nbdnfs/{name}.toml").write_text(text)
    return root


def test_all_files(tmp_path: Path) -> None:
    """One bad file does not keep the others from being read; each is named with its line."""
    root = write(tmp_path, good=VALID, bad=VALID + 'siez = "2G"\n', worse="url = \n")
    problems = check.find_problems(root=root)
    assert list(problems) == ["bad", "worse"]
    assert problems["bad"].message == f"{root}/etc/nbdnfs/bad.toml:2: unknown key 'siez'"
    assert problems["bad"].hint == "did you mean 'size'?"
    assert problems["worse"].message.startswith(f"{root}/etc/nbdnfs/worse.toml:1: not valid TOML")


def test_one_name(tmp_path: Path) -> None:
    """Only that one; a file that does not exist is an error of the call."""
    root = write(tmp_path, good=VALID, bad="")
    assert check.find_problems("good", root) == {}
    assert list(check.find_problems("bad", root)) == ["bad"]
    with pytest.raises(NoInputError):
        check.find_problems("missing", root)


def test_files_that_nothing_reads(tmp_path: Path) -> None:
    """A name that no device can have, and drop-ins for a device that has no file."""
    root = write(tmp_path, good=VALID)
    (root / "etc/nbdnfs/my swap.toml").write_text(VALID)
    (root / "etc/nbdnfs/other.toml.d").mkdir()
    (root / "etc/nbdnfs/other.toml.d/10.toml").write_text("discard = true\n")
    (root / "etc/nbdnfs/empty.toml.d").mkdir()
    (root / "etc/nbdnfs/other.toml.d/20-x.conf").write_text("discard = true\n")
    (root / "etc/nbdnfs/swap1.conf").write_text(VALID)
    (root / "etc/nbdnfs/README").write_text("not one of ours\n")
    problems = check.find_problems(root=root)
    assert list(problems) == ["my swap", "20-x.conf", "swap1.conf", "other"]
    assert problems["swap1.conf"].message.startswith(f"{root}/etc/nbdnfs/swap1.conf is not read")
    assert "cannot be the name of a device" in problems["my swap"].message
    assert problems["other"].message.endswith("other.toml.d is not read: there is no other.toml")


def test_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each device, and the remedy below; EX_CONFIG when one is not valid."""
    root = write(tmp_path, good=VALID, bad=VALID + "discard = 1\n")
    find_problems, names = check.find_problems, config.names
    monkeypatch.setattr(check, "find_problems", lambda name: find_problems(name, root))
    monkeypatch.setattr(config, "names", lambda folder=root: names(folder))
    assert check.run(argparse.Namespace(name=None)) == os.EX_CONFIG
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "good: valid"
    assert lines[1].startswith(f"bad: {root}/etc/nbdnfs/bad.toml:2: ")
    assert lines[2].startswith("     ")
    assert check.run(argparse.Namespace(name="good")) == 0
    with pytest.raises(UsageError):
        check.run(argparse.Namespace(name="good.toml"))


def test_no_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a file there is nothing wrong, and the output says how to write one."""
    monkeypatch.setattr(check, "find_problems", lambda name: {})
    monkeypatch.setattr(config, "names", list)
    assert check.run(argparse.Namespace(name=None)) == 0
    assert "write /etc/nbdnfs/NAME.toml" in capsys.readouterr().out
