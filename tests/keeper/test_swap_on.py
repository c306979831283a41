# SPDX-License-Identifier: LGPL-2.1-or-later
"""The helper that turns swap on: its command line and its exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbdnfs.errors import BusyError
from nbdnfs.keeper.helpers import swap_on
from nbdnfs.kernel import swap_area


@pytest.mark.parametrize(
    ("words", "priority", "discard"), [(["-", "swap0"], None, False), (["7", "swap0", "--discard"], 7, True)]
)
def test_arguments(monkeypatch: pytest.MonkeyPatch, words: list[str], priority: int | None, discard: bool) -> None:
    """As the keeper gives them: RealWork.swap_on."""
    asked: list[tuple[Path, dict[str, Any]]] = []
    monkeypatch.setattr(swap_area, "enable", lambda path, **settings: asked.append((path, settings)))
    assert swap_on.main(["/dev/nbd0", *words]) == 0
    assert asked == [(Path("/dev/nbd0"), {"priority": priority, "label": "swap0", "discard": discard})]


def test_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Message and hint on stderr, and the exit status, which says whether the keeper tries again."""

    def enable(path: Path, **settings: Any) -> None:
        raise BusyError("in use", "wait")

    monkeypatch.setattr(swap_area, "enable", enable)
    assert swap_on.main(["/dev/nbd0", "-", "swap0"]) == BusyError.exit_code
    assert capsys.readouterr().err == "nbdnfs: in use\nnbdnfs: wait\n"
