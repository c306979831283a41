# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a kernel nbd device is set up. nbd_device.py says what makes it a "hard" one."""

from __future__ import annotations

import os
from pathlib import Path

# How long requests wait for another socket when theirs is dead. "Hard" is for as long as it takes; the kernel
# multiplies it by HZ, and a day is far from any overflow.
DEAD_CONN_TIMEOUT_S = 86400

# How soon after a reconnect the kernel sends again what was in flight. CONNECT with TIMEOUT 0 sets 30 s
# (nbd_set_cmd_timeout). The price of less is one "Possible stuck request" line per request and interval.
IO_TIMEOUT_MS = 2000

# The largest request, in KiB. Reclaim writes SWAP_CLUSTER_MAX (32) pages at a time (include/linux/swap.h) and a plug
# merges them; a larger request would only make each thread of the worker hold a larger buffer.
MAX_REQUEST_KIB = 128

# Requests under way; the kernel would have 128. Pages that are being written cannot be reclaimed, and in a memory
# cgroup reclaim does not wait for them (mm/vmscan.c, shrink_folio_list: writeback_throttling_sane): where those are all
# of its pages, its processes are killed. With fewer requests, reclaim waits for a free one instead, for as long as the
# NAS takes. The worker serves fewer than this at once anyway.
QUEUE_DEPTH = 16


def queue(io_timeout_ms: int) -> dict[str, str]:
    """Files below /sys/block/nbdN/queue and their values for swap, in the order of writing: to set a scheduler resets
    nr_requests.

    scheduler none: requests are merged before, and the NAS orders them. read_ahead_kb 0: swap reads ahead by itself
    (vm.page-cluster). The other files stay as they are. None of this is needed for safety.
    """
    return {
        "scheduler": "none",
        "read_ahead_kb": "0",
        "io_timeout": str(io_timeout_ms),
        "nr_requests": str(QUEUE_DEPTH),
    }


def write_queue(name: str, setting: str, value: str, root: Path) -> None:
    """Write one of these files of the device `name`. OSError where this kernel does not have it, or refuses."""
    descriptor = os.open(root / "sys/block" / name / "queue" / setting, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)
