# SPDX-License-Identifier: LGPL-2.1-or-later
"""Transfers over NFSv3 without libnfs (nbdnfs/engine/nfs/wire*.c), against a server whose answers look as they like.

No page that is read here was written before: its checksum is unknown, and a wrong byte would reach the reader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.engines import PAGE, OpenEngine, opening, read_pages, results, write_pages
from support.fake_nfs import NFS3_OK, NFS3ERR_JUKEBOX, NFS3ERR_NXIO, UNSTABLE, Call, FakeNfsServer
from support.sunrpc import (
    GARBAGE_ARGS,
    LAST_FRAGMENT,
    PROC_UNAVAIL,
    PROG_MISMATCH,
    PROG_UNAVAIL,
    SYSTEM_ERR,
    Credentials,
    opaque,
    record,
    u32,
    u64,
)
from support.tcp_queues import TcpQueues
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

from nbdnfs import region
from nbdnfs.engine import Engine

MIB = 1 << 20
MIB_PAGES = MIB // PAGE
SIZE = 4 * MIB
# Nothing here is to be mended by the end of the engine's patience with a silent connection.
NEVER_MS = 600_000
# The machine name by which calls say who has made them.
WIRE, LIBNFS = "nbdnfs", "libnfs"

# RFC 5531: reply_stat, reject_stat, auth_stat
REPLY, MSG_DENIED, RPC_MISMATCH, AUTH_ERROR, AUTH_TOOWEAK = 1, 1, 0, 1, 5


@pytest.fixture
def new_fake() -> Iterator[Callable[..., FakeNfsServer]]:
    """`new_fake(...)`: a fake server with a file of random bytes, for the test."""
    with contextlib.ExitStack() as servers:
        yield lambda **options: servers.enter_context(FakeNfsServer(os.urandom(SIZE), **options))


@pytest.fixture
def fake(new_fake: Callable[..., FakeNfsServer]) -> FakeNfsServer:
    """One of those."""
    return new_fake()


@pytest.fixture
def engine_options() -> dict[str, int]:
    """Nothing here is to be mended by the end of the engine's patience."""
    return {"silence_ms": NEVER_MS}


@pytest.fixture(scope="module")
def lasting() -> Iterator[tuple[FakeNfsServer, Engine]]:
    """A server and an engine for the many examples of one property."""
    with FakeNfsServer(os.urandom(SIZE)) as fake, opening(silence_ms=NEVER_MS) as open_engine:
        yield fake, open_engine(fake.url())


def read_at_once(fake: FakeNfsServer, engine: Engine, count: int, order: Sequence[int] | None = None) -> None:
    """Have the first pages read, each by a READ of its own, and see that they are right.

    Several are under way at once: the server has all of them before it answers the first, in `order`.
    """
    if count == 1:
        pages = [in_background(read_pages, engine, 0)]
    else:
        fake.hold("READ")
        pages = [in_background(read_pages, engine, number) for number in range(count)]
        fake.wait_for(count, DEADLINE_S)
        fake.release(order=order)
    assert b"".join(results(pages)) == fake.content[: count * PAGE]


def caller(call: Call) -> str:
    """The machine name of who has made it."""
    assert call.credentials is not None
    return call.credentials.machine


def heard_ms(region_fd: int) -> int:
    """When an engine with this region has last heard its server."""
    waits = region.read_waits(region_fd)
    assert waits is not None
    return waits[0]


def callers(fake: FakeNfsServer, *ops: str) -> set[str]:
    """Of those who have asked for a READ, WRITE or COMMIT, or for `ops`."""
    return {caller(call) for call in fake.calls(*(ops or ("READ", "WRITE", "COMMIT")))}


def connections_of(calls: Sequence[Call]) -> dict[int, list[Call]]:
    """The calls by the connection on which they came, in their order."""
    by_number: dict[int, list[Call]] = {}
    for call in calls:
        by_number.setdefault(call.connection, []).append(call)
    return by_number


# Answers that are right, in any shape


@dataclasses.dataclass(frozen=True)
class Shape:
    """How an answer to READ looks. A server may do all of it.

    attributes      it has the file's
    verifier_bytes  the body of its AUTH_NONE verifier
    most_bytes      it has no more data than that
    beyond_bytes    that the record has behind all that RFC 1813 says
    """

    attributes: bool = True
    verifier_bytes: int = 0
    most_bytes: int = MIB
    beyond_bytes: int = 0

    def message(self, message: bytes) -> bytes:
        """The fake server's message, in this shape."""
        xid, status, results = message[:4], message[24:28], message[28:]
        begin = xid + u32(REPLY, 0, 0) + opaque(b"v" * self.verifier_bytes) + u32(0) + status
        begin += u32(1) + FATTR3 if self.attributes else u32(0)
        if int.from_bytes(status) != NFS3_OK:
            return begin + b"b" * self.beyond_bytes
        count, end_of_file = (int.from_bytes(results[at : at + 4]) for at in (4 + len(FATTR3), 8 + len(FATTR3)))
        data = results[-(count + -count % 4) :][:count] if count else b""
        given = data[: self.most_bytes]
        return begin + u32(len(given), end_of_file and given == data) + opaque(given) + b"b" * self.beyond_bytes

    def __call__(self, message: bytes) -> bytes:
        return record(self.message(message))


# A regular file, 0600, one name, no owner, as large as it is used
FATTR3 = u32(1, 0o600, 1, 0, 0) + u64(SIZE, SIZE) + u32(0, 0) + u64(1, 1000) + u32(0, 0) * 3

PLAIN, BARE, LONG = Shape(), Shape(attributes=False), Shape(verifier_bytes=400)
SHAPES = {
    "plain": PLAIN,
    "without attributes": BARE,
    "with a verifier": Shape(verifier_bytes=33),
    "with the longest verifier": LONG,
    "with a verifier, without attributes": Shape(attributes=False, verifier_bytes=7),
    "with something behind": Shape(beyond_bytes=3000),
}


def shaped(fake: FakeNfsServer, shapes: Sequence[Shape]) -> None:
    """The next answers to READ look like this; those after them are plain."""
    coming = itertools.chain(shapes, itertools.repeat(PLAIN))
    fake.rewrite("READ", lambda message: next(coming)(message))


@dataclasses.dataclass(frozen=True)
class Round:
    """READs that are under way together, the order of their answers, and how those look and come."""

    order: list[int]
    shapes: list[Shape]
    piece_sizes: list[int]


a_shape = st.builds(
    Shape,
    attributes=st.booleans(),
    verifier_bytes=st.sampled_from([0, 0, 0, 1, 4, 33, 400]),
    most_bytes=st.one_of(st.just(MIB), st.integers(1000, PAGE)),
    beyond_bytes=st.sampled_from([0, 0, 0, 4, 2000]),
)
# around the heads of answers, anywhere in them, and larger than one
a_size = st.one_of(st.integers(1, 12), st.integers(40, 140), st.integers(1, 2 * PAGE), st.just(MIB))
a_round = st.integers(1, 5).flatmap(
    lambda count: st.builds(
        Round,
        order=st.permutations(range(count)),
        shapes=st.lists(a_shape, min_size=1, max_size=6),
        piece_sizes=st.lists(a_size, max_size=40),
    )
)


@given(st.lists(a_round, min_size=1, max_size=3))
@example([Round([0], [BARE, PLAIN], [44, 4]), Round([2, 0, 1], [PLAIN, BARE, LONG], [MIB])])
@settings(max_examples=200, deadline=None)
def test_answers_come_in_any_pieces_order_and_shape(lasting: tuple[FakeNfsServer, Engine], rounds: list[Round]) -> None:
    """One READ or several under way, answers cut anywhere or several in one segment, short, in any order, with and
    without what a server may leave out: every byte is right, and all of it goes over one connection.
    """
    fake, engine = lasting
    for now in rounds:
        shaped(fake, now.shapes)
        fake.send_in_pieces(now.piece_sizes)
        read_at_once(fake, engine, len(now.order), now.order)
    fake.send_in_pieces(None)
    assert callers(fake) == {WIRE}
    assert len(connections_of(fake.calls("READ"))) == 1


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", [PLAIN, BARE], ids=["with attributes", "without"])
def test_answers_come_byte_by_byte(fake: FakeNfsServer, open_engine: OpenEngine, count: int, shape: Shape) -> None:
    """Of one READ and of several."""
    engine = open_engine(fake.url())
    fake.rewrite("READ", shape)
    fake.send_in_pieces(itertools.repeat(1))
    read_at_once(fake, engine, count)
    assert callers(fake) == {WIRE}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("second", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("first", SHAPES.values(), ids=SHAPES)
def test_no_answer_looks_like_the_one_before(
    fake: FakeNfsServer, open_engine: OpenEngine, first: Shape, second: Shape, count: int
) -> None:
    """Where the data begins is guessed from the last answer, and the guess is wrong, in both directions."""
    engine = open_engine(fake.url())
    shaped(fake, [first, second] * 4)
    for _ in range(8 // count):
        read_at_once(fake, engine, count)
    assert callers(fake) == {WIRE}
    assert len(fake.calls("READ")) == 8
    assert len(connections_of(fake.calls("READ"))) == 1


@pytest.mark.parametrize("most_bytes", [511, 1001, 4094, 4095])
@pytest.mark.parametrize("shape", [PLAIN, BARE, LONG], ids=["plain", "without attributes", "with a verifier"])
@pytest.mark.parametrize("count", [1, 4])
def test_short_and_odd_counts(
    fake: FakeNfsServer, open_engine: OpenEngine, most_bytes: int, shape: Shape, count: int
) -> None:
    """Less than asked for, with bytes that pad it: the rest, and no more, is asked for again."""
    engine = open_engine(fake.url())
    fake.rewrite("READ", dataclasses.replace(shape, most_bytes=most_bytes))
    read_at_once(fake, engine, count)
    asked = [(at, PAGE - at) for at in range(0, PAGE, most_bytes)]
    expected = [(page * PAGE + at, left) for page in range(count) for at, left in asked]
    assert sorted((call.offset, call.count) for call in fake.calls("READ")) == expected
    assert len(connections_of(fake.calls("READ"))) == 1


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("said", "sent"), [(PAGE, 1000), (1000, PAGE), (1001, 998), (0xFFFF_FFFF, 2000)])
def test_a_count_that_is_not_that_of_the_data(
    fake: FakeNfsServer, open_engine: OpenEngine, said: int, sent: int, count: int
) -> None:
    """What has been read is no more than either; the rest is asked for again."""
    engine = open_engine(fake.url())

    def answer(message: bytes) -> bytes:
        head, data = message[: -PAGE - 12], message[-PAGE:][:sent]
        return record(head + u32(said, 0) + opaque(data))

    fake.rewrite("READ", answer, times=count)
    read_at_once(fake, engine, count)
    rests = [(call.offset % PAGE, call.count) for call in fake.calls("READ")[count:]]
    assert rests == [(min(said, sent), PAGE - min(said, sent))] * count
    assert len(connections_of(fake.calls("READ"))) == 1


@pytest.mark.parametrize("shape", [PLAIN, BARE], ids=["with attributes", "without"])
@pytest.mark.parametrize("end_of_file", [True, False])
def test_no_bytes_at_all(fake: FakeNfsServer, open_engine: OpenEngine, shape: Shape, end_of_file: bool) -> None:
    """The end of the file is EIO: a device has none in the middle. It is believed when three answers say so. Neither
    data nor the end is asked for again."""
    engine = open_engine(fake.url())
    read_at_once(fake, engine, 1)

    def empty(message: bytes) -> bytes:
        return record(shape.message(message)[: -PAGE - 12] + u32(0, end_of_file, 0))

    fake.rewrite("READ", empty, times=1)
    read_at_once(fake, engine, 1)
    if end_of_file:
        fake.rewrite("READ", empty, times=3)
        with pytest.raises(OSError, match="Input/output error"):
            read_pages(engine, 0)
    read_at_once(fake, engine, 4)
    assert len(connections_of(fake.calls("READ"))) == 1


# Errors where data was guessed to come


@pytest.mark.parametrize("before", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("shape", [PLAIN, BARE, LONG], ids=["with attributes", "without", "with a verifier"])
def test_an_error_instead_of_data(fake: FakeNfsServer, open_engine: OpenEngine, before: Shape, shape: Shape) -> None:
    """It is asked again, and the others go on: of one READ, and of one in four."""
    engine = open_engine(fake.url())
    shaped(fake, [before, shape])
    read_at_once(fake, engine, 1)
    fake.fail("READ", NFS3ERR_NXIO, times=1)
    read_at_once(fake, engine, 1)
    fake.fail("READ", NFS3ERR_NXIO, times=1)
    read_at_once(fake, engine, 4)
    assert len(fake.calls("READ")) == 1 + 2 + 5
    assert callers(fake) == {WIRE}
    assert len(connections_of(fake.calls("READ"))) == 1


@pytest.mark.parametrize("before", [PLAIN, BARE, LONG], ids=["plain", "without attributes", "with a verifier"])
def test_not_now_instead_of_data(fake: FakeNfsServer, open_engine: OpenEngine, before: Shape) -> None:
    """JUKEBOX is no error to the reader, only a wait; the others go on."""
    engine = open_engine(fake.url())
    shaped(fake, [before])
    read_at_once(fake, engine, 1)
    fake.fail("READ", NFS3ERR_JUKEBOX, times=1)
    read_at_once(fake, engine, 1)
    fake.fail("READ", NFS3ERR_JUKEBOX, times=2)
    read_at_once(fake, engine, 4)
    assert len(fake.calls("READ")) == 1 + 2 + 6
    assert len(connections_of(fake.calls("READ"))) == 1


# Answers to WRITE and COMMIT


@pytest.mark.parametrize("before", [b"", u64(SIZE) + bytes(16)], ids=["", "attributes before"])
@pytest.mark.parametrize("after", [b"", FATTR3], ids=["", "attributes after"])
@pytest.mark.parametrize("size", [1, 7, MIB])
def test_answers_to_writes(
    fake: FakeNfsServer, open_engine: OpenEngine, before: bytes, after: bytes, size: int
) -> None:
    """With and without attributes, in pieces: what they say is understood, and nothing is written twice."""
    engine = open_engine(fake.url())
    wcc = b"".join(u32(bool(attributes)) + attributes for attributes in (before, after))
    fake.mangle("WRITE", lambda result: result[:4] + wcc + result[-16:])
    fake.mangle("COMMIT", lambda result: result[:4] + wcc + result[-8:])
    fake.send_in_pieces(itertools.repeat(size))
    expected = bytearray(fake.content)
    for number in range(4):
        expected[number * 2 * PAGE : (number * 2 + 1) * PAGE] = page = os.urandom(PAGE)
        write_pages(engine, number * 2, page)
    in_background(engine.flush).result(DEADLINE_S)
    assert fake.on_disk == expected
    assert [call.count for call in fake.calls("WRITE")] == [PAGE] * 4
    assert callers(fake) == {WIRE}
    assert len(connections_of(fake.calls("WRITE", "COMMIT"))) == 1


@pytest.mark.parametrize("limit", [1001, 1002, 1003, 4095])
def test_writes_that_need_padding(fake: FakeNfsServer, open_engine: OpenEngine, limit: int) -> None:
    """What a short WRITE has left is no multiple of four bytes: what comes after it is understood all the same."""
    engine = open_engine(fake.url())
    fake.limit("WRITE", limit)
    page = os.urandom(PAGE)
    write_pages(engine, 1, page)
    in_background(engine.flush).result(DEADLINE_S)
    assert fake.on_disk[PAGE : 2 * PAGE] == page
    assert [call.count for call in fake.calls("WRITE")] == [PAGE - at for at in range(0, PAGE, limit)]
    assert len(connections_of(fake.calls("WRITE", "COMMIT"))) == 1


# Answers in several fragments


def in_fragments(message: bytes, sizes: Iterator[int]) -> bytes:
    """The message, split in these sizes, 0 among them; the last fragment has what is left."""
    parts = []
    for size in sizes:
        parts.append(u32(len(message[:size])) + message[:size])
        message = message[size:]
        if not message:
            return b"".join(parts) + u32(LAST_FRAGMENT)
    return b"".join(parts) + record(message)


FRAGMENTS: dict[str, list[int]] = {
    "in the head": [50],
    "before the data": [128],
    "in the data": [50, 950],
    "everywhere": [1, 3, 0, 40, 100, 7, 1000, 1, 1, 1],
    "of one byte": [1] * 300,
    "behind everything": [1 << 20],
}


@given(
    st.lists(a_round, min_size=1, max_size=3),
    st.lists(st.lists(st.one_of(st.integers(0, 150), st.integers(0, 2 * PAGE)), max_size=12), min_size=1, max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_fragments_split_answers_anywhere(
    lasting: tuple[FakeNfsServer, Engine], rounds: list[Round], splits: list[list[int]]
) -> None:
    """Answers of any shape, cut anywhere on their way, in any fragments: right, and over one connection."""
    fake, engine = lasting
    for now in rounds:
        coming = itertools.chain(now.shapes, itertools.repeat(PLAIN))
        sizes = itertools.cycle(splits)
        fake.rewrite("READ", lambda message, coming=coming, sizes=sizes: in_fragments(
            next(coming).message(message), iter(next(sizes))))  # fmt: skip
        fake.send_in_pieces(now.piece_sizes)
        read_at_once(fake, engine, len(now.order), now.order)
    fake.send_in_pieces(None)
    fake.rewrite("READ", None)
    assert len(connections_of(fake.calls("READ"))) == 1


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("piece_bytes", [1, 5, MIB])
@pytest.mark.parametrize("sizes", FRAGMENTS.values(), ids=FRAGMENTS)
def test_reads_in_fragments(
    fake: FakeNfsServer, open_engine: OpenEngine, sizes: list[int], piece_bytes: int, count: int
) -> None:
    """Each of many, alone or together, first or later, without another connection."""
    engine = open_engine(fake.url())
    fake.rewrite("READ", lambda message: in_fragments(message, iter(sizes)))
    fake.send_in_pieces(itertools.repeat(piece_bytes))
    for _ in range(3 if piece_bytes > 1 else 1):
        read_at_once(fake, engine, count)
    assert len(connections_of(fake.calls("READ"))) == 1


@pytest.mark.parametrize("sizes", FRAGMENTS.values(), ids=FRAGMENTS)
def test_writes_in_fragments(fake: FakeNfsServer, open_engine: OpenEngine, sizes: list[int]) -> None:
    """Their answers are understood as well, and NULL, GETATTR and FSINFO when connecting again."""
    engine = open_engine(fake.url())
    for op in ("WRITE", "COMMIT", "NULL", "GETATTR", "FSINFO"):
        fake.rewrite(op, lambda message: in_fragments(message, iter(sizes)))
    for number in range(2):
        write_pages(engine, number, page := os.urandom(PAGE))
        in_background(engine.flush).result(DEADLINE_S)
        assert fake.on_disk[number * PAGE : (number + 1) * PAGE] == page
        fake.disconnect()
    assert len(fake.calls("WRITE")) == 2


# Answers that refuse a call


NOT_NOW: dict[str, Callable[[bytes], bytes]] = {
    "a failure of the system": lambda message: record(message[:20] + u32(SYSTEM_ERR)),
    "no program": lambda message: record(message[:20] + u32(PROG_UNAVAIL)),
}
REFUSALS: dict[str, Callable[[bytes], bytes]] = {
    "denied": lambda message: record(message[:4] + u32(REPLY, MSG_DENIED, AUTH_ERROR, AUTH_TOOWEAK)),
    "another RPC": lambda message: record(message[:4] + u32(REPLY, MSG_DENIED, RPC_MISMATCH, 2, 2)),
    "another version": lambda message: record(message[:20] + u32(PROG_MISMATCH, 3, 3)),
    "bad arguments": lambda message: record(message[:20] + u32(GARBAGE_ARGS)),
    "no procedure": lambda message: record(message[:20] + u32(PROC_UNAVAIL)),
    "too long a verifier": lambda message: record(message[:4] + u32(REPLY, 0, 0) + opaque(bytes(404)) + message[20:]),
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("op", ["READ", "WRITE", "COMMIT"])
@pytest.mark.parametrize("not_now", NOT_NOW.values(), ids=NOT_NOW)
def test_what_may_pass_is_asked_again(
    fake: FakeNfsServer, open_engine: OpenEngine, not_now: Callable[[bytes], bytes], op: str, count: int
) -> None:
    """As a server answers while it restarts: the request waits, and the connection stays."""
    engine = open_engine(fake.url())
    fake.rewrite(op, not_now, times=count)
    if op == "READ":
        read_at_once(fake, engine, count)
    else:
        for number in range(count):
            write_pages(engine, number * 2, page := os.urandom(PAGE))
            in_background(engine.flush).result(DEADLINE_S)
            assert fake.on_disk[number * 2 * PAGE : (number * 2 + 1) * PAGE] == page
    assert len(fake.calls(op)) == 2 * count
    assert callers(fake) == {WIRE}
    assert len(connections_of(fake.calls("READ", "WRITE", "COMMIT"))) == 1


@pytest.mark.parametrize("op", ["READ", "WRITE", "COMMIT"])
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refusals_cost_the_connection(
    fake: FakeNfsServer,
    open_engine: OpenEngine,
    capfd: pytest.CaptureFixture[str],
    refusal: Callable[[bytes], bytes],
    op: str,
) -> None:
    """All that was under way is sent again over a new one, by the wire; one line for many in a row."""
    engine = open_engine(fake.url())
    said = SaidOnStderr(capfd)
    fake.rewrite(op, refusal, times=3)
    page = fake.content[:PAGE]
    if op == "READ":
        assert in_background(read_pages, engine, 0).result(DEADLINE_S) == page
    else:
        write_pages(engine, 0, page := os.urandom(PAGE))
        in_background(engine.flush).result(DEADLINE_S)
        assert fake.on_disk[:PAGE] == page
    assert len(connections_of(fake.calls(op))) == 4
    assert callers(fake) == {WIRE}
    said.wait_for("connecting again")
    assert sum("connecting again" in line for line in said.lines) == 1


# Answers that make no sense


def with_count(message: bytes, length: int) -> bytes:
    """As many bytes of data, whatever was asked for."""
    return record(message[: 28 + 4 + len(FATTR3)] + u32(length, 0) + opaque(b"?" * length))


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "to nobody": lambda message: record(bytes(byte ^ 0x55 for byte in message[:4]) + message[4:]),
    "twice": lambda message: record(message) * 2,
    "a short one twice": lambda message: Shape(most_bytes=1000)(message) * 2,
    "a call": lambda message: record(message[:4] + u32(0) + message[8:]),
    "more data than asked for": lambda message: with_count(message, PAGE + 4),
    "much more data than asked for": lambda message: with_count(message, 64 * PAGE),
    "more data than the record": lambda message: record(with_count(message, PAGE)[4:-8]),
    "a record that ends in RPC's head": lambda message: record(message[:12]),
    "a record that ends behind the verifier": lambda message: record(message[:20]),
    "a record that ends in the attributes": lambda message: record(message[:50]),
    "a record that ends in the head": lambda message: u32(LAST_FRAGMENT | 50) + message,
    "a record that ends in the data": lambda message: u32(LAST_FRAGMENT | 1000) + message,
    "an empty record": lambda message: u32(LAST_FRAGMENT) + record(message),
    "a record of 2 GiB": lambda message: u32(LAST_FRAGMENT | 0x7FFF_FFFF) + message,
    "a fragment of 2 GiB": lambda message: u32(0x7FFF_FFFF) + message,
    "a record of 2 MiB": lambda message: u32(LAST_FRAGMENT | 2 * MIB) + message,
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("is_guessed", [False, True], ids=["first", "after another"])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_answers_that_make_no_sense(
    fake: FakeNfsServer,
    open_engine: OpenEngine,
    capfd: pytest.CaptureFixture[str],
    broken: Callable[[bytes], bytes],
    is_guessed: bool,
    count: int,
) -> None:
    """They cost the connection, at once, and all that was under way is asked for again over a new one."""
    engine = open_engine(fake.url())
    said = SaidOnStderr(capfd)
    if is_guessed:
        shaped(fake, [BARE])
        read_at_once(fake, engine, 1)
    fake.rewrite("READ", broken, times=1)
    read_at_once(fake, engine, count)
    read_at_once(fake, engine, 4)  # for what came too much is met by what comes next
    assert len(connections_of(fake.calls("READ"))) == 2
    said.wait_for("connected again after")
    assert callers(fake) == {WIRE}


@pytest.mark.parametrize("first", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("second", [PLAIN, BARE, LONG], ids=["plain", "without attributes", "with a verifier"])
def test_little_data_and_much_that_is_none(
    fake: FakeNfsServer, open_engine: OpenEngine, first: Shape, second: Shape
) -> None:
    """Whatever that is taken for, the page is right."""
    engine = open_engine(fake.url())
    shaped(fake, [first, dataclasses.replace(second, most_bytes=4, beyond_bytes=3000)] * 3)
    for _ in range(3):
        read_at_once(fake, engine, 1)
    assert callers(fake) == {WIRE}


def test_nothing_is_under_way_and_an_answer_comes(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The same where nobody waits: the one who comes next does so on a new connection."""
    engine = open_engine(fake.url())
    fake.rewrite("COMMIT", BROKEN["twice"], times=1)
    write_pages(engine, 0, os.urandom(PAGE))
    in_background(engine.flush).result(DEADLINE_S)
    (first,) = fake.calls("FSINFO")[-1:]
    wait_until(lambda: fake.calls("FSINFO")[-1].connection != first.connection, "a new connection")
    assert read_pages(engine, 64) == fake.content[64 * PAGE : 65 * PAGE]
    assert callers(fake) == {WIRE}


# A socket that is full


def test_writes_that_do_not_fit_into_the_socket(
    new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine
) -> None:
    """The server reads nothing, and then slowly: a WRITE stops in its middle and goes on there, and others follow.
    What is answered meanwhile is read, and what is asked for meanwhile is asked for after it.
    """
    fake = new_fake(narrow=True)
    engine = open_engine(fake.url(), region_pages=1024)
    fake.hold("READ", times=1)
    early = in_background(read_pages, engine, 3 * MIB_PAGES)
    fake.wait_for(1, DEADLINE_S)
    (first,) = fake.calls("READ")
    fake.receive(0)

    expected = bytearray(fake.content)
    expected[:MIB] = data = os.urandom(MIB)
    write_pages(engine, 0, data)
    flushed = in_background(engine.flush)
    with TcpQueues() as queues:
        wait_until(
            lambda: queues.of(first.client_port, fake.port)[1] > 2 * PAGE, "the beginning of a WRITE is in the socket"
        )
        late = [in_background(read_pages, engine, 3 * MIB_PAGES + number) for number in range(1, 5)]
        fake.release()
        assert early.result(DEADLINE_S) == expected[3 * MIB : 3 * MIB + PAGE]
        in_socket = queues.of(first.client_port, fake.port)[1]
    for count in (1, 100, 4097, 20_000):
        assert not fake.calls("WRITE")
        fake.receive(count)
        wait_until(lambda: fake.has_received, "some of it has come")
    fake.receive(None)
    flushed.result(DEADLINE_S)
    assert b"".join(results(late)) == expected[3 * MIB + PAGE : 3 * MIB + 5 * PAGE]
    assert fake.on_disk == expected
    assert sum(call.count for call in fake.calls("WRITE")) == MIB
    assert max(call.count for call in fake.calls("WRITE")) > in_socket, "no WRITE was too long for the socket"
    assert list(connections_of(fake.calls("READ", "WRITE", "COMMIT"))) == [first.connection]


def test_a_server_that_only_takes_is_not_heard(
    new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine, region_fd: int
) -> None:
    """It takes what is sent over a new connection and answers nothing: it was last heard when that was made."""
    fake = new_fake(narrow=True)
    engine = open_engine(fake.url(), region_pages=1024, region_fd=region_fd)
    connected = heard_ms(region_fd)
    fake.receive(0)
    fake.hold("WRITE")
    write_pages(engine, 0, os.urandom(MIB))
    flushed = in_background(engine.flush)
    port = fake.calls("FSINFO")[-1].client_port
    with TcpQueues() as queues:
        wait_until(lambda: queues.of(port, fake.port)[1] > 2 * PAGE, "the beginning of a WRITE is in the socket")
    fake.receive(None)
    fake.wait_for(2, DEADLINE_S)  # the rest of the first has followed
    assert heard_ms(region_fd) == connected
    fake.release()
    flushed.result(DEADLINE_S)
    assert heard_ms(region_fd) > connected


def test_an_answer_to_half_a_call(new_fake: Callable[..., FakeNfsServer], open_engine: OpenEngine) -> None:
    """A WRITE that is said to be done before the server has it whole is not; it is sent again on a new connection."""
    fake = new_fake(narrow=True)
    engine = open_engine(fake.url())
    fake.hold("READ", times=1)
    page = in_background(read_pages, engine, 3 * MIB_PAGES)
    fake.wait_for(1, DEADLINE_S)
    (call,) = fake.calls("READ")
    fake.receive(0)
    expected = bytearray(fake.content)
    expected[: 32 * PAGE] = data = os.urandom(32 * PAGE)
    write_pages(engine, 0, data)
    flushed = in_background(engine.flush)
    with TcpQueues() as queues:
        wait_until(lambda: queues.of(call.client_port, fake.port)[1] > 2 * PAGE, "half of a WRITE is in the socket")
    done = u32(call.xid + 1 & 0xFFFF_FFFF, REPLY, 0, 0, 0, 0) + u32(NFS3_OK, 0, 0, len(data), UNSTABLE) + u64(1)
    fake.rewrite("READ", lambda message: record(done), times=1)
    fake.release()
    wait_until(lambda: fake.open_connections > 1, "it connects again")
    fake.receive(None)
    flushed.result(DEADLINE_S)
    assert page.result(DEADLINE_S) == fake.content[3 * MIB : 3 * MIB + PAGE]
    assert fake.on_disk == expected
    (write,) = fake.calls("WRITE")
    assert write.connection != call.connection


# What calls say of themselves


def test_xids_begin_anew(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """A server knows a repeated call by its xid: no connection begins with that of another, and none uses one twice."""
    engine = open_engine(fake.url(), connections=2)
    for _ in range(3):
        read_at_once(fake, engine, 4)
        fake.disconnect()
        wait_until(lambda: fake.open_connections == 2, "it has connected again, with both")
    connections = connections_of(fake.calls("READ")).values()
    assert len(connections) >= 3
    xids = [[call.xid for call in calls] for calls in connections]
    assert len({first for first, *_ in xids}) == len(xids)
    for of_one in xids:
        assert len(set(of_one)) == len(of_one)


@pytest.mark.parametrize(
    ("params", "expected"),
    [({}, None), ({"uid": 1234, "gid": 5678}, (1234, 5678)), ({"uid": 4294967294, "gid": 0}, (4294967294, 0))],
)
def test_calls_come_from_the_urls_user(
    fake: FakeNfsServer,
    open_engine: OpenEngine,
    params: dict[str, int],
    expected: tuple[int, int] | None,
) -> None:
    """READ, WRITE and COMMIT have the URL's uid and gid, or those of the process."""
    engine = open_engine(fake.url(**params))
    read_at_once(fake, engine, 1)
    write_pages(engine, 0, os.urandom(PAGE))
    in_background(engine.flush).result(DEADLINE_S)
    for op in ("READ", "WRITE", "COMMIT"):
        found = [call.credentials for call in fake.calls(op)]
        assert set(found) == {Credentials(WIRE, *(expected or (os.getuid(), os.getgid())))}, op


@pytest.mark.parametrize("size", [1, MIB])
def test_a_slow_server_is_asked_whether_it_is_there(
    fake: FakeNfsServer, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str], size: int
) -> None:
    """It is, as its answer to a NULL says over the same connection: that one stays, and the READ is answered there."""
    engine = open_engine(fake.url(), silence_ms=1000)
    said = SaidOnStderr(capfd)
    fake.hold("READ")
    page = in_background(read_pages, engine, 0)
    fake.wait_for(1, DEADLINE_S)
    (asked,) = fake.calls("READ")
    fake.send_in_pieces(itertools.repeat(size))

    def nulls() -> list[Call]:
        return [call for call in fake.calls("NULL") if call.connection == asked.connection]

    asked_before = len(nulls())  # when it was made, by libnfs
    wait_until(lambda: len(nulls()) >= asked_before + 2, "it asks, is answered, and asks again when it is silent again")
    fake.release()
    assert page.result(DEADLINE_S) == fake.content[:PAGE]
    assert {caller(call) for call in nulls()[asked_before:]} == {WIRE}
    assert len(fake.calls("READ")) == 1
    assert not said.lines


def test_several_connections_at_once(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Each has its own answers in pieces, and is lost now and then: no byte is wrong."""
    engine = open_engine(fake.url(), connections=3)
    shaped(fake, [BARE, PLAIN, LONG] * 20)
    fake.send_in_pieces(itertools.chain([1] * 100, itertools.cycle([7, 130, 4096, 10_000])))
    for number in range(8):
        offsets = [(number * 8 + reader) * 16 * PAGE % SIZE for reader in range(8)]
        pieces = [in_background(read_pages, engine, offset // PAGE, 16) for offset in offsets]
        if number % 2:
            fake.disconnect()
        for offset, piece in zip(offsets, results(pieces), strict=True):
            assert piece == fake.content[offset : offset + 16 * PAGE]
    assert callers(fake) == {WIRE}
    assert len(connections_of(fake.calls("READ"))) >= 3


# And through libnfs


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_who_makes_the_calls(fake: FakeNfsServer, open_engine: OpenEngine, transport: str) -> None:
    """READ, WRITE and COMMIT are libnfs's with transport="libnfs", and otherwise none is."""
    engine = open_engine(fake.url(), transport=transport)
    read_at_once(fake, engine, 4)
    write_pages(engine, 0, page := os.urandom(PAGE))
    in_background(engine.flush).result(DEADLINE_S)
    assert fake.on_disk[:PAGE] == page
    for op in ("READ", "WRITE", "COMMIT"):
        assert callers(fake, op) == {LIBNFS if transport == "libnfs" else WIRE}


def test_a_transport_that_is_none(fake: FakeNfsServer, open_engine: Callable[..., Engine]) -> None:
    """Two names, and nothing else."""
    with pytest.raises(ValueError, match="'wire' or 'libnfs'"):
        open_engine(fake.url(), transport="tcp")
