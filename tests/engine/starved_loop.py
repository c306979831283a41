# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a loop that has no memory to send anything, for a while. poor_socket.c is preloaded.

    python starved_loop.py LIBRARY

Exits with 0 where requests were received and done meanwhile, and answered afterwards.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys

from support.engines import PAGE, opening
from support.fake_nfs import FakeNfsServer
from support.nbd_client import READ, WRITE
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs.kernel import nbd_handshake

_SIZE = 1 << 20
_TICK_MS = 3_600_000
_REQUEST = struct.Struct(">IHHQQI")


def main() -> None:
    no_send = ctypes.c_bool.in_dll(ctypes.CDLL(sys.argv[1]), "no_send")
    with FakeNfsServer(os.urandom(_SIZE)) as fake, opening(region_pages=256, connections=2) as open_engine:
        engine = open_engine(fake.url())
        ours, theirs = socket.socketpair()
        ours.settimeout(DEADLINE_S)
        ended = in_background(engine.serve, theirs.fileno(), _TICK_MS)
        nbd_handshake.negotiate(ours)
        no_send.value = True
        ours.sendall(_REQUEST.pack(0x25609513, 0, READ, 1, 0, PAGE))
        wait_until(lambda: engine.counters()["reads"] == 1, "the read is done")  # and its reply is to be sent
        ours.sendall(_REQUEST.pack(0x25609513, 0, WRITE, 2, PAGE, PAGE) + os.urandom(PAGE))
        wait_until(lambda: engine.counters()["writes"] == 1, "the write is received and done")
        no_send.value = False
        wanted = 16 + PAGE + 16
        while wanted > 0:
            piece = ours.recv(wanted)
            assert piece, "the loop has hung up"
            wanted -= len(piece)
        ours.close()
        ended.result(DEADLINE_S)
        theirs.close()


if __name__ == "__main__":
    main()
