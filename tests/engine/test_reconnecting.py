# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handle is the file: what a connection over NFSv3 needs after the first open, and what it does not need."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from support.engines import PAGE, OpenEngine, opening, read_pages, results, write_pages_and_flush
from support.fake_nfs import NFS3ERR_JUKEBOX, Call, FakeNfsServer
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

from nbdnfs.engine import NfsError

MIB = 1 << 20
MIB_PAGES = MIB // PAGE
SIZE = 4 * MIB
INVAL = 22


@pytest.fixture
def new_fake() -> Iterator[Callable[..., FakeNfsServer]]:
    """`new_fake(...)`: a fake server with a file of random bytes, for the test."""
    servers: list[FakeNfsServer] = []

    def make(**options: object) -> FakeNfsServer:
        servers.append(FakeNfsServer(os.urandom(SIZE), **options).__enter__())  # type: ignore[arg-type]
        return servers[-1]

    yield make
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture
def open_engine(new_fake: Callable[..., FakeNfsServer]) -> Iterator[OpenEngine]:
    """As in support/engines.py; closed before the servers end."""
    with opening() as open_it:
        yield open_it


@pytest.fixture
def fake(new_fake: Callable[..., FakeNfsServer]) -> FakeNfsServer:
    return new_fake()


def caller(call: Call) -> str:
    """The machine name of its caller."""
    return call.credentials.machine if call.credentials is not None else ""


def by_libnfs(fake: FakeNfsServer) -> list[Call]:
    """The calls that libnfs has made."""
    return [call for call in fake.calls() if caller(call) == "libnfs"]


def page_of(fake: FakeNfsServer, number: int) -> bytes:
    return fake.content[number * PAGE : (number + 1) * PAGE]


@pytest.mark.parametrize("connections", [1, 4])
def test_libnfs_opens_the_file_once(fake: FakeNfsServer, open_engine: OpenEngine, connections: int) -> None:
    """Further connections, and those after a break, are four steps, and nothing of mountd, names or libnfs."""
    engine = open_engine(fake.url(), connections=connections)
    opened = len(by_libnfs(fake))
    assert len(fake.calls("MNT")) == 1
    assert not fake.calls("EXPORT")
    for number in range(3):
        fake.disconnect()
        assert in_background(read_pages, engine, number).result(DEADLINE_S) == page_of(fake, number)
    assert len(by_libnfs(fake)) == opened
    calls = fake.calls()
    last = [call.op for call in calls if call.connection == fake.calls("READ")[-1].connection]
    assert last[:3] == ["NULL", "GETATTR", "FSINFO"]
    assert not set(last) & {"LOOKUP", "ACCESS", "MNT", "EXPORT", "PATHCONF"}


def test_mountd_is_dead(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The NFS server is well, and the connection breaks: everything goes on."""
    engine = open_engine(fake.url())
    fake.stop_mounting()
    fake.crash()
    page = os.urandom(PAGE)
    in_background(write_pages_and_flush, engine, 0, page).result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == page


def test_the_file_was_renamed(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Its handle is good: it is the file."""
    engine = open_engine(fake.url())
    fake.fail("LOOKUP", 2)
    fake.crash()
    assert in_background(read_pages, engine, 5).result(DEADLINE_S) == page_of(fake, 5)


@pytest.mark.parametrize("known", [0, 1, 5])
def test_other_file_numbers_after_a_boot(fake: FakeNfsServer, open_engine: OpenEngine, known: int) -> None:
    """A FUSE file system numbers its files again: several pages that are right say that it is the file."""
    engine = open_engine(fake.url(), gone_limit_ms=0)
    for number in range(known):
        write_pages_and_flush(engine, number * 7, os.urandom(PAGE))
    fake.replace(fake.content, fake.fileid + 77)
    fake.crash()
    reading = in_background(read_pages, engine, 200)
    if known >= 2:
        assert reading.result(DEADLINE_S) == page_of(fake, 200)
        # and the new number is what the next connection finds
        fake.crash()
        lookups = len(fake.calls("LOOKUP"))
        assert in_background(read_pages, engine, 201).result(DEADLINE_S) == page_of(fake, 201)
        assert len(fake.calls("LOOKUP")) == lookups
    else:
        lookups = len(fake.calls("LOOKUP"))
        wait_until(lambda: len(fake.calls("LOOKUP")) >= lookups + 2, "it goes on looking for the old file")
        assert not reading.done()
        fake.replace(fake.content, 1000)
        assert reading.result(DEADLINE_S) == page_of(fake, 200)


@pytest.mark.parametrize("step", [1, 30], ids=["the first that is compared", "others are right"])
def test_other_file_numbers_and_one_wrong_page(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str], step: int
) -> None:
    """A copy from yesterday is not the file, even if most of it is the same."""
    engine = open_engine(fake.url(), gone_limit_ms=0)
    said = SaidOnStderr(capfd)
    for number in range(4):
        write_pages_and_flush(engine, number * step, os.urandom(PAGE))
    before = fake.content
    fake.replace(bytes(2 * PAGE) + before[2 * PAGE :], fake.fileid + 1)
    fake.crash()
    reading = in_background(read_pages, engine, 200)
    said.wait_for("replaced by another")
    assert not reading.done()
    fake.replace(before, 1000)
    assert reading.result(DEADLINE_S) == before[200 * PAGE : 201 * PAGE]


# What the server takes in one call


@pytest.mark.parametrize("refuse", [None, INVAL], ids=["moves less", "refuses more"])
@pytest.mark.parametrize("limit_bytes", [4096, 6000, 32768])
def test_a_server_that_takes_less_after_a_restart(
    fake: FakeNfsServer, open_engine: OpenEngine, limit_bytes: int, refuse: int | None
) -> None:
    """The limits are those of each connection: what waits is cut again, and no call is larger."""
    engine = open_engine(fake.url(), connections=2, region_pages=1024)
    data = os.urandom(MIB)
    write_pages_and_flush(engine, 0, data)
    fake.shrink_transfers(limit_bytes, refuse)
    before = len(fake.calls("READ", "WRITE"))
    fake.crash()
    data = os.urandom(MIB)
    in_background(write_pages_and_flush, engine, MIB_PAGES, data).result(DEADLINE_S)
    pieces = [in_background(read_pages, engine, 2 * MIB_PAGES + number * 32, 32) for number in range(8)]
    assert b"".join(results(pieces)) == fake.content[2 * MIB : 3 * MIB]
    assert fake.on_disk[MIB : 2 * MIB] == data
    assert max(call.count for call in fake.calls("READ", "WRITE")[before:]) <= limit_bytes
    assert limit_bytes < 32768 or max(call.count for call in fake.calls("WRITE")[before:]) == limit_bytes


def test_a_write_that_moved_more_than_was_sent(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Where a write is several calls, an answer that claims all of it for the first is not believed."""
    engine = open_engine(fake.url())
    fake.shrink_transfers(4096)
    fake.disconnect()
    fake.claim_count("WRITE", 8192)
    data = os.urandom(8192)
    written = in_background(write_pages_and_flush, engine, 0, data)
    wait_until(lambda: len({call.connection for call in fake.calls("WRITE")}) > 1, "another connection")
    assert not written.done()
    fake.claim_count("WRITE", None)
    written.result(DEADLINE_S)
    assert fake.on_disk[:8192] == data


# First contact


@pytest.mark.parametrize("op", ["MNT", "GETATTR", "FSINFO", "LOOKUP", "ACCESS", "NULL"])
def test_not_now_at_first_contact(fake: FakeNfsServer, open_engine: OpenEngine, op: str) -> None:
    """JUKEBOX from any procedure: it is waited for."""
    if op != "NULL":
        fake.fail(op, NFS3ERR_JUKEBOX, times=3)
    engine = open_engine(fake.url(), connections=2)
    assert read_pages(engine, 0) == page_of(fake, 0)
    if op != "MNT":
        fake.disconnect()
        if op != "NULL":
            fake.fail(op, NFS3ERR_JUKEBOX, times=3)
        assert in_background(read_pages, engine, 1).result(DEADLINE_S) == page_of(fake, 1)


@pytest.mark.parametrize("op", ["MNT", "NULL", "GETATTR", "FSINFO", "LOOKUP"])
def test_an_answer_that_is_lost_at_first_contact(fake: FakeNfsServer, open_engine: OpenEngine, op: str) -> None:
    """It costs a third of the time that connecting may take, and then the call is made again."""
    fake.hold(op, times=1)
    begun_s = time.monotonic()
    engine = open_engine(fake.url(), connect_timeout_s=9)
    assert 2.9 < time.monotonic() - begun_s < 8.0
    assert read_pages(engine, 0) == page_of(fake, 0)


def test_no_answer_at_first_contact(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The error says which step it was."""
    fake.hold("LOOKUP")
    with pytest.raises(NfsError, match="no answer to the open") as caught:
        open_engine(fake.url(), connect_timeout_s=1)
    assert caught.value.errno == errno.ETIMEDOUT


def test_the_root_directory_is_the_export(new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine) -> None:
    """MOUNT is asked for "/", which is its name."""
    fake = new_fake(path="/swap", export="/")
    assert read_pages(open_engine(fake.url()), 0) == page_of(fake, 0)


def test_a_parent_of_the_directory_is_the_root(new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine) -> None:
    """The same where the file lies below it."""
    fake = new_fake(path="/a/b/swap", export="/")
    assert read_pages(open_engine(fake.url()), 0) == page_of(fake, 0)


def test_ten_thousand_exports(new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine) -> None:
    """Nobody asks for the list."""
    fake = new_fake(exports=[f"/export/user{number}" for number in range(10_000)])
    assert read_pages(open_engine(fake.url()), 0) == page_of(fake, 0)
    assert not fake.calls("EXPORT")


# Local ports


@pytest.mark.skipif(os.geteuid() != 0, reason="reserved ports need root")
def test_no_port_of_a_service_is_taken(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """However often it connects, from below 1024, and looking for a name in /etc/services is off as in a worker."""
    engine = open_engine(fake.url(), connections=8)
    for number in range(12):
        connected = len(fake.calls("FSINFO"))
        fake.disconnect()
        assert in_background(read_pages, engine, number).result(DEADLINE_S) == page_of(fake, number)
        wait_until(lambda connected=connected: len(fake.calls("FSINFO")) >= connected + 8, "all have connected")
    ports = {call.client_port for call in fake.calls("FSINFO") if caller(call) != "libnfs"}
    assert len(ports) > 50
    assert all(port < 1024 for port in ports)
    assert not ports & {623, 631, 636, 664, 749, 853, 873, 989, 990, 992, 993, 995}
    for port in ports:
        with pytest.raises(OSError, match="not found"):
            socket.getservbyport(port, "tcp")
