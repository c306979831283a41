# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a program in place of nbdkit with the plugin, as a keeper starts it; it serves zeros.

    python fake_worker.py BEHAVIOUR

serve     as the real one: a standby until it is activated, then an NBD server until its connection closes
exit:N    exits with status N when it is activated
early:N   exits with status N at once
mute      is activated, and never sends a greeting
held      sends back what has activated it, and serves once it gets one more byte: its server is away meanwhile
rude      greets as no NBD server does
refuse    refuses the export
breaks    hangs up in the middle of the handshake
deaf      serves, and ignores the end of its connection
"""

import os
import socket
import struct
import sys
import time

_CONTROL_FD = 201
_SIZE_BYTES = 1 << 20


def _greeting() -> bytes:
    head = struct.pack(">QII", 0x3E889045565A9, 7, 3)
    return (
        b"NBDMAGICIHAVEOPT\x00\x03"
        + head
        + struct.pack(">IHQH", 12, 0, _SIZE_BYTES, 0x10D)
        + struct.pack(">QIII", 0x3E889045565A9, 7, 1, 0)
    )


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


_HEAD_BYTES = 18
_REFUSAL = struct.pack(">QIII", 0x3E889045565A9, 7, 0x80000006, 0)
_GREETINGS = {
    "rude": b"HTTP/1.1 400 Bad Request",
    "refuse": _greeting()[:_HEAD_BYTES] + _REFUSAL,
    "breaks": _greeting()[: _HEAD_BYTES + 12],
}


def _serve(sock: socket.socket) -> None:
    sock.sendall(_greeting())
    _exactly(sock, 4 + 8 + 4)
    (length,) = struct.unpack(">I", _exactly(sock, 4))
    _exactly(sock, length)
    while True:
        _, _, op, cookie, _, length = struct.unpack(">IHHQQI", _exactly(sock, 28))
        if op == 1:
            _exactly(sock, length)
        sock.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + (bytes(length) if op == 0 else b""))


def main() -> None:
    """Run the behaviour that the first argument names."""
    behaviour, _, status = sys.argv[1].partition(":")
    if behaviour == "early":
        sys.exit(int(status))
    os.write(_CONTROL_FD, b"r")
    message = os.read(_CONTROL_FD, 128)
    if message[:1] != b"g":
        sys.exit(0)
    if behaviour == "held":
        os.write(_CONTROL_FD, message)
        if os.read(_CONTROL_FD, 1) == b"":
            sys.exit(0)
    if behaviour == "exit":
        sys.exit(int(status))
    if behaviour == "mute":
        time.sleep(600)
    if behaviour in _GREETINGS:
        os.write(0, _GREETINGS[behaviour])
        if behaviour == "breaks":
            socket.socket(fileno=0).shutdown(socket.SHUT_WR)
        time.sleep(600)
    try:
        _serve(socket.socket(fileno=0))
    except (EOFError, OSError):
        if behaviour == "deaf":
            time.sleep(600)


main()
