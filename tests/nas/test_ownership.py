# SPDX-License-Identifier: LGPL-2.1-or-later
"""Claims of a backing file by several machines, on a real server: refusal, theft, takeover, release."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.nfs_server import FileOnServer, Ganesha
from support.owner_records import (
    HOLDER,
    QUICK,
    Held,
    beside,
    claim,
    each_version,
    grow_old,
    machine,
    record_of,
    record_path,
)
from support.waiting import in_background

from nbdnfs import name_lock, nfs_url
from nbdnfs.engine import NfsFile
from nbdnfs.errors import ConfigError, NbdnfsError, NoInputError, OwnedError, PermissionDeniedError
from nbdnfs.nas import backing_file, owner_record, ownership, part_file, remote_file
from nbdnfs.nas.owner_record import Identity, Record
from nbdnfs.nas.patience import Interrupted

MIB = 1 << 20
DEVICE_BYTES = 4 * MIB


def refused(file: FileOnServer, me: Identity, *words: str, **options: str | Path) -> None:
    """The claim is refused with these words, and the record is left as it was."""
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


def test_a_keeper_lives_from_its_start(tmp_path: Path) -> None:
    """Not only once its device is attached: two names for one file may start at the same moment."""
    assert not ownership.holder_lives("keeper:swap0", tmp_path)
    lock = name_lock.take("swap0", name_lock.KEEPER, root=tmp_path)
    assert ownership.holder_lives("keeper:swap0", tmp_path)
    assert not ownership.holder_lives("keeper:swap1", tmp_path)
    os.close(lock)


@each_version
def test_a_second_machine_is_refused(swap_file: FileOnServer, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the owner and since when, and says, by the server's clock, whether it is alive."""
    url, box1, box2 = swap_file.url(version), machine("box1"), machine("box2")
    record = ownership.claim(url, HOLDER, box1)
    assert record == record_of(swap_file)
    assert (record.state, record.host, record.generation, record.refresh_ms) == ("held", "box1", 1, 10_000)
    assert stat.S_IMODE(record_path(swap_file).stat().st_mode) == 0o644
    assert beside(swap_file) == [record_path(swap_file)]
    assert ownership.claim(url, HOLDER, box1) == record

    refused(swap_file, box2, "is in use as swap by box1", record.claimed, "last sign of life", "nbdnfs down")
    grow_old(swap_file, 7260)
    refused(swap_file, box2, "box1", record.claimed, "no sign of life for 2 h", "--steal")

    waited_s: list[float] = []
    monkeypatch.setattr(time, "sleep", waited_s.append)
    stolen = claim(swap_file, box2, steal=True)
    # two refresh times of 10 s, and 30 s for what is on its way: the first one's, not the second one's
    assert waited_s == [50.0]
    assert (stolen.host, stolen.generation, stolen.state) == ("box2", 2, "held")
    assert record_of(swap_file) == stolen
    refused(swap_file, box1, "box2")


def test_an_earlier_boot_is_taken_over(swap_file: FileOnServer) -> None:
    """At once where its last sign of life is old; where that is recent, after watching it for long enough."""
    box1 = machine("box1")
    claim(swap_file, box1)
    grow_old(swap_file)
    again = dataclasses.replace(box1, boot=secrets.token_hex(16))
    assert claim(swap_file, again).generation == 2
    # the next one comes at once; the same hardware, whose image has a new machine id at each boot
    third = Identity(secrets.token_hex(16), secrets.token_hex(16), box1.hardware, "box1", has_new_machine_id=True)
    assert claim(swap_file, third).generation == 3
    assert record_of(swap_file).boot == third.boot


def test_one_shared_id_is_not_enough(swap_file: FileOnServer) -> None:
    """A copied image on other hardware, and another image on hardware with the same id: strangers, however long the
    owner has been silent."""
    box1 = machine("box1")
    claim(swap_file, box1)
    grow_old(swap_file)
    other = machine("box2")
    for shared in ({"machine": box1.machine}, {"hardware": box1.hardware}):
        refused(swap_file, dataclasses.replace(other, **shared), "is the swap of box1", "--steal")


def test_a_living_clone_is_not_an_earlier_boot(swap_file: FileOnServer) -> None:
    """Two machines with one machine id: the record is refreshed while it is watched."""
    box1 = machine("box1")
    claim(swap_file, box1)
    with contextlib.closing(Held(swap_file.url(), swap_file, box1)):
        refused(swap_file, dataclasses.replace(box1, boot=secrets.token_hex(16)), "in use as swap by box1")


def test_this_boot_keeps_its_file(swap_file: FileOnServer) -> None:
    """A keeper after a crash finds its own record; another device or `serve` on this machine does not get the file
    while that one runs."""
    box1, root = machine("box1"), Path("/")
    claim(swap_file, box1, holder=ownership.serve_holder(), root=root)
    refused(swap_file, box1, "in use on this machine", f"process {os.getpid()}", holder="keeper:swap1")
    with pytest.raises(OwnedError, match="in use on this machine"):
        claim(swap_file, box1, steal=True, holder="keeper:swap1")
    dead = dataclasses.replace(record_of(swap_file), holder=f"serve:{os.getpid()}:1")
    record_path(swap_file).write_bytes(dead.to_bytes())
    assert claim(swap_file, box1, holder="keeper:swap1").generation == 2
    assert claim(swap_file, box1, holder="keeper:swap1").generation == 2


def test_a_container_of_the_same_machine(swap_file: FileOnServer) -> None:
    """It sees no process of the other one: a record that is refreshed is somebody's, and so is the one that comes in
    its place. `down` of a device of the same name leaves it alone."""
    box1 = machine("box1")
    other = dataclasses.replace(box1, pid_namespace=box1.pid_namespace + 1)
    said: list[str] = []
    claim(swap_file, box1)
    with contextlib.closing(Held(swap_file.url(), swap_file, box1)):
        for holder in (HOLDER, "serve:7:12345"):
            refused(swap_file, other, "in use as swap by box1", holder=holder)
            assert not ownership.release(swap_file.url(), holder, other)

    grow_old(swap_file)  # it died with its container
    record = ownership.claim(swap_file.url(), HOLDER, other, report=said.append, timing=QUICK)
    assert record.generation == 2
    assert said == ["waiting 1 s, until box1 has certainly stopped writing"]
    assert claim(swap_file, other) == record


def test_an_owner_that_gives_the_file_up_while_it_is_watched(
    swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when one container follows another: there is nothing to wait for any more."""
    box1 = machine("box1")
    other = dataclasses.replace(box1, pid_namespace=box1.pid_namespace + 1)
    ownership.claim(swap_file.url(), HOLDER, box1)  # with the real times
    said: list[str] = []

    def end(line: str) -> None:
        said.append(line)
        assert ownership.release(swap_file.url(), HOLDER, box1)

    assert ownership.claim(swap_file.url(), HOLDER, other, report=end, timing=QUICK).generation == 1
    assert len(said) == 1
    assert "of this machine" in said[0]
    assert "whether its owner, which cannot be seen from here (a container?), refreshes it" in said[0]


def test_a_damaged_record(swap_file: FileOnServer) -> None:
    """Bytes that are not a record are left to the administrator."""
    record_path(swap_file).write_bytes(b"nbdnfs owner 1\n")
    refused(swap_file, machine("box1"), "damaged", "--steal")
    assert claim(swap_file, machine("box1"), steal=True).generation == 1


def test_a_steal_that_was_interrupted_waits_again(swap_file: FileOnServer) -> None:
    """A machine that died while it waited to steal a file waits again when it comes back."""
    box2 = machine("box2")
    waiting = owner_record.new(box2, HOLDER, None, "waiting", QUICK)
    record_path(swap_file).write_bytes(waiting.to_bytes())
    said: list[str] = []
    before_s = time.monotonic()
    record = ownership.claim(swap_file.url(), HOLDER, box2, report=said.append, timing=QUICK)
    assert time.monotonic() - before_s >= QUICK.stops_within_ms / 1000
    assert record.state == record_of(swap_file).state == "held"
    assert "waiting" in said[0]


def test_of_many_claimants_one_wins(swap_file: FileOnServer) -> None:
    """Eight machines at once, without a record, with a free one, and with --steal: one owns the file, and knows it."""
    url = swap_file.url()

    def all_at_once(*, steal: bool) -> None:
        boxes = [machine(f"box{number}") for number in range(8)]
        barrier = threading.Barrier(len(boxes))

        def attempt(me: Identity) -> Record | None:
            barrier.wait()
            try:
                return ownership.claim(url, HOLDER, me, steal=steal, timing=QUICK, report=lambda _: None)
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
    """The first record is created under its name, and nothing is waited for. One that was never written is watched,
    and then replaced."""
    without_links(monkeypatch)
    slept_s: list[float] = []
    monkeypatch.setattr(time, "sleep", slept_s.append)
    box1 = machine("box1")
    for _ in range(2):
        record = ownership.claim(swap_file.url(), HOLDER, box1)  # for long enough to be alive, on a busy machine too
        assert record == record_of(swap_file)
        assert (record.state, record.generation) == ("held", 1)
        refused(swap_file, machine("box2"), "in use as swap by box1")
        assert ownership.release(swap_file.url(), HOLDER, box1)
    assert slept_s == []
    record_path(swap_file).touch()
    monkeypatch.setattr(ownership, "EMPTY_STALE_AFTER_S", 0.3)
    assert claim(swap_file, box1) == record_of(swap_file)
    assert slept_s[-1] == QUICK.stops_within_ms / 1000


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers LINK with an error."""

    def link(file: NfsFile, old_path: str, new_path: str) -> None:
        raise OSError(errno.EINVAL, "NFS3ERR_NOTSUPP")

    monkeypatch.setattr(remote_file, "NfsFile", type("Linkless", (Wrapped,), {"link": link}))


class Wrapped:
    """An NfsFile, for changes to some of its methods."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._file = NfsFile(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_of_many_claimants_without_hard_links_one_wins(
    swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The creation of the record decides."""
    without_links(monkeypatch)
    for _ in range(5):
        futures = [in_background(claim, swap_file, machine(f"box{number}")) for number in range(8)]
        results = [future.exception(60) or future.result() for future in futures]
        won = [result for result in results if isinstance(result, Record)]
        assert won == [record_of(swap_file)]
        assert beside(swap_file) == [record_path(swap_file)]
        record_path(swap_file).unlink()


def test_a_file_with_two_names(swap_file: FileOnServer) -> None:
    """Under another name it would have another record: hard and symbolic links are refused, under each name."""
    other = swap_file.path.with_name("other.swap")
    url = swap_file.url().replace(swap_file.name, other.name)
    other.symlink_to(swap_file.name)
    swap_file.path.chmod(0o600)
    with pytest.raises(ConfigError, match="is a symbolic link") as caught:
        ownership.claim(url, HOLDER, machine("box1"))
    assert "the file itself" in caught.value.hint
    with pytest.raises(ConfigError, match="is a symbolic link"):
        backing_file.create(url, DEVICE_BYTES, force=True)
    other.unlink()
    os.link(swap_file.path, other)
    for name in (url, swap_file.url()):
        with pytest.raises(ConfigError, match=r"has 2 names \(hard links\)") as caught:
            ownership.claim(name, HOLDER, machine("box1"))
        assert "-samefile" in caught.value.hint
    other.unlink()
    assert beside(swap_file) == []
    assert claim(swap_file, machine("box1")) == record_of(swap_file)


def test_a_leftover_of_create_is_removed(swap_file: FileOnServer) -> None:
    """It died after the file got its name: the part file's name is not another name of the file."""
    part = swap_file.path.with_name(part_file.name_of(nfs_url.parse(swap_file.url())))
    os.link(swap_file.path, part)
    claim(swap_file, machine("box1"))
    assert beside(swap_file) == [record_path(swap_file)]


def test_a_claim_that_is_interrupted(swap_file: FileOnServer) -> None:
    """While it watches, nothing is left behind; while it waits, a record that makes the next claimant wait as well."""
    box1, box2, stop = machine("box1"), machine("box2"), threading.Event()
    owned = ownership.claim(swap_file.url(), HOLDER, box1)  # with the real times
    before = record_path(swap_file).read_bytes()

    def interrupt(line: str) -> None:
        said.append(line)
        stop.set()

    said: list[str] = []
    again = dataclasses.replace(box1, boot=secrets.token_hex(16))
    with pytest.raises(Interrupted):
        ownership.claim(swap_file.url(), HOLDER, again, report=interrupt, stop=stop)
    assert "checking whether another machine refreshes it" in said.pop()
    assert record_path(swap_file).read_bytes() == before
    stop.clear()
    with pytest.raises(Interrupted):
        ownership.claim(swap_file.url(), HOLDER, box2, steal=True, report=interrupt, stop=stop)
    assert "waiting 50 s" in said.pop()
    found = record_of(swap_file)
    assert (found.state, found.host, found.generation) == ("free", "box2", owned.generation + 1)
    assert beside(swap_file) == [record_path(swap_file)]
    stop.clear()
    with pytest.raises(Interrupted):
        ownership.claim(swap_file.url(), HOLDER, box1, report=interrupt, stop=stop)
    assert "waiting 50 s" in said.pop()


def test_release(swap_file: FileOnServer) -> None:
    """The owner's release leaves nothing behind; that of another machine or holder changes nothing."""
    box1, box2 = machine("box1"), machine("box2")
    claim(swap_file, box1)
    assert not ownership.release(swap_file.url(), HOLDER, box2)
    assert not ownership.release(swap_file.url(), "keeper:other", box1)
    assert record_of(swap_file).state == "held"
    assert ownership.release(swap_file.url(), HOLDER, box1)
    assert beside(swap_file) == []
    assert not ownership.release(swap_file.url(), HOLDER, box1)
    assert claim(swap_file, box2).generation == 1


def test_release_spares_a_thief(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that gets the name between the lookup and the removal stays."""
    box1, box2 = machine("box1"), machine("box2")
    claim(swap_file, box1)
    theirs = owner_record.new(box2, HOLDER, None, "held")

    class Robbed(Wrapped):
        """An NfsFile whose name goes to another file once it has been written."""

        def pwrite(self, data: bytes, offset: int) -> int:
            count = self._file.pwrite(data, offset)
            new = swap_file.path.with_name("theirs")
            new.write_bytes(theirs.to_bytes())
            new.rename(record_path(swap_file))
            return count

    monkeypatch.setattr(remote_file, "NfsFile", Robbed)
    with contextlib.suppress(NbdnfsError):  # the file that it had open is gone
        ownership.release(swap_file.url(), HOLDER, box1)
    assert record_of(swap_file) == theirs


def test_a_directory_without_permission(ganesha: Ganesha, swap_file: FileOnServer) -> None:
    """A directory where no record can be created is an error with a way out; an error of the file comes first."""
    folder = ganesha.export_path / "closed"
    folder.mkdir(mode=0o755)
    (folder / "swap").write_bytes(bytes(DEVICE_BYTES))
    os.chown(folder / "swap", 1234, 1234)
    with pytest.raises(PermissionDeniedError) as caught:
        ownership.claim(ganesha.url("closed/swap", uid=1234, gid=1234), HOLDER, machine("box1"))
    assert "may not create an owner record" in caught.value.message
    assert "owner = false" in caught.value.hint
    with pytest.raises(NoInputError, match="there is no file"):
        ownership.claim(ganesha.url("closed/other"), HOLDER, machine("box1"))


def test_create_force(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with an owner is not overwritten with zeros; a released one is."""
    box1 = machine("box1")
    claim(swap_file, box1)
    swap_file.path.chmod(0o600)
    swap_file.path.write_bytes(b"x" * DEVICE_BYTES)
    for seconds, word in ((0, "last sign of life"), (600, "no sign of life")):
        grow_old(swap_file, seconds)
        with pytest.raises(OwnedError, match=word):
            backing_file.create(swap_file.url(), DEVICE_BYTES, force=True)
    assert swap_file.path.read_bytes() == b"x" * DEVICE_BYTES
    monkeypatch.setattr(owner_record, "identity", lambda: box1)
    record = dataclasses.replace(record_of(swap_file), holder=ownership.serve_holder())
    record_path(swap_file).write_bytes(record.to_bytes())
    with pytest.raises(OwnedError, match="in use on this machine"):
        backing_file.create(swap_file.url(), DEVICE_BYTES, force=True)
    ownership.release(swap_file.url(), record.holder, box1)
    backing_file.create(swap_file.url(), DEVICE_BYTES, force=True)
    assert swap_file.path.read_bytes() == bytes(DEVICE_BYTES)
