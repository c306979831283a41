# SPDX-License-Identifier: LGPL-2.1-or-later
"""What doctor says of nbdkit and libnfs: which ones there are, or what to install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdnfs.commands import installation_checks
from nbdnfs.commands.findings import Finding

_DUMP = "python_version=3.11.2"
_TOO_OLD = "python_version=3.9.2"


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Finding]:
    """The finding about an nbdkit that is this shell script; "": there is none."""

    def look(script: str) -> Finding:
        if script:
            (tmp_path / "nbdkit").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "nbdkit").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        (finding,) = (one for one in installation_checks.installation(Path("/")) if one.subject == "nbdkit")
        return finding

    return look


def test_nbdkit(found: Callable[[str], Finding]) -> None:
    """Its version."""
    finding = found(f'[ "$1" = --version ] && echo nbdkit 1.32.5 || echo {_DUMP}')
    assert finding == Finding("nbdkit", True, "1.32.5, with its Python plugin")


@pytest.mark.parametrize(
    ("script", "text", "advice"),
    [
        ("", "the program 'nbdkit' is not installed", "apt install nbdkit"),
        ("exit 1", "nbdkit has no Python plugin", "apt install nbdkit-plugin-python"),
        (f"echo {_TOO_OLD}", "nbdkit embeds Python 3.9.2", "Debian 12"),
    ],
)
def test_an_nbdkit_that_cannot_serve(found: Callable[[str], Finding], script: str, text: str, advice: str) -> None:
    """No program, no plugin, or one with a Python that cannot load ours."""
    finding = found(script)
    assert not finding.good
    assert text in finding.found
    assert advice in finding.advice


def test_libnfs_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor goes on, and says what to install."""
    monkeypatch.delitem(sys.modules, "nbdnfs.engine", raising=False)
    monkeypatch.setitem(sys.modules, "nbdnfs.engine._engine", None)
    (finding,) = (one for one in installation_checks.installation(Path("/")) if one.subject == "libnfs")
    assert not finding.good
    assert "libnfs-dev" in finding.advice
