# SPDX-License-Identifier: LGPL-2.1-or-later
"""Register another port for a program with this machine's rpcbind (RFC 1833, portmapper version 2)."""

from __future__ import annotations

import socket
import struct

_PORTMAPPER, _VERSION, _SET, _UNSET = 100000, 2, 1, 2
_TCP = 6

# each is used once: a second connection from it would meet the first in TIME_WAIT
_ports = iter(range(700, 1024))


def register(program: int, version: int, port: int) -> None:
    """Replace the registration of `program` over TCP. OSError when rpcbind rejects it."""
    _call(_UNSET, program, version, 0)
    if not _call(_SET, program, version, port):
        raise OSError(f"rpcbind did not register program {program} on port {port}")


def _call(procedure: int, program: int, version: int, port: int) -> bool:
    body = struct.pack(">10I", 1, 0, 2, _PORTMAPPER, _VERSION, procedure, 0, 0, 0, 0)
    body += struct.pack(">4I", program, version, _TCP, port)
    with socket.socket() as connection:
        connection.settimeout(5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind(("127.0.0.1", next(_ports)))  # a privileged port: rpcbind demands one
        connection.connect(("127.0.0.1", 111))
        connection.sendall(struct.pack(">I", 0x8000_0000 | len(body)) + body)
        reply = connection.recv(256)
    return bool(struct.unpack(">I", reply[28:32])[0])
