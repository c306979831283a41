# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine's wire (nbdnfs/engine/nfs/wire*.c) as a shared library, called through ctypes, with a server's end."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from ctypes import POINTER, Structure, byref, c_bool, c_int, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path

from support.sunrpc import record, u32

SOURCES = Path(__file__).resolve().parents[2] / "nbdnfs" / "engine"
NULL, GETATTR, LOOKUP, READLINK, READ, WRITE, FSINFO, COMMIT = 0, 1, 3, 5, 6, 7, 19, 21
MNT, GETPORT, GETADDR = 256, 257, 258
# larger than struct wire
_WIRE_BYTES = 64 * 1024
_HEAD_BYTES = 72  # of a call, with its record mark, up to its arguments


class WireCall(Structure):
    """struct wire_call"""

    _fields_ = (
        ("procedure", c_int),
        ("handle", c_void_p),
        ("handle_bytes", c_uint32),
        ("length_bytes", c_uint32),
        ("offset_bytes", c_uint64),
        ("data", c_void_p),
        ("stable", c_bool),
        ("program", c_uint32),
        ("version", c_uint32),
        ("xid", c_uint32),
        ("prev", c_void_p),
        ("next", c_void_p),
    )


class WireAnswer(Structure):
    """struct wire_answer"""

    _fields_ = (
        ("call", c_void_p),
        ("status", c_uint32),
        ("count_bytes", c_uint32),
        ("end_of_file", c_bool),
        ("stable", c_bool),
        ("verifier", c_uint64),
        ("has_attributes", c_bool),
        ("type", c_uint32),
        ("links", c_uint32),
        ("size_bytes", c_uint64),
        ("fsid", c_uint64),
        ("fileid", c_uint64),
        ("has_size_before", c_bool),
        ("size_before_bytes", c_uint64),
        ("handle", POINTER(c_uint8)),
        ("handle_bytes", c_uint32),
        ("read_max_bytes", c_uint32),
        ("read_preferred_bytes", c_uint32),
        ("write_max_bytes", c_uint32),
        ("write_preferred_bytes", c_uint32),
        ("port", c_uint32),
    )


def build(directory: Path) -> ctypes.CDLL:
    """Compile the library into `directory` and declare its functions."""
    path = directory / "libwire.so"
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-fPIC", "-shared"]
    command += os.environ.get("NBDNFS_TEST_CFLAGS", "").split()  # simulator/coverage.py
    sources = sorted((SOURCES / "nfs").glob("wire_*.c"))
    subprocess.run([*command, f"-I{SOURCES}", "-o", str(path), *map(str, sources)], check=True)
    library = ctypes.CDLL(str(path))
    signatures = {
        "wire_init": (None, c_void_p),
        "wire_open": (None, c_void_p, c_int, c_uint32, c_uint32),
        "wire_close": (None, c_void_p),
        "wire_send": (c_int, c_void_p, POINTER(WireCall)),
        "wire_send_null": (c_int, c_void_p),
        "wire_receive": (c_int, c_void_p, POINTER(WireAnswer)),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Pair:
    """A wire and the server's end of its connection. One thread uses it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        ours, self.server = socket.socketpair()
        self.server.settimeout(10)
        self._wire = ctypes.create_string_buffer(_WIRE_BYTES)
        library.wire_open(self._wire, ours.detach(), 1, 2)
        self._kept: list[object] = []

    def close(self) -> None:
        """Both ends."""
        self._library.wire_close(self._wire)
        self.server.close()

    def send(
        self, procedure: int, handle: bytes, data: bytes = b"", offset: int = 0, program: tuple[int, int] = (0, 0)
    ) -> WireCall:
        """Make a call; a READ is of as many bytes as there are in `data`. `program`: with its version."""
        handle_buffer, data_buffer = (ctypes.create_string_buffer(what, len(what)) for what in (handle, data))
        call = WireCall(
            procedure=procedure,
            handle=ctypes.addressof(handle_buffer),
            handle_bytes=len(handle),
            length_bytes=len(data),
            offset_bytes=offset,
            data=ctypes.addressof(data_buffer) if data else None,
            program=program[0],
            version=program[1],
        )
        self._kept += [handle_buffer, call]
        self.data = data_buffer  # of the last call
        self._kept.append(data_buffer)
        assert self._library.wire_send(self._wire, byref(call)) == 0
        return call

    def send_null(self) -> int:
        """Ask for a sign of life, unless one is due already. 0 or -errno."""
        return int(self._library.wire_send_null(self._wire))

    def send_at_once(self, call: WireCall) -> int:
        """Make a call that `send` has made before once more. 0 or -errno."""
        again = WireCall.from_buffer_copy(call)
        self._kept.append(again)
        return int(self._library.wire_send(self._wire, byref(again)))

    def received(self) -> tuple[int, bytes]:
        """The procedure and the arguments of the next call, at the server."""
        _, _, procedure, arguments = self.received_whole()
        return procedure, arguments

    def received_whole(self) -> tuple[int, int, int, bytes]:
        """The same, with the program and its version before."""
        mark = int.from_bytes(self.server.recv(4, socket.MSG_WAITALL)) & 0x7FFF_FFFF
        message = self.server.recv(mark, socket.MSG_WAITALL)
        assert len(message) == mark
        program, version, procedure = (int.from_bytes(message[at : at + 4]) for at in (12, 16, 20))
        return program, version, procedure, message[_HEAD_BYTES - 4 :]

    def receive(self) -> WireAnswer | None:
        """The next answer. None: there is none yet. OSError: the wire must be closed."""
        answer = WireAnswer()
        # twice: it does not ask a socket again that it has just emptied
        status = self._library.wire_receive(self._wire, byref(answer))
        status = status or self._library.wire_receive(self._wire, byref(answer))
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        return answer if status > 0 else None

    def answer(self, call: WireCall, results: bytes) -> bytes:
        """The record that answers the call."""
        return record(u32(call.xid, 1, 0) + u32(0, 0) + u32(0) + results)
