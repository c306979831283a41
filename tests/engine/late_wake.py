# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a client leaves while its last read fails in another thread than the loop's. late_wake.c is preloaded.

    python late_wake.py LIBRARY

Exits with 0 where that thread has done with the loop before it ends.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import time

from support.engines import PAGE, opening
from support.fake_nfs import FakeNfsServer
from support.nbd_client import READ
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs.kernel import nbd_handshake

_READS = 10  # late_wake.c
_TICK_MS = 3_600_000
_REQUEST = struct.Struct(">IHHQQI")


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    armed, was_closed = (ctypes.c_bool.in_dll(library, name) for name in ("armed", "was_closed"))
    wakes = ctypes.c_int.in_dll(library, "wakes")
    with opening(region_pages=256, connections=2, soft_limit_ms=1000, read_ahead_pages=0) as open_engine:
        with FakeNfsServer(os.urandom(1 << 20)) as fake:
            engine = open_engine(fake.url())
            ours, theirs = socket.socketpair()
            ended = in_background(engine.serve, theirs.fileno(), _TICK_MS)
            nbd_handshake.negotiate(ours)
        wait_until(lambda: engine.counters()["disconnected"] == 1, "the server is gone")
        ours.sendall(b"".join(_REQUEST.pack(0x25609513, 0, READ, i, 2 * i * PAGE, PAGE) for i in range(_READS)))
        ours.close()
        armed.value = True
        ended.result(DEADLINE_S)
        armed.value = False
        theirs.close()
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and not was_closed.value:
            time.sleep(0.05)
    assert wakes.value == _READS, f"{wakes.value} wake-ups"
    assert not was_closed.value, "the loop was woken after its end"


if __name__ == "__main__":
    main()
