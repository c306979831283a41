# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing waits for ever: an answer to a look or to an operation on names is dropped, late or an error.

nbdnfs/engine/nfs/silence.c and docs/decisions/0020-liveness.md have what is promised.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.engines import PAGE, OpenEngine, opening, read_pages
from support.fake_nas import FakeNas, NasCall
from support.fake_nfs import (
    NFS3ERR_ACCES,
    NFS3ERR_DQUOT,
    NFS3ERR_IO,
    NFS3ERR_NOENT,
    NFS3ERR_NOSPC,
    NFS3ERR_PERM,
    NFS3ERR_ROFS,
    NFS3ERR_SERVERFAULT,
    NFS3ERR_STALE,
)
from support.nfs_server import LOOPBACK
from support.owner_records import HOLDER, machine
from support.sunrpc import record as rpc_record
from support.sunrpc import u32
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

from nbdnfs.engine import Engine, NfsFile
from nbdnfs.nas import owner_record

MIB = 1 << 20
FILE, RECORD = "/export/swap", "/export/.swap.owner"
LOOK = ("LOOKUP", "READ", "WRITE")

# enum owner_state
HELD, UNSURE, STOLEN = 1, 2, 3

REFRESH_MS = 400
# owner_watch.c: a look that is not answered goes over a new connection after 3/4 of refresh_ms, but at least this.
REPEAT_S = 1.0
# To make a connection, and for a machine that is busy with other things.
SLACK_S = 5.0


@pytest.fixture
def nas() -> Iterator[FakeNas]:
    """A server with a swap file of 1 MiB and the owner record of this boot."""
    me = machine("box1")
    with FakeNas() as server:
        server.add(FILE, bytes(MIB))
        server.add(RECORD, owner_record.new(me, HOLDER, None, "held").to_bytes())
        yield server


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> SaidOnStderr:
    """What the C code says during the test."""
    return SaidOnStderr(capfd)


def own(open_engine: OpenEngine, nas: FakeNas, **options: object) -> Engine:
    """An engine that watches the record."""
    record = owner_record.parse(nas.content(RECORD))
    assert record is not None
    return open_engine(
        nas.url(FILE),
        owner_path="/.swap.owner",
        owner_identity=f"\nboot {record.boot}\n",
        **{"owner_refresh_ms": REFRESH_MS, "connect_timeout_s": 2, **options},
    )


def state(engine: Engine) -> int:
    found = engine.counters()["owner_state"]
    assert isinstance(found, int)
    return found


def reconnects(engine: Engine) -> int:
    found = engine.counters()["reconnects"]
    assert isinstance(found, int)
    return found


def wait_for_state(engine: Engine, wanted: int, timeout_s: float = DEADLINE_S) -> None:
    wait_until(lambda: state(engine) == wanted, f"owner_state {wanted}", timeout_s)


def write_stably(engine: Engine) -> None:
    engine.pwrite(secrets.token_bytes(PAGE), PAGE, True)


def said_once_each(said: SaidOnStderr) -> list[str]:
    """The lines that the permission has run out, one for each time: on a loaded machine it does so again by itself."""
    unsure = [number for number, line in enumerate(said.lines) if "has not been refreshed" in line]
    again = [number for number, line in enumerate(said.lines) if "is refreshed again" in line]
    assert all(any(one < number < following for number in again) for one, following in itertools.pairwise(unsure))
    return [said.lines[number] for number in unsure]


# Looks


@pytest.mark.parametrize("op", LOOK)
def test_an_answer_to_a_look_that_is_dropped(
    nas: FakeNas, open_engine: OpenEngine, said: SaidOnStderr, op: str
) -> None:
    """The permission runs out by the clock; the look goes over a new connection; writes go on. Both are logged."""
    engine = own(open_engine, nas)
    nas.drop(op)
    wait_until(lambda: nas.struck(op), "the call is dropped")
    dropped_s = time.monotonic()
    wait_for_state(engine, UNSURE, 2 * REFRESH_MS / 1000 + SLACK_S)
    in_background(write_stably, engine).result(DEADLINE_S)
    assert time.monotonic() - dropped_s < REPEAT_S + SLACK_S
    wait_for_state(engine, HELD)
    assert reconnects(engine) == 1
    said.wait_for("is refreshed again: writes go on")
    unsure = said_once_each(said)
    assert any(f"({op}: no result yet)" in line for line in unsure)


@pytest.mark.parametrize("op", LOOK)
def test_answers_to_looks_that_are_dropped_for_a_while(nas: FakeNas, open_engine: OpenEngine, op: str) -> None:
    """It is asked again and again, at longer and longer intervals; writes go on when it is answered."""
    engine = own(open_engine, nas)
    nas.drop(op, times=None)
    wait_for_state(engine, UNSURE)
    before = len(nas.calls(op))
    write = in_background(write_stably, engine)
    wait_until(lambda: len(nas.calls(op)) >= before + 2, "it is asked again")
    assert not write.done()
    nas.end_faults()
    write.result(8 * REPEAT_S + SLACK_S)
    wait_for_state(engine, HELD)


@pytest.mark.parametrize("op", LOOK)
def test_an_answer_to_a_look_that_is_late(nas: FakeNas, open_engine: OpenEngine, op: str) -> None:
    """It comes over a connection that was given up, and means nothing."""
    engine = own(open_engine, nas)
    nas.delay(op, REPEAT_S * 1.5)
    wait_until(lambda: nas.struck(op), "the call is put aside")
    wait_for_state(engine, UNSURE)
    in_background(write_stably, engine).result(REPEAT_S + SLACK_S)
    wait_for_state(engine, HELD)
    assert reconnects(engine) == 1


@pytest.mark.parametrize("op", LOOK)
def test_a_server_that_is_slow_to_answer_looks(nas: FakeNas, open_engine: OpenEngine, op: str) -> None:
    """Its answers take longer than is waited for at first: each time it is given more."""
    engine = own(open_engine, nas, owner_refresh_ms=2000)
    nas.delay(op, 1.8, times=None)
    wait_until(lambda: reconnects(engine) == 1, "it was not waited for")
    wait_for_state(engine, HELD)
    refreshed = owner_record.parse(nas.content(RECORD))
    wait_until(lambda: owner_record.parse(nas.content(RECORD)) != refreshed, "a sign of life")
    assert reconnects(engine) <= 2
    wait_for_state(engine, HELD)


REFUSALS = [
    *[(op, status) for op in LOOK for status in (NFS3ERR_PERM, NFS3ERR_IO, NFS3ERR_ACCES, NFS3ERR_SERVERFAULT)],
    *[(op, status) for op in ("READ", "WRITE") for status in (NFS3ERR_STALE, NFS3ERR_NOENT)],
    *[("WRITE", status) for status in (NFS3ERR_NOSPC, NFS3ERR_DQUOT, NFS3ERR_ROFS)],
]


@pytest.mark.parametrize(("op", "status"), REFUSALS)
def test_a_look_that_is_refused(
    nas: FakeNas, open_engine: OpenEngine, said: SaidOnStderr, op: str, status: int
) -> None:
    """Without the sign of life nothing is written, and the reason is logged when the permission has run out. The same
    connection is used on.
    """
    text = {
        NFS3ERR_PERM: os.strerror(errno.EPERM),
        NFS3ERR_NOENT: os.strerror(errno.EIO),  # RFC 1813 has no such answer, and the file is not gone for it
        NFS3ERR_IO: os.strerror(errno.EIO),
        NFS3ERR_ACCES: os.strerror(errno.EACCES),
        NFS3ERR_SERVERFAULT: "",  # libnfs has an errno of its own for it
        NFS3ERR_STALE: os.strerror(errno.ESTALE),
        NFS3ERR_NOSPC: os.strerror(errno.ENOSPC),
        NFS3ERR_DQUOT: os.strerror(errno.EDQUOT),
        NFS3ERR_ROFS: os.strerror(errno.EROFS),
    }[status]
    engine = own(open_engine, nas)
    nas.fail(op, status)
    wait_for_state(engine, UNSURE, 2 * REFRESH_MS / 1000 + SLACK_S)
    said.wait_for(f"({op}: {text}")
    write = in_background(write_stably, engine)
    asked = len(nas.calls("LOOKUP"))
    wait_until(lambda: len(nas.calls("LOOKUP")) >= asked + 2, "it looks again")
    assert not write.done()
    said_once_each(said)
    nas.end_faults()
    write.result(DEADLINE_S)
    wait_for_state(engine, HELD)
    said.wait_for("is refreshed again: writes go on")
    assert reconnects(engine) <= 1  # not with each look; one, where a loaded machine answers too late


def test_a_first_look_that_takes_too_long(nas: FakeNas, open_engine: OpenEngine) -> None:
    """It permits nothing by then, and ends no worker: the next one may be in time."""
    nas.delay("READ", 2 * REFRESH_MS / 1000 + 0.05)
    engine = own(open_engine, nas, connect_timeout_s=60)
    assert state(engine) == HELD
    assert nas.struck("READ")
    in_background(write_stably, engine).result(DEADLINE_S)


# RFC 1813, nfsstat3, and two numbers that are none.
_ALL_STATUSES = (
    *(1, 2, 5, 6, 13, 17, 18, 19, 20, 21, 22, 27, 28, 30, 31, 63, 66, 69, 70, 71),
    *(10001, 10002, 10003, 10004, 10005, 10006, 10007, 10008, 77, 1 << 31),
)


def states_while_refused(op: str, status: int) -> set[int]:
    """The states of an owner that is refused more looks in a row than a missing record needs to be believed."""
    me = machine("box1")
    with FakeNas() as nas, opening() as open_engine:
        nas.add(FILE, bytes(MIB))
        nas.add(RECORD, owner_record.new(me, HOLDER, None, "held").to_bytes())
        engine = own(open_engine, nas, connect_timeout_s=60)  # there are many at once
        nas.fail(op, status, times=4)
        seen = {state(engine)}
        while not nas.struck(op):
            seen.add(state(engine))
            time.sleep(0.02)
        nas.end_faults()
        in_background(write_stably, engine).result(DEADLINE_S)
        wait_for_state(engine, HELD)
        return seen


@pytest.mark.parametrize("op", LOOK)
def test_no_refusal_is_a_theft(op: str) -> None:
    """Whatever the status. That there is no record is an answer, and LOOKUP's alone."""
    statuses = [status for status in _ALL_STATUSES if (op, status) != ("LOOKUP", NFS3ERR_NOENT)]
    with ThreadPoolExecutor(10) as pool:
        seen = dict(zip(statuses, pool.map(lambda status: states_while_refused(op, status), statuses), strict=True))
    assert not [status for status, states in seen.items() if STOLEN in states]


@pytest.mark.parametrize("op", LOOK)
def test_a_look_that_is_put_off(nas: FakeNas, open_engine: OpenEngine, said: SaidOnStderr, op: str) -> None:
    """JUKEBOX: the call is sent again until it is done, over the same connection."""
    engine = own(open_engine, nas)
    nas.jukebox(op)
    wait_for_state(engine, UNSURE)
    said.wait_for(f"({op}: no result yet)")
    nas.end_faults()
    in_background(write_stably, engine).result(SLACK_S)
    wait_for_state(engine, HELD)
    assert reconnects(engine) <= 1  # not with each look; one, where a loaded machine answers too late


def test_the_count_of_an_answer_without_data(nas: FakeNas, open_engine: OpenEngine) -> None:
    """READ says that there are 512 bytes, and has none: no byte is taken, and the file is not taken for stolen."""
    engine = own(open_engine, nas)

    def without_data(call: NasCall, message: bytes) -> bytes | None:
        if call.op != "READ":
            return None
        no_attributes = u32(0)
        return rpc_record(message[:24] + u32(0) + no_attributes + u32(512, 0) + u32(0))

    nas.mutate(without_data)
    wait_for_state(engine, UNSURE)
    nas.end_faults()
    in_background(write_stably, engine).result(SLACK_S)
    wait_for_state(engine, HELD)


def test_a_record_that_is_missing_for_a_moment(nas: FakeNas, open_engine: OpenEngine) -> None:
    """Two looks that do not find it prove nothing."""
    engine = own(open_engine, nas)
    nas.fail("LOOKUP", 2, times=2)  # NFS3ERR_NOENT
    wait_until(lambda: nas.struck("LOOKUP"), "it is not found")
    in_background(write_stably, engine).result(SLACK_S)
    assert state(engine) == HELD


@pytest.mark.parametrize("looks", [2, 3])
def test_a_look_that_finds_another_file(nas: FakeNas, open_engine: OpenEngine, said: SaidOnStderr, looks: int) -> None:
    """LOOKUP was answered with the handle of another file: two looks prove nothing, and three are believed."""
    engine = own(open_engine, nas)
    left = [looks]

    def of_another_file(call: NasCall, message: bytes) -> bytes | None:
        if call.op != "READ" or call.count != 512 or not left[0]:
            return None
        left[0] -= 1
        return rpc_record(message[:-512] + bytes(511) + b"!")

    nas.mutate(of_another_file)
    wait_until(lambda: not left[0], "it has been answered with")
    if looks == 2:
        in_background(write_stably, engine).result(SLACK_S)
        assert state(engine) == HELD
        return
    wait_for_state(engine, STOLEN)
    said.wait_for("the owner record .swap.owner is damaged: all requests fail from now on")
    with pytest.raises(OSError, match="Input/output error"):
        in_background(write_stably, engine).result(SLACK_S)


def test_a_directory_with_another_handle(nas: FakeNas, open_engine: OpenEngine) -> None:
    """All handles have changed while the file is the same: the record is looked up in the directory's new one."""
    engine = own(open_engine, nas)
    nas.expire_handles()
    in_background(write_stably, engine).result(DEADLINE_S)
    wait_for_state(engine, HELD)


def test_only_the_directory_has_another_handle(nas: FakeNas, open_engine: OpenEngine) -> None:
    """It is found by its name then, over a new connection."""
    engine = own(open_engine, nas)
    mounted = len(nas.calls("MNT"))
    nas.fail("LOOKUP", NFS3ERR_STALE, times=1)
    wait_until(lambda: len(nas.calls("MNT")) > mounted, "it is looked for")
    in_background(write_stably, engine).result(DEADLINE_S)
    wait_for_state(engine, HELD)
    assert reconnects(engine) == 1


def test_a_directory_that_is_not_found_again(nas: FakeNas, open_engine: OpenEngine) -> None:
    """The file has its handle, and is read as before; writes wait for the directory."""
    engine = own(open_engine, nas)
    nas.stop_mountd()
    nas.fail("LOOKUP", NFS3ERR_STALE)
    wait_for_state(engine, UNSURE)
    buffer = bytearray(PAGE)
    in_background(engine.pread, buffer, 0).result(DEADLINE_S)
    nas.end_faults()
    in_background(write_stably, engine).result(DEADLINE_S)
    wait_for_state(engine, HELD)


@pytest.mark.parametrize("op", LOOK)
def test_an_engine_that_cannot_look(nas: FakeNas, open_engine: OpenEngine, op: str) -> None:
    """It does not start, and says so within the time for a connection."""
    nas.drop(op, times=None, after=1 if op == "LOOKUP" else 0)  # the first one is of the swap file
    begin_s = time.monotonic()
    with pytest.raises(OSError, match="timed out") as caught:
        in_background(own, open_engine, nas).result(DEADLINE_S)
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - begin_s < 2 * 2 + SLACK_S


@pytest.mark.parametrize("op", LOOK)
def test_closing_during_a_look(nas: FakeNas, open_engine: OpenEngine, op: str) -> None:
    """An answer that does not come does not delay the end."""
    engine = own(open_engine, nas)
    nas.drop(op)
    wait_until(lambda: nas.struck(op), "it is dropped")
    in_background(engine.close).result(SLACK_S)


def test_looks_need_no_connection_of_their_own(nas: FakeNas, open_engine: OpenEngine) -> None:
    """LOOKUP, READ and a stable WRITE for each look, over the connection that is there."""
    engine = own(open_engine, nas)
    before = owner_record.parse(nas.content(RECORD))
    asked = len(nas.calls("LOOKUP"))
    wait_until(lambda: len(nas.calls("LOOKUP")) >= asked + 3, "three looks")
    assert before != owner_record.parse(nas.content(RECORD))
    looks = nas.calls(*LOOK, "ACCESS", "COMMIT")[-9:]
    assert sorted({call.op for call in looks}) == sorted(LOOK)
    assert len({call.client_port for call in looks}) == 1
    assert nas.on_disk(RECORD) == nas.content(RECORD)
    assert len(nas.calls("MNT")) == 1
    assert reconnects(engine) == 0


# Operations on names

SILENCE_MS = 500


@pytest.fixture
def file(nas: FakeNas) -> Iterator[NfsFile]:
    """The swap file."""
    with contextlib.closing(NfsFile(nas.url(FILE), LOOPBACK, silence_ms=SILENCE_MS, connect_timeout_s=2)) as opened:
        yield opened


def test_a_lookup_that_is_dropped(nas: FakeNas, file: NfsFile) -> None:
    """It is sent again over a new connection."""
    nas.drop("LOOKUP")
    assert in_background(file.lookup, "/.swap.owner").result(DEADLINE_S)["size"] == 512


def test_a_stat_that_is_dropped(nas: FakeNas, file: NfsFile) -> None:
    """It is sent again over a new connection."""
    nas.drop("GETATTR")
    assert in_background(file.stat).result(DEADLINE_S)["size"] == MIB


def operation(file: NfsFile, op: str) -> None:
    """One that may not be done twice."""
    if op == "LINK":
        file.link("/swap", "/other")
    elif op == "RENAME":
        file.rename("/swap", "/other")
    else:
        file.unlink("/.swap.owner")


def is_done(nas: FakeNas, op: str) -> bool:
    names = nas.names("/export")
    return ".swap.owner" not in names if op == "REMOVE" else "other" in names and ("swap" in names) == (op == "LINK")


@pytest.mark.parametrize("op", ["LINK", "RENAME", "REMOVE"])
@pytest.mark.parametrize("executed", [True, False])
@pytest.mark.parametrize("silent", [True, False])
def test_an_operation_that_is_dropped(nas: FakeNas, file: NfsFile, op: str, executed: bool, silent: bool) -> None:
    """It is not sent twice: it fails after 2 x silence_ms, also when nothing else is answered; its caller can look."""
    nas.drop(op, executed=executed)
    if silent:
        nas.drop("NULL", times=None)
    begin_s = time.monotonic()
    with pytest.raises(OSError, match="has not answered") as caught:
        in_background(operation, file, op).result(DEADLINE_S)
    assert caught.value.errno == errno.ETIMEDOUT
    assert 2 * SILENCE_MS / 1000 <= time.monotonic() - begin_s < 2 * SILENCE_MS / 1000 + SLACK_S
    assert len(nas.calls(op)) == 1
    assert is_done(nas, op) == executed


@pytest.mark.parametrize(
    ("op", "puts_off"), [("LINK", "LINK"), ("LINK", "LOOKUP"), ("RENAME", "RENAME"), ("REMOVE", "REMOVE")]
)
def test_an_operation_that_is_put_off(nas: FakeNas, file: NfsFile, op: str, puts_off: str) -> None:
    """JUKEBOX: the server has done nothing, and the operation is sent again until it does."""
    nas.jukebox(puts_off, times=2)
    in_background(operation, file, op).result(DEADLINE_S)
    assert nas.struck(puts_off)
    assert is_done(nas, op)


@pytest.mark.parametrize("op", ["LINK", "RENAME", "REMOVE", "GETATTR", "LOOKUP"])
def test_an_operation_that_is_put_off_for_ever(nas: FakeNas, file: NfsFile, op: str) -> None:
    """It fails with EAGAIN, and soon: how long to go on is for the caller to say."""
    call = {"GETATTR": file.stat, "LOOKUP": lambda: file.lookup("/swap")}.get(op, lambda: operation(file, op))
    nas.jukebox(op)
    begin_s = time.monotonic()
    with pytest.raises(OSError, match="puts it off") as caught:
        in_background(call).result(DEADLINE_S)
    assert caught.value.errno == errno.EAGAIN
    assert time.monotonic() - begin_s < 1 + SLACK_S


def test_operations_without_a_server(nas: FakeNas, file: NfsFile, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing was sent, and the error says that."""
    said = SaidOnStderr(capfd)
    nas.stop()
    said.wait_for("no connection")  # until then an operation goes into the old connection
    nas_is_gone_s = time.monotonic()
    for call in (file.stat, lambda: operation(file, "LINK")):
        with pytest.raises(OSError, match="no connection") as caught:
            in_background(call).result(DEADLINE_S)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNRESET)
    assert time.monotonic() - nas_is_gone_s < 2 * 4 * SILENCE_MS / 1000 + SLACK_S


def test_connections_that_are_down(nas: FakeNas, open_engine: OpenEngine) -> None:
    """Three of four wait for an answer that was lost: reads go over the fourth, whichever that is."""
    engine = open_engine(nas.url(FILE), connections=4, connect_timeout_s=4 * int(DEADLINE_S))

    def reconnects() -> int:
        return int(engine.counters()["reconnects"])

    nas.drop("FSINFO", times=3)
    nas.disconnect()
    wait_until(lambda: reconnects() == 1, "one is connected again")
    for page in range(8):
        in_background(read_pages, engine, page).result(DEADLINE_S)
    assert reconnects() == 1


def test_lost_answers_to_attempts_to_connect(nas: FakeNas, open_engine: OpenEngine) -> None:
    """Each costs connect_timeout_s: what earlier ones have cost is forgotten. With twice the time each it is 63 s."""
    engine = open_engine(nas.url(FILE), connect_timeout_s=1)
    for page in range(6):
        nas.drop("GETATTR")
        nas.disconnect()
        in_background(read_pages, engine, page).result(DEADLINE_S / 2)
