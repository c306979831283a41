# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes and durations as users write and read them."""

from __future__ import annotations

import re

from nbdnfs.errors import UsageError

_SIZE_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# More digits than any size or time has, and fewer than Python refuses to read.
_NUMBER = r"([0-9]{1,30}(?:\.[0-9]{1,30})?)"
_SHOWN_CHARACTERS = 60
_DURATION_FACTORS_S = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size_bytes(text: str) -> int:
    """Bytes in "4096", "512K", "2G", "1.5GiB" (binary units, as mkswap and truncate use them).

    Raises UsageError when it is not a size, or not a whole number of bytes.
    """
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"'{_shortened(text)}' is not a size", "write a number and a unit, for example 512M or 2G")
    whole, _, decimals = match[1].partition(".")
    scale: int = 10 ** len(decimals)
    size_bytes, rest = divmod(int(whole + decimals) * _SIZE_FACTORS[match[2].upper()], scale)
    if rest:
        raise UsageError(f"'{text}' is not a whole number of bytes", "write for example 1536M instead")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size in the largest binary unit that it reaches, with one decimal at most: "2 GiB", "1.5 GiB", "4 KiB"."""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while round(abs(value), 1) >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:.1f}".removesuffix(".0") + f" {units[0]}"


def parse_duration_s(text: str) -> float:
    """Seconds in "30", "500ms", "90s", "5min", "2h", "1d". Raises UsageError."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*(ms|s|min|h|d)?\s*", text)
    if match is None:
        raise UsageError(f"'{_shortened(text)}' is not a duration", "write a number and a unit: ms, s, min, h or d")
    return float(match[1]) * _DURATION_FACTORS_S[match[2] or "s"]


def format_duration(seconds: float) -> str:
    """A duration in two units at most: "0.7 s", "42 s", "2 min 5 s", "3 h 20 min"."""
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
