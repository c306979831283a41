# SPDX-License-Identifier: LGPL-2.1-or-later
"""Swap areas: what may be made one, and whether what is swapped out fits. swapon itself is tested in vm-tests/."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbdnfs import programs
from nbdnfs.errors import BusyError, CannotCreateError, NbdnfsError, UnavailableError
from nbdnfs.kernel import swap_area
from nbdnfs.kernel.state import Swap

MIB = 1 << 20


def test_signature(tmp_path: Path) -> None:
    """What mkswap makes is recognized; zeros are not."""
    area = tmp_path / "area"
    area.write_bytes(bytes(MIB))
    assert not swap_area.has_signature(area)
    subprocess.run(["/usr/sbin/mkswap", str(area)], check=True, capture_output=True)
    assert swap_area.has_signature(area)


@pytest.mark.parametrize("offset", [0, 4095, 3 * MIB - 1, 5 * MIB + 8191])
def test_data_is_refused(tmp_path: Path, offset: int) -> None:
    """A single byte anywhere counts as data; nothing is written."""
    area = tmp_path / "area"
    area.write_bytes(bytes(5 * MIB + 8192))
    swap_area.refuse_data(area)
    with area.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")
    before = area.read_bytes()
    with pytest.raises(CannotCreateError, match="neither swap nor empty") as caught:
        swap_area.refuse_data(area)
    assert caught.value.hint
    assert area.read_bytes() == before


def machine(tmp_path: Path, available_mib: int, other_free_mib: int = 0) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: 262144 kB\nMemFree: 1000 kB\nMemAvailable: {available_mib << 10} kB\n"
        "SwapTotal: 1000000 kB\nSwapFree: 500000 kB\n"
    )
    lines = ["Filename Type Size Used Priority", f"/dev/nbd0 partition {256 << 10} {100 << 10} 100"]
    if other_free_mib:
        lines.append(f"/dev/sda2 partition {other_free_mib << 10} 0 -2")
    (tmp_path / "proc/swaps").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize(("available_mib", "other_free_mib"), [(200, 0), (20, 200), (116, 0)])
def test_it_fits(tmp_path: Path, available_mib: int, other_free_mib: int) -> None:
    """In memory, or in another swap area, with a margin."""
    root = machine(tmp_path, available_mib, other_free_mib)
    swap = swap_area.find("/dev/nbd0", root)
    assert swap is not None
    swap_area.refuse_unless_it_fits(swap, root)


@pytest.mark.parametrize("available_mib", [0, 100, 115])
def test_it_does_not_fit(tmp_path: Path, available_mib: int) -> None:
    """Refused, with figures, and before anything is changed."""
    root = machine(tmp_path, available_mib)
    swap = swap_area.find("/dev/nbd0", root)
    assert swap is not None
    with pytest.raises(BusyError, match="100 MiB are swapped out to /dev/nbd0, and there is room for"):
        swap_area.refuse_unless_it_fits(swap, root)


def test_find(tmp_path: Path) -> None:
    """By the device's path; also when its node has been removed."""
    root = machine(tmp_path, 100)
    assert swap_area.find("/dev/nbd1", root) is None
    (root / "proc/swaps").write_text("Filename\n/dev/nbd0\\040(deleted) partition 4 0 1\n")
    assert swap_area.find("/dev/nbd0", root) == Swap("/dev/nbd0 (deleted)", "partition", 4096, 0, 1)


@pytest.mark.parametrize(
    ("status", "errors", "kind", "end"),
    [
        (2, "swapoff: /dev/nbd0: swapoff failed: Kein Speicher verfügbar\n", BusyError, "Kein Speicher verfügbar"),
        (-9, "", BusyError, "swapoff was ended by signal 9"),
        (4, "", UnavailableError, "swapoff ended with exit status 4"),
    ],
)
def test_swapoff_fails_midway(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    errors: str,
    kind: type[NbdnfsError],
    end: str,
) -> None:
    """The message says what has come back by then, and that the kernel has killed a process."""
    root = machine(tmp_path, 200)
    vmstat = root / "proc/vmstat"
    vmstat.write_text("pswpin 1\noom_kill 3\n")
    swap = swap_area.find("/dev/nbd0", root)
    assert swap is not None

    def swapoff(argv: list[str], progress: object, *, every_s: float) -> tuple[int, str]:
        text = (root / "proc/swaps").read_text()
        (root / "proc/swaps").write_text(text.replace(f" {100 << 10} ", f" {70 << 10} "))
        vmstat.write_text("pswpin 1\noom_kill 4\n")
        return status, errors

    monkeypatch.setattr(programs, "find_program", lambda name, package: name)
    monkeypatch.setattr(programs, "watch", swapoff)
    with pytest.raises(kind) as caught:
        swap_area.disable(swap, lambda left_bytes, total_bytes: None, root)
    assert caught.value.message.startswith(
        "/dev/nbd0 stays in use as swap; 30 MiB of 100 MiB are back in memory, and the kernel killed 1 process(es)"
    )
    assert caught.value.message.endswith(end)
