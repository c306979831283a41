#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches swap while a server is away, and kills the worker after a third of the time.

    away.py NAME SECONDS

Started before the load, it prints "ready", and "now" once pages go out, at which the server is to go. At the end it
prints one line of JSON: requests that the device completed before and after the kill, and how long after the kill it
completed the first one ("resumed_s"; null: none in time), and how often the keeper's loop went to sleep from then on
("keeper_turns"; it does so once in a second at the least). Where nothing is completed for some seconds, it has the
kernel log what all tasks that are blocked wait for. It locks its memory, and opens what it reads beforehand: neither
server is needed, and no memory.
"""

import ctypes
import json
import os
import signal
import sys
import time

_GRACE_S = 0.3
_STANDSTILL_S = 12.0
_PAGES_OUT = 1000
_LOAD_TIMEOUT_S = 600.0

libc = ctypes.CDLL(None, use_errno=True)
# MCL_CURRENT | MCL_FUTURE
if libc.mlockall(3) != 0:
    sys.exit(f"away: mlockall: {os.strerror(ctypes.get_errno())}")
os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))


def completed(stat: int) -> int:
    """Reads and writes, Documentation/block/stat.rst."""
    fields = os.pread(stat, 4096, 0).split()
    return int(fields[0]) + int(fields[4])


def pages_out(vmstat: int) -> int:
    """Since boot: mm/vmstat.c."""
    (line,) = (line for line in os.pread(vmstat, 1 << 16, 0).splitlines() if line.startswith(b"pswpout "))
    return int(line.split()[1])


def sleeps(status: int) -> int:
    """Of the keeper's first thread, which runs its loop: proc_pid_status(5)."""
    (line,) = (line for line in os.pread(status, 1 << 16, 0).splitlines() if line.startswith(b"voluntary_ctxt"))
    return int(line.split()[1])


def main() -> None:
    name, seconds = sys.argv[1], float(sys.argv[2])
    with open(f"/run/nbdnfs/{name}/device") as record:
        device = record.read().strip()
    with open(f"/run/nbdnfs/{name}/worker") as record:
        worker = os.pidfd_open(int(record.read().split()[0]))
    sysrq = os.open("/proc/sysrq-trigger", os.O_WRONLY)
    stat = os.open(f"/sys/block/{device}/stat", os.O_RDONLY)
    with open(f"/run/nbdnfs/{name}/keeper") as record:
        keeper = int(record.read().split()[0])
    keeper_status = os.open(f"/proc/{keeper}/task/{keeper}/status", os.O_RDONLY)
    result: dict[str, float | None] = {
        "requests_before": 0,
        "requests_after": 0,
        "resumed_s": None,
        "keeper_turns": 0,
    }
    json.dumps(result)
    vmstat = os.open("/proc/vmstat", os.O_RDONLY)
    begun_at, gives_up_at_s = pages_out(vmstat), time.monotonic() + _LOAD_TIMEOUT_S
    print("ready", flush=True)
    while pages_out(vmstat) < begun_at + _PAGES_OUT:
        if time.monotonic() > gives_up_at_s:
            sys.exit("away: there is no load")
        time.sleep(0.1)
    print("now", flush=True)
    ends_s = time.monotonic() + seconds
    start = completed(stat)
    time.sleep(seconds / 3)
    signal.pidfd_send_signal(worker, signal.SIGKILL)
    killed_s = time.monotonic()
    time.sleep(_GRACE_S)
    before, slept = completed(stat), sleeps(keeper_status)
    logs_at_s = killed_s + _STANDSTILL_S
    while time.monotonic() < ends_s:
        if result["resumed_s"] is None and time.monotonic() > logs_at_s:
            logs_at_s = ends_s
            for key in (b"w", b"m", b"t"):  # Documentation/admin-guide/sysrq.rst
                os.write(sysrq, key)
        if result["resumed_s"] is None and completed(stat) > before:
            result["resumed_s"] = round(time.monotonic() - killed_s, 3)
        time.sleep(0.01)
    result["requests_before"], result["requests_after"] = before - start, completed(stat) - before
    result["keeper_turns"] = sleeps(keeper_status) - slept
    print(json.dumps(result), flush=True)


main()
