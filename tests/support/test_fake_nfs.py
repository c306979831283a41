# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fake NFS server follows RFC 1813 when no fault is set, and each fault does what it promises."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from support.fake_nfs import (
    FILE_SYNC,
    NFS3_OK,
    NFS3ERR_ACCES,
    NFS3ERR_IO,
    NFS3ERR_JUKEBOX,
    NFS3ERR_NOENT,
    NFS3ERR_STALE,
    UNSTABLE,
    Call,
    FakeNfsServer,
)
from support.nfs_server import LOOPBACK
from support.sunrpc import GARBAGE_ARGS, PROC_UNAVAIL, PROG_UNAVAIL, SUCCESS, XdrReader, opaque, u32, u64

DEADLINE_S = 10.0
NFS, MOUNT = 100003, 100005
CONTENT = bytes(range(256)) * 4


class Client:
    """Raw calls over one connection; replies are told apart by their xid."""

    def __init__(self, server: FakeNfsServer) -> None:
        self._socket = socket.create_connection((LOOPBACK, server.port), timeout=DEADLINE_S)
        self._stream = self._socket.makefile("rb")
        self._xids = itertools.count(1)
        self.size_before = 0

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def send(self, program: int, procedure: int, arguments: bytes) -> int:
        """Send a call, in two fragments; its xid."""
        xid = next(self._xids)
        message = u32(xid, 0, 2, program, 3, procedure, 0, 0, 0, 0) + arguments
        self._socket.sendall(u32(8) + message[:8] + u32(0x8000_0000 | len(message) - 8) + message[8:])
        return xid

    def receive(self) -> tuple[int, int, XdrReader]:
        """The next reply: xid, accept_stat and the result."""
        header = self._stream.read(4)
        if len(header) < 4:
            raise ConnectionError("the server closed the connection")
        reply = XdrReader(self._stream.read(int.from_bytes(header) & 0x7FFF_FFFF))
        xid, _kind, _accepted, _flavour, _length, accept_stat = (reply.u32() for _ in range(6))
        return xid, accept_stat, reply

    def call(self, program: int, procedure: int, arguments: bytes) -> XdrReader:
        xid = self.send(program, procedure, arguments)
        answered, accept_stat, result = self.receive()
        assert (answered, accept_stat) == (xid, SUCCESS)
        return result

    def mount(self, path: str = "/export") -> tuple[int, bytes]:
        result = self.call(MOUNT, 1, opaque(path.encode()))
        status = result.u32()
        return status, result.opaque() if status == NFS3_OK else b""

    def lookup(self, directory: bytes, name: str = "swap") -> tuple[int, bytes]:
        result = self.call(NFS, 3, opaque(directory) + opaque(name.encode()))
        status = result.u32()
        return status, result.opaque() if status == NFS3_OK else b""

    def read(self, handle: bytes, offset: int, count: int) -> tuple[int, bytes, bool]:
        result = self.call(NFS, 6, opaque(handle) + u64(offset) + u32(count))
        status = result.u32()
        if status != NFS3_OK:
            return status, b"", False
        assert result.u32() == 1
        for _ in range(21):  # fattr3
            result.u32()
        moved, at_end = result.u32(), bool(result.u32())
        data = result.opaque()
        assert moved == len(data)
        return status, data, at_end

    def write(self, handle: bytes, offset: int, data: bytes, stable: int) -> tuple[int, int, int, int]:
        """Status, count, committed, verifier."""
        result = self.call(NFS, 7, opaque(handle) + u64(offset) + u32(len(data), stable) + opaque(data))
        status = result.u32()
        if result.u32():  # wcc_data: before the write the size, and no times ...
            self.size_before, *times = result.u64(), *(result.u32() for _ in range(4))
            assert times == [0] * 4
        assert result.u32() == 0  # ... and after it nothing
        return (status, result.u32(), result.u32(), result.u64()) if status == NFS3_OK else (status, 0, 0, 0)

    def commit(self, handle: bytes) -> int:
        """The verifier."""
        result = self.call(NFS, 21, opaque(handle) + u64(0) + u32(0))
        assert (result.u32(), result.u32(), result.u32()) == (NFS3_OK, 0, 0)
        return result.u64()


@pytest.fixture
def server() -> Iterator[FakeNfsServer]:
    with FakeNfsServer(CONTENT) as server:
        yield server


@pytest.fixture
def client(server: FakeNfsServer) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.close()


@pytest.fixture
def handle(client: Client) -> bytes:
    """The file's handle."""
    return client.lookup(client.mount()[1])[1]


def test_finds_the_file_and_nothing_else(client: Client) -> None:
    """MNT takes the export only, LOOKUP the file only."""
    status, root = client.mount()
    assert status == NFS3_OK
    assert client.mount("/")[0] == client.mount("/other")[0] == NFS3ERR_ACCES
    assert client.lookup(root)[0] == NFS3_OK
    assert client.lookup(root, "swap2")[0] == NFS3ERR_NOENT


def test_reads(client: Client, handle: bytes) -> None:
    """Inside the file, across its end, beyond it."""
    assert client.read(handle, 10, 20) == (NFS3_OK, CONTENT[10:30], False)
    assert client.read(handle, 1000, 100) == (NFS3_OK, CONTENT[1000:], True)
    assert client.read(handle, 5000, 100) == (NFS3_OK, b"", True)


def test_writes_and_the_log(server: FakeNfsServer, client: Client, handle: bytes) -> None:
    """A write lands where it should; the log has offset, count and stability."""
    assert client.write(handle, 100, b"abc", FILE_SYNC)[:3] == (NFS3_OK, 3, FILE_SYNC)
    assert client.size_before == len(CONTENT)
    assert client.read(handle, 0, 50)[0] == NFS3_OK
    assert server.content == CONTENT[:100] + b"abc" + CONTENT[103:]
    assert server.calls("READ", "WRITE") == [Call("WRITE", 100, 3, FILE_SYNC), Call("READ", 0, 50, 0)]


@pytest.mark.parametrize("lying", [False, True])
def test_a_crash_loses_what_is_not_on_disk(server: FakeNfsServer, client: Client, handle: bytes, lying: bool) -> None:
    """Unstable writes are lost, committed and stable ones are not, unless the server lies; the verifier changes."""
    server.lying = lying
    verifier = client.write(handle, 0, b"committed", UNSTABLE)[3]
    assert client.commit(handle) == verifier
    assert client.write(handle, 10, b"stable", FILE_SYNC)[2:] == (FILE_SYNC, verifier)
    assert client.write(handle, 20, b"unstable", UNSTABLE)[2:] == (UNSTABLE, verifier)
    assert server.content[:28] == b"committed\x09stable" + CONTENT[16:20] + b"unstable"
    server.crash()
    with pytest.raises(ConnectionError):
        client.read(handle, 0, 1)
    kept = CONTENT if lying else b"committed\x09stable" + CONTENT[16:]
    assert server.content == server.on_disk == kept
    again = Client(server)
    assert again.commit(handle) != verifier
    again.close()


@pytest.mark.parametrize(("after", "done"), [(False, b"\0"), (True, b"x")])
def test_held_calls_are_done_before_or_after(
    server: FakeNfsServer, client: Client, handle: bytes, after: bool, done: bytes
) -> None:
    """A held write has had its effect only where that was asked for; released, it is answered."""
    server.hold("WRITE", after=after)
    xid = client.send(NFS, 7, opaque(handle) + u64(0) + u32(1, FILE_SYNC) + opaque(b"x"))
    server.wait_for(1, DEADLINE_S)
    assert server.content[:1] == done
    assert client.read(handle, 0, 1)[1] == done
    server.release()
    assert client.receive()[:2] == (xid, SUCCESS)
    assert (server.content[:1], server.held_count) == (b"x", 0)


@pytest.mark.parametrize("reverse", [False, True])
def test_release_in_order_and_in_reverse(server: FakeNfsServer, client: Client, handle: bytes, reverse: bool) -> None:
    """Replies come in the order asked for."""
    server.hold("READ")
    xids = [client.send(NFS, 6, opaque(handle) + u64(0) + u32(1)) for _ in range(5)]
    server.wait_for(5, DEADLINE_S)
    server.release(reverse=reverse)
    assert [client.receive()[0] for _ in range(5)] == (xids[::-1] if reverse else xids)


def test_wait_for_has_a_deadline(server: FakeNfsServer) -> None:
    """Without calls, the error has their number."""
    with pytest.raises(AssertionError, match="0 calls are held"):
        server.wait_for(1, 0.01)


def test_delays_overlap(server: FakeNfsServer, client: Client, handle: bytes) -> None:
    """Five calls delayed by 100 ms take that; a procedure without delay overtakes them."""
    server.delay("READ", 0.1)
    start = time.monotonic()
    xids = [client.send(NFS, 6, opaque(handle) + u64(0) + u32(1)) for _ in range(5)]
    overtaking = client.send(NFS, 0, b"")
    assert [client.receive()[0] for _ in range(6)] == [overtaking, *xids]
    assert 0.1 <= time.monotonic() - start < 0.4


def test_failures_by_number_and_for_good(server: FakeNfsServer, client: Client, handle: bytes) -> None:
    """The next two fail one way, all others the other, until that is ended; nothing is written meanwhile."""
    server.fail("WRITE", NFS3ERR_JUKEBOX, times=2)
    server.fail("WRITE", NFS3ERR_IO)
    statuses = [client.write(handle, 0, b"x", FILE_SYNC)[0] for _ in range(4)]
    assert statuses == [NFS3ERR_JUKEBOX, NFS3ERR_JUKEBOX, NFS3ERR_IO, NFS3ERR_IO]
    assert server.content == CONTENT
    server.fail("WRITE", NFS3_OK)
    assert client.write(handle, 0, b"x", FILE_SYNC)[0] == NFS3_OK


def test_limits_and_claims(server: FakeNfsServer, client: Client, handle: bytes) -> None:
    """Short transfers move and report less than was asked; claims report what was not done."""
    server.limit("READ", 7)
    server.limit("WRITE", 2)
    assert client.read(handle, 0, 100)[1] == CONTENT[:7]
    assert client.write(handle, 0, b"abc", FILE_SYNC)[1] == 2
    server.limit("WRITE", None)
    server.claim_count("WRITE", 99)
    server.claim_stable(UNSTABLE)
    assert client.write(handle, 0, b"abc", FILE_SYNC)[:3] == (NFS3_OK, 99, UNSTABLE)
    assert server.content[:3] == b"abc"
    server.limit("READ", None)
    server.claim_count("READ", 200)
    assert client.read(handle, 0, 100)[1] == server.content[:100] + b"?" * 100


def test_handles_go_stale(server: FakeNfsServer, client: Client, handle: bytes) -> None:
    """When they expire, and when the file is replaced; LOOKUP finds the new one."""
    server.expire_handles()
    assert client.read(handle, 0, 1)[0] == NFS3ERR_STALE
    fresh = client.lookup(client.mount()[1])[1]
    assert client.read(fresh, 0, 1)[1] == CONTENT[:1]
    server.replace(b"new", server.fileid + 1)
    assert client.read(fresh, 0, 1)[0] == NFS3ERR_STALE
    assert client.read(client.lookup(client.mount()[1])[1], 0, 9)[1] == b"new"


def test_what_it_does_not_understand(server: FakeNfsServer, client: Client) -> None:
    """Other programs and procedures, and arguments that end too early, are answered as RFC 5531 demands."""
    for program, procedure, arguments, expected in (
        (100000, 0, b"", PROG_UNAVAIL),
        (NFS, 99, b"", PROC_UNAVAIL),
        (NFS, 3, u32(1000), GARBAGE_ARGS),
    ):
        client.send(program, procedure, arguments)
        assert client.receive()[1] == expected
    server.mangle("GETATTR", lambda result: b"garbage!")
    assert client.call(NFS, 1, opaque(client.mount()[1])).u64() == int.from_bytes(b"garbage!")


def test_the_end_leaves_nothing() -> None:
    """Its thread ends, with a call held and a client connected; the client sees it."""
    with FakeNfsServer(CONTENT) as server:
        client = Client(server)
        server.hold("MNT")
        client.send(MOUNT, 1, opaque(b"/export"))
        server.wait_for(1, DEADLINE_S)
        name = f"rpc-server-{server.port}"
        assert name in [thread.name for thread in threading.enumerate()]
    assert name not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ConnectionError):
        client.receive()
    client.close()


def test_held_for_a_number_of_calls(server: FakeNfsServer, client: Client, handle: bytes) -> None:
    """One WRITE is held, the next is done; the held one is done in the end although its connection has gone."""
    server.hold("WRITE", times=1)
    client.send(NFS, 7, opaque(handle) + u64(0) + u32(3, FILE_SYNC) + opaque(b"old"))
    server.wait_for(1, DEADLINE_S)
    server.disconnect()
    again = Client(server)
    assert again.write(handle, 0, b"new", FILE_SYNC)[0] == NFS3_OK
    assert server.content[:3] == b"new"
    server.release()
    assert again.read(handle, 0, 3)[0] == NFS3_OK
    assert server.content[:3] == b"old"
    again.close()
