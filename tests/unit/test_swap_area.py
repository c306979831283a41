# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which a device becomes swap. With a real kernel: vm-tests/."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdnfs import swap_area
from nbdnfs.errors import CannotCreateError, UnavailableError

SIGNED = bytes(4086) + b"SWAPSPACE2"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the device, in order; no program is started."""
    done: list[str] = []

    def run(argv: Sequence[str], **options: object) -> str:
        done.append(argv[0])
        return ""

    monkeypatch.setattr(swap_area.run, "find_program", lambda name, package: name)
    monkeypatch.setattr(swap_area.run, "run", run)
    monkeypatch.setattr(swap_area.warmup, "warm_up", lambda path, timeout_s: done.append("warm-up"))
    return done


@pytest.mark.parametrize(
    ("content", "expected"),
    [(SIGNED + bytes(4096), ["warm-up", "swapon"]), (bytes(8192), ["mkswap", "warm-up", "swapon"])],
)
def test_warm_before_swapon(steps: list[str], tmp_path: Path, content: bytes, expected: list[str]) -> None:
    """The last thing before swapon; mkswap only where there is no swap area yet."""
    (tmp_path / "device").write_bytes(content)
    swap_area.enable(tmp_path / "device", priority=None, label="swap0", discard=False)
    assert steps == expected


def test_data_is_not_swapped_to(steps: list[str], tmp_path: Path) -> None:
    """Neither mkswap nor a warm-up nor swapon touches what somebody may want back."""
    (tmp_path / "device").write_bytes(bytes(4096) + b"precious".ljust(4096, b"\0"))
    with pytest.raises(CannotCreateError):
        swap_area.enable(tmp_path / "device", priority=None, label="swap0", discard=False)
    assert steps == []


def test_no_swap_on_a_worker_that_does_not_answer(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up that fails is no swapon."""

    def fail(path: Path, timeout_s: float) -> None:
        raise UnavailableError("no answer")

    monkeypatch.setattr(swap_area.warmup, "warm_up", fail)
    (tmp_path / "device").write_bytes(SIGNED)
    with pytest.raises(UnavailableError):
        swap_area.enable(tmp_path / "device", priority=None, label="swap0", discard=False)
    assert steps == []
