# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backing file or device holds, by its first bytes, and the header of a swap area.

include/linux/swap.h: union swap_header fills the first page of the kernel that it is for. The signature is its end;
version and last_page follow the boot loader's 1024 bytes, in the byte order of the machine that made it.
"""

from __future__ import annotations

import struct

from nbdnfs.sizes import KERNEL_PAGE_BYTES

# Of the kernels that Linux has nbd for: powerpc and some others may have up to 64 KiB.
PAGE_SIZES_BYTES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10)
# What has to be read to find the signature of any kernel's swap area.
HEAD_BYTES = PAGE_SIZES_BYTES[-1]
INFO_OFFSET = 1024
_SIGNATURE = b"SWAPSPACE2"
_VERSIONS = (b"\1\0\0\0", b"\0\0\0\1")
_LUKS = b"LUKS\xba\xbe"


def page_bytes(head: bytes, kernel_page_bytes: int = KERNEL_PAGE_BYTES) -> int | None:
    """The page size of the swap area that begins with `head`, which may be shorter than HEAD_BYTES where the area is;
    None where it is not one.

    An area for the kernel's own page is found before one for another, which may be a remnant.
    """
    if not head.startswith(_VERSIONS, INFO_OFFSET):
        return None
    for size_bytes in (kernel_page_bytes, *PAGE_SIZES_BYTES):
        if head[size_bytes - len(_SIGNATURE) : size_bytes] == _SIGNATURE:
            return size_bytes
    return None


def is_luks(head: bytes) -> bool:
    """Whether it is for dm-crypt, with a header of its own. What is inside cannot be seen: swap, or a file system."""
    return head.startswith(_LUKS)


def grown(head: bytes, size_bytes: int) -> bytes | None:
    """The header's changed bytes, at INFO_OFFSET of the file, for an area of `size_bytes`; None: nothing to change."""
    page = page_bytes(head)
    if page is None:
        return None
    order = "<" if head.startswith(_VERSIONS[0], INFO_OFFSET) else ">"
    version, last_page = struct.unpack_from(f"{order}II", head, INFO_OFFSET)
    new_last_page = min(size_bytes // page, 2**32) - 1
    return struct.pack(f"{order}II", version, new_last_page) if new_last_page > last_page else None
