# SPDX-License-Identifier: LGPL-2.1-or-later
"""The helper that turns swap on: its command line and its exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbdnfs.config import Config
from nbdnfs.errors import BusyError
from nbdnfs.keeper import real_work
from nbdnfs.keeper.helpers import swap_on
from nbdnfs.kernel import swap_area
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.nas import existing_file


@pytest.mark.parametrize("priority", [None, 7])
@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize("is_owned", [False, True])
def test_arguments(monkeypatch: pytest.MonkeyPatch, priority: int | None, discard: bool, is_owned: bool) -> None:
    """What the keeper gives arrives."""
    commands: list[list[str]] = []
    monkeypatch.setattr(real_work, "HelperProcess", lambda argv, environment, **_: commands.append(argv))
    config = Config("swap0", "nfs://127.0.0.1/x/y", priority=priority, discard=discard, owner=is_owned)
    real_work.RealWork(config, config.url, "127.0.0.1").swap_on(Attached(index=0, size_bytes=4096))
    (command,) = commands
    arguments = command[command.index(swap_on.__name__) + 1 :]
    asked: list[tuple[Path, dict[str, Any]]] = []
    monkeypatch.setattr(swap_area, "enable", lambda path, **settings: asked.append((path, settings)))
    assert swap_on.main(arguments) == 0
    ((path, settings),) = asked
    looked: list[str] = []
    monkeypatch.setattr(existing_file, "swap_page_bytes", looked.append)
    assert settings.pop("look")() is None
    assert looked == [config.url]
    assert path == Path("/dev/nbd0")
    assert settings == {"priority": priority, "label": "swap0", "discard": discard, "is_owned": is_owned}


def test_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Message and hint on stderr, and the exit status, which says whether the keeper tries again."""

    def enable(path: Path, **settings: Any) -> None:
        raise BusyError("in use", "wait")

    monkeypatch.setattr(swap_area, "enable", enable)
    assert swap_on.main(["/dev/nbd0", "-", "swap0", "nfs://nas/x/y"]) == BusyError.exit_code
    assert capsys.readouterr().err == "nbdnfs: in use\nnbdnfs: wait\n"
