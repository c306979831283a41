#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches swap while a server is away, and kills the worker after a third of the time.

    away.py NAME SECONDS

Prints "ready", at which the server goes, and at the end one line of JSON: requests that the device completed before and
after the kill, and how long after the kill it completed the first one ("resumed_s"; null: none in time). It locks its
memory, and opens what it reads beforehand: neither server is needed.
"""

import ctypes
import json
import os
import signal
import sys
import time

_GRACE_S = 0.3

libc = ctypes.CDLL(None, use_errno=True)
# MCL_CURRENT | MCL_FUTURE
if libc.mlockall(3) != 0:
    sys.exit(f"away: mlockall: {os.strerror(ctypes.get_errno())}")
os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))


def completed(stat: int) -> int:
    """Reads and writes, Documentation/block/stat.rst."""
    fields = os.pread(stat, 4096, 0).split()
    return int(fields[0]) + int(fields[4])


def main() -> None:
    name, seconds = sys.argv[1], float(sys.argv[2])
    with open(f"/run/nbdnfs/{name}/device") as record:
        device = record.read().strip()
    with open(f"/run/nbdnfs/{name}/worker") as record:
        worker = os.pidfd_open(int(record.read().split()[0]))
    stat = os.open(f"/sys/block/{device}/stat", os.O_RDONLY)
    result: dict[str, float | None] = {"requests_before": 0, "requests_after": 0, "resumed_s": None}
    json.dumps(result)
    print("ready", flush=True)
    ends_s = time.monotonic() + seconds
    start = completed(stat)
    time.sleep(seconds / 3)
    signal.pidfd_send_signal(worker, signal.SIGKILL)
    killed_s = time.monotonic()
    time.sleep(_GRACE_S)
    before = completed(stat)
    while time.monotonic() < ends_s:
        if result["resumed_s"] is None and completed(stat) > before:
            result["resumed_s"] = round(time.monotonic() - killed_s, 3)
        time.sleep(0.01)
    result["requests_before"], result["requests_after"] = before - start, completed(stat) - before
    print(json.dumps(result), flush=True)


main()
