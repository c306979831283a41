# SPDX-License-Identifier: LGPL-2.1-or-later
"""Engines of two machines on one backing file, on a real server: what stops when, and what is never written."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from conftest import FileOnServer
from support.fake_nas import FakeNas
from support.fake_nfs import NFS3ERR_IO, NFS3ERR_NOENT, NFS3ERR_STALE
from support.nfs_server import LOOPBACK, Ganesha
from support.owner_records import (
    HOLDER,
    ONE,
    PAGE,
    PAGES,
    QUICK,
    TWO,
    Held,
    claim,
    each_version,
    grow_old,
    machine,
    record_of,
    record_path,
)
from support.proxy import TcpProxy
from support.small_filesystem import small_filesystem
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs.engine import Engine
from nbdnfs.nas import owner_record
from nbdnfs.nas.owner_record import Identity

MIB = 1 << 20
DEVICE_BYTES = 4 * MIB

# enum owner_state
OWNER_STOLEN, OWNER_UNSURE, OWNER_HELD = 3, 2, 1


@pytest.fixture
def hold() -> Iterator[Callable[..., Held]]:
    """As Held, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(*arguments: object, **options: object) -> Held:
            held = Held(*arguments, **options)  # type: ignore[arg-type]
            stack.callback(held.close)
            return held

        yield make


def owned_by_box1(server: Ganesha) -> tuple[FileOnServer, Identity]:
    """A file of zeros on a server of the test's own, and the machine that has claimed it."""
    (server.export_path / "swap").write_bytes(bytes(DEVICE_BYTES))
    file = FileOnServer(server, "swap", DEVICE_BYTES)
    box1 = machine("box1")
    claim(file, box1)
    return file, box1


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
@each_version
def test_the_record_is_kept_fresh(
    swap_file: FileOnServer, hold: Callable[..., Held], version: int, transport: str
) -> None:
    """The engine writes ten digits in place and nothing else; the time of the file advances."""
    box1 = machine("box1")
    record = claim(swap_file, box1)
    grow_old(swap_file)
    held = hold(swap_file.url(version), swap_file, box1, transport=transport)
    wait_until(lambda: record_of(swap_file).refreshed >= 3, "three signs of life")
    assert dataclasses.replace(record_of(swap_file), refreshed=0) == record
    assert time.time() - record_path(swap_file).stat().st_mtime < 60
    assert held.state == OWNER_HELD


@each_version
@pytest.mark.parametrize("delay_s", [0.0, 0.05])
def test_a_theft_under_load(
    swap_file: FileOnServer, proxy: TcpProxy, hold: Callable[..., Held], version: int, delay_s: float
) -> None:
    """The first owner stops within its refresh interval, before the thief starts; none of its writes comes later."""
    box1, box2 = machine("box1"), machine("box2")
    claim(swap_file, box1)
    first = hold(swap_file.url(version, nfsport=proxy.port), swap_file, box1)
    proxy.delay_s = delay_s
    ended = in_background(first.write_until_it_fails)
    wait_until(lambda: ONE in swap_file.path.read_bytes(), "the first writes")

    theft = in_background(lambda: claim(swap_file, box2, steal=True))
    wait_until(lambda: record_of(swap_file).host == "box2", "the thief's record")
    stolen_s = time.monotonic()
    assert ended.result(DEADLINE_S) == errno.EIO
    stopped_s = time.monotonic() - stolen_s
    assert first.state == OWNER_STOLEN
    # four answers come one after the other in a look; and a busy machine may be late
    assert stopped_s < QUICK.refresh_ms / 1000 + 5 * delay_s + 0.5
    assert not theft.done()

    theft.result(DEADLINE_S)
    second = hold(swap_file.url(version), swap_file, box2)
    for page in range(PAGES):
        second.engine.pwrite(TWO, page * PAGE)
    second.engine.flush()
    for call in (
        lambda: first.engine.pwrite(ONE, 0),
        lambda: first.engine.pread(bytearray(PAGE), 0),
        lambda: first.engine.flush(),
    ):
        with pytest.raises(OSError, match="Input/output error"):
            call()
    first.close()
    assert swap_file.path.read_bytes() == TWO * PAGES
    assert second.state == OWNER_HELD


def test_a_machine_that_was_cut_off_looks_before_it_writes(
    swap_file: FileOnServer, proxy: TcpProxy, hold: Callable[..., Held]
) -> None:
    """What waited for the server when the file was stolen is never sent: neither what is in the region, nor what was
    in flight when the connection broke."""
    box1, box2 = machine("box1"), machine("box2")
    claim(swap_file, box1)
    first = hold(swap_file.url(nfsport=proxy.port), swap_file, box1)
    ended = in_background(first.write_until_it_fails)
    wait_until(lambda: ONE in swap_file.path.read_bytes(), "the first writes")
    proxy.refuse = True
    proxy.cut()
    wait_until(lambda: first.state == OWNER_UNSURE, "the permission runs out")

    claim(swap_file, box2, steal=True)
    second = hold(swap_file.url(), swap_file, box2)
    for page in range(PAGES):
        second.engine.pwrite(TWO, page * PAGE)
    second.engine.flush()
    assert not ended.done()
    proxy.refuse = False
    assert ended.result(DEADLINE_S) == errno.EIO
    assert first.state == OWNER_STOLEN
    first.close()
    assert swap_file.path.read_bytes() == TWO * PAGES


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_server_that_was_away_changes_nothing(
    own_ganesha: Ganesha, hold: Callable[..., Held], transport: str
) -> None:
    """A server that was away for longer than the permission lasts: the owner goes on, and every page arrives."""
    file, box1 = owned_by_box1(own_ganesha)
    held = hold(file.url(), file, box1, transport=transport)
    own_ganesha.kill()
    for page in range(512):
        held.engine.pwrite(ONE, page * PAGE)
    wait_until(lambda: held.state == OWNER_UNSURE, "the permission runs out")
    own_ganesha.start()
    in_background(held.engine.flush).result(DEADLINE_S)
    assert file.path.read_bytes()[: 512 * PAGE] == ONE * 512
    wait_until(lambda: held.state == OWNER_HELD, "its own again")


def test_a_theft_from_a_full_server(tmp_path: Path, hold: Callable[..., Held]) -> None:
    """A write that waits for room on the server fails as well, because it will never be sent."""
    with small_filesystem(tmp_path, 4 * MIB) as folder, Ganesha(tmp_path / "server", export=folder) as server:
        file = FileOnServer(server, "swap", 64 * MIB)
        with file.path.open("wb") as hole:
            hole.truncate(file.size_bytes)
        box1, box2 = machine("box1"), machine("box2")
        claim(file, box1)
        theirs = owner_record.new(box2, HOLDER, None, "held", QUICK)
        new = folder / "theirs"
        new.write_bytes(theirs.to_bytes())
        held = hold(file.url(), file, box1)
        ended = in_background(held.write_until_it_fails)
        wait_until(lambda: held.engine.counters()["write_back_error"] == errno.ENOSPC, "no room")
        new.rename(record_path(file))
        assert ended.result(DEADLINE_S) == errno.EIO
        held.close()


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_record_that_is_removed(
    swap_file: FileOnServer, hold: Callable[..., Held], capfd: pytest.CaptureFixture[str], transport: str
) -> None:
    """Without a record any machine may claim the file: the owner stops, and says so once."""
    box1 = machine("box1")
    claim(swap_file, box1)
    held = hold(swap_file.url(), swap_file, box1, transport=transport)
    record_path(swap_file).unlink()
    wait_until(lambda: held.state == OWNER_STOLEN, "it is noticed")
    with pytest.raises(OSError, match="Input/output error"):
        held.engine.flush()
    said = capfd.readouterr().err
    assert said.count("is gone: all requests fail from now on") == 1


def test_a_worker_that_comes_too_late(
    swap_file: FileOnServer, hold: Callable[..., Held], capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker that takes over a region whose file was stolen in the meantime writes none of it."""
    region = os.memfd_create("region")
    box1, box2 = machine("box1"), machine("box2")
    claim(swap_file, box1)
    options = {
        "region_fd": region,
        "owner_path": f"/{owner_record.name_of(swap_file.name)}",
        "owner_identity": f"\nboot {box1.boot}\n",
        "owner_refresh_ms": 60_000,
    }
    first = Engine(swap_file.url(), LOOPBACK, **options)  # type: ignore[arg-type]
    first.pwrite(ONE, 0)
    first.close()  # what the region holds is the next one's
    claim(swap_file, box2, steal=True)
    capfd.readouterr()
    next_one = Engine(swap_file.url(), LOOPBACK, **options)  # type: ignore[arg-type]
    assert next_one.counters()["owner_state"] == OWNER_STOLEN
    assert next_one.counters()["unstable_pages"] == 1
    with pytest.raises(OSError, match="Input/output error"):
        next_one.pread(bytearray(PAGE), 0)
    assert "taken over by box2" in capfd.readouterr().err
    next_one.close()
    os.close(region)
    assert swap_file.path.read_bytes() == bytes(DEVICE_BYTES)


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_closing_while_the_server_hangs(own_ganesha: Ganesha, transport: str) -> None:
    """A read of the record that gets no answer does not delay the end."""
    file, box1 = owned_by_box1(own_ganesha)
    held = Held(file.url(), file, box1, transport=transport)
    wait_until(lambda: record_of(file).refreshed >= 1, "it looks")
    own_ganesha.pause()
    try:
        held.close()
    finally:
        own_ganesha.resume()


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_server_that_hangs(own_ganesha: Ganesha, hold: Callable[..., Held], transport: str) -> None:
    """The permission runs out while a look waits for its answer, and comes back with the server."""
    file, box1 = owned_by_box1(own_ganesha)
    held = hold(file.url(), file, box1, transport=transport)
    own_ganesha.pause()
    try:
        wait_until(lambda: held.state == OWNER_UNSURE, "the permission runs out")
    finally:
        own_ganesha.resume()
    wait_until(lambda: held.state == OWNER_HELD, "its own again")


def without(record: bytes, line: bytes) -> bytes:
    """The record without the line that begins so, and as long as before."""
    lines = [it for it in record.split(b"\n") if not it.startswith(line)]
    return b"\n".join(lines).ljust(len(record), b"\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.replace(b"nbdnfs owner 1", b"nbdnfs owner 2"), "is damaged"),
        (lambda record: record.replace(b"\nstate held\n", b"\nstate free\n"), "taken over by box1"),
        (lambda record: record[:-1], "is damaged"),
        (lambda record: b"x" * len(record), "is damaged"),
        (lambda record: b"", "is gone"),
        (lambda record: without(record.replace(b"\nboot ", b"\nboot 0"), b"host "), "taken over by ?"),
    ],
)
@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_record_that_is_not_ours(
    swap_file: FileOnServer,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[bytes], bytes],
    said: str,
    transport: Literal["wire", "libnfs"],
) -> None:
    """From the first look on nothing is read or written."""
    box1 = machine("box1")
    claim(swap_file, box1)
    record = record_path(swap_file)
    record.write_bytes(change(record.read_bytes()))
    held = Held(swap_file.url(), swap_file, box1, transport=transport)
    wait_until(lambda: held.state == OWNER_STOLEN, "it is noticed")
    with pytest.raises(OSError, match="Input/output error"):
        held.engine.pwrite(ONE, 0)
    held.close()
    assert said in capfd.readouterr().err
    assert swap_file.path.read_bytes() == bytes(DEVICE_BYTES)


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
@pytest.mark.parametrize("name", ["/", "/" + "x" * 256])
def test_names_that_no_record_has(swap_file: FileOnServer, name: str, transport: Literal["wire", "libnfs"]) -> None:
    """An owner that cannot look at its record does not begin."""
    with pytest.raises(OSError, match="Errno"):
        Engine(swap_file.url(), LOOPBACK, owner_path=name, owner_identity="x", transport=transport, connect_timeout_s=1)


@contextlib.contextmanager
def owner_on(nas: FakeNas, transport: Literal["wire", "libnfs"], **options: int) -> Iterator[Engine]:
    """An engine of a machine that has claimed /export/swap, and looks at its record every 300 ms."""
    box1 = machine("box1")
    nas.add("/export/swap", bytes(16 * PAGE))
    nas.add("/export/.swap.owner", owner_record.new(box1, HOLDER, None, "held", QUICK).to_bytes())
    engine = Engine(
        nas.url("/export/swap"),
        LOOPBACK,
        transport=transport,
        region_pages=256,
        owner_path="/.swap.owner",
        owner_identity=f"\nboot {box1.boot}\n",
        owner_refresh_ms=300,
        **options,
    )
    with contextlib.closing(engine):
        yield engine


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
@pytest.mark.parametrize("op", ["LOOKUP", "READ", "WRITE"])
@pytest.mark.parametrize("fault", ["refused", "silence"])
def test_a_look_that_fails(transport: Literal["wire", "libnfs"], op: str, fault: str) -> None:
    """At any of its calls: the server refuses some, or the connection breaks. The record is refreshed again."""
    with FakeNas() as nas, owner_on(nas, transport) as engine:
        if fault == "refused":
            nas.fail(op, NFS3ERR_IO, times=2)
            wait_until(lambda: nas.struck(op), "they are refused")
        else:
            nas.drop(op)
            wait_until(lambda: nas.struck(op), "a call has arrived")
            nas.disconnect()
        before = nas.content("/export/.swap.owner")
        wait_until(lambda: nas.content("/export/.swap.owner") != before, "another sign of life")
        wait_until(lambda: engine.counters()["owner_state"] == OWNER_HELD, "its own")


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_disk_that_is_not_mounted_for_a_moment(transport: Literal["wire", "libnfs"]) -> None:
    """The connection stays up, lookups find nothing, and the file's handle is stale. The file does not count as stolen,
    and writes go on when the disk is back."""
    with FakeNas() as nas:
        with owner_on(nas, transport, connections=2) as engine:
            for op in ("GETATTR", "READ", "WRITE", "COMMIT"):
                nas.fail(op, NFS3ERR_STALE, seconds=3)
            nas.fail("LOOKUP", NFS3ERR_NOENT, seconds=3)
            # three looks without a record take less than a second: if they were believed, it would be stolen
            wait_until(lambda: engine.counters()["owner_state"] != OWNER_HELD, "it has not been refreshed")
            assert engine.counters()["owner_state"] == OWNER_UNSURE
            wait_until(lambda: engine.counters()["owner_state"] != OWNER_UNSURE, "the disk is back")
            assert engine.counters()["owner_state"] == OWNER_HELD
            engine.pwrite(b"x" * PAGE, 0)
            engine.flush()
        assert nas.content("/export/swap")[:PAGE] == b"x" * PAGE


@pytest.mark.timeout(60)
@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_start_without_a_record_and_without_answers(transport: Literal["wire", "libnfs"]) -> None:
    """The look at the file, whether it is there although the record is not, has the start's limit."""
    with FakeNas() as nas:
        nas.add("/export/swap", bytes(16 * PAGE))
        nas.drop("READ", times=None)
        with pytest.raises(OSError, match=r"."):
            Engine(
                nas.url("/export/swap"),
                LOOPBACK,
                transport=transport,
                region_pages=256,
                owner_path="/.swap.owner",
                owner_identity="\nboot x\n",
                owner_refresh_ms=300,
                connect_timeout_s=2,
            )


def test_both_options_or_none(swap_file: FileOnServer) -> None:
    """A record without an identity, or a refresh time of 0, is a mistake of the caller."""
    for options in ({"owner_path": "/x"}, {"owner_identity": "x"}, {"owner_refresh_ms": 0}):
        with pytest.raises(ValueError, match="owner_path"):
            Engine(swap_file.url(), LOOPBACK, **options)  # type: ignore[arg-type]
