# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes and durations as people write them, and as they are printed."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdnfs import quantities
from nbdnfs.errors import UsageError

FACTORS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SECONDS = {"": 1, "ms": Fraction(1, 1000), "s": 1, "min": 60, "h": 3600, "d": 86400}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512K", 512 * 1024),
        ("2G", 2 * 2**30),
        ("1.5G", 1536 * 2**20),
        ("1.5GiB", 1536 * 2**20),
        ("2gb", 2 * 2**30),
        (" 16 MiB ", 16 * 2**20),
        ("3T", 3 * 2**40),
        ("512B", 512),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    """Binary units, with or without B, in any case."""
    assert quantities.parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1", "+1", "1P", "1 2", "1e9", "0x10", ".5G", "5.", "1,5G", "2Gx", "nan"])
def test_what_is_no_size(text: str) -> None:
    """It is quoted, with an example."""
    with pytest.raises(UsageError, match=r"is not a size$") as caught:
        quantities.parse_size_bytes(text)
    assert f"'{text}'" in caught.value.message
    assert "512M or 2G" in caught.value.hint


@pytest.mark.parametrize("text", ["9" * 5000, "1." + "9" * 5000, "9" * 31, "x" * 5000])
def test_more_digits_than_any_size_has(text: str) -> None:
    """Python refuses to read some of them: they are no sizes and no durations, and are not quoted in full."""
    for parse, wrong in ((quantities.parse_size_bytes, "a size"), (quantities.parse_duration_s, "a duration")):
        with pytest.raises(UsageError, match=rf"is not {wrong}$") as caught:
            parse(text)
        assert text[:30] in caught.value.message
        assert len(caught.value.message) < 100


@pytest.mark.parametrize("text", ["0.5", "1.1K", "0.3M"])
def test_no_part_of_a_byte(text: str) -> None:
    """Nothing is rounded."""
    with pytest.raises(UsageError, match=r"is not a whole number of bytes$"):
        quantities.parse_size_bytes(text)


@given(
    whole=st.integers(0, 2**70),
    decimals=st.from_regex(r"(\.[0-9]{1,6})?", fullmatch=True),
    unit=st.sampled_from([*FACTORS]),
)
@example(2**53 + 1, ".0", "")
@example(2**53 + 1, ".5", "K")
def test_sizes_are_exact(whole: int, decimals: str, unit: str) -> None:
    """The exact number, or an error where it is not a whole number of bytes."""
    expected = Fraction(f"{whole}{decimals}") * FACTORS[unit]
    if expected.denominator == 1:
        assert quantities.parse_size_bytes(f"{whole}{decimals}{unit}") == expected
    else:
        with pytest.raises(UsageError, match="whole number"):
            quantities.parse_size_bytes(f"{whole}{decimals}{unit}")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (1536 * 2**20, "1.5 GiB"),
        (2 * 2**30, "2 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_sizes_in_print(size_bytes: int, text: str) -> None:
    """One decimal at most, and no number of 1024 or more where there is a larger unit."""
    assert quantities.format_size(size_bytes) == text


@given(st.integers(0, 2**52))
def test_printed_sizes_are_near_and_read_back(size_bytes: int) -> None:
    """What is printed parses, but for the decimals, to within a twentieth of its unit."""
    text = quantities.format_size(size_bytes)
    match = re.fullmatch(r"(\d+(?:\.\d)?) ([KMGT]?)i?B", text)
    assert match is not None, text
    unit = FACTORS[match[2]]
    assert abs(Fraction(match[1]) * unit - size_bytes) <= Fraction(unit, 20)
    assert Fraction(match[1]) < 1024 or match[2] == "T"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("500ms", 0.5), ("90s", 90), ("5min", 300), ("2h", 7200), ("1d", 86400), ("1.5h", 5400), (" 3 s ", 3)],
)
def test_durations(text: str, seconds: float) -> None:
    """Without a unit: seconds."""
    assert quantities.parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "5m", "5M", "1 2", "1h30min", "1e3", "inf"])
def test_what_is_no_duration(text: str) -> None:
    """Also "5m", which could be minutes or a slip of the keyboard for ms."""
    with pytest.raises(UsageError, match=r"is not a duration$") as caught:
        quantities.parse_duration_s(text)
    assert "ms, s, min, h or d" in caught.value.hint


@given(whole=st.integers(0, 10**9), unit=st.sampled_from([*SECONDS]))
def test_durations_by_unit(whole: int, unit: str) -> None:
    """Each unit is what it is called."""
    assert quantities.parse_duration_s(f"{whole}{unit}") == pytest.approx(float(whole * SECONDS[unit]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.71, "0.7 s"),
        (9.97, "10 s"),
        (42.4, "42 s"),
        (59.7, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.9, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations_in_print(seconds: float, text: str) -> None:
    """Two units at most, and neither reaches the next larger one."""
    assert quantities.format_duration(seconds) == text
