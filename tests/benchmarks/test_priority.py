# SPDX-License-Identifier: LGPL-2.1-or-later
"""In virtual time a guest and its servers go before what else the machine does, in whichever session that is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import vm_time
from support.waiting import wait_until
from vmtest import host

from nbdnfs.kernel.openers import descendants

AUTOGROUP = Path("/proc/self/autogroup")
needs_autogroups = pytest.mark.skipif(
    os.geteuid() != 0 or not AUTOGROUP.exists(), reason="needs root, and a kernel with CONFIG_SCHED_AUTOGROUP"
)


def session_nice(pid: int) -> int:
    return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])


@needs_autogroups
def test_session_of_a_guest() -> None:
    """It has a share of its own, beside which a nice value does not count: that of the share is raised."""
    process = host.start(["sleep", "600"])
    try:
        assert session_nice(process.pid) == 0
        host.raise_session_priority(process.pid)
        assert session_nice(process.pid) == -20
        assert AUTOGROUP.read_text() != Path(f"/proc/{process.pid}/autogroup").read_text()
    finally:
        process.kill()
        process.wait()


def test_process_that_has_ended() -> None:
    """It is ignored."""
    process = host.start(["true"])
    process.wait()
    host.raise_session_priority(process.pid)


@needs_autogroups
def test_busy_host() -> None:
    """Its loops are what other users of the machine run: in sessions of their own, at nice 0."""
    before = descendants(os.getpid())
    with vm_time.busy(1):
        wait_until(lambda: len(descendants(os.getpid()) - before) == 1, "renice has ended")
        (loop,) = descendants(os.getpid()) - before
        assert os.getsid(loop) == loop
        assert session_nice(loop) == 0
