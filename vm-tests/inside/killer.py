#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kills what keeps a swap device alive, again and again, and measures how long swap stands still after each kill.

    killer.py NAME worker|keeper|both COUNT SECONDS

Started before the load, it prints "ready" when all that it needs is in its memory: under the load, a program takes
minutes to start from a root on NFS. The kills begin when pages go out. One line of JSON for each:

    {"killed": [pids], "waited_s": until all were there, "resumed_s": seconds, or null when nothing moved in time}

Both at once are survived by a keeper's heir and its parked standby, so that the next such kill waits for the next pair.

Swap moves again when the device completes a request, by its counters in /sys/block: without requests nothing completes.
It locks its memory: it must not be part of what it measures.
"""

import ctypes
import json
import os
import signal
import sys
import time

RESUME_TIMEOUT_S = 60.0
NEXT_TIMEOUT_S = 1800.0
# Replies that were on their way when the worker died do not count. An emulated CPU needs long to take them in.
GRACE_S = 0.3
PAGES_OUT = 1000
LOAD_TIMEOUT_S = 600.0

libc = ctypes.CDLL(None, use_errno=True)
# MCL_CURRENT | MCL_FUTURE
if libc.mlockall(3) != 0:
    sys.exit(f"killer: mlockall: {os.strerror(ctypes.get_errno())}")
os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))


def pid_of(name: str, what: str) -> int:
    with open(f"/run/nbdnfs/{name}/{what}") as record:
        return int(record.read().split()[0])


def completed(device: str) -> int:
    """Reads and writes, Documentation/block/stat.rst."""
    with open(f"/sys/block/{device}/stat") as stat:
        fields = stat.read().split()
    return int(fields[0]) + int(fields[4])


def pages_out() -> int:
    """Since boot: mm/vmstat.c."""
    with open("/proc/vmstat") as vmstat:
        return next(int(line.split()[1]) for line in vmstat if line.startswith("pswpout "))


def wait_for_load() -> None:
    begun_at, gives_up_at_s = pages_out(), time.monotonic() + LOAD_TIMEOUT_S
    json.dumps({"killed": [1], "resumed_s": 0.5})
    print("ready", flush=True)
    while pages_out() < begun_at + PAGES_OUT:
        if time.monotonic() > gives_up_at_s:
            sys.exit("killer: there is no load")
        time.sleep(0.1)


def living_pid_of(name: str, what: str) -> int:
    """Of a process that is there: a record may be that of the last one, which was killed, and which systemd has not
    collected yet. Under a load of all memory it takes a while until there is another keeper."""
    deadline = time.monotonic() + NEXT_TIMEOUT_S
    while True:
        try:
            pid = pid_of(name, what)
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] not in "ZX":
                    return pid
        except (OSError, ValueError):
            pass
        if time.monotonic() > deadline:
            sys.exit(f"killer: no {what} of {name}")
        time.sleep(0.1)


def wait_for_standby(name: str) -> None:
    """Until there is one beside the worker: the keeper tells its heir of it in the same turn."""
    while living_pid_of(name, "standby") == living_pid_of(name, "worker"):
        time.sleep(0.1)


def main() -> None:
    name, what, count, every_s = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    with open(f"/run/nbdnfs/{name}/device") as record:
        device = record.read().strip()
    wait_for_load()
    targets = ["worker", "keeper"] if what == "both" else [what]
    for _ in range(count):
        asked_s = time.monotonic()
        if what == "both":
            living_pid_of(name, "keeper")
            wait_for_standby(name)
        waited_s = round(time.monotonic() - asked_s, 3)
        time.sleep(every_s)
        pids = [living_pid_of(name, one) for one in targets]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        time.sleep(GRACE_S)
        before = completed(device)
        resumed_s = None
        while time.monotonic() - killed_s < RESUME_TIMEOUT_S:
            if completed(device) > before:
                resumed_s = round(time.monotonic() - killed_s, 3)
                break
            time.sleep(0.01)
        print(json.dumps({"killed": pids, "waited_s": waited_s, "resumed_s": resumed_s}), flush=True)


main()
