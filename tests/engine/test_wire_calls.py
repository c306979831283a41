# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the wire asks to find a file and to connect to it, and calls that carry their handle, without an engine."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator

import pytest
from support.fake_nfs import NFS3ERR_JUKEBOX, NFS3ERR_NOENT, NFS3ERR_STALE
from support.sunrpc import XdrReader, opaque, record, u32, u64
from wire_library import (
    COMMIT,
    FSINFO,
    GETADDR,
    GETATTR,
    GETPORT,
    LOOKUP,
    MNT,
    READ,
    READLINK,
    WRITE,
    Pair,
    WireAnswer,
    build,
)

FSID, FILEID, SIZE, LINKS = 0x1122_3344_5566_7788, 0x99AA_BBCC_DDEE_FF00, 1 << 33, 3
# fattr3: type, mode, nlink, uid, gid, size, used, rdev, fsid, fileid, atime, mtime, ctime
FATTR3 = u32(1, 0o600, LINKS, 7, 8) + u64(SIZE, 4096) + u32(0, 0) + u64(FSID, FILEID) + u32(*range(6))
DIRECTORY = u32(2, 0o755, 2, 0, 0) + u64(4096, 4096) + u32(0, 0) + u64(1, 2) + u32(*range(6))
FOUND = bytes(range(1, 36))
# rtmax, rtpref, rtmult, wtmax, wtpref, wtmult, dtpref, maxfilesize, time_delta, properties
LIMITS = u32(65536, 32768, 512, 16384, 8192, 1024, 4096) + u64(1 << 50) + u32(0, 1, 0x1B)

GOOD = {
    "getattr": (GETATTR, b"", u32(0) + FATTR3),
    "lookup": (LOOKUP, b"swap", u32(0) + opaque(FOUND) + u32(1) + FATTR3 + u32(1) + DIRECTORY),
    "lookup, bare": (LOOKUP, b"swap", u32(0) + opaque(FOUND) + u32(0, 0)),
    "fsinfo": (FSINFO, b"", u32(0, 1) + FATTR3 + LIMITS),
    "fsinfo, bare": (FSINFO, b"", u32(0, 0) + LIMITS),
    "mnt": (MNT, b"/export", u32(0) + opaque(FOUND)),
    "readlink": (READLINK, bytes(64), u32(0, 1) + FATTR3 + opaque(b"real/way")),
    "readlink, bare": (READLINK, bytes(64), u32(0, 0) + opaque(b"other/it")),
    "getport": (GETPORT, b"", u32(2049)),
    "getaddr": (GETADDR, b"", opaque(b"::1.8.1")),
}
BAD = {
    "getattr": (GETATTR, b"", u32(NFS3ERR_STALE)),
    "lookup": (LOOKUP, b"swap", u32(NFS3ERR_NOENT, 1) + DIRECTORY),
    "lookup, bare": (LOOKUP, b"swap", u32(NFS3ERR_NOENT, 0)),
    "fsinfo": (FSINFO, b"", u32(NFS3ERR_JUKEBOX, 1) + DIRECTORY),
    "mnt": (MNT, b"/export", u32(NFS3ERR_NOENT)),
    "readlink": (READLINK, bytes(64), u32(NFS3ERR_STALE, 0)),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("wire"))


@pytest.fixture
def pair(library: ctypes.CDLL) -> Iterator[Pair]:
    """A wire, and the server's end of its connection."""
    pair = Pair(library)
    yield pair
    pair.close()


def handle_of(answer: WireAnswer) -> bytes:
    return bytes(answer.handle[: answer.handle_bytes])


def attributes_of(answer: WireAnswer) -> tuple[int, ...]:
    return answer.type, answer.links, answer.size_bytes, answer.fsid, answer.fileid


def received(pair: Pair) -> WireAnswer:
    answer = pair.receive()
    assert answer is not None
    return answer


@pytest.mark.parametrize("handle_bytes", [1, 3, 4, 35, 64])
def test_each_call_has_its_own_handle(pair: Pair, handle_bytes: int) -> None:
    """Of any length, padded with zeros, and before the procedure's own arguments."""
    file, directory = os.urandom(handle_bytes), os.urandom(64)
    for call, expected in (
        ((GETATTR, file), b""),
        ((LOOKUP, directory, b"swap!"), opaque(b"swap!")),
        ((FSINFO, file), b""),
        ((WRITE, file, b"data.", 7), u64(7) + u32(5, 0) + opaque(b"data.")),
        ((READ, directory, bytes(9), 1 << 40), u64(1 << 40) + u32(9)),
        ((COMMIT, file), u64(0) + u32(0)),
    ):
        pair.send(*call)
        assert pair.received() == (call[0], opaque(call[1]) + expected)


@pytest.mark.parametrize("name_bytes", [1, 255])
def test_the_longest_name(pair: Pair, name_bytes: int) -> None:
    """NAME_MAX is what LOOKUP takes."""
    pair.send(LOOKUP, b"d", name := os.urandom(name_bytes))
    assert XdrReader(pair.received()[1][8:]).opaque() == name


@pytest.mark.parametrize("piece_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize(("procedure", "data", "results"), GOOD.values(), ids=GOOD)
def test_good_answers(pair: Pair, procedure: int, data: bytes, results: bytes, piece_bytes: int) -> None:
    """Cut anywhere: each is understood when its last byte is there, and not before."""
    call = pair.send(procedure, b"handle", data)
    message = pair.answer(call, results)
    for at in range(0, len(message), piece_bytes):
        assert pair.receive() is None
        pair.server.sendall(message[at : at + piece_bytes])
    answer = received(pair)
    assert (answer.call, answer.status) == (ctypes.addressof(call), 0)
    assert bool(answer.has_attributes) is (FATTR3 in results)
    if answer.has_attributes:
        assert attributes_of(answer) == (1, LINKS, SIZE, FSID, FILEID)
    if procedure in (LOOKUP, MNT):
        assert handle_of(answer) == FOUND
    if procedure == READLINK:
        assert pair.data.raw[: answer.count_bytes] in (b"real/way", b"other/it")
    if procedure in (GETPORT, GETADDR):
        assert answer.port == 2049
    if procedure == FSINFO:
        assert (answer.read_max_bytes, answer.read_preferred_bytes) == (65536, 32768)
        assert (answer.write_max_bytes, answer.write_preferred_bytes) == (16384, 8192)
    assert pair.receive() is None


@pytest.mark.parametrize(("procedure", "data", "results"), BAD.values(), ids=BAD)
def test_errors(pair: Pair, procedure: int, data: bytes, results: bytes) -> None:
    """The status is the result; a directory's attributes are not taken for the file's."""
    call = pair.send(procedure, b"handle", data)
    pair.server.sendall(pair.answer(call, results))
    answer = received(pair)
    assert answer.status == int.from_bytes(results[:4])
    assert answer.handle_bytes == 0
    assert procedure != LOOKUP or not answer.has_attributes


@pytest.mark.parametrize(("procedure", "data", "results"), [*GOOD.values(), *BAD.values()], ids=[*GOOD, *BAD])
def test_records_that_end_too_early(library: ctypes.CDLL, procedure: int, data: bytes, results: bytes) -> None:
    """At any place: the connection has no more use."""
    for length in range(0, len(results), 4):
        pair = Pair(library)
        call = pair.send(procedure, b"handle", data)
        pair.server.sendall(pair.answer(call, results[:length]))
        with pytest.raises(OSError, match="Protocol error"):
            pair.receive()
        pair.close()


@pytest.mark.parametrize("length", [0, 65, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_handles_that_none_may_send(pair: Pair, length: int) -> None:
    """RFC 1813: 64 bytes at most. One of none names nothing."""
    call = pair.send(LOOKUP, b"handle", b"swap")
    pair.server.sendall(pair.answer(call, u32(0, length) + bytes(200)))
    with pytest.raises(OSError, match="Protocol error"):
        pair.receive()


def test_answers_in_one_segment(pair: Pair) -> None:
    """Three procedures, in another order than they were called in: each has its own results."""
    calls = [pair.send(procedure, b"handle", data) for procedure, data, _ in GOOD.values()]
    answers = [pair.answer(call, results) for call, (_, _, results) in zip(calls, GOOD.values(), strict=True)]
    pair.server.sendall(b"".join(reversed(answers)))
    for call in reversed(calls):
        answer = received(pair)
        assert answer.call == ctypes.addressof(call)
        if call.procedure in (LOOKUP, MNT):
            assert handle_of(answer) == FOUND


@pytest.mark.parametrize(
    ("procedure", "data", "program", "arguments"),
    [
        (MNT, b"/export/a", (100005, 3, 1), opaque(b"/export/a")),
        (GETPORT, b"", (100000, 2, 3), u32(100005, 3, 6, 0)),
        (GETADDR, b"", (100000, 3, 3), u32(100005, 3) + opaque(b"tcp6") + u32(0, 0)),
    ],
)
def test_calls_of_other_programs(
    pair: Pair, procedure: int, data: bytes, program: tuple[int, int, int], arguments: bytes
) -> None:
    """MOUNT version 3 (RFC 1813, 5.2.1); portmapper versions 2 and 3 (RFC 1833)."""
    pair.send(procedure, b"h", data, program=(100005, 3))
    assert pair.received_whole() == (*program, arguments)


@pytest.mark.parametrize("flavours", [b"", u32(1, 1), u32(0xFFFF_FFF0), u32(1 << 31) + bytes(400)])
def test_flavours_of_a_mount(pair: Pair, flavours: bytes) -> None:
    """Whatever follows the handle: it is not needed, and so it is not parsed."""
    call = pair.send(MNT, b"h", b"/export")
    pair.server.sendall(pair.answer(call, u32(0) + opaque(FOUND) + flavours) + b"")
    assert handle_of(received(pair)) == FOUND


@pytest.mark.parametrize("length", [0, 65, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_handles_that_no_mountd_may_send(pair: Pair, length: int) -> None:
    call = pair.send(MNT, b"h", b"/export")
    pair.server.sendall(pair.answer(call, u32(0, length) + bytes(200)))
    with pytest.raises(OSError, match="Protocol error"):
        pair.receive()


@pytest.mark.parametrize("length", [65, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_targets_that_are_too_long(pair: Pair, length: int) -> None:
    """The room for a symbolic link's target is the call's."""
    call = pair.send(READLINK, b"h", bytes(64))
    pair.server.sendall(pair.answer(call, u32(0, 0, length) + bytes(200)))
    with pytest.raises(OSError, match="Protocol error"):
        pair.receive()
    assert pair.data.raw == bytes(64)


@pytest.mark.parametrize(
    ("address", "port"),
    [(b"", 0), (b"0.0.0.0.0.111", 111), (b"fe80::1%2.255.255", 65535), (b"::.3.9", 777)],
)
def test_universal_addresses(pair: Pair, address: bytes, port: int) -> None:
    """RFC 5665: the port is in the last two parts; "" is that of a program that is not there."""
    call = pair.send(GETADDR, b"h")
    pair.server.sendall(pair.answer(call, opaque(address)))
    assert received(pair).port == port


@pytest.mark.parametrize(
    "results",
    [
        *(opaque(text) for text in (b"1", b"1.2", b"::1", b"1.2.3.", b"h.256.1", b"h.1.999", b"h.0001.1", b"h.-1.2")),
        u32(0x8000_0000),
        opaque(bytes(129)),
    ],
)
def test_addresses_without_a_port(pair: Pair, results: bytes) -> None:
    """What is no universal address ends the connection."""
    call = pair.send(GETADDR, b"h")
    pair.server.sendall(pair.answer(call, results))
    with pytest.raises(OSError, match="Protocol error"):
        pair.receive()


def test_a_port_that_there_is_not(pair: Pair) -> None:
    call = pair.send(GETPORT, b"h")
    pair.server.sendall(pair.answer(call, u32(65536)))
    with pytest.raises(OSError, match="Protocol error"):
        pair.receive()


# Calls that must wait, and answers in fragments


def test_one_sign_of_life_at_a_time(pair: Pair) -> None:
    """NULL is not sent again before it is answered; its answer goes to no caller, and then it may be sent again."""
    for _ in range(2):
        assert (pair.send_null(), pair.send_null()) == (0, 0)
        head = pair.server.recv(4096)
        assert head[20:28] == u32(3, 0)  # once: version and procedure
        assert len(head) == 4 + (int.from_bytes(head[:4]) & 0x7FFF_FFFF)
        pair.server.sendall(record(head[4:8] + u32(1, 0) + u32(0, 0) + u32(0)))
        assert pair.receive() is None


def test_a_call_that_the_socket_has_no_room_for(pair: Pair) -> None:
    """It is refused as long as the one before it has not left, and nothing of it is sent."""
    data = os.urandom(1 << 20)
    call = pair.send(WRITE, b"handle", data)
    assert pair.send_at_once(call) == -errno.EBUSY
    assert pair.send_null() == 0
    sent = b""
    pair.server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while piece := pair.server.recv(1 << 20):
            sent += piece
    assert len(sent) < len(data)
    assert sent[-1000:] in data


@pytest.mark.parametrize("has_attributes", [True, False])
@pytest.mark.parametrize("first", [0, 4, 24, 40, 60, 200, 1000])
@pytest.mark.parametrize("empty", [200, 253, 254, 255, 256, 300, 500, 760, 1000])
def test_fragments_without_bytes(pair: Pair, empty: int, first: int, has_attributes: bool) -> None:
    """So many of them that the room for the data has marks alone, before the head is there."""
    content = os.urandom(3000)
    call = pair.send(READ, b"handle", bytes(3000))
    attributes = u32(1) + FATTR3 if has_attributes else u32(0)
    message = pair.answer(call, u32(0) + attributes + u32(3000, 1) + opaque(content))[4:]
    pair.server.sendall(
        u32(*[0] * empty) + u32(first) + message[:first] + u32(1 << 31 | len(message) - first) + message[first:]
    )
    answer = received(pair)
    assert (answer.call, answer.count_bytes) == (ctypes.addressof(call), 3000)
    assert pair.data.raw == content
    assert pair.receive() is None


def errors_of(pair: Pair, pieces: list[bytes]) -> int | None:
    """The errno with which the wire refuses what comes; in the end there come bytes that are nothing."""
    try:
        for piece in (*pieces, bytes(3000)):
            pair.server.sendall(piece)
            while pair.receive() is not None:
                pass
    except OSError as error:
        return error.errno
    return None


# What is not the answer: a function that makes it of a good one, without its mark
ODD_FRAGMENTS = {
    "2 GiB, first": lambda message: u32(0x7FFF_FFFF) + message,
    "2 GiB, second": lambda message: u32(24) + message[:24] + u32(0x7FFF_FFFF) + message[24:],
    "too long together": lambda message: u32(24) + message[:24] + u32(1 << 20 | 4096) + message[24:],
    "more than one": lambda message: (u32(24) + message[:24] + u32(1 << 31 | len(message) - 24) + message[24:]) * 2,
    "the end is missing": lambda message: u32(24) + message[:24] + u32(1 << 31 | 40) + message[24:64],
    "some data is missing": lambda message: u32(24) + message[:24] + u32(1 << 31 | len(message) - 28) + message[24:-4],
    "to no call": lambda message: u32(4) + b"none" + u32(1 << 31 | len(message) - 4) + message[4:],
    "a call": lambda message: u32(8) + message[:4] + u32(0, 1 << 31 | len(message) - 8) + message[8:],
    "nothing at all": lambda message: u32(0, 1 << 31),
    "it is rejected": lambda message: u32(8) + message[:8] + u32(1 << 31 | 4, 1),
}


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 21])
@pytest.mark.parametrize("others", [0, 1], ids=["one is due", "two are due"])
@pytest.mark.parametrize("make", ODD_FRAGMENTS.values(), ids=ODD_FRAGMENTS)
def test_odd_fragments(pair: Pair, make: Callable[[bytes], bytes], others: int, piece_bytes: int) -> None:
    """The connection has no more use, and the bytes around the room for the data are what they were."""
    for _ in range(others):
        pair.send(GETATTR, b"handle")
    call = pair.send(READ, b"handle", bytes(3000))
    message = pair.answer(call, u32(0, 0) + u32(3000, 1) + opaque(os.urandom(3000)))[4:]
    odd = make(message)
    assert errors_of(pair, [odd[at : at + piece_bytes] for at in range(0, len(odd), piece_bytes)]) == errno.EPROTO
