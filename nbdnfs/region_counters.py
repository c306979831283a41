# SPDX-License-Identifier: LGPL-2.1-or-later
"""Python's view of a region's header (nbdnfs/engine/region/region.h), read without mapping it or loading the engine.

The keeper reads regions and must stay small: this imports nothing but what Python has loaded anyway. A test compares
every number here with the C header.
"""

from __future__ import annotations

import os
import struct
import sys

REGION_VERSION = 2
MAGIC = b"nbdnfs\0\0"

# Where each field of struct region_header begins, in bytes, and what it is to struct(3), in the machine's byte order.
HEADER_FIELDS = {
    "magic": (0, "8s"),
    "version": (8, "I"),
    "slot_count": (12, "I"),
    "device_bytes": (16, "Q"),
    "fileid": (24, "Q"),
    "path_hash": (32, "Q"),
    "region_bytes": (40, "Q"),
    "generation": (48, "Q"),
}
COUNTERS_OFFSET = 56

# One 64-bit number each, in this order.
COUNTERS = (
    "reads",
    "writes",
    "flushes",
    "trims",
    "read_bytes",
    "written_bytes",
    "hit_pages",
    "missed_pages",
    "filled_pages_written",
    "nfs_reads",
    "nfs_read_bytes",
    "nfs_writes",
    "nfs_written_bytes",
    "nfs_commits",
    "read_ahead_pages",
    "read_ahead_hits",
    "read_ahead_wasted",
    "stalls",
    "write_errors",
    "lost_uncommitted_pages",
    "checksum_rereads",
    "checksum_failures",
    "replayed_pages",
    "reconnects",
    "unstable_pages",
    "nfs_in_flight",
    "write_back_error",
    "disconnected",
    "file_state",
    "twins_until_ms",
    "owner_state",
)
# Behind the counters: HISTOGRAM_BUCKETS numbers each. Bucket n counts what took less than 2^n microseconds.
HISTOGRAMS = ("read_us", "write_us", "nfs_read_us", "nfs_write_us")
HISTOGRAM_BUCKETS = 32

_NUMBER_BYTES = 8
HEADER_BYTES = COUNTERS_OFFSET + (len(COUNTERS) + len(HISTOGRAMS) * HISTOGRAM_BUCKETS) * _NUMBER_BYTES


def counter_offset(name: str) -> int:
    """Where a counter lies in the region, in bytes; it has 8. ValueError when there is none of that name."""
    return COUNTERS_OFFSET + COUNTERS.index(name) * _NUMBER_BYTES


DISCONNECTED_OFFSET = counter_offset("disconnected")


def read_version(fd: int) -> int | None:
    """The version of the region behind `fd`; None when no worker has laid it out. OSError as pread(2)."""
    header = os.pread(fd, 12, 0)
    return int.from_bytes(header[8:12], sys.byteorder) if header[:8] == MAGIC else None


def read_counters(fd: int) -> dict[str, int | list[int]]:
    """The counters and histograms of the region behind `fd`, with `slots`, `generation` and `region_bytes`.

    A worker counts meanwhile, without a lock: each number is whole, but they are not of one moment. Magic and version
    are not looked at. ValueError when the file is too short to be a region; OSError as pread(2).
    """
    header = os.pread(fd, HEADER_BYTES, 0)
    if len(header) < HEADER_BYTES:
        raise ValueError(f"a region begins with {HEADER_BYTES} bytes, this one has {len(header)}")
    numbers = struct.unpack_from(f"={len(COUNTERS) + len(HISTOGRAMS) * HISTOGRAM_BUCKETS}Q", header, COUNTERS_OFFSET)
    found: dict[str, int | list[int]] = dict(zip(COUNTERS, numbers, strict=False))
    for index, name in enumerate(HISTOGRAMS):
        first = len(COUNTERS) + index * HISTOGRAM_BUCKETS
        found[name] = list(numbers[first : first + HISTOGRAM_BUCKETS])
    found["slots"] = _field(header, "slot_count")
    found["generation"] = _field(header, "generation")
    found["region_bytes"] = _field(header, "region_bytes")
    return found


def _field(header: bytes, name: str) -> int:
    offset, code = HEADER_FIELDS[name]
    (value,) = struct.unpack_from(f"={code}", header, offset)
    return int(value)
