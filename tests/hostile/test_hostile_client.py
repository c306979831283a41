# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine's loop against NBD clients that send anything: what is well formed is answered, and serving ends."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import PAGE, opening, read_pages
from support.fake_nfs import FakeNfsServer
from support.nbd_client import READ, WRITE
from support.waiting import DEADLINE_S, in_background

from nbdnfs.engine import Engine
from nbdnfs.kernel import nbd_handshake

PAGES = 256
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
REQUEST_BYTES_MAX = 1 << 20
LARGE = 1 << 63
# An hour: what is not called for hangs.
TICK_MS = 3_600_000
HELLO = struct.pack(">I", 3)
GO = struct.pack(">8sIIIH", b"IHAVEOPT", 7, 6, 0, 0)

magics = st.sampled_from([REQUEST_MAGIC] * 30 + [0, REPLY_MAGIC, REQUEST_MAGIC ^ 1, 0xFFFFFFFF])
flags = st.sampled_from([0, 0, 0, 1, 2, 4, 16, 0x8000, 0xFFFF])
kinds = st.sampled_from([0, 0, 1, 1, 1, 3, 4, 6, 5, 7, 77, 0xFFFF])
offsets = st.one_of(
    st.integers(0, PAGES).map(lambda page: page * PAGE),
    st.sampled_from([1, PAGE - 1, PAGES * PAGE - 1, LARGE, LARGE - PAGE, (1 << 64) - PAGE, (1 << 64) - 1]),
)
lengths = st.one_of(
    st.integers(0, 64).map(lambda count: count * PAGE),
    st.sampled_from([1, PAGE + 1, REQUEST_BYTES_MAX, REQUEST_BYTES_MAX + PAGE, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]),
)
requests = st.lists(st.tuples(magics, flags, kinds, offsets, lengths), max_size=12)
# how many bytes a write sends beside what it says: none, some of it, or more
slips = st.sampled_from([0] * 20 + [-PAGE, -1, 1, 27, 28, PAGE])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One for all clients, which come one after the other."""
    with FakeNfsServer(os.urandom(PAGES * PAGE)) as server, opening() as open_engine:
        yield open_engine(server.url(), region_pages=256, connections=2)


class Client:
    """A socket whose other end the loop serves."""

    def __init__(self, engine: Engine) -> None:
        self.socket, self._theirs = socket.socketpair()
        self.socket.settimeout(DEADLINE_S)
        self.serving = in_background(self._serve, engine)

    def _serve(self, engine: Engine) -> None:
        with self._theirs:
            engine.serve(self._theirs.fileno(), TICK_MS)

    def send(self, stream: bytes, cuts: random.Random) -> None:
        """In pieces of any length, and no more; what the loop does not receive any more is left."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while stream:
                piece = cuts.choice([1, 3, 28, 4096, 100_000])
                self.socket.sendall(stream[:piece])
                stream = stream[piece:]
            self.socket.shutdown(socket.SHUT_WR)

    def received(self) -> bytes:
        """All that comes until the loop hangs up."""
        found = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(1 << 16):
                found += piece
        return bytes(found)

    def result(self) -> int:
        """0, or the errno with which serving ended."""
        try:
            self.serving.result(DEADLINE_S)
        except OSError as error:
            return error.errno or -1
        return 0


def check_works(engine: Engine) -> None:
    """The next client is served, and all of the device can be read."""
    client = Client(engine)
    nbd_handshake.negotiate(client.socket)
    request = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, READ, 1, 0, PAGE)
    client.socket.sendall(request)
    assert client.socket.recv(16, socket.MSG_WAITALL) == struct.pack(">IIQ", REPLY_MAGIC, 0, 1)
    assert client.socket.recv(PAGE, socket.MSG_WAITALL) == read_pages(engine, 0)
    client.socket.close()
    assert client.result() == 0


def replies(stream: bytes, lengths_by_cookie: dict[int, int]) -> list[int]:
    """The cookies of whole replies, one after the other; AssertionError where it is anything else."""
    found = []
    at = 0
    while at + 16 <= len(stream):
        magic, error, cookie = struct.unpack_from(">IIQ", stream, at)
        assert magic == REPLY_MAGIC
        assert error in (0, 1, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC)
        at += 16 + (lengths_by_cookie[cookie] if error == 0 else 0)
        found.append(cookie)
    assert at == len(stream)
    return found


@pytest.mark.fake
@given(requests, st.lists(slips, min_size=12, max_size=12), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_requests(engine: Engine, requests: list[tuple[int, int, int, int, int]], slips: list[int], seed: int) -> None:
    """Whatever their magic, flags, kind, range and length, and however much data follows: each reply is whole and to a
    request that was sent, at most one to each, and serving ends when the client does."""
    cuts = random.Random(seed)  # hypothesis calls an example too large that is made of so many bytes
    stream, data_lengths, is_odd = bytearray(), {}, False
    for cookie, (magic, flag, kind, offset, length) in enumerate(requests):
        stream += struct.pack(">IHHQQI", magic, flag, kind, cookie, offset, length)
        data_lengths[cookie] = length if kind == READ else 0
        if kind == WRITE:
            stream += cuts.randbytes(max(0, min(length, REQUEST_BYTES_MAX + PAGE) + slips[cookie]))
            is_odd |= slips[cookie] != 0
    client = Client(engine)
    nbd_handshake.negotiate(client.socket)
    sending = in_background(client.send, bytes(stream), cuts)
    received = client.received()
    sending.result(DEADLINE_S)
    assert client.result() in (0, errno.EPROTO)
    client.socket.close()
    if not is_odd:  # else what was data may have been taken for requests, which have any cookie
        found = replies(received, data_lengths)
        assert len(set(found)) == len(found)
    check_works(engine)


@pytest.mark.fake
@given(st.binary(max_size=64), st.integers(0, len(HELLO + GO)), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_handshakes(engine: Engine, junk: bytes, right_bytes: int, cuts: random.Random) -> None:
    """The beginning of a handshake, and then anything: serving ends when the client does."""
    client = Client(engine)
    client.send((HELLO + GO)[:right_bytes] + junk, cuts)
    client.received()
    assert client.result() in (0, errno.EPROTO)
    client.socket.close()
    check_works(engine)
