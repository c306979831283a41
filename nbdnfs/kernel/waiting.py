# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for what the kernel announces nowhere: sysfs, /proc and udev's nodes are polled."""

from __future__ import annotations

import time
from collections.abc import Callable

_POLL_S = 0.02


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether `condition` becomes true within `timeout_s` seconds. It is tried once at least."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True
