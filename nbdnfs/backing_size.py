# SPDX-License-Identifier: LGPL-2.1-or-later
"""The size of a backing file: what is possible, and sizes relative to this machine's memory.

    2G                       a size, see quantities.py
    ram, ram / 2, ram * 1.5  so much of MemTotal, proc_meminfo(5)
    ram / 2, at most 8G

Blanks may be left out: ram/2,atmost8G. What is relative is rounded down to 64 MiB, below that to 1 MiB, because
MemTotal differs by a few MiB from one kernel to the next. The keeper has this module in locked memory.
"""

from __future__ import annotations

import re

from nbdnfs import machine_ids, quantities
from nbdnfs.errors import ConfigError, UsageError
from nbdnfs.sizes import KERNEL_PAGE_BYTES, SLOT_BYTES

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from pathlib import Path

# mkswap(8): a swap area has ten pages at least. At most as many as the kernel's 32-bit page numbers can count.
MIN_BYTES = 10 * KERNEL_PAGE_BYTES
MAX_BYTES = (2**32 - 1) * KERNEL_PAGE_BYTES

_MIB = 1 << 20
_STEP_BYTES = 64 * _MIB
_RELATIVE = r"\s*ram\s*(?:([*/])\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*)?(?:,\s*at\s*most\s*([^,]+))?"
# engine/block/engine.h: ENGINE_MEMORY_SHARE, ENGINE_MEMORY_MIN_BYTES; and region.h: 4 bytes of it for each page
_MEMORY_SHARE = 8
_MEMORY_MIN_BYTES = 64 * _MIB
_TABLE_BYTES_PER_PAGE = 4


def parse(text: str, root: Path) -> int:
    """The bytes of a size, which is possible. `root` is where /proc/meminfo is. UsageError."""
    is_relative = text.lstrip().lower().startswith("ram")
    size_bytes = _of_memory(text, root) if is_relative else quantities.parse_size_bytes(text)
    check(size_bytes, f"'{text}'")
    return size_bytes


def check(size_bytes: int, shown: str) -> None:
    """UsageError: no backing file can have this size. `shown` is what the user wrote."""
    if size_bytes < MIN_BYTES:
        raise UsageError(
            f"{shown} is too small: {size_bytes} bytes, and a swap area has at least {MIN_BYTES}",
            "ask for example for 2G",
        )
    if size_bytes > MAX_BYTES:
        raise UsageError(
            f"{shown} is too large: a swap area has at most {quantities.format_size(MAX_BYTES)}",
            "ask for example for 2G",
        )
    if size_bytes % SLOT_BYTES:
        raise UsageError(
            f"{shown} is not a multiple of {SLOT_BYTES} bytes",
            f"ask for {size_bytes + -size_bytes % SLOT_BYTES} bytes, or for example for 2G",
        )


def refuse_unless_lockable(size_bytes: int, root: Path) -> None:
    """ConfigError: this machine would refuse such a file: the engine locks memory for each page of it."""
    limit_bytes = max(memory_bytes(root) // _MEMORY_SHARE, _MEMORY_MIN_BYTES)
    needed_bytes = size_bytes // SLOT_BYTES * _TABLE_BYTES_PER_PAGE
    if needed_bytes > limit_bytes:
        size = quantities.format_size
        raise ConfigError(
            f"a file of {size(size_bytes)} needs {size(needed_bytes)} of locked memory, and at most {size(limit_bytes)}"
            " may be locked on this machine (an eighth of its memory, or 64 MiB)",
            f"ask for less than {size(limit_bytes * SLOT_BYTES // _TABLE_BYTES_PER_PAGE)}",
        )


def memory_bytes(root: Path) -> int:
    """The machine's memory. UsageError where the kernel does not say."""
    for line in machine_ids.read(root / "proc/meminfo").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "MemTotal:" and words[1].isdecimal():
            return int(words[1]) * 1024
    raise UsageError("/proc/meminfo does not have the machine's memory", "mount /proc, or give a size like 2G")


def _of_memory(text: str, root: Path) -> int:
    match = re.fullmatch(_RELATIVE, text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"'{text}' is not a size", 'write it like "ram / 2", "ram * 1.5" or "ram / 2, at most 8G"')
    whole, _, decimals = (match[2] or "1").partition(".")
    factor = int(whole + decimals)
    scale: int = 10 ** len(decimals)
    if factor == 0:
        raise UsageError(f"'{text}' is not a size", "write a number greater than 0")
    memory = memory_bytes(root)
    size_bytes = memory * scale // factor if match[1] == "/" else memory * factor // scale
    size_bytes -= size_bytes % (_STEP_BYTES if size_bytes >= _STEP_BYTES else _MIB)
    return min(size_bytes, quantities.parse_size_bytes(match[3])) if match[3] is not None else size_bytes
