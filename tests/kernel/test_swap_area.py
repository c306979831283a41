# SPDX-License-Identifier: LGPL-2.1-or-later
"""Swap areas: what may be made one, and whether what is swapped out fits. swapon itself is tested in vm-tests/."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdnfs import programs
from nbdnfs.errors import BusyError, CannotCreateError, NbdnfsError, UnavailableError
from nbdnfs.kernel import swap_area, warm_up
from nbdnfs.kernel.state import Swap

MIB = 1 << 20
PAGE_SIZES = (4096, 8192, 16384, 32768, 65536)


def mkswap(area: Path, page_bytes: int) -> None:
    subprocess.run(["/usr/sbin/mkswap", "-p", str(page_bytes), str(area)], check=True, capture_output=True)


@pytest.fixture
def area(tmp_path: Path) -> Path:
    """A file of zeros, with the smallest size that is a swap area of any kernel."""
    path = tmp_path / "area"
    path.write_bytes(bytes(10 * PAGE_SIZES[-1]))
    return path


@pytest.fixture
def turned_on(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that `enable` would have run beside mkswap, which is run. A file has no worker to warm up."""
    swapons: list[list[str]] = []
    run = programs.run

    def run_mkswap(argv: Sequence[str | Path], **options: object) -> str:
        words = [str(word) for word in argv]
        if words[0].endswith("/mkswap"):
            return run(argv, **options)  # type: ignore[arg-type]
        swapons.append(words)
        return ""

    monkeypatch.setattr(programs, "run", run_mkswap)
    monkeypatch.setattr(warm_up, "warm_up", lambda path, *, timeout_s: None)
    return swapons


def enable(area: Path, page_bytes: int, *, is_owned: bool = True) -> None:
    """As the helper does on a kernel with pages of that size, where the device shows what the file holds."""

    def look() -> int | None:
        found = swap_area.swap_page_bytes(area, page_bytes)
        if found is None and any(area.read_bytes()):
            raise CannotCreateError("data")
        return found

    swap_area.enable(
        area, priority=None, label="swap0", discard=False, is_owned=is_owned, look=look, page_bytes=page_bytes
    )


@pytest.mark.parametrize("made_for", PAGE_SIZES)
@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_signature(area: Path, made_for: int, page_bytes: int) -> None:
    """What mkswap makes for a kernel with any page size is recognized on any other; zeros are not."""
    assert swap_area.swap_page_bytes(area, page_bytes) is None
    mkswap(area, made_for)
    assert swap_area.swap_page_bytes(area, page_bytes) == made_for


def test_the_smallest_swap_area_of_all(tmp_path: Path) -> None:
    """A device that ends before the largest page does."""
    area = tmp_path / "area"
    area.write_bytes(bytes(10 * 4096))
    assert swap_area.swap_page_bytes(area) is None
    mkswap(area, 4096)
    assert swap_area.swap_page_bytes(area, 65536) == 4096


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    start=st.binary(max_size=200),
    offset=st.integers(0, 66000),
    version=st.sampled_from([0, 1, 2]),
    page_bytes=st.sampled_from(PAGE_SIZES),
)
def test_what_merely_looks_like_a_signature(
    area: Path, start: bytes, offset: int, version: int, page_bytes: int
) -> None:
    """The ten letters count at the end of a page only, and with the header's version 1."""
    content = bytearray(10 * PAGE_SIZES[-1])
    content[: len(start)] = start
    content[1024:1028] = version.to_bytes(4, "little")
    content[offset : offset + 10] = b"SWAPSPACE2"
    area.write_bytes(content)
    is_one = content[1024:1028] == b"\1\0\0\0" and offset + 10 in PAGE_SIZES
    assert swap_area.swap_page_bytes(area, page_bytes) == (offset + 10 if is_one else None)


@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_every_boot_swaps(area: Path, turned_on: list[list[str]], page_bytes: int) -> None:
    """The first boot makes a swap area of zeros; the second one finds it, and writes nothing."""
    enable(area, page_bytes)
    made = area.read_bytes()
    assert made[page_bytes - 10 : page_bytes] == b"SWAPSPACE2"
    enable(area, page_bytes, is_owned=False)
    assert area.read_bytes() == made
    assert [words[1:] for words in turned_on] == [[str(area)]] * 2


@pytest.mark.parametrize(("made_for", "page_bytes"), [(4096, 16384), (16384, 4096), (4096, 65536), (65536, 16384)])
def test_another_kernel(
    area: Path, turned_on: list[list[str]], capfd: pytest.CaptureFixture[str], made_for: int, page_bytes: int
) -> None:
    """A swap area that a kernel with other pages has left: made again where it is ours, with a line in the journal."""
    mkswap(area, made_for)
    with area.open("r+b") as file:
        os.pwrite(file.fileno(), b"what was swapped out in the last boot", 5 * 65536)
    enable(area, page_bytes)
    assert swap_area.swap_page_bytes(area, made_for) == page_bytes, "nothing is left of the old signature"
    assert len(turned_on) == 1
    assert capfd.readouterr().err == (
        f"nbdnfs: {area} was a swap area for pages of {made_for // 1024} KiB, and this kernel has pages of"
        f" {page_bytes // 1024} KiB: it is made again\n"
    )
    enable(area, page_bytes)
    assert capfd.readouterr().err == ""


def test_the_swap_area_of_another_machine(area: Path, turned_on: list[list[str]]) -> None:
    """Without an owner record it may be in use there: refused, and left as it is."""
    mkswap(area, 4096)
    before = area.read_bytes()
    with pytest.raises(CannotCreateError, match="for pages of 4 KiB, and this kernel has pages of 16 KiB") as caught:
        enable(area, 16384, is_owned=False)
    assert "--force" not in str(caught.value.hint)
    assert area.read_bytes() == before
    assert turned_on == []


def test_data_is_not_made_a_swap_area(area: Path, turned_on: list[list[str]]) -> None:
    """The owner record does not change that: the file may hold something else. The device need not show it: where pages
    are encrypted, what was there before reads as zeros."""

    def look() -> int | None:
        raise CannotCreateError("neither swap nor empty")

    before = area.read_bytes()
    assert not any(before)
    with pytest.raises(CannotCreateError, match="neither swap nor empty"):
        swap_area.enable(area, priority=None, label="swap0", discard=False, is_owned=True, look=look)
    assert area.read_bytes() == before
    assert turned_on == []


def test_a_swap_area_that_the_device_does_not_show(area: Path, turned_on: list[list[str]]) -> None:
    """One for larger pages ends behind the kernel's first page, and reads as zeros where pages are encrypted: it is
    made again all the same, where it is ours."""
    enabling = {"priority": None, "label": "swap0", "discard": False, "look": lambda: 65536}
    with pytest.raises(CannotCreateError, match="for pages of 64 KiB"):
        swap_area.enable(area, is_owned=False, page_bytes=4096, **enabling)  # type: ignore[arg-type]
    assert not any(area.read_bytes())
    swap_area.enable(area, is_owned=True, page_bytes=4096, **enabling)  # type: ignore[arg-type]
    assert swap_area.swap_page_bytes(area, 4096) == 4096
    assert len(turned_on) == 1


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


@pytest.mark.parametrize("is_listed", [True, False])
def test_swapoff_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_listed: bool) -> None:
    """The last thing that is told is that nothing is left, also where the kernel's list has it a moment longer."""
    root = machine(tmp_path, 200)
    (root / "proc/vmstat").write_text("oom_kill 0\n")
    swap = swap_area.find("/dev/nbd0", root)
    assert swap is not None
    told: list[tuple[int, int]] = []

    def swapoff(argv: list[str], look: Callable[[], None], *, every_s: float) -> tuple[int, str]:
        if not is_listed:
            (root / "proc/swaps").write_text("Filename Type Size Used Priority\n")
        look()
        return 0, ""

    monkeypatch.setattr(programs, "find_program", lambda name, package: name)
    monkeypatch.setattr(programs, "watch", swapoff)
    swap_area.disable(swap, lambda *numbers: told.append(numbers), root)
    assert told == [(swap.used_bytes if is_listed else 0, swap.used_bytes), (0, swap.used_bytes)]


def test_swapoff_that_fails_when_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message does not say that the swap stays on."""
    root = machine(tmp_path, 200)
    (root / "proc/vmstat").write_text("oom_kill 0\n")
    swap = swap_area.find("/dev/nbd0", root)
    assert swap is not None

    def swapoff(*_: object, **__: object) -> tuple[int, str]:
        (root / "proc/swaps").write_text("Filename Type Size Used Priority\n")
        return 1, "swapoff: it does not say why"

    monkeypatch.setattr(programs, "find_program", lambda name, package: name)
    monkeypatch.setattr(programs, "watch", swapoff)
    with pytest.raises(UnavailableError, match="is not in use as swap any more, though swapoff failed"):
        swap_area.disable(swap, lambda left_bytes, total_bytes: None, root)
