# SPDX-License-Identifier: LGPL-2.1-or-later
"""heir_keeper.py in a process of its own, which a test kills as a keeper is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nbdnfs import programs
from support.fake_nbd_netlink import FakeNbdNetlink

_TESTS = Path(__file__).resolve().parents[1]


def keeper_with_heir(
    name: str, run: Path, netlink: FakeNbdNetlink, backend: Path, worker: int, control: int, address: str = ""
) -> subprocess.Popen[str]:
    """Returns once its heir, `netlink.pid`, knows the worker and the standby's control socket. 0 or -1 for none.

    `backend` is the file that stands for /sys/block/nbdN/backend.
    """
    with backend.open() as opened:
        descriptors = [netlink.peer.fileno(), opened.fileno(), max(control, 0)]
        numbers = [*descriptors[:2], worker, descriptors[2]]
        process = subprocess.Popen(
            [sys.executable, _TESTS / "support/heir_keeper.py", name, run, *map(str, numbers), address],
            pass_fds=descriptors,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**programs.python_environment(), "PYTHONPATH": f"{_TESTS.parent}:{_TESTS}"},
            text=True,
        )
    assert process.stdout is not None
    netlink.pid = int(process.stdout.readline())
    return process
