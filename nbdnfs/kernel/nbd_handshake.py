# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD newstyle fixed negotiation, client side: from a connected socket to one the kernel can be given.

`negotiate(sock)` speaks the handshake of the NBD project's doc/proto.md with NBD_OPT_GO, and reads no byte beyond it:
what follows on the socket is for the kernel. No TLS and no structured replies, which the kernel's client does not
support; no oldstyle and no NBD_OPT_EXPORT_NAME, because the server is nbdkit.

What the server may send is bounded: MAX_REPLIES replies of at most MAX_REPLY_BYTES each, and one deadline
over the whole exchange.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import time
from dataclasses import dataclass

from nbdnfs.errors import NbdnfsError, PermissionDeniedError, UnavailableError, UsageError, is_of_want

DEFAULT_TIMEOUT_S = 10.0

MAX_REPLIES = 64
MAX_REPLY_BYTES = 16 * 1024
MAX_NAME_BYTES = 4096

# Numbers of doc/proto.md; all integers on the wire are big-endian.
_MAGIC = b"NBDMAGIC"
_MAGIC_NEWSTYLE = b"IHAVEOPT"
_MAGIC_OLDSTYLE = bytes.fromhex("0000420281861253")
_MAGIC_REPLY = 0x0003_E889_0455_65A9

_HANDSHAKE_FIXED_NEWSTYLE = 1 << 0
_HANDSHAKE_NO_ZEROES = 1 << 1

_OPT_ABORT = 2
_OPT_GO = 7

_REP_ACK = 1
_REP_INFO = 3
_REP_ERROR_BIT = 1 << 31

_INFO_EXPORT = 0
_INFO_BLOCK_SIZE = 3

_REFUSALS = {
    1: "the server does not know NBD_OPT_GO",
    2: "the policy of the server forbids it",
    3: "the server considers the request invalid",
    4: "the platform of the server does not support it",
    5: "the server requires TLS, which the kernel's client does not support",
    # nbdkit answers so whenever its plugin cannot open
    6: "the server has no such export, or cannot open it",
    7: "the server is shutting down",
    8: "the server requires a client that honours its block size",
    9: "the request is too big for the server",
}
_REFUSED_BY_POLICY = 2


class TransmissionFlags(enum.IntFlag):
    """What the export can do; the kernel takes the number as NBD_ATTR_SERVER_FLAGS.

    Bits that are not named here are kept. The kernel knows those of its include/uapi/linux/nbd.h.
    """

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


@dataclass(frozen=True)
class Export:
    """What the server offers. The block sizes are the protocol's defaults where the server names none."""

    size_bytes: int
    flags: TransmissionFlags
    min_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    max_block_bytes: int = 32 * 1024 * 1024

    @property
    def read_only(self) -> bool:
        return TransmissionFlags.READ_ONLY in self.flags

    @property
    def can_flush(self) -> bool:
        return TransmissionFlags.SEND_FLUSH in self.flags

    @property
    def can_fua(self) -> bool:
        return TransmissionFlags.SEND_FUA in self.flags

    @property
    def can_trim(self) -> bool:
        return TransmissionFlags.SEND_TRIM in self.flags

    @property
    def can_multi_conn(self) -> bool:
        return TransmissionFlags.CAN_MULTI_CONN in self.flags


def negotiate(sock: socket.socket, export_name: str = "", *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Export:
    """Shake hands on a connected stream socket, within `timeout_s` seconds for all of it.

    On return the connection is in the transmission phase and blocking again. After an error the caller closes
    the socket.

    UnavailableError: not an NBD server, an oldstyle one, one that closes the connection, breaks the protocol, is too
    slow or refuses the export; PermissionDeniedError: by policy. UsageError: the name is too long.
    """
    name = export_name.encode("utf-8", "surrogateescape")
    if len(name) > MAX_NAME_BYTES:
        raise UsageError(f"an export name of {len(name)} bytes is too long", f"NBD allows {MAX_NAME_BYTES} bytes")
    deadline = time.monotonic() + timeout_s
    try:
        _greet(sock, deadline)
        _send(sock, deadline, _go(name))
        export = _read_export(sock, deadline, export_name)
        sock.settimeout(None)
    except TimeoutError:
        raise UnavailableError(
            f"the NBD server did not finish the handshake within {timeout_s:g} s",
            "see the log of the server, and whether the NAS answers",
        ) from None
    except OSError as error:
        raise _closed(error.strerror or str(error)) from None
    return export


def go_option() -> bytes:
    """What a client sends after its flags for the default export, NBD_OPT_GO: for nbdnfs/heir/handshake.c."""
    return _go(b"")


def _go(name: bytes) -> bytes:
    return _option(_OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, _INFO_BLOCK_SIZE))


def _greet(sock: socket.socket, deadline: float) -> None:
    """The greeting of the server, and the flags of the client."""
    magic = _receive(sock, deadline, 8)
    if magic != _MAGIC:
        raise _not_nbd(f"it greets with {magic!r}")
    style = _receive(sock, deadline, 8)
    if style == _MAGIC_OLDSTYLE:
        raise UnavailableError(
            "the NBD server speaks the oldstyle protocol",
            "start it with newstyle negotiation (nbdkit: without -o)",
        )
    if style != _MAGIC_NEWSTYLE:
        raise _not_nbd(f"its second word is {style!r}")
    (flags,) = struct.unpack(">H", _receive(sock, deadline, 2))
    if not flags & _HANDSHAKE_FIXED_NEWSTYLE:
        raise UnavailableError(
            "the NBD server speaks newstyle, but not fixed newstyle",
            "use a server newer than 2011, such as nbdkit",
        )
    _send(sock, deadline, struct.pack(">I", flags & (_HANDSHAKE_FIXED_NEWSTYLE | _HANDSHAKE_NO_ZEROES)))


def _read_export(sock: socket.socket, deadline: float, export_name: str) -> Export:
    """The replies to NBD_OPT_GO, up to the one that ends them."""
    size_and_flags: tuple[int, int] | None = None
    blocks: tuple[int, int, int] | None = None
    for _ in range(MAX_REPLIES):
        magic, option, kind, length = struct.unpack(">QIII", _receive(sock, deadline, 20))
        if magic != _MAGIC_REPLY or option != _OPT_GO:
            raise _not_nbd("a reply to another option than NBD_OPT_GO")
        if length > MAX_REPLY_BYTES:
            raise _not_nbd(f"a reply of {length} bytes")
        payload = _receive(sock, deadline, length)
        if kind & _REP_ERROR_BIT:
            raise _refused(sock, deadline, kind & ~_REP_ERROR_BIT, payload, export_name)
        if kind == _REP_ACK:
            if size_and_flags is None:
                raise _not_nbd("it acknowledges before it gives the size of the export")
            return _export(size_and_flags, blocks)
        if kind != _REP_INFO or length < 2:
            raise _not_nbd(f"a reply of unknown kind {kind}")
        (info,) = struct.unpack_from(">H", payload)
        if info == _INFO_EXPORT:
            _expect_length(payload, 12)
            size_and_flags = struct.unpack_from(">QH", payload, 2)
        elif info == _INFO_BLOCK_SIZE:
            _expect_length(payload, 14)
            blocks = struct.unpack_from(">III", payload, 2)
        # a server may send other kinds of information unasked; the kernel does not use them
    raise _not_nbd(f"more than {MAX_REPLIES} replies to one option")


def _export(size_and_flags: tuple[int, int], blocks: tuple[int, int, int] | None) -> Export:
    size_bytes, flags = size_and_flags
    if size_bytes >= 1 << 63:
        raise _not_nbd(f"an export of {size_bytes} bytes")
    if blocks is None:
        return Export(size_bytes, TransmissionFlags(flags))
    smallest, preferred, largest = blocks
    if smallest == 0 or smallest & (smallest - 1) or not smallest <= preferred <= largest:
        raise _not_nbd(f"block sizes of {smallest}, {preferred} and {largest} bytes")
    return Export(size_bytes, TransmissionFlags(flags), smallest, preferred, largest)


def _refused(sock: socket.socket, deadline: float, code: int, payload: bytes, export_name: str) -> NbdnfsError:
    """Send NBD_OPT_ABORT, as the protocol asks, and make an error of the refusal."""
    with contextlib.suppress(OSError):  # a courtesy
        _send(sock, deadline, _option(_OPT_ABORT, b""))
    reason = _REFUSALS.get(code, f"error {code}")
    said = "".join(c if c.isprintable() else " " for c in payload[:200].decode("utf-8", "replace")).strip()
    kind = PermissionDeniedError if code == _REFUSED_BY_POLICY else UnavailableError
    message = f"the NBD server refuses the export '{export_name}': {reason}"
    return kind(message + (f" ({said})" if said else ""), "see the log of the server")


def _option(option: int, data: bytes) -> bytes:
    return _MAGIC_NEWSTYLE + struct.pack(">II", option, len(data)) + data


def _expect_length(payload: bytes, count: int) -> None:
    if len(payload) != count:
        raise _not_nbd(f"an information reply of {len(payload)} bytes instead of {count}")


def _receive(sock: socket.socket, deadline: float, count: int) -> bytes:
    """Exactly `count` bytes. TimeoutError at the deadline."""
    data = bytearray()
    while len(data) < count:
        sock.settimeout(_remaining_s(deadline))
        try:
            piece = sock.recv(count - len(data))
        except OSError as error:
            _wait_for_memory(error)
            continue
        if not piece:
            raise _closed("end of file")
        data += piece
    return bytes(data)


# How soon what there was no memory for is sent or received again.
_AGAIN_S = 0.02


def _send(sock: socket.socket, deadline: float, data: bytes) -> None:
    """All of it. TimeoutError at the deadline."""
    left = memoryview(data)
    while left:
        sock.settimeout(_remaining_s(deadline))
        try:
            left = left[sock.send(left) :]
        except OSError as error:
            _wait_for_memory(error)


def _wait_for_memory(error: OSError) -> None:
    """A call that failed for want of it has done nothing, and is made again. Any other error is raised."""
    if not is_of_want(error):
        raise error
    time.sleep(_AGAIN_S)


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s


def _closed(why: str) -> NbdnfsError:
    return UnavailableError(
        f"the NBD server closed the connection during the handshake ({why})", "see the log of the server"
    )


def _not_nbd(what: str) -> NbdnfsError:
    return UnavailableError(
        f"the server does not speak the NBD handshake: {what}",
        "check the path or address of the socket",
    )
