#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""In a guest: give the kernel an NBD server on TCP, as nbd-client would: attach_tcp.py HOST PORT CONNECTIONS; prints
the device.

The kernel's own nbd over the network is what the benchmark compares with; nbdnfs itself has no use for it.
"""

import contextlib
import socket
import sys
import time
from pathlib import Path

from nbdnfs.kernel import nbd_handshake
from nbdnfs.kernel.nbd_netlink import NbdNetlink

DEADLINE_S = 10.0


def main() -> None:
    """Connect, shake hands, hand over, and wait until the device has its size."""
    host, port, connections = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with contextlib.ExitStack() as stack, NbdNetlink.open() as kernel:
        sockets = []
        for _ in range(connections):
            sock = stack.enter_context(socket.create_connection((host, port), timeout=DEADLINE_S))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            export = nbd_handshake.negotiate(sock)
            sockets.append(sock.fileno())
        index = kernel.connect(
            sockets,
            index=None,
            size_bytes=export.size_bytes,
            block_size_bytes=4096,
            server_flags=int(export.flags),
            backend=f"bench:{host}:{port}",
            timeout_s=0,
            dead_conn_timeout_s=60,
        )
    size = Path(f"/sys/block/nbd{index}/size")
    deadline = time.monotonic() + DEADLINE_S
    while int(size.read_text()) * 512 != export.size_bytes or not Path(f"/dev/nbd{index}").exists():
        if time.monotonic() > deadline:
            sys.exit(f"attach_tcp: /dev/nbd{index} does not get its size")
        time.sleep(0.05)
    print(f"/dev/nbd{index}")


if __name__ == "__main__":
    main()
