# SPDX-License-Identifier: LGPL-2.1-or-later
"""What keeps a machine with a device from hibernating: systemd's refusal, and the kernel's."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdnfs.commands import up_down
from nbdnfs.keeper import hibernation
from nbdnfs.keeper.records import Records


def test_forbid_and_permit(tmp_path: Path) -> None:
    """One file for each device, read by systemd as sleep.conf.d(5) says; it goes with the device."""
    for name in ("swap0", "swap1", "swap0"):
        hibernation.forbid(name, tmp_path)
    folder = tmp_path / "run/systemd/sleep.conf.d"
    assert sorted(os.listdir(folder)) == ["nbdnfs@swap0.conf", "nbdnfs@swap1.conf"]
    parser = configparser.ConfigParser()
    parser.read(hibernation.drop_in("swap0", tmp_path))
    assert set(parser["Sleep"].values()) == {"no"}
    assert set(parser["Sleep"]) == {"allowhibernation", "allowhybridsleep", "allowsuspendthenhibernate"}
    for _ in range(2):
        hibernation.permit("swap0", tmp_path)
        assert os.listdir(folder) == ["nbdnfs@swap1.conf"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a warning, no error: swap is wanted all the same."""
    (tmp_path / "run").write_text("not a folder")
    hibernation.forbid("swap0", tmp_path)
    said = capsys.readouterr().err
    assert "do not hibernate" in said
    assert said.count("\n") == 1
    hibernation.permit("swap0", tmp_path)


def test_down_permits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`down` takes the refusal away with the records."""
    permitted: list[str] = []
    monkeypatch.setattr(hibernation, "permit", permitted.append)
    records = Records("swap0", tmp_path)
    records.make()
    up_down._take_down(records, None)
    assert permitted == ["swap0"]
    assert not records.path.exists()


def test_secret_memory() -> None:
    """A process that locks its memory keeps a descriptor of secret memory, where the kernel has it, until it ends: then
    /sys/power/state no longer offers "disk". The descriptor is not inherited."""
    script = (
        "import os; from nbdnfs import memlock\n"
        "before = len(os.listdir('/proc/self/fd')); measure = memlock._awake()\n"
        "after = len(os.listdir('/proc/self/fd')); assert measure.ok, measure.found\n"
        "if measure.found == 'the kernel does not hibernate':\n"
        "    assert after == before + 1\n"
        "    assert not os.path.exists('/sys/power/state') or 'disk' not in open('/sys/power/state').read().split()\n"
        "    assert not any(os.get_inheritable(int(fd)) for fd in os.listdir('/proc/self/fd')"
        " if int(fd) > 2 and os.path.exists('/proc/self/fd/' + fd))\n"
        "else:\n"
        "    assert after == before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
