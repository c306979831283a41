# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole path once, as the demo takes it: a guest swaps onto a file on a real NFS server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.nfs_server import Ganesha
from vmtest import host, swap
from vmtest.guest import Guest, seen_from_guest

_HOG_MIB = 32


@pytest.mark.smoke
@pytest.mark.timeout(900)
def test_swap_on_nfs(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """A program four times its cgroup's limit lives: no wrong page, no OOM kill, nothing in the kernel log."""
    url = ganesha.url("smoke.swap")
    host.nbdnfs_create(url, 256, timeout_s=120)
    # whether a request takes longer than queue/io_timeout depends on the host's speed, which is not what is tested
    with boot(project=True, allow={"slow"}) as guest:
        guest.settle()
        measured = swap.run(
            guest, seen_from_guest(url), size_mib=_HOG_MIB, limit_mib=_HOG_MIB // 4, timeout_s=600
        ).check()
        print(f"boot {guest.boot_seconds:.1f} s\n{measured.table()}")
        assert measured.pages_out >= measured.pages * 3 // 4
        guest.shutdown()
