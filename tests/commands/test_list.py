# SPDX-License-Identifier: LGPL-2.1-or-later
"""The devices of a machine, on a golden tree of /sys, /proc and /etc."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.nbd_tree import add_device

from nbdnfs import cli, config
from nbdnfs.commands import list as list_command
from nbdnfs.commands.list import Device
from nbdnfs.errors import PermissionDeniedError

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two configured devices, one of them up and in use; a broken configuration; an attached and a foreign device."""
    (tmp_path / "etc/nbdnfs").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "etc/nbdnfs/swap0.toml").write_text('url = "nfs://nas/export/a.swap"\n')
    (tmp_path / "etc/nbdnfs/swap1.toml").write_text('url = "nfs://nas/export/b.swap"\n')
    (tmp_path / "etc/nbdnfs/typo.toml").write_text("url = nas\n")
    (tmp_path / "proc/swaps").write_text(
        "Filename\tType\tSize\tUsed\tPriority\n/dev/nbd3 partition 65532 1024 -2\n/dev/sda2 partition 4096 0 -3\n"
    )
    add_device(tmp_path, 0)
    add_device(tmp_path, 1, size_bytes=8 * MIB, pid=7)
    add_device(tmp_path, 2, size_bytes=16 * MIB, pid=7, backend="qemu-nbd")
    add_device(tmp_path, 3, size_bytes=64 * MIB, pid=7, backend="nbdnfs:swap0")
    add_device(tmp_path, 4, size_bytes=32 * MIB, pid=7, backend="nbdnfs:old")
    add_device(tmp_path, 5, size_bytes=8 * MIB, pid=7)
    return tmp_path


def test_devices(root: Path) -> None:
    """Of all kinds, each once; those that are free are none."""
    found = list_command.devices(root)
    assert found[:2] == [
        Device("configured", "swap0", "/dev/nbd3", 64 * MIB, 1024 * 1024, "nfs://nas/export/a.swap"),
        Device("configured", "swap1", url="nfs://nas/export/b.swap"),
    ]
    assert (found[2].name, "not valid TOML" in str(found[2].problem)) == ("typo", True)
    assert found[3:] == [
        Device("foreign", None, "/dev/nbd1", 8 * MIB),
        Device("foreign", "qemu-nbd", "/dev/nbd2", 16 * MIB),
        Device("attached", "old", "/dev/nbd4", 32 * MIB),
        Device("foreign", None, "/dev/nbd5", 8 * MIB),
    ]
    assert list_command.devices(root / "none") == []


def test_configurations_that_may_not_be_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is attached is there all the same."""

    def names(root: Path) -> list[str]:
        raise PermissionDeniedError("/etc/nbdnfs cannot be read: Permission denied", "run this as root")

    monkeypatch.setattr(config, "names", names)
    assert [device.device for device in list_command.devices(root)] == [f"/dev/nbd{n}" for n in range(1, 6)]
    assert capsys.readouterr().err.startswith("nbdnfs: /etc/nbdnfs cannot be read: Permission denied: ")


def test_output(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines for a person, and JSON with its schema for a program."""
    monkeypatch.setattr(list_command, "devices", lambda devices=list_command.devices: devices(root))
    for arguments in (["list"], ["list", "--json"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
    text, _, rest = capsys.readouterr().out.partition("{")
    assert "swap0            configured /dev/nbd3      64 MiB  swap, 1 MiB in use  nfs://nas/export/a.swap" in text
    found = json.loads("{" + rest)
    assert found["schema"] == 1
    assert [device["name"] for device in found["devices"][:2]] == ["swap0", "swap1"]
