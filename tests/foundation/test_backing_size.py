# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes of backing files: absolute, relative to memory, and the limits of both."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbdnfs import backing_size
from nbdnfs.errors import ConfigError, NbdnfsError, UsageError

MIB, GIB = 1 << 20, 1 << 30


def machine(root: Path, memory_bytes: int) -> Path:
    """A machine with so much memory."""
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       {memory_bytes // 1024} kB\nMemFree:  1 kB\n")
    return root


@pytest.mark.parametrize(
    ("text", "memory_bytes", "size_bytes"),
    [
        ("2G", GIB, 2 * GIB),
        ("ram", 4 * GIB, 4 * GIB),
        ("ram / 2", 8 * GIB, 4 * GIB),
        ("ram / 2", 8 * GIB - 70 * MIB, 4 * GIB - 64 * MIB),
        ("ram/2,atmost8G", 32 * GIB, 8 * GIB),
        ("RAM*1.5", 2 * GIB, 3 * GIB),
        ("  ram  /  2  ,  at  most  512M ", 4 * GIB, 512 * MIB),
        ("ram / 2, at most 8G", 4 * GIB, 2 * GIB),
        ("ram / 8", 256 * MIB, 32 * MIB),
        ("ram / 8", 250 * MIB, 31 * MIB),
        ("ram * 0.75", GIB, 768 * MIB),
    ],
)
def test_sizes(tmp_path: Path, text: str, memory_bytes: int, size_bytes: int) -> None:
    """Relative ones are rounded down to 64 MiB, below that to 1 MiB."""
    assert backing_size.parse(text, machine(tmp_path, memory_bytes)) == size_bytes


def test_a_kernel_that_takes_a_little_more_memory(tmp_path: Path) -> None:
    """A few MiB less, well inside a step, are the same size."""
    sizes = {backing_size.parse("ram / 2", machine(tmp_path, 8 * GIB - less * MIB)) for less in range(130, 250, 10)}
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("200T", "too large: a swap area has at most 16 TiB"),
        ("16T", "too large"),
        ("ram * 100000", "too large"),
        ("0", "too small"),
        ("ram / 999999", "too small"),
        ("1000000", "not a multiple of 4096"),
        ("ram / 2, at most 1000000", "not a multiple of 4096"),
        ("ram / 0", "is not a size"),
        ("ram * 0.0", "is not a size"),
        ("ram /", "is not a size"),
        ("ram / 2 / 2", "is not a size"),
        ("ram + 2G", "is not a size"),
        ("ram / 2, at most", "is not a size"),
        ("ram / 2, at most ram", "is not a size"),
        ("2G, at most 1G", "is not a size"),
        ("ramp", "is not a size"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    """With what to write instead."""
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        backing_size.parse(text, machine(tmp_path, 4 * GIB))
    assert caught.value.hint


def test_no_meminfo(tmp_path: Path) -> None:
    """A sentence; an absolute size needs none."""
    with pytest.raises(UsageError, match="does not have the machine's memory"):
        backing_size.parse("ram / 2", tmp_path)
    assert backing_size.parse("1G", tmp_path) == GIB


@given(
    memory_mib=st.integers(64, 1 << 23),
    operator=st.sampled_from("*/"),
    number=st.integers(1, 999),
    decimals=st.integers(0, 2),
    most_mib=st.none() | st.integers(1, 1 << 20),
    gap=st.sampled_from(["", " ", "  "]),
)
@settings(max_examples=300, deadline=None)
@example(memory_mib=64, operator="/", number=999, decimals=0, most_mib=None, gap="")
def test_any_expression(
    tmp_path_factory: pytest.TempPathFactory,
    memory_mib: int,
    operator: str,
    number: int,
    decimals: int,
    most_mib: int | None,
    gap: str,
) -> None:
    """Never above what was asked for, less than a step below it, at most the limit; or refused as out of range."""
    factor = Fraction(number, 10**decimals)
    shown = f"{number / 10**decimals:.{decimals}f}"
    text = gap.join(["ram", operator, shown]) + (f",{gap}at{gap}most{gap}{most_mib}M" if most_mib is not None else "")
    root = machine(tmp_path_factory.getbasetemp(), memory_mib * MIB)
    exact = memory_mib * MIB * factor if operator == "*" else memory_mib * MIB / factor
    wanted = min(exact, most_mib * MIB) if most_mib is not None else exact
    try:
        found = backing_size.parse(text, root)
    except UsageError:
        assert wanted < backing_size.MIN_BYTES + MIB or wanted > backing_size.MAX_BYTES
        return
    assert wanted - 64 * MIB < found <= wanted
    assert found % 4096 == 0


@given(st.text(alphabet="ram */.,0129 atmostGMT%-é\n", max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text(text: str) -> None:
    """A possible size, or a NbdnfsError."""
    try:
        size_bytes = backing_size.parse(text, Path("/"))
    except NbdnfsError:
        return
    assert backing_size.MIN_BYTES <= size_bytes <= backing_size.MAX_BYTES


def test_what_this_machine_could_not_lock(tmp_path: Path) -> None:
    """Four bytes for each page, of an eighth of the memory or 64 MiB: the engine's own limit."""
    small = machine(tmp_path, 256 * MIB)
    backing_size.refuse_unless_lockable(64 * GIB, small)
    with pytest.raises(ConfigError, match="and at most 64 MiB may be locked"):
        backing_size.refuse_unless_lockable(65 * GIB, small)
    backing_size.refuse_unless_lockable(128 * GIB, machine(tmp_path, GIB))
