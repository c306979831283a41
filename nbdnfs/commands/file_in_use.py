# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which file a worker uses, whatever has its name now: the number that the engine has left for the next worker.

Read through the worker's descriptor of the region, as counters.py does.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from nbdnfs import region

# struct last_place (engine/region/last_place.h): its CRC, its format and its number, the greater of two being the newer
# one; then struct nfsio_known (engine/nfs/nfsio.h), which begins with size, fsid and fileid.
_PLACE = struct.Struct("=IIQQQQ")
_FORMAT = 1
_CRC_BYTES = 4


def file_id(pid: int, root: Path = Path("/")) -> int | None:
    """The file id by which the worker `pid` has last found its file. None where that is not known: `counters.of_worker`
    would return None, or the region is of a version that does not keep it."""
    descriptor = region.take_from(pid, root)
    if descriptor is None:
        return None
    try:
        return in_region(descriptor)
    except OSError:  # truncated meanwhile
        return None
    finally:
        os.close(descriptor)


def in_region(descriptor: int) -> int | None:
    """As `file_id`, of an open region."""
    newest, found = 0, 0
    for half in range(2):
        data = os.pread(descriptor, region.LAST_PLACE_BYTES, region.LAST_PLACE_OFFSET + half * region.LAST_PLACE_BYTES)
        if len(data) < region.LAST_PLACE_BYTES:  # it has not been laid out
            continue
        crc, format_number, number, _, _, file_number = _PLACE.unpack_from(data)
        # the engine may be writing this half
        if format_number == _FORMAT and number > newest and crc == crc32c(data[_CRC_BYTES:]):
            newest, found = number, file_number
    return found or None


def crc32c(data: bytes) -> int:
    """RFC 3720, B.4, bit by bit: it is little, and Python has none."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
