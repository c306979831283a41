# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks a server's RPC services what they offer, to explain why there is no connection. Not for transfers.

RFC 5531 (ONC RPC over TCP), RFC 1833 (portmapper and rpcbind). Each call takes up to two seconds.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
import time

PORTMAPPER_PORT = 111
_PORTMAPPER, NFS, MOUNT = 100000, 100003, 100005
_PROBE_TIMEOUT_S = 2.0
_ANSWER_BYTES_MAX = 4096
_LAST_FRAGMENT = 1 << 31
_TCP = 6

# reply_stat and accept_stat
_DENIED, _SUCCESS, _PROG_UNAVAIL, _PROG_MISMATCH = 1, 0, 1, 2


class Offer(enum.Enum):
    """What a port says to the NULL call of one version of a program."""

    YES = "it offers this version"
    OTHER_VERSIONS = "it offers other versions"
    NOT_AT_ALL = "it does not know the program"
    REFUSED = "it refuses the call (AUTH_ERROR)"
    SILENT = "it does not answer"


def why_closed(address: str, port: int) -> str | None:
    """Why no TCP connection to `port` can be made; None when one can."""
    try:
        socket.create_connection((address, port), timeout=_PROBE_TIMEOUT_S).close()
    except TimeoutError:
        return "timed out"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def offer(address: str, port: int, program: int, version: int) -> Offer:
    """Whether `port` offers a version of a program."""
    answer = _call(address, port, program, version, 0, b"")
    if answer is None:
        return Offer.SILENT
    status, accepted, _ = answer
    if status == _DENIED:
        return Offer.REFUSED
    return {_SUCCESS: Offer.YES, _PROG_MISMATCH: Offer.OTHER_VERSIONS, _PROG_UNAVAIL: Offer.NOT_AT_ALL}.get(
        accepted, Offer.SILENT
    )


def registered_port(address: str, program: int, version: int, portmapper_port: int = PORTMAPPER_PORT) -> int | None:
    """The TCP port that the portmapper has for a program; 0: it has none; None: it does not answer."""
    if ":" in address:  # rpcbind has version 2 for IPv4 only
        arguments = struct.pack(">II", program, version) + _string(b"tcp6") + _string(b"") + _string(b"")
        answer = _call(address, portmapper_port, _PORTMAPPER, 3, 3, arguments)
    else:
        answer = _call(address, portmapper_port, _PORTMAPPER, 2, 3, struct.pack(">IIII", program, version, _TCP, 0))
    if answer is None or answer[:2] != (0, _SUCCESS) or len(answer[2]) < 4:
        return None
    (number,) = struct.unpack_from(">I", answer[2])
    if ":" not in address:
        return int(number)
    # a universal address: the port is its last two parts (RFC 5665, 5.2.3.4)
    parts = answer[2][4 : 4 + number].decode(errors="replace").split(".")[-2:]
    return int(parts[0]) * 256 + int(parts[1]) if len(parts) == 2 and all(map(str.isdecimal, parts)) else 0


def may_use_reserved_ports() -> bool:
    """Whether this process may bind a port below 1024, which servers ask for that export with `secure`, exports(5)."""
    for port in range(1023, 512, -1):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except PermissionError:
                return False
            except OSError:
                continue
        return True
    return True


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def _call(
    address: str, port: int, program: int, version: int, procedure: int, arguments: bytes
) -> tuple[int, int, bytes] | None:
    """reply_stat, accept_stat (or reject_stat) and the results; None: no answer, or not one to this call."""
    xid = os.urandom(4)
    message = xid + struct.pack(">9I", 0, 2, program, version, procedure, 0, 0, 0, 0) + arguments
    try:
        with socket.create_connection((address, port), timeout=_PROBE_TIMEOUT_S) as connection:
            connection.sendall(struct.pack(">I", _LAST_FRAGMENT | len(message)) + message)
            answer = _receive(connection)
    except OSError:
        return None
    if len(answer) < 16 or answer[:4] != xid:
        return None
    kind, status, detail = struct.unpack_from(">III", answer, 4)
    if kind != 1:
        return None
    if status == _DENIED:
        return status, detail, b""
    # `detail` is the flavour of the verifier; its length follows
    (verifier_bytes,) = struct.unpack_from(">I", answer, 16) if len(answer) >= 20 else (0,)
    at = 20 + verifier_bytes + -verifier_bytes % 4
    if len(answer) < at + 4:
        return None
    return status, struct.unpack_from(">I", answer, at)[0], answer[at + 4 :]


def _receive(connection: socket.socket) -> bytes:
    """One fragment, without its mark; b"" when it does not come in time, or is too long. OSError."""
    deadline_s = time.monotonic() + _PROBE_TIMEOUT_S
    data, wanted = b"", 4
    while len(data) < wanted:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return b""
        connection.settimeout(left_s)
        piece = connection.recv(wanted - len(data))
        if not piece:
            return b""
        data += piece
        if wanted == 4 and len(data) == 4:
            wanted = 4 + (struct.unpack(">I", data)[0] & ~_LAST_FRAGMENT)
            if wanted > _ANSWER_BYTES_MAX:
                return b""
    return data[4:]
