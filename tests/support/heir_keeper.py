# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a process that has nothing of a keeper but its lock and its heir, to be killed.

    python heir_keeper.py NAME RUN NETLINK BACKEND WORKER STANDBY ADDRESS

NETLINK and BACKEND are descriptors: what stands for the kernel's netlink, and for /sys/block/nbdN/backend. WORKER is a
pid; STANDBY is the descriptor of a parked standby's control socket. 0 stands for none. It prints the heir's pid once
the heir knows all of that. A line on stdin is another WORKER and STANDBY; "end": there is nothing to guard.
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nbdnfs.keeper import heir as heirs
from nbdnfs.keeper import only_keeper
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from support.fake_nbd_netlink import Prepared


def _worker(pid: int) -> Any:
    return SimpleNamespace(pid=pid, pidfd=os.pidfd_open(pid)) if pid else None


def _standby(descriptor: int) -> Any:
    return SimpleNamespace(pid=descriptor, make_parkable=lambda: descriptor) if descriptor else None


def main() -> None:
    """Until it is killed."""
    name, run, *numbers, address = sys.argv[1:]
    netlink, backend_file, worker, standby = map(int, numbers)
    records = Records(name, run=Path(run))
    only_keeper.become(records)
    prepared: Any = Prepared(netlink, backend_file)
    heirs._PAUSE_S = 0.0
    heir = heirs.Heir(records, Reporter(records, Notifier({})), lambda device: prepared)
    while True:
        device: Any = SimpleNamespace()
        heir.keep(time.monotonic(), device, _worker(worker), _standby(standby), address)
        print(heir.pid, flush=True)
        line = sys.stdin.readline().split()
        if not line:
            time.sleep(600)
        if line == ["end"]:
            heir.end()
            line = sys.stdin.readline().split()
        worker, standby = map(int, line)


main()
