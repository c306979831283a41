# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a program in place of nbdkit, which keeps its pages in the region; without imports of ours, so that it
starts soon.

    python page_worker.py FOLDER

It leaves a file with its pid's name in FOLDER. A standby until it is activated; then it locks the region, which one
process can do at a time, and serves the pages that are in it.
"""

import fcntl
import os
import sys

_REGION_FD, _CONTROL_FD = 200, 201
# Before the pages: what makes it a region that is made.
_HEAD_BYTES = 8192
_SIZE_BYTES = 1 << 20
_MAGIC = 0x3E889045565A9


def _exactly(count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(0, count - len(data))
        if not piece:
            sys.exit(0)
        data += piece
    return data


def _send(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _bytes(value: int, count: int) -> bytes:
    return value.to_bytes(count, "big")


def main() -> None:
    open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
    os.write(_CONTROL_FD, b"r")
    if os.read(_CONTROL_FD, 1) != b"g":
        sys.exit(0)
    region = os.open(f"/proc/self/fd/{_REGION_FD}", os.O_RDWR)
    fcntl.flock(region, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.fstat(region).st_size == 0:
        os.ftruncate(region, _HEAD_BYTES + _SIZE_BYTES)
    os.close(_CONTROL_FD)
    export = _bytes(12, 4) + _bytes(0, 2) + _bytes(_SIZE_BYTES, 8) + _bytes(0x10D, 2)
    head = _bytes(_MAGIC, 8) + _bytes(7, 4)
    _send(b"NBDMAGICIHAVEOPT\0\3" + head + _bytes(3, 4) + export + head + _bytes(1, 4) + _bytes(0, 4))
    _exactly(16)
    _exactly(_number(_exactly(4)))
    while True:
        request = _exactly(28)
        op, cookie = _number(request[6:8]), request[8:16]
        offset, length = _HEAD_BYTES + _number(request[16:24]), _number(request[24:])
        if op == 2:
            sys.exit(0)
        answer = b""
        if op == 1:
            os.pwrite(region, _exactly(length), offset)
        elif op == 0:
            answer = os.pread(region, length, offset)
        _send(_bytes(0x67446698, 4) + _bytes(0, 4) + cookie + answer)


try:
    main()
except OSError:  # whoever is at the other end has ended
    sys.exit(1)
