# SPDX-License-Identifier: LGPL-2.1-or-later
"""A device's counters: numbers that the engine keeps in the region, read through the worker's descriptor of it.

Reading takes no lock and does not disturb the worker.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nbdnfs import region

# Name ▸ number, or ▸ the buckets of a log2 histogram of microseconds: bucket n counts what took less than 2**n.
Counters = Mapping[str, int | list[int]]


def of_worker(pid: int, root: Path = Path("/")) -> dict[str, int | list[int]]:
    """The counters in the region of the worker `pid`, by the names that the engine gives them.

    Empty where the process holds no region, a worker has not laid it out yet, or the caller may not look into the
    process (proc_pid_fd(5)).
    """
    descriptor = region.take_from(pid, root)
    if descriptor is None:
        return {}
    try:
        return region.read_counters(descriptor) if region.is_made(descriptor) else {}
    finally:
        os.close(descriptor)


def number(counters: Counters, key: str) -> int:
    """The counter `key`; 0 where there is none, or where it is a histogram."""
    value = counters.get(key, 0)
    return value if isinstance(value, int) else 0
