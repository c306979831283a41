# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two machines and one backing file, on a real server: claims, engines that keep them, theft, and what stops when."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FileOnServer
from nfs_server import LOOPBACK, Ganesha
from proxy import TcpProxy
from small_filesystem import small_filesystem
from waiting import DEADLINE_S, in_background, wait_until

from nbdnfs import cli, config, keeper_work, lifecycle, link, owner, owner_record, provision, run_dir
from nbdnfs.engine import Engine, NfsFile, libnfs_version
from nbdnfs.errors import NbdnfsError, NoInputError, OwnedError, PermissionDeniedError
from nbdnfs.owner_record import Identity, Record, Timing
from nbdnfs.run_dir import RunDir

PAGE = 4096
MIB = 1 << 20
DEVICE_BYTES = 4 * MIB
PAGES = DEVICE_BYTES // PAGE

# Short, so that the tests are; the proportions are those of owner_record.TIMING.
QUICK = Timing(refresh_ms=300, in_flight_ms=300)
HOLDER = "keeper:swap0"
OWNER_STOLEN, OWNER_UNSURE, OWNER_HELD = 3, 2, 1

# Not one 32-bit word again and again: such a page would not travel before a flush.
ONE, TWO = (bytes([byte]) * (PAGE - 1) + b"!" for byte in (1, 2))

# libnfs 4.0 cannot write over NFSv4
each_version = pytest.mark.parametrize("version", (3, 4) if int(libnfs_version.split(".")[0]) >= 5 else (3,))


def machine(host: str) -> Identity:
    """A machine that has just been started."""
    return Identity(secrets.token_hex(16), secrets.token_hex(16), secrets.token_hex(16), host)


@pytest.fixture
def swap_file(new_file: Callable[..., FileOnServer]) -> Iterator[FileOnServer]:
    """A file of zeros; what is left beside it is removed."""
    file = new_file(content=bytes(DEVICE_BYTES))
    yield file
    for path in beside(file):
        path.unlink()


def record_path(file: FileOnServer) -> Path:
    return file.path.with_name(owner_record.name_of(file.name))


def beside(file: FileOnServer) -> list[Path]:
    """The record, and what should not stay."""
    return sorted(file.path.parent.glob(f".{file.name}.*"))


def record_of(file: FileOnServer) -> Record:
    record = owner_record.parse(record_path(file).read_bytes())
    assert record is not None
    return record


def claim(
    file: FileOnServer, me: Identity, *, steal: bool = False, holder: str = HOLDER, root: Path = Path("/")
) -> Record:
    said: list[str] = []
    return owner.claim(file.url(), holder, me, steal=steal, say=said.append, timing=QUICK, root=root)


def refused(file: FileOnServer, me: Identity, *words: str, **options: str | Path) -> None:
    """The file is refused, in these words, and its record is as it was."""
    before = record_path(file).read_bytes()
    with pytest.raises(OwnedError) as caught:
        claim(file, me, **options)  # type: ignore[arg-type]
    for word in words:
        assert word in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.exit_code == os.EX_NOPERM
    after = owner_record.parse(record_path(file).read_bytes())
    assert after is None or dataclasses.replace(after, refreshed=0) == dataclasses.replace(
        owner_record.parse(before),
        refreshed=0,  # type: ignore[type-var]
    )
    assert beside(file) == [record_path(file)]


def grow_old(file: FileOnServer, seconds: float = 600.0) -> None:
    """The record's last sign of life was so long ago."""
    then = time.time() - seconds
    os.utime(record_path(file), (then, then))


class Held:
    """An engine of `me`'s that keeps the record, and what it is told to write meanwhile."""

    def __init__(self, url: str, file: FileOnServer, me: Identity, timing: Timing = QUICK) -> None:
        self.engine = Engine(
            url,
            LOOPBACK,
            read_ahead_pages=0,
            owner_path=f"/{owner_record.name_of(file.name)}",
            owner_identity=f"\nboot {me.boot}\n",
            owner_refresh_ms=timing.refresh_ms,
        )

    @property
    def state(self) -> int:
        found = self.engine.counters()["owner_state"]
        assert isinstance(found, int)
        return found

    def write_until_it_fails(self) -> int:
        """All pages again and again, some of them stably; the errno of the end."""
        at = 0
        while True:
            try:
                self.engine.pwrite(ONE, at * PAGE, at % 7 == 0)
            except OSError as error:
                return error.errno or 0
            at = (at + 1) % PAGES

    def close(self) -> None:
        in_background(self.engine.close).result(DEADLINE_S)


@pytest.fixture
def hold() -> Iterator[Callable[..., Held]]:
    """As Held, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(*arguments: object, **options: object) -> Held:
            held = Held(*arguments, **options)  # type: ignore[arg-type]
            stack.callback(held.close)
            return held

        yield make


# Claims


@each_version
def test_a_second_machine_is_refused(swap_file: FileOnServer, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With who and since when; by the clock of the server alone, whether the other one lives."""
    url, box1, box2 = swap_file.url(version), machine("box1"), machine("box2")
    record = owner.claim(url, HOLDER, box1)
    assert record == record_of(swap_file)
    assert (record.state, record.host, record.generation, record.refresh_ms) == ("held", "box1", 1, 10_000)
    assert stat.S_IMODE(record_path(swap_file).stat().st_mode) == 0o644
    assert beside(swap_file) == [record_path(swap_file)]
    assert owner.claim(url, HOLDER, box1) == record

    refused(swap_file, box2, "is in use as swap by box1", record.claimed, "last sign of life", "nbdnfs down")
    grow_old(swap_file, 7200)
    refused(swap_file, box2, "box1", record.claimed, "no sign of life for 2 h", "--steal")
    assert "box1" in owner.look(url).text()

    waited_s: list[float] = []
    monkeypatch.setattr(time, "sleep", waited_s.append)
    stolen = claim(swap_file, box2, steal=True)
    # two refresh times of 10 s, and 30 s for what is on its way: the first one's, not the second one's
    assert waited_s == [50.0]
    assert (stolen.host, stolen.generation, stolen.state) == ("box2", 2, "held")
    assert record_of(swap_file) == stolen
    refused(swap_file, box1, "box2")


def test_an_earlier_boot_is_taken_over(swap_file: FileOnServer) -> None:
    """At once where its last sign of life is old; where it is young, once it has shown none for long enough."""
    box1 = machine("box1")
    claim(swap_file, box1)
    grow_old(swap_file)
    again = dataclasses.replace(box1, boot=secrets.token_hex(16))
    assert claim(swap_file, again).generation == 2
    # the next one comes at once; the same hardware, whose image has a new machine id at each boot
    third = Identity(secrets.token_hex(16), secrets.token_hex(16), box1.hardware, "box1")
    assert claim(swap_file, third).generation == 3
    assert record_of(swap_file).boot == third.boot


def test_a_clone_that_lives_is_no_earlier_boot(swap_file: FileOnServer, hold: Callable[..., Held]) -> None:
    """Two machines with one machine id: the record moves on while it is watched."""
    box1 = machine("box1")
    claim(swap_file, box1)
    hold(swap_file.url(), swap_file, box1)
    refused(swap_file, dataclasses.replace(box1, boot=secrets.token_hex(16)), "in use as swap by box1")


def test_this_very_boot_goes_on(swap_file: FileOnServer) -> None:
    """A keeper after a crash finds its own record; another device or `serve` on this machine does not get the file
    while that one runs."""
    box1, root = machine("box1"), Path("/")
    claim(swap_file, box1, holder=owner.serve_holder(), root=root)
    refused(swap_file, box1, "in use on this machine", f"process {os.getpid()}", holder="keeper:swap1")
    with pytest.raises(OwnedError, match="in use on this machine"):
        claim(swap_file, box1, steal=True, holder="keeper:swap1")
    dead = dataclasses.replace(record_of(swap_file), holder=f"serve:{os.getpid()}:1")
    record_path(swap_file).write_bytes(dead.to_bytes())
    assert claim(swap_file, box1, holder="keeper:swap1").generation == 2
    assert claim(swap_file, box1, holder="keeper:swap1").generation == 2


def test_a_damaged_record(swap_file: FileOnServer) -> None:
    """Something that is no record is nobody's business but the administrator's."""
    record_path(swap_file).write_bytes(b"nbdnfs owner 1\n")
    refused(swap_file, machine("box1"), "damaged", "--steal")
    assert claim(swap_file, machine("box1"), steal=True).generation == 1


def test_a_steal_that_was_interrupted_waits_again(swap_file: FileOnServer) -> None:
    """The record of a thief that died while it waited does not spare its next try the wait."""
    box2 = machine("box2")
    waiting = owner_record.new(box2, HOLDER, None, "waiting", QUICK)
    record_path(swap_file).write_bytes(waiting.to_bytes())
    said: list[str] = []
    before_s = time.monotonic()
    record = owner.claim(swap_file.url(), HOLDER, box2, say=said.append, timing=QUICK)
    assert time.monotonic() - before_s >= QUICK.stops_within_ms / 1000
    assert record.state == record_of(swap_file).state == "held"
    assert "waiting" in said[0]


def test_of_many_newcomers_one_wins(swap_file: FileOnServer) -> None:
    """Eight machines at once, on no record, on a free one, and as thieves: one has it at the end, and knows."""
    url = swap_file.url()

    def all_at_once(*, steal: bool) -> None:
        boxes = [machine(f"box{number}") for number in range(8)]
        barrier = threading.Barrier(len(boxes))

        def attempt(me: Identity) -> Record | None:
            barrier.wait()
            try:
                return owner.claim(url, HOLDER, me, steal=steal, timing=QUICK, say=lambda _: None)
            except (OwnedError, NbdnfsError):
                return None

        futures = [in_background(attempt, me) for me in boxes]
        won = [record for future in futures if (record := future.result(60)) is not None]
        assert won == [record_of(swap_file)]

    for _ in range(5):
        all_at_once(steal=False)
        record_path(swap_file).unlink()
    all_at_once(steal=False)
    all_at_once(steal=True)
    free = dataclasses.replace(record_of(swap_file), state="free")
    record_path(swap_file).write_bytes(free.to_bytes())
    all_at_once(steal=False)
    assert beside(swap_file) == [record_path(swap_file)]


def test_a_server_without_hard_links(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first record is renamed into place, and waits as one that takes another's."""
    monkeypatch.setattr(owner._Newcomer, "link", lambda newcomer: False)
    before_s = time.monotonic()
    assert claim(swap_file, machine("box1")) == record_of(swap_file)
    assert time.monotonic() - before_s >= QUICK.stops_within_ms / 1000


def test_release(swap_file: FileOnServer) -> None:
    """Who gives the file up leaves nothing; who never had it changes nothing."""
    box1, box2 = machine("box1"), machine("box2")
    claim(swap_file, box1)
    assert not owner.release(swap_file.url(), HOLDER, box2)
    assert not owner.release(swap_file.url(), "keeper:other", box1)
    assert record_of(swap_file).state == "held"
    assert owner.release(swap_file.url(), HOLDER, box1)
    assert beside(swap_file) == []
    assert not owner.release(swap_file.url(), HOLDER, box1)
    assert claim(swap_file, box2).generation == 1


def test_release_spares_a_thief(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that comes between the look and the deed stays."""
    box1, box2 = machine("box1"), machine("box2")
    claim(swap_file, box1)
    theirs = owner_record.new(box2, HOLDER, None, "held")

    class Robbed:
        """An NfsFile whose name another file gets once it has been written."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = NfsFile(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def pwrite(self, data: bytes, offset: int) -> int:
            count = self._file.pwrite(data, offset)
            new = swap_file.path.with_name("theirs")
            new.write_bytes(theirs.to_bytes())
            new.rename(record_path(swap_file))
            return count

    monkeypatch.setattr(owner, "NfsFile", Robbed)
    with contextlib.suppress(NbdnfsError):  # the file that it had open is gone
        owner.release(swap_file.url(), HOLDER, box1)
    assert record_of(swap_file) == theirs


def test_a_directory_that_is_not_ours(ganesha: Ganesha, swap_file: FileOnServer) -> None:
    """The file may be written, its directory not: said, with the way out. What is wrong with the file comes first."""
    folder = ganesha.export_path / "closed"
    folder.mkdir(mode=0o755)
    (folder / "swap").write_bytes(bytes(DEVICE_BYTES))
    os.chown(folder / "swap", 1234, 1234)
    with pytest.raises(PermissionDeniedError) as caught:
        owner.claim(ganesha.url("closed/swap", uid=1234, gid=1234), HOLDER, machine("box1"))
    assert "may not make an owner record" in caught.value.message
    assert "owner = false" in caught.value.hint
    with pytest.raises(NoInputError, match="there is no file"):
        owner.claim(ganesha.url("closed/other"), HOLDER, machine("box1"))


def test_create_force(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody owns is not overwritten with zeros, whoever it is; what was given up is."""
    box1 = machine("box1")
    claim(swap_file, box1)
    swap_file.path.chmod(0o600)
    swap_file.path.write_bytes(b"x" * DEVICE_BYTES)
    for seconds, word in ((0, "last sign of life"), (600, "no sign of life")):
        grow_old(swap_file, seconds)
        with pytest.raises(OwnedError, match=word):
            provision.create(swap_file.url(), DEVICE_BYTES, force=True)
    assert swap_file.path.read_bytes() == b"x" * DEVICE_BYTES
    monkeypatch.setattr(owner_record, "identity", lambda: box1)
    record = dataclasses.replace(record_of(swap_file), holder=owner.serve_holder())
    record_path(swap_file).write_bytes(record.to_bytes())
    with pytest.raises(OwnedError, match="in use on this machine"):
        provision.create(swap_file.url(), DEVICE_BYTES, force=True)
    owner.release(swap_file.url(), record.holder, box1)
    provision.create(swap_file.url(), DEVICE_BYTES, force=True)
    assert swap_file.path.read_bytes() == bytes(DEVICE_BYTES)


# Engines


@each_version
def test_the_record_is_kept_fresh(swap_file: FileOnServer, hold: Callable[..., Held], version: int) -> None:
    """Ten digits, in place, and nothing else; its time moves on."""
    box1 = machine("box1")
    record = claim(swap_file, box1)
    grow_old(swap_file)
    held = hold(swap_file.url(version), swap_file, box1)
    wait_until(lambda: record_of(swap_file).refreshed >= 3, "three signs of life")
    assert dataclasses.replace(record_of(swap_file), refreshed=0) == record
    assert time.time() - record_path(swap_file).stat().st_mtime < 60
    assert held.state == OWNER_HELD


@each_version
@pytest.mark.parametrize("delay_s", [0.0, 0.05])
def test_a_theft_under_load(
    swap_file: FileOnServer, proxy: TcpProxy, hold: Callable[..., Held], version: int, delay_s: float
) -> None:
    """The first stops within its refresh interval, before the thief may begin; none of its writes comes after."""
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
    """What waited for the server when the file was stolen never goes out: neither what is in the region, nor what was
    on its way when the connection broke."""
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


def test_a_server_that_was_away_changes_nothing(own_ganesha: Ganesha, hold: Callable[..., Held]) -> None:
    """Killed, away for longer than the permission lasts, and back: the owner goes on, and all of it arrives."""
    (own_ganesha.export_path / "swap").write_bytes(bytes(DEVICE_BYTES))
    file = FileOnServer(own_ganesha, "swap", DEVICE_BYTES)
    box1 = machine("box1")
    claim(file, box1)
    held = hold(file.url(), file, box1)
    own_ganesha.kill()
    for page in range(512):
        held.engine.pwrite(ONE, page * PAGE)
    wait_until(lambda: held.state == OWNER_UNSURE, "the permission runs out")
    own_ganesha.start()
    in_background(held.engine.flush).result(DEADLINE_S)
    assert file.path.read_bytes()[: 512 * PAGE] == ONE * 512
    wait_until(lambda: held.state == OWNER_HELD, "its own again")


def test_a_theft_from_a_full_server(tmp_path: Path, hold: Callable[..., Held]) -> None:
    """Who waits for a page that the server has no room for is told, too, that it will never be written."""
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


def test_a_record_that_is_removed(
    swap_file: FileOnServer, hold: Callable[..., Held], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody can tell then who else may come: the owner stops, and says so once."""
    box1 = machine("box1")
    claim(swap_file, box1)
    held = hold(swap_file.url(), swap_file, box1)
    record_path(swap_file).unlink()
    wait_until(lambda: held.state == OWNER_STOLEN, "it is noticed")
    with pytest.raises(OSError, match="Input/output error"):
        held.engine.flush()
    said = capfd.readouterr().err
    assert said.count("is gone: all requests fail from now on") == 1


def test_a_worker_that_comes_too_late(
    swap_file: FileOnServer, hold: Callable[..., Held], capfd: pytest.CaptureFixture[str]
) -> None:
    """One that takes over a region whose file has been stolen meanwhile writes none of it."""
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


def test_closing_while_the_server_hangs(own_ganesha: Ganesha, hold: Callable[..., Held]) -> None:
    """A look that gets no answer does not hold up the end."""
    (own_ganesha.export_path / "swap").write_bytes(bytes(DEVICE_BYTES))
    file = FileOnServer(own_ganesha, "swap", DEVICE_BYTES)
    box1 = machine("box1")
    claim(file, box1)
    held = Held(file.url(), file, box1)
    wait_until(lambda: record_of(file).refreshed >= 1, "it looks")
    own_ganesha.pause()
    try:
        held.close()
    finally:
        own_ganesha.resume()


def test_both_options_or_none(swap_file: FileOnServer) -> None:
    """A record without an identity, or looks without a pause, are mistakes."""
    for options in ({"owner_path": "/x"}, {"owner_identity": "x"}, {"owner_refresh_ms": 0}):
        with pytest.raises(ValueError, match="owner_path"):
            Engine(swap_file.url(), LOOPBACK, **options)  # type: ignore[arg-type]


# The commands around it


def test_claim_and_down(swap_file: FileOnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a keeper's helper does, in a process of its own; `down` gives the file up by the records alone, a refusal
    is left for `status`."""
    command = [sys.executable, "-m", "nbdnfs", "claim", swap_file.url(), "--size=4M", f"--holder={HOLDER}"]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    assert (record_of(swap_file).boot, record_of(swap_file).holder) == (owner_record.boot_id(), HOLDER)
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    assert record_of(swap_file).generation == 1

    records = RunDir("swap0", run=tmp_path)
    records.make()
    lifecycle._give_up(records)  # a device that never got so far
    assert record_path(swap_file).exists()
    records.write(run_dir.ADDRESS, f"{swap_file.url()}\n{LOOPBACK}")
    lifecycle._give_up(records)
    assert beside(swap_file) == []

    owner.claim(swap_file.url(), HOLDER, machine("box2"))
    lifecycle._give_up(records)
    assert record_of(swap_file).host == "box2"
    refusals: list[tuple[str, str | None]] = []
    monkeypatch.setattr(run_dir, "write_refusal", lambda name, text: refusals.append((name, text)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["claim", swap_file.url(), f"--holder={HOLDER}"])
    assert ended.value.code == os.EX_NOPERM
    ((name, text),) = refusals
    assert name == "swap0"
    assert "in use as swap by box2" in str(text)


def test_a_keeper_that_fails_gives_the_file_up(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its device is still there, to be taken on by the next one."""
    owner.claim(swap_file.url(), HOLDER, owner_record.identity())
    monkeypatch.setattr(link, "find", lambda backend: link.Attached(0, DEVICE_BYTES))
    keeper_work._give_up_unless_attached("swap0", swap_file.url(), LOOPBACK)
    assert record_path(swap_file).exists()
    monkeypatch.setattr(link, "find", lambda backend: None)
    keeper_work._give_up_unless_attached("swap0", swap_file.url(), LOOPBACK)
    assert beside(swap_file) == []


def test_down_does_not_wait_for_a_server(
    own_ganesha: Ganesha, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record stays when nobody answers, which is said, and the next boot takes it over."""
    records = RunDir("swap0", run=tmp_path)
    records.make()
    records.write(run_dir.ADDRESS, f"{own_ganesha.url('swap')}\n{LOOPBACK}")
    own_ganesha.kill()
    lifecycle._give_up(records)
    assert "the owner record stays: no answer" in capsys.readouterr().err


def test_up_steals_before_it_starts_anything(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper, whoever starts it, finds the file its machine's."""
    owner.claim(swap_file.url(), HOLDER, machine("box2"), timing=QUICK)
    monkeypatch.setattr(owner.claim, "__kwdefaults__", {**(owner.claim.__kwdefaults__ or {}), "timing": QUICK})
    monkeypatch.setattr(config, "load", lambda name: config.Config(name, swap_file.url()))
    monkeypatch.setattr(lifecycle, "_systemd_has", lambda name: False)
    started: list[Record] = []
    monkeypatch.setattr(lifecycle, "_start_in_background", lambda name, timeout_s: started.append(record_of(swap_file)))
    lifecycle.up("swap0", steal=True)
    (found,) = started
    assert (found.boot, found.state, found.generation) == (owner_record.boot_id(), "held", 2)
