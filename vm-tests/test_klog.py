# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness on kernel logs: every kind of trouble is found, and an ordinary log holds none."""

from __future__ import annotations

import pytest
from vmtest import klog

pytestmark = pytest.mark.meta

# Lines as Linux 6.1 and 6.12 print them.
_TROUBLE = [
    ("panic", "[   21.1] Kernel panic - not syncing: sysrq triggered crash"),
    ("oops", "[   21.1] BUG: kernel NULL pointer dereference, address: 0000000000000000"),
    ("oops", "[   21.1] Oops: 0002 [#1] PREEMPT SMP NOPTI"),
    ("oops", "[    9.9] BUG: unable to handle page fault for address: ffffc90000a7f000"),
    ("oops", "[    9.9] kernel BUG at mm/swapfile.c:1234!"),
    ("warning", "[   30.0] WARNING: CPU: 1 PID: 77 at drivers/block/nbd.c:400 nbd_xmit_timeout+0x12/0x20 [nbd]"),
    ("hung", "[  120.7] INFO: task kswapd0:41 blocked for more than 60 seconds."),
    ("stall", "[   88.1] watchdog: BUG: soft lockup - CPU#1 stuck for 67s! [hog:301]"),
    ("stall", "[   88.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
    ("stall", "[   88.1] BUG: workqueue lockup - pool cpus=1 node=0 flags=0x0 nice=0 stuck for 61s!"),
    ("oom", "[   40.2] Memory cgroup out of memory: Killed process 222 (hog) total-vm:67000kB, anon-rss:32000kB"),
    ("oom", "[   40.2] Out of memory: Killed process 222 (hog) total-vm:67000kB, anon-rss:32000kB"),
    ("oom", "[   40.2] oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0"),
    ("nomem", "[   40.2] nbdkit: page allocation failure: order:0, mode:0x40800(GFP_NOWAIT|__GFP_COMP)"),
    ("io", "[   55.5] I/O error, dev nbd0, sector 2048 op 0x1:(WRITE) flags 0x104000 phys_seg 1 prio class 2"),
    ("io", "[   55.5] blk_update_request: I/O error, dev nbd0, sector 8 op 0x0:(READ)"),
    ("io", "[   55.5] Write-error on swap-device (43:0:2048)"),
    ("io", "[   55.5] Read-error on swap-device (43:0:2048)"),
    ("io", "[   55.5] Buffer I/O error on dev nbd0, logical block 0, async page read"),
    ("dm", "[   55.5] Buffer I/O error on dev dm-0, logical block 262128, async page read"),
    ("dm", "[   55.5] EXT4-fs warning (device dm-3): ext4_end_bio:343: I/O error 3 writing to inode 395)"),
    ("nbd", "[   60.0] block nbd0: Receive control failed (result -104)"),
    ("nbd", "[   60.0] block nbd0: Connection timed out, retrying (0/1 alive)"),
    ("nbd", "[   60.0] block nbd0: Dead connection, failed to find a fallback"),
    ("nbd", "[   60.0] block nbd0: Other side returned error (5)"),
    ("slow", "[   60.0] block nbd0: Possible stuck request 00000000b0: control (write@4096,4096B). Runtime 30 seconds"),
    ("swap", "[   61.0] get_swap_device: Bad swap file entry 58d5b4d8a2a1b2c3"),
    ("traceback", "[   62.0] nbdnfs[311]: Traceback (most recent call last):"),
    ("lockdep", "[   70.0] WARNING: possible circular locking dependency detected"),
]

_ORDINARY = """\
[    0.000000] Linux version 6.1.0-cloud-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) 12.2.0)
[    0.070000] rcu: \tRCU event tracing is enabled.
[    0.080000] Console: colour VGA+ 80x25
[    4.100000] EXT4-fs (vda): mounted filesystem with ordered data mode. Quota mode: none.
[    9.000000] nbd: registered device at major 43
[   12.000000] nbd0: detected capacity change from 0 to 524288
[   13.000000] Adding 262140k swap on /dev/nbd0.  Priority:-2 extents:1 across:262140k SS
[   15.000000] block nbd0: NBD_DISCONNECT
[   15.000010] block nbd0: Disconnected due to user request.
[   15.000020] block nbd0: shutting down sockets
[   16.000000] reboot: Power down
"""


@pytest.mark.parametrize(("kind", "line"), _TROUBLE)
def test_trouble_is_found_and_can_be_allowed(kind: str, line: str) -> None:
    """A line is found as its kind, with the line itself, and no longer once that kind is allowed."""
    log = _ORDINARY + line + "\n"
    assert klog.Finding(kind, line) in klog.scan(log)
    assert klog.Finding(kind, line) not in klog.scan(log, {kind})


def test_every_kind_has_a_sample() -> None:
    """No kind is in the table without having been seen to work."""
    assert {kind for kind, _ in _TROUBLE} == klog.KINDS


def test_an_ordinary_log_is_clean() -> None:
    """Boot, attach, swapon, detach and power-off leave nothing to complain about."""
    assert klog.scan(_ORDINARY) == []


def test_unknown_allowance() -> None:
    """An allowance that allows nothing is a mistake of the test."""
    with pytest.raises(ValueError, match="no such kind: ooom"):
        klog.scan("", {"ooom"})
