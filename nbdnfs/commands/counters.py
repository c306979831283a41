# SPDX-License-Identifier: LGPL-2.1-or-later
"""A device's counters: numbers that the engine keeps in the region, read through the worker's descriptor of it.

Reading takes no lock and does not disturb the worker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbdnfs import region

# Name ▸ number, or ▸ the buckets of a log2 histogram of microseconds: bucket n counts what took less than 2**n.
Counters = Mapping[str, int | list[int]]


@dataclass(frozen=True)
class Waits:
    """How long what is waited for has been waited for, in seconds; 0.0 for nothing.

    unheard_s         nothing has been received from the server for so long, though answers are outstanding
    oldest_request_s  the age of the kernel's oldest request
    last_heard_s      how long ago the server last answered anything, or was connected to, whether or not something is
                      outstanding
    """

    unheard_s: float
    oldest_request_s: float
    last_heard_s: float


@dataclass(frozen=True)
class Reading:
    """What a region shows. `is_encrypted` is about the pages on the NAS. `waits` is None where the worker is of a
    version that does not note them, `failed_read_s`, how long ago a read failed last, where none has."""

    counters: Counters = field(default_factory=dict)
    waits: Waits | None = None
    is_encrypted: bool = False
    failed_read_s: float | None = None


def of_worker(
    pid: int, root: Path = Path("/"), clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000
) -> Reading | None:
    """The region of the worker `pid`.

    None where it cannot be read: the caller may not look into the process (proc_pid_fd(5)), the process holds no
    region, or a worker has not laid it out yet.
    """
    descriptor = region.take_from(pid, root)
    if descriptor is None:
        return None
    try:
        if not region.is_made(descriptor):
            return None
        found, now_ms = region.read_counters(descriptor), clock_ms()
        failed_ms = number(found, "failed_read_ms")
        return Reading(
            found,
            _waits(region.read_waits(descriptor), now_ms),
            region.version_of(descriptor) in region.ENCRYPTED,
            max(0, now_ms - failed_ms) / 1000 if failed_ms else None,
        )
    except OSError:  # truncated meanwhile
        return None
    finally:
        os.close(descriptor)


def connection_waits_s(
    pid: int, root: Path = Path("/"), clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000
) -> list[float]:
    """For how long each connection of the worker `pid` has waited for answers, without a pause; 0.0 for one that does
    not. As many as the region has room for; none where `of_worker` would return None."""
    descriptor = region.take_from(pid, root)
    if descriptor is None:
        return []
    try:
        since_ms = region.read_connection_waits(descriptor) if region.is_made(descriptor) else []
    except OSError:  # truncated meanwhile
        return []
    finally:
        os.close(descriptor)
    now_ms = clock_ms()
    return [max(0, now_ms - at_ms) / 1000 if at_ms else 0.0 for at_ms in since_ms]


def _waits(found_ms: tuple[int, int, int] | None, now_ms: int) -> Waits | None:
    if found_ms is None:
        return None
    last_received_ms, waiting_since_ms, request_since_ms = found_ms

    def age_s(since_ms: int) -> float:
        return max(0, now_ms - since_ms) / 1000 if since_ms else 0.0

    unheard_since_ms = region.owed_since_ms(last_received_ms, waiting_since_ms)
    return Waits(age_s(unheard_since_ms), age_s(request_since_ms), age_s(last_received_ms))


def number(counters: Counters, key: str) -> int:
    """The counter `key`; 0 where there is none, or where it is a histogram."""
    value = counters.get(key, 0)
    return value if isinstance(value, int) else 0
