# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loading the driver, where it fails; the rest is in vm-tests."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nbdnfs import programs
from nbdnfs.errors import NbdnfsError, UnavailableError
from nbdnfs.kernel import nbd_driver

UNIT = Path(__file__).resolve().parents[2] / "systemd/nbdnfs@.service"


def test_a_missing_driver_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """modprobe's own words, and an exit status after which the unit stays down."""

    def refused(*_: object, **__: object) -> str:
        raise NbdnfsError("loading the kernel's nbd driver: Module nbd not found")

    monkeypatch.setattr(programs, "run", refused)
    monkeypatch.setattr(programs, "find_program", lambda *_: "/sbin/modprobe")
    with pytest.raises(UnavailableError, match=r"driver is not there: .* Module nbd not found") as caught:
        nbd_driver.load(tmp_path)
    assert caught.value.exit_code == os.EX_OSFILE
    final = re.search(r"^RestartPreventExitStatus=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert final is not None
    assert str(os.EX_OSFILE) in final[1].split()


def test_a_driver_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is started: with swap in use it might have to come from there."""
    (tmp_path / "sys/module/nbd").mkdir(parents=True)
    monkeypatch.setattr(programs, "run", lambda *_, **__: pytest.fail("it is loaded again"))
    nbd_driver.load(tmp_path)
