# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backing file holds, by its first bytes, and the header of a swap area (include/linux/swap.h: swap_header)."""

from __future__ import annotations

import struct

# The largest page of any architecture: the signature is at the end of the first one.
HEAD_BYTES = 64 << 10
_PAGE_SIZES = (4096, 8192, 16384, 32768, 65536)
_SIGNATURE = b"SWAPSPACE2"
# version, last_page, behind the boot block; version is 1 in the byte order of the machine that made it
INFO_OFFSET = 1024
_LUKS = b"LUKS\xba\xbe"


def page_bytes(head: bytes) -> int | None:
    """The page size of the swap area that begins with `head`; None where it is not one."""
    return next((size for size in _PAGE_SIZES if head[size - len(_SIGNATURE) : size] == _SIGNATURE), None)


def may_be_swap(head: bytes) -> bool:
    """Whether a file that begins so is for swap: a swap area, an encrypted device, or zeros as `create` makes them."""
    return page_bytes(head) is not None or head.startswith(_LUKS) or not any(head)


def grown(head: bytes, size_bytes: int) -> bytes | None:
    """The header's changed bytes, at INFO_OFFSET of the file, for an area of `size_bytes`; None: nothing to change."""
    page = page_bytes(head)
    if page is None:
        return None
    for order in ("<", ">"):
        version, last_page = struct.unpack_from(f"{order}II", head, INFO_OFFSET)
        if version == 1:
            new_last_page = min(size_bytes // page, 2**32) - 1
            return struct.pack(f"{order}II", 1, new_last_page) if new_last_page > last_page else None
    return None
