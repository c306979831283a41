# SPDX-License-Identifier: LGPL-2.1-or-later
"""One answer of each procedure is dropped, or delayed, while everything else is answered: nothing waits for ever.

The rows run side by side, each with a server of its own; `pytest -s` shows them as a table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from support.engines import PAGE, read_pages, write_pages_and_flush
from support.fake_nas import FakeNas, Oddities
from support.nfs_server import LOOPBACK
from support.waiting import in_background

from nbdnfs.engine import Engine
from nbdnfs.errors import NbdnfsError
from nbdnfs.nas import backing_file, owner_record, ownership
from nbdnfs.nas.owner_record import Identity, Timing

PAGES = 64
SWAP = "/export/swap"
RECORD = f"/export/{owner_record.name_of('swap')}"
SILENCE_MS = 500
TIMING = Timing(refresh_ms=400, in_flight_ms=300)
DELAY_S = 1.0
# Of an engine with SILENCE_MS: four times that for an answer that does not come while others do; or the silence, and
# the five seconds that a server has to answer over the old connection.
ENGINE_LIMIT_S = 10.0
# `create` and `claim` have the silence of production, 15 s: four times that, and a new connection.
NAMES_LIMIT_S = 80.0
HANGS_S = NAMES_LIMIT_S + 20.0


@dataclasses.dataclass
class Row:
    """Of the table: what was struck, and what came of it."""

    when: str
    op: str
    fault: str
    limit_s: float
    outcome: str = "hangs"
    took_s: float = HANGS_S

    def __str__(self) -> str:
        return (
            f"{self.when:10} {self.op:11} {self.fault:9} {self.took_s:5.1f} s of {self.limit_s:.0f} s  {self.outcome}"
        )


def set_fault(nas: FakeNas, op: str, fault: str) -> None:
    """On the next call of the procedure."""
    if fault == "dropped":
        nas.drop(op)
    else:
        nas.delay(op, DELAY_S)


@contextlib.contextmanager
def serving(*, with_owner: bool) -> Iterator[tuple[FakeNas, Engine]]:
    """A server and an engine on it, which has written all of the file."""
    boot = secrets.token_hex(16)
    owner = {
        "owner_path": f"/{owner_record.name_of('swap')}",
        "owner_identity": f"\nboot {boot}\n",
        "owner_refresh_ms": TIMING.refresh_ms,
    }
    with FakeNas() as nas:
        nas.add(SWAP, bytes(PAGES * PAGE))
        record = owner_record.new(machine(boot), "keeper:swap0", None, "held", TIMING)
        nas.add(RECORD, record.to_bytes())
        engine = Engine(
            nas.url(SWAP),
            LOOPBACK,
            region_pages=256,
            read_ahead_pages=0,
            silence_ms=SILENCE_MS,
            connect_timeout_s=2,  # of a busy machine
            **(owner if with_owner else {}),  # type: ignore[arg-type]
        )
        write_pages_and_flush(engine, 0, os.urandom(PAGE))
        yield nas, engine
        in_background(engine.close).result(ENGINE_LIMIT_S)


def machine(boot: str = "") -> Identity:
    ids = secrets.token_hex(16), boot or secrets.token_hex(16), secrets.token_hex(16)
    return Identity(*ids, "dropped", pid_namespace=0xEFFF_FFFC)


def while_transferring(row: Row) -> str:
    """A READ, a WRITE or a COMMIT of a request that waits for it."""
    with serving(with_owner=False) as (nas, engine):
        set_fault(nas, row.op, row.fault)
        data = os.urandom(PAGE)
        if row.op == "READ":
            assert read_pages(engine, 5) == bytes(PAGE)
        else:
            write_pages_and_flush(engine, 5, data)
            assert nas.on_disk(SWAP)[5 * PAGE : 6 * PAGE] == data
        return "done" if nas.struck(row.op) else "not asked"


def while_reconnecting(row: Row) -> str:
    """Whatever the engine asks when its connection has broken."""
    with serving(with_owner=False) as (nas, engine):
        set_fault(nas, row.op, row.fault)
        nas.disconnect()
        assert read_pages(engine, 5) == bytes(PAGE)
        return "done" if nas.struck(row.op) else "not asked"


def while_handles_expire(row: Row) -> str:
    """Whatever the engine asks when its handle is stale."""
    with serving(with_owner=False) as (nas, engine):
        set_fault(nas, row.op, row.fault)
        nas.expire_handles()
        assert read_pages(engine, 5) == bytes(PAGE)
        return "done" if nas.struck(row.op) else "not asked"


def while_owning(row: Row) -> str:
    """A look at the owner record. Writes wait for the next one at most."""
    with serving(with_owner=True) as (nas, engine):
        time.sleep(TIMING.refresh_ms / 1000)  # what the opening asked is over
        set_fault(nas, row.op, row.fault)
        begun_s = time.monotonic()
        while not nas.struck(row.op) and time.monotonic() < begun_s + 3 * TIMING.refresh_ms / 1000:
            time.sleep(0.01)
        struck = nas.struck(row.op)
        time.sleep(2 * TIMING.refresh_ms / 1000)  # the permission to write has run out, unless it was renewed
        write_pages_and_flush(engine, 7, os.urandom(PAGE))
        assert engine.counters()["owner_state"] == 1
        return "done" if struck else "not asked"


def while_creating(row: Row, *, has_hard_links: bool = True) -> str:
    """`nbdnfs create`: it ends, well or with a reason, and the next one ends well."""
    # one `create` at a time for each path of a server, whatever its port
    path = f"/export/{row.op}-{row.fault}-{has_hard_links}"
    with FakeNas(Oddities(has_hard_links=has_hard_links)) as nas:
        set_fault(nas, row.op, row.fault)
        outcome = _tried(lambda: backing_file.create(nas.url(path), PAGES * PAGE))
        struck = nas.struck(row.op)
        nas.end_faults()
        if outcome != "done":
            backing_file.create(nas.url(path), PAGES * PAGE, force=True)
        assert nas.content(path) == bytes(PAGES * PAGE)
        return outcome if struck else "not asked"


def while_claiming(row: Row) -> str:
    """`nbdnfs claim` over a record that was released: the same."""
    with FakeNas() as nas:
        nas.add(SWAP, bytes(PAGES * PAGE))
        url = nas.url(SWAP)
        before, me = machine(), machine()
        _claim(url, before)
        ownership.release(url, "keeper:swap0", before)
        set_fault(nas, row.op, row.fault)
        outcome = _tried(lambda: _claim(url, me))
        struck = nas.struck(row.op)
        nas.end_faults()
        if outcome != "done":
            _claim(url, me)
        record = owner_record.parse(nas.content(RECORD))
        assert record is not None
        assert record.boot == me.boot
        return outcome if struck else "not asked"


def _claim(url: str, me: Identity) -> None:
    ownership.claim(url, "keeper:swap0", me, report=lambda line: None, timing=TIMING)


def _tried(command: Callable[[], None]) -> str:
    try:
        command()
    except (NbdnfsError, OSError) as error:
        return f"ends: {error}"
    return "done"


CONNECTING = ("MOUNT_NULL", "MNT", "EXPORT", "NULL", "FSINFO", "GETATTR", "LOOKUP", "ACCESS")
WITH_NAMES = (*CONNECTING, "READ", "WRITE", "COMMIT", "CREATE", "SETATTR", "LINK", "RENAME", "REMOVE")
SITUATIONS: dict[str, tuple[Callable[[Row], str], tuple[str, ...], float]] = {
    "transfer": (while_transferring, ("READ", "WRITE", "COMMIT"), ENGINE_LIMIT_S),
    "reconnect": (while_reconnecting, CONNECTING, ENGINE_LIMIT_S),
    "stale": (while_handles_expire, CONNECTING, ENGINE_LIMIT_S),
    "owner": (while_owning, ("LOOKUP", "GETATTR", "ACCESS", "READ", "WRITE", "COMMIT"), ENGINE_LIMIT_S),
    "create": (while_creating, WITH_NAMES, NAMES_LIMIT_S),
    "no links": (
        functools.partial(while_creating, has_hard_links=False),
        ("LINK", "CREATE", "RENAME", "LOOKUP", "REMOVE"),
        NAMES_LIMIT_S,
    ),
    "claim": (while_claiming, WITH_NAMES, NAMES_LIMIT_S),
}


def run_row(row: Row) -> None:
    begun_s = time.monotonic()
    found: Future[str] = in_background(SITUATIONS[row.when][0], row)
    try:
        row.outcome = found.result(HANGS_S)
    except TimeoutError:
        return
    except Exception as error:
        row.outcome = f"wrong: {type(error).__name__}: {error}"
    row.took_s = time.monotonic() - begun_s


def check(situations: tuple[str, ...]) -> None:
    """Run all rows of these, side by side, and print them."""
    rows = [
        Row(when, op, fault, SITUATIONS[when][2])
        for when in situations
        for op in SITUATIONS[when][1]
        for fault in ("dropped", "delayed")
    ]
    with ThreadPoolExecutor(len(rows)) as pool:
        list(pool.map(run_row, rows))
    print(*rows, sep="\n")
    wrong = [row for row in rows if row.took_s > row.limit_s or row.outcome.startswith(("wrong", "hangs"))]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.fake
def test_an_engine_misses_one_answer() -> None:
    """Each request resumes within the limit. A procedure that is not asked there cannot hurt."""
    check(("transfer", "reconnect", "stale", "owner"))


@pytest.mark.fake
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_command_misses_one_answer() -> None:
    """`create` and `claim` end within the limit, and what did not end well ends well the next time."""
    check(("create", "no links", "claim"))
