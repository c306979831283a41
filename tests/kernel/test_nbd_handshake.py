# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NBD handshake against a scripted server. The byte layouts are those of the NBD project's
doc/proto.md."""

import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdnfs.errors import NbdnfsError, PermissionDeniedError, UnavailableError, UsageError
from nbdnfs.kernel import nbd_handshake
from nbdnfs.kernel.nbd_handshake import Export, TransmissionFlags

GREETING = b"NBDMAGICIHAVEOPT" + b"\x00\x03"  # fixed newstyle, no zeroes
GO = 7
ACK, INFO = 1, 3
ERROR = 1 << 31


def reply(kind: int, payload: bytes = b"", option: int = GO) -> bytes:
    """One option reply: magic, the option it answers, its kind, length, payload."""
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload


def info_export(size_bytes: int, flags: int) -> bytes:
    return reply(INFO, struct.pack(">HQH", 0, size_bytes, flags))


def info_blocks(smallest: int, preferred: int, largest: int) -> bytes:
    return reply(INFO, struct.pack(">HIII", 3, smallest, preferred, largest))


@contextmanager
def said_by_server(data: bytes, *, hang_up: bool = True) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client socket on which the server has said everything already; nothing here runs concurrently."""
    client, server = socket.socketpair()
    with client, server:
        server.sendall(data)
        if hang_up:
            server.shutdown(socket.SHUT_WR)
        yield client, server


def negotiate(data: bytes, export_name: str = "", *, hang_up: bool = True, timeout_s: float = 5) -> Export:
    with said_by_server(data, hang_up=hang_up) as (client, _):
        return nbd_handshake.negotiate(client, export_name, timeout_s=timeout_s)


def test_size_flags_and_block_sizes() -> None:
    """An ordinary answer comes back as numbers and named flags."""
    export = negotiate(GREETING + info_export(1 << 31, 0x10D) + info_blocks(1, 4096, 1 << 25) + reply(ACK))
    assert export == Export(1 << 31, TransmissionFlags(0x10D), 1, 4096, 1 << 25)
    assert export.flags == (
        TransmissionFlags.HAS_FLAGS
        | TransmissionFlags.SEND_FLUSH
        | TransmissionFlags.SEND_FUA
        | TransmissionFlags.CAN_MULTI_CONN
    )
    assert export.can_flush
    assert export.can_fua
    assert export.can_multi_conn
    assert not export.can_trim
    assert not export.read_only


class PoorSocket(socket.socket):
    """Has no memory for every other call."""

    calls = 0

    def _spend(self) -> None:
        self.calls += 1
        if self.calls % 2:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    def send(self, *arguments: Any) -> int:
        self._spend()
        return super().send(*arguments)

    def sendall(self, *arguments: Any) -> None:
        self._spend()
        super().sendall(*arguments)

    def recv(self, *arguments: Any) -> bytes:
        self._spend()
        return super().recv(*arguments)


def test_no_memory_for_a_moment() -> None:
    """What the kernel had no memory for is sent and received again: the worker may be the only one there is."""
    with said_by_server(GREETING + info_export(4096, 1) + reply(ACK)) as (client, _):
        poor = PoorSocket(fileno=client.detach())
        with poor:
            assert nbd_handshake.negotiate(poor).size_bytes == 4096


def test_flags_without_a_name_are_kept() -> None:
    """A bit that only a later protocol names reaches the kernel all the same."""
    assert int(negotiate(GREETING + info_export(4096, 0x8001) + reply(ACK)).flags) == 0x8001


def test_block_sizes_default_to_those_of_the_protocol() -> None:
    """A server that names no block size takes what the protocol says clients may assume."""
    assert negotiate(GREETING + info_export(4096, 1) + reply(ACK)) == Export(
        4096, TransmissionFlags.HAS_FLAGS, 1, 4096, 1 << 25
    )


def test_other_information_is_skipped() -> None:
    """A name (1), a description (2) and kinds of the future do no harm."""
    extra = reply(INFO, b"\x00\x01name") + reply(INFO, b"\x00\x02what it is") + reply(INFO, b"\x12\x34")
    assert negotiate(GREETING + extra + info_export(8192, 1) + reply(ACK)).size_bytes == 8192


def test_what_the_client_says() -> None:
    """Our flags, then NBD_OPT_GO for the export with one information request: block size (3)."""
    with said_by_server(GREETING + info_export(4096, 1) + reply(ACK)) as (client, server):
        nbd_handshake.negotiate(client, "swäp")
        client.shutdown(socket.SHUT_WR)
        said = server.makefile("rb").read()
    name = "swäp".encode()
    data = struct.pack(">I", len(name)) + name + b"\x00\x01" + b"\x00\x03"
    assert said == struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", GO, len(data)) + data


def test_the_client_promises_no_more_than_the_server_offers() -> None:
    """Without NO_ZEROES from the server, none from us."""
    with said_by_server(b"NBDMAGICIHAVEOPT\x00\x01" + info_export(4096, 1) + reply(ACK)) as (client, server):
        nbd_handshake.negotiate(client)
        assert server.recv(4) == struct.pack(">I", 1)


def test_nothing_of_the_transmission_phase_is_read() -> None:
    """The byte after the last reply is still there, and the socket blocks again: both are the kernel's."""
    with said_by_server(GREETING + info_export(4096, 1) + reply(ACK) + b"K") as (client, _):
        nbd_handshake.negotiate(client)
        assert client.gettimeout() is None
        assert client.recv(10) == b"K"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the NBD handshake"),
        (b"NBDMAGIC" + b"\x00" * 8, "does not speak the NBD handshake"),
        (b"NBDMAGIC" + bytes.fromhex("0000420281861253") + b"\0" * 136, "speaks the oldstyle protocol"),
        (b"NBDMAGICIHAVEOPT\x00\x00", "not fixed newstyle"),
        (GREETING + b"\0" * 20, "another option than NBD_OPT_GO"),
        (GREETING + reply(ACK, option=3), "another option than NBD_OPT_GO"),
        (GREETING + reply(ACK), "before it gives the size"),
        (GREETING + reply(77), "unknown kind 77"),
        (GREETING + reply(INFO, b"\0"), "unknown kind 3"),
        (GREETING + reply(INFO, b"\0\0short"), "an information reply of 7 bytes instead of 12"),
        (GREETING + reply(INFO, b"\0\3short"), "an information reply of 7 bytes instead of 14"),
        (GREETING + info_export(1 << 63, 1) + reply(ACK), "9223372036854775808 bytes"),
        (GREETING + info_export(1, 1) + info_blocks(3, 4, 5) + reply(ACK), "block sizes of 3, 4 and 5"),
        (GREETING + info_export(1, 1) + info_blocks(0, 4, 5) + reply(ACK), "block sizes of 0, 4 and 5"),
        (GREETING + info_export(1, 1) + info_blocks(8, 4, 16) + reply(ACK), "block sizes of 8, 4 and 16"),
        (GREETING + struct.pack(">QIII", 0x3E889045565A9, GO, INFO, 1 << 31), "2147483648 bytes"),
        (GREETING + reply(INFO, b"\x12\x34") * 100, "more than 64 replies"),
        (b"", "closed the connection"),
        (b"NBDMAG", "closed the connection"),
        (GREETING, "closed the connection"),
        (GREETING + info_export(4096, 1), "closed the connection"),
    ],
)
def test_servers_that_do_not_keep_to_the_protocol(data: bytes, message: str) -> None:
    """Each kind of nonsense gets a line of its own, and a hint."""
    with pytest.raises(UnavailableError, match=message) as caught:
        negotiate(data)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (1, UnavailableError, "does not know NBD_OPT_GO"),
        (2, PermissionDeniedError, "policy"),
        (5, UnavailableError, "requires TLS"),
        (6, UnavailableError, r"refuses the export 'x': the server has no such export.*\(look elsewhere\)"),
        (7, UnavailableError, "shutting down"),
        (99, UnavailableError, "error 99"),
    ],
)
def test_refusals(code: int, kind: type[NbdnfsError], message: str) -> None:
    """The server's reason and its own words are in the message."""
    with pytest.raises(kind, match=message):
        negotiate(GREETING + reply(ERROR | code, b"look elsewhere"), "x")


def test_a_refused_client_says_goodbye() -> None:
    """The protocol wants NBD_OPT_ABORT (2) from a client that gives up."""
    with said_by_server(GREETING + reply(ERROR | 6)) as (client, server):
        with pytest.raises(UnavailableError):
            nbd_handshake.negotiate(client)
        client.shutdown(socket.SHUT_WR)
        assert server.makefile("rb").read().endswith(b"IHAVEOPT" + struct.pack(">II", 2, 0))


def test_a_refusal_cannot_paint_on_the_terminal() -> None:
    """Control characters and endless texts from the server do not get into the message."""
    with pytest.raises(NbdnfsError) as caught:
        negotiate(GREETING + reply(ERROR | 6, b"\x1b[2J\n" + b"x" * 10_000))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_an_export_name_has_a_limit() -> None:
    """Names of more than 4096 bytes are refused before anything is sent."""
    with pytest.raises(UsageError, match="4097 bytes is too long"):
        negotiate(GREETING, "x" * 4097)


@pytest.mark.parametrize("data", [b"", GREETING, GREETING + info_export(4096, 1)])
def test_a_silent_server_runs_into_the_deadline(data: bytes) -> None:
    """A server that stops talking, but keeps the connection, is given up in time."""
    before = time.monotonic()
    with pytest.raises(UnavailableError, match=r"within 0\.05 s"):
        negotiate(data, hang_up=False, timeout_s=0.05)
    assert time.monotonic() - before < 2


def test_the_deadline_is_over_everything() -> None:
    """A server that keeps sending a byte now and then does not prolong it."""
    client, server = socket.socketpair()
    done = threading.Event()

    def drip() -> None:
        for byte in GREETING + reply(INFO, b"\x12\x34" + b"x" * 1000):
            if done.wait(0.01):
                return
            server.send(bytes([byte]))

    thread = threading.Thread(target=drip)
    with client, server:
        thread.start()
        before = time.monotonic()
        try:
            with pytest.raises(UnavailableError, match=r"within 0\.2 s"):
                nbd_handshake.negotiate(client, timeout_s=0.2)
        finally:
            done.set()
            thread.join()
    assert time.monotonic() - before < 2


def test_a_deadline_that_has_passed() -> None:
    """Nothing is read after it, also what is there already."""
    with pytest.raises(UnavailableError, match="within 0 s"):
        negotiate(GREETING + info_export(4096, 1) + reply(ACK), timeout_s=0.0)


def test_a_reset_connection() -> None:
    """An error of the socket is a server that hung up, too."""
    with said_by_server(b"", hang_up=False) as (client, server):
        server.close()
        with pytest.raises(UnavailableError, match="closed the connection"):
            nbd_handshake.negotiate(client)


replies = st.builds(
    reply, st.sampled_from([ACK, INFO, 2, 4, ERROR | 1, ERROR | 6]), st.binary(max_size=40), st.sampled_from([GO, 6])
)
infos = st.one_of(
    st.builds(info_export, st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1)),
    st.builds(info_blocks, *[st.integers(0, 2**32 - 1)] * 3),
)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=200).map(GREETING.__add__),
        st.lists(st.one_of(replies, infos), max_size=8).map(b"".join).map(GREETING.__add__),
    )
)
def test_any_bytes_give_an_export_or_an_error_of_ours(data: bytes) -> None:
    """Whatever a server says, the outcome is an Export that fits the kernel or an NbdnfsError."""
    export = None
    with suppress(NbdnfsError):
        export = negotiate(data)
    if export is not None:
        assert 0 <= export.size_bytes < 1 << 63
        assert 1 <= export.min_block_bytes <= export.preferred_block_bytes <= export.max_block_bytes


@given(st.binary(max_size=300))
def test_reads_are_bounded(data: bytes) -> None:
    """No more is read than the limits allow, whatever lengths the server announces."""
    limit = 18 + nbd_handshake.MAX_REPLIES * (20 + nbd_handshake.MAX_REPLY_BYTES)

    class FakeSocket:
        """Serves the data over and over, and counts."""

        read = 0
        position = 0

        def recv(self, count: int) -> bytes:
            source = GREETING + data
            piece = bytes(source[(self.position + i) % len(source)] for i in range(count))
            self.position += count
            self.read += count
            return piece

        settimeout: Callable[..., None] = staticmethod(lambda _: None)
        send: Callable[..., int] = staticmethod(len)

    fake = FakeSocket()
    with suppress(NbdnfsError):
        nbd_handshake.negotiate(fake)  # type: ignore[arg-type]
    assert fake.read <= limit
