# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fake NAS follows RFC 1813 when nothing is odd, and each oddity and fault does what it promises."""

from __future__ import annotations

import dataclasses
import itertools
import random
import socket
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from nbdnfs.engine import NfsError, NfsFile
from support.fake_nas import MOUNT, NFS, PORTMAP, FakeNas, Oddities, fragments
from support.fake_nfs import (
    FILE_SYNC,
    NFS3_OK,
    NFS3ERR_ACCES,
    NFS3ERR_IO,
    NFS3ERR_JUKEBOX,
    NFS3ERR_NOENT,
    NFS3ERR_STALE,
    UNSTABLE,
)
from support.nfs_server import LOOPBACK, free_ports
from support.sunrpc import GARBAGE_ARGS, PROC_UNAVAIL, PROG_UNAVAIL, SUCCESS, XdrReader, opaque, record, u32, u64

DEADLINE_S = 10.0
CONTENT = bytes(range(256)) * 64
PATH = "/export/dir/swap"


class Client:
    """Raw calls over one connection, one after the other. Closed at the end of the test."""

    opened: ClassVar[list[Client]] = []

    def __init__(self, port: int, timeout_s: float = DEADLINE_S) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), timeout=timeout_s)
        self._stream = self._socket.makefile("rb")
        self._xids = itertools.count(1)
        self.fragments = 0
        self.opened.append(self)

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def send(self, program: int, procedure: int, arguments: bytes = b"", version: int = 3) -> int:
        xid = next(self._xids)
        self._socket.sendall(record(u32(xid, 0, 2, program, version, procedure, 0, 0, 0, 0) + arguments))
        return xid

    def receive(self) -> tuple[int, int, XdrReader]:
        """xid, accept_stat and the results."""
        message, last = b"", 0
        while not last:
            header = self._stream.read(4)
            if len(header) < 4:
                raise ConnectionError("the server closed the connection")
            last, length = header[0] & 0x80, int.from_bytes(header) & 0x7FFF_FFFF
            message += self._stream.read(length)
            self.fragments += 1
        reply = XdrReader(message)
        xid, _kind, _accepted, _flavour, _length, accept_stat = (reply.u32() for _ in range(6))
        return xid, accept_stat, reply

    def call(self, program: int, procedure: int, arguments: bytes = b"") -> XdrReader:
        xid = self.send(program, procedure, arguments)
        found, accept_stat, results = self.receive()
        assert (found, accept_stat) == (xid, SUCCESS)
        return results

    def lookup(self, directory: bytes, name: str) -> bytes:
        results = self.call(NFS, 3, opaque(directory) + opaque(name.encode()))
        assert results.u32() == NFS3_OK
        return results.opaque()


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while Client.opened:
        Client.opened.pop().close()


@pytest.fixture
def nas() -> Iterator[FakeNas]:
    with FakeNas(seed=1) as nas:
        nas.add(PATH, CONTENT)
        yield nas


def mount(nas: FakeNas, path: str = "/export") -> tuple[int, bytes]:
    client = Client(nas.mount_port)
    results = client.call(MOUNT, 1, opaque(path.encode()))
    status = results.u32()
    return status, results.opaque() if status == NFS3_OK else b""


def open_swap(nas: FakeNas) -> tuple[Client, bytes]:
    client = Client(nas.port)
    return client, client.lookup(client.lookup(mount(nas)[1], "dir"), "swap")


def write(client: Client, handle: bytes, data: bytes, stable: int) -> tuple[int, int, int, int]:
    """Status, count, committed and verifier."""
    results = client.call(NFS, 7, opaque(handle) + u64(0) + u32(len(data), stable) + opaque(data))
    status = results.u32()
    for words in (6, 21):  # wcc_data
        if results.u32():
            [results.u32() for _ in range(words)]
    return status, results.u32(), results.u32(), results.u64()


def read(client: Client, handle: bytes, count: int) -> bytes:
    results = client.call(NFS, 6, opaque(handle) + u64(0) + u32(count))
    assert results.u32() == NFS3_OK
    if results.u32():
        [results.u32() for _ in range(21)]
    results.u64()
    return results.opaque()


def test_through_libnfs(nas: FakeNas) -> None:
    """Open, read, write, create, link, rename, unlink and stat, as an independent implementation does them."""
    with nas.files() as tree:
        tree.make(tree.make_directories("/export"), "way", 5, 0o777).target = "dir"
    file = NfsFile(nas.url("/export/way/swap"), LOOPBACK)
    buffer = bytearray(8192)
    assert file.pread(buffer, 4096) == 8192
    assert buffer == CONTENT[4096 : 4096 + 8192]
    file.link("/swap", "/other")
    assert file.stat()["nlink"] == 2
    file.rename("/other", "/third")
    assert nas.names("/export/dir") == ["swap", "third"]
    file.unlink("/third")
    assert file.lookup("/swap")["ino"] == file.stat()["ino"]
    with pytest.raises(NfsError):
        file.lookup("/third")
    file.close()
    new = NfsFile(nas.url("/export/new"), LOOPBACK, create=True, exclusive=True)
    assert new.pwrite(b"new", 1) == 3
    new.close()
    assert nas.on_disk("/export/new") == b"\0new"


def test_a_crash_takes_what_was_not_committed(nas: FakeNas) -> None:
    """UNSTABLE is lost, FILE_SYNC and COMMIT are not; the verifier is another after it."""
    client, handle = open_swap(nas)
    status, _count, committed, verifier = write(client, handle, b"one", UNSTABLE)
    assert (status, committed) == (NFS3_OK, UNSTABLE)
    nas.restart()
    client = Client(nas.port)
    assert read(client, handle, 3) == CONTENT[:3]
    assert write(client, handle, b"two", UNSTABLE)[3] != verifier
    assert client.call(NFS, 21, opaque(handle) + u64(0) + u32(0)).u32() == NFS3_OK
    assert nas.on_disk(PATH)[:3] == b"two"
    write(client, handle, b"six", FILE_SYNC)
    nas.restart()
    assert nas.content(PATH)[:3] == b"six"


def test_what_a_restart_changes() -> None:
    """Handles, file numbers and fsid, each where it is asked for."""
    for new_handles, new_fileids, new_fsid in itertools.product((False, True), repeat=3):
        with FakeNas(Oddities(new_handles=new_handles, new_fileids=new_fileids, new_fsid=new_fsid)) as nas:
            nas.add(PATH)
            client, handle = open_swap(nas)
            before = client.call(NFS, 1, opaque(handle))
            nas.restart()
            client = Client(nas.port)
            status = client.call(NFS, 1, opaque(handle)).u32()
            assert status == (NFS3ERR_STALE if new_handles else NFS3_OK)
            client, handle = open_swap(nas)
            after = client.call(NFS, 1, opaque(handle))
            # status, type, mode, links, uid, gid, size, used and rdev come before fsid and fileid
            old, new = ([results.u32() for _ in range(22)][12:16] for results in (before, after))
            assert (old[:2] != new[:2], old[2:] != new[2:]) == (new_fsid, new_fileids)


def test_exports() -> None:
    """Ten thousand are listed; a closed one is listed and refused; a path of no export is refused."""
    exports = tuple(f"/export{number}" for number in range(10_000))
    with FakeNas(Oddities(exports=exports, closed_exports=("/export1/closed",))) as nas:
        client = Client(nas.mount_port)
        results = client.call(MOUNT, 5)
        listed = []
        while results.u32():
            listed.append(results.opaque().decode())
            assert results.u32() == 0
        assert listed == [*exports, "/export1/closed"]
        assert mount(nas, "/export9999/")[0] == NFS3_OK
        assert mount(nas, "/export1/closed")[0] == mount(nas, "/")[0] == NFS3ERR_ACCES
        assert mount(nas, "")[0] == NFS3ERR_NOENT
    with FakeNas(Oddities(exports=("/",))) as nas:
        assert mount(nas, "/")[0] == NFS3_OK


@pytest.mark.parametrize("size", [8, 64])
def test_handles_of_any_length(size: int) -> None:
    """Each is as long as it was asked for, and leads to its file."""
    with FakeNas(Oddities(handle_bytes=size)) as nas:
        nas.add(PATH, CONTENT)
        client, handle = open_swap(nas)
        assert len(handle) == size
        assert read(client, handle, 8) == CONTENT[:8]
        nas.expire_handles()
        assert client.call(NFS, 1, opaque(handle)).u32() == NFS3ERR_STALE


def test_limits_and_short_transfers() -> None:
    """READ and WRITE move what the limits allow, or fewer; FSINFO tells the truth, and a change is in force at once."""
    with FakeNas(Oddities(rtmax=8192, wtmax=4096, shortest_bytes=1), seed=3) as nas:
        nas.add(PATH, CONTENT)
        client, handle = open_swap(nas)
        sizes = {len(read(client, handle, 16384)) for _ in range(50)}
        assert len(sizes) > 20
        assert max(sizes) <= 8192
        assert all(1 <= write(client, handle, bytes(8192), FILE_SYNC)[1] <= 4096 for _ in range(50))
        nas.become(dataclasses.replace(nas.oddities, rtmax=4096, rtpref=512, shortest_bytes=None))
        results = client.call(NFS, 19, opaque(handle))
        assert [results.u32() for _ in range(2 + 21)][:2] == [NFS3_OK, 1]
        assert [results.u32() for _ in range(5)] == [4096, 512, 1, 4096, 4096]
        assert len(read(client, handle, 16384)) == 4096


def test_no_attributes_and_another_stability() -> None:
    """Nothing of post_op_attr and wcc_data, and DATA_SYNC for UNSTABLE, which is on the disk then."""
    with FakeNas(Oddities(has_attributes=False, stability=1)) as nas:
        nas.add(PATH, CONTENT)
        client, handle = open_swap(nas)
        results = client.call(NFS, 7, opaque(handle) + u64(0) + u32(3, UNSTABLE) + opaque(b"one"))
        assert [results.u32() for _ in range(5)] == [NFS3_OK, 0, 0, 3, 1]
        assert nas.on_disk(PATH)[:3] == b"one"


def test_fragments() -> None:
    """An answer in pieces is the same answer; the same seed cuts alike."""
    message = bytes(range(256)) * 400
    assert fragments(message, random.Random(5)) == fragments(message, random.Random(5))
    with FakeNas(Oddities(in_fragments=True), seed=5) as nas:
        nas.add(PATH, CONTENT)
        client, handle = open_swap(nas)
        before = client.fragments
        assert [read(client, handle, 16384) for _ in range(10)] == [CONTENT] * 10
        assert client.fragments - before > 10


def test_faults_of_single_calls(nas: FakeNas) -> None:
    """Refused, dropped with and without its work, and delayed: the call that was meant, and no other."""
    client, handle = open_swap(nas)
    nas.jukebox("GETATTR", times=1, after=1)
    statuses = [client.call(NFS, 1, opaque(handle)).u32() for _ in range(3)]
    assert statuses == [NFS3_OK, NFS3ERR_JUKEBOX, NFS3_OK]
    nas.fail("ACCESS", NFS3ERR_IO)
    nas.end_faults()
    assert client.call(NFS, 4, opaque(handle) + u32(1)).u32() == NFS3_OK
    for executed in (True, False):
        nas.drop("WRITE", executed=executed)
        data = b"yes" if executed else b"not"
        client.send(NFS, 7, opaque(handle) + u64(0) + u32(3, FILE_SYNC) + opaque(data))
        xid = client.send(NFS, 0)
        assert client.receive()[0] == xid
        assert nas.struck("WRITE")
    assert nas.content(PATH)[:3] == b"yes"
    nas.delay("READ", 0.2)
    sent_s = time.monotonic()
    late = client.send(NFS, 6, opaque(handle) + u64(0) + u32(3))
    xid = client.send(NFS, 0)
    assert client.receive()[0] == xid
    assert client.receive()[0] == late
    assert time.monotonic() - sent_s >= 0.2
    nas.jukebox("NULL", seconds=0.1)
    time.sleep(0.1)
    assert client.call(NFS, 0) is not None


def test_odd_procedures() -> None:
    """JUKEBOX at random, the same for the same seed; every third LOOKUP is silent."""
    with FakeNas(Oddities(jukebox_chance=0.5)) as nas:
        nas.add(PATH)
        client = Client(nas.port)
        root = mount(nas)[1]
        statuses = {client.call(NFS, 1, opaque(root)).u32() for _ in range(30)}
        assert statuses == {NFS3_OK, NFS3ERR_JUKEBOX}
    with FakeNas(Oddities(silent_every={"GETATTR": 3})) as nas:
        root = mount(nas)[1]
        client = Client(nas.port)
        sent = [client.send(NFS, 1, opaque(root)) for _ in range(4)]
        assert [client.receive()[0] for _ in range(3)] == [sent[0], sent[1], sent[3]]


def test_mutated_answers(nas: FakeNas) -> None:
    """What the function returns goes over the wire; None leaves the answer alone."""
    client, handle = open_swap(nas)
    nas.mutate(lambda call, message: record(message[:4] + b"garbage?" * 4) if call.op == "GETATTR" else None)
    client.send(NFS, 1, opaque(handle))
    assert client.receive()[1] == int.from_bytes(b"garb")
    assert client.call(NFS, 0) is not None
    nas.mutate(lambda call, message: b"")
    client.send(NFS, 1, opaque(handle))
    nas.mutate(None)


def test_mountd_and_connections(nas: FakeNas) -> None:
    """MOUNT ends and begins apart from NFS; a reset closes every connection for files."""
    client, handle = open_swap(nas)
    nas.stop_mountd()
    with pytest.raises(ConnectionRefusedError):
        Client(nas.mount_port)
    assert client.call(NFS, 1, opaque(handle)).u32() == NFS3_OK
    nas.start_mountd()
    assert mount(nas)[0] == NFS3_OK
    nas.disconnect()
    with pytest.raises(ConnectionError):
        client.call(NFS, 0)
    assert nas.answers >= 4
    assert [call.name for call in nas.calls("LOOKUP")] == ["dir", "swap"]


def test_an_idle_connection_is_closed() -> None:
    """After its time, and not before."""
    with FakeNas(Oddities(idle_limit_s=0.3)) as nas:
        client = Client(nas.port)
        begun_s = time.monotonic()
        client.call(NFS, 0)
        with pytest.raises(ConnectionError):
            client.receive()
        assert time.monotonic() - begun_s >= 0.3


def test_the_portmapper() -> None:
    """Versions 2 and 3; 0 and "" for what is not there."""
    with FakeNas(portmap_port=free_ports(1)[0]) as nas:
        assert nas._portmap_port is not None
        client = Client(nas._portmap_port)
        client.send(PORTMAP, 3, u32(MOUNT, 3, 6, 0), 2)
        assert client.receive()[2].u32() == nas.mount_port
        client.send(PORTMAP, 3, u32(NFS, 4, 6, 0), 2)
        assert client.receive()[2].u32() == 0
        client.send(PORTMAP, 3, u32(NFS, 3) + opaque(b"tcp") + opaque(b"") + opaque(b""))
        assert client.receive()[2].opaque() == f"0.0.0.0.{nas.port >> 8}.{nas.port & 255}".encode()


def test_what_it_does_not_understand(nas: FakeNas) -> None:
    """Other programs and procedures, and arguments that end too early."""
    client = Client(nas.port)
    for program, procedure, arguments, expected in (
        (100021, 0, b"", PROG_UNAVAIL),
        (NFS, 11, b"", PROC_UNAVAIL),
        (NFS, 99, b"", PROC_UNAVAIL),
        (NFS, 3, u32(1000), GARBAGE_ARGS),
    ):
        client.send(program, procedure, arguments)
        assert client.receive()[1] == expected
