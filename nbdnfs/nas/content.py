# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file holds, by a look at some places of it: swap, nothing yet, or something else, which is left alone.

Zeros at the beginning prove little. A btrfs image has its first superblock at 64 KiB, an md array may have its only one
at the end, and an image of a disk without a boot sector begins with whatever lies there.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator

from nbdnfs import quantities, swap_header
from nbdnfs.engine import NfsFile
from nbdnfs.nas import remote_file, zeros
from nbdnfs.sizes import SLOT_BYTES

# What is read of a file that begins with zeros: this much at both ends, and as many places between them.
_END_BYTES = 1 << 20
_PLACES = 32
_PLACE_BYTES = 64 << 10


class Kind(enum.Enum):
    """EMPTY: zeros wherever it was looked, as in a new backing file. LUKS: for dm-crypt, which may have anything in it,
    swap too."""

    SWAP = enum.auto()
    EMPTY = enum.auto()
    LUKS = enum.auto()
    OTHER = enum.auto()


@dataclasses.dataclass(frozen=True)
class Content:
    """What was found. `why_not` says why a file of kind OTHER is not for swap, after its name."""

    kind: Kind
    head: bytes
    size_bytes: int
    why_not: str = ""


def look(file: NfsFile) -> Content:
    """Read the header, and where it is all zeros, some places of the rest. OSError."""
    size_bytes, head = remote_file.stat(file)["size"], head_of(file)
    if swap_header.page_bytes(head) is not None:
        return Content(Kind.SWAP, head, size_bytes)
    if swap_header.is_luks(head):
        return Content(Kind.LUKS, head, size_bytes)
    if any(head):
        return Content(Kind.OTHER, head, size_bytes, "begins with neither zeros nor a swap area")
    for start, end in _places(size_bytes):
        if (offset := zeros.find_other(file, start, end)) is not None:
            return Content(Kind.OTHER, head, size_bytes, has_data_at(offset))
    return Content(Kind.EMPTY, head, size_bytes)


def has_data_at(offset: int) -> str:
    """Why a file without a swap area is not for swap."""
    return f"has no swap area, and has data at {quantities.format_size(offset)}"


def gaps(file: NfsFile, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where a range has nothing but zeros, which may be holes: runs of SLOT_BYTES, from where to where. OSError."""
    window = bytearray(end - start)
    file.pread(window, start)
    gap_start = start
    for offset in range(start, end, SLOT_BYTES):
        if any(window[offset - start : offset - start + SLOT_BYTES]):
            if gap_start < offset:
                yield gap_start, offset
            gap_start = offset + SLOT_BYTES
    if gap_start < end:
        yield gap_start, end


def head_of(file: NfsFile) -> bytes:
    """As much as a swap area's header has. OSError."""
    head = bytearray(swap_header.HEAD_BYTES)
    return bytes(head[: file.pread(head, 0)])


def _places(size_bytes: int) -> Iterator[tuple[int, int]]:
    """Both ends, where most things have what they are known by, and places at equal distances."""
    yield 0, min(_END_BYTES, size_bytes)
    yield max(0, size_bytes - _END_BYTES), size_bytes
    for number in range(1, _PLACES + 1):
        start = size_bytes * number // (_PLACES + 1) // SLOT_BYTES * SLOT_BYTES
        yield start, min(start + _PLACE_BYTES, size_bytes)
