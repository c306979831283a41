# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `nbdnfs doctor` says of the server and of the backing file, and that it waits for neither."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

import pytest
from support.engines import OpenEngine
from support.nfs_server import FileOnServer, Ganesha
from support.owner_records import HOLDER, machine

from nbdnfs import backing_size, name_lock, region
from nbdnfs.commands import file_checks, file_in_use
from nbdnfs.commands.file_checks import FileFacts
from nbdnfs.commands.findings import Finding
from nbdnfs.config import Config
from nbdnfs.errors import UnavailableError
from nbdnfs.nas import owner_record, ownership
from nbdnfs.nas.owner_record import Identity
from nbdnfs.nas.record_file import FoundRecord

MIB = 1 << 20
ME = Identity(machine="a" * 32, boot="b" * 32, hardware="-", host="box1")
OTHER = Identity(machine="c" * 32, boot="d" * 32, hardware="-", host="box2")
SETTINGS = Config("swap0", "nfs://nas/export/x.swap", size_bytes=MIB)


def header(page_bytes: int, version: int = 1) -> bytes:
    content = bytearray(65536)
    content[1024:1028] = version.to_bytes(4, "little")
    content[page_bytes - 10 : page_bytes] = b"SWAPSPACE2"
    return bytes(content)


def facts(owner: Identity | None = ME, state: str = "held", **changes: object) -> FileFacts:
    record = FoundRecord()
    if owner is not None:
        found = owner_record.new(owner, HOLDER, None, state)
        record = FoundRecord(found.to_bytes(), found)
    known = FileFacts("192.0.2.7", MIB, 0o600, header(4096), record, ME)
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


def findings(found: FileFacts | None, settings: Config = SETTINGS, attached_bytes: int | None = None) -> list[Finding]:
    return list(file_checks.backing_file(settings, attached_bytes, look=lambda url: found))


def bad(found: list[Finding]) -> dict[str, str]:
    assert all(one.advice for one in found if not one.good)
    return {one.subject: one.found for one in found if not one.good}


def test_all_is_well() -> None:
    """Up, and not up: nothing is bad."""
    assert bad(findings(facts(), attached_bytes=MIB)) == {}
    assert bad(findings(facts(None))) == {}
    assert len(findings(facts())) == 5
    assert bad(findings(None)) == {}  # it has a size: the first start makes it
    assert bad(findings(facts(head=bytes(65536)))) == {}


@pytest.mark.parametrize(
    ("found", "subject", "words"),
    [
        (facts(mode=0o644), "file mode", "0644"),
        (facts(size_bytes=2 * MIB), "file size", "2 MiB, configured: 1 MiB"),
        (facts(size_bytes=MIB // 2), "file size", "512 KiB, and the device has 1 MiB"),
        (facts(OTHER), "owner record", "box2 (since "),
        (facts(None), "owner record", "none"),
        (facts(state="free"), "owner record", "none"),
        (
            facts(record=FoundRecord(b"?", None)),
            "owner record",
            "whose owner record is damaged owns",
        ),
        (None, "file", "no file of this name any more; the device may still reach its own by its handle"),
    ],
)
def test_what_is_wrong_with_a_device_that_is_up(found: FileFacts | None, subject: str, words: str) -> None:
    """One thing that is wrong makes one bad finding, with what to do."""
    ((name, text),) = bad(findings(found, attached_bytes=MIB)).items()
    assert name == f"swap0: {subject}"
    assert words in text


def test_a_file_that_is_not_under_its_name() -> None:
    """The finding says what is known and gives commands. A renamed file still has its pages."""
    (found,) = (one for one in findings(None, attached_bytes=MIB) if not one.good)
    assert "nothing need be lost yet" in found.found
    assert found.advice == (
        "was it renamed or moved? on the NAS, put it back under its name."
        " Else, at once: nbdnfs down swap0; nbdnfs up swap0; where down fails, end what uses the swap first"
    )
    (found,) = (one for one in findings(facts(size_bytes=MIB // 2), attached_bytes=MIB) if not one.good)
    assert "nbdnfs down swap0; nbdnfs up swap0" in found.advice


def test_another_file_under_the_name() -> None:
    """Where the device's own is known: nothing else about that one is judged. Not where the device is not up."""

    def check(used: int | None, attached_bytes: int | None, there: int | None = 7) -> list[Finding]:
        found = facts(OTHER, file_id=there)
        return list(
            file_checks.backing_file(SETTINGS, attached_bytes, used_file_id=used, look=lambda url: found),
        )

    server, other = check(8, MIB)
    assert server.good
    assert "the server has another file under this name now (number 7)" in other.found
    assert "put it back under its name" in other.advice
    for same in (check(7, MIB), check(None, MIB), check(8, MIB, None), check(8, None)):
        assert list(bad(same)) == ["swap0: owner record"]


def test_which_file_a_worker_uses(swap_file: FileOnServer, open_engine: OpenEngine) -> None:
    """The engine's own note of it in the region is read, the newer of two and only a whole one."""
    descriptor = region.create()
    assert file_in_use.in_region(descriptor) is None
    engine = open_engine(swap_file.url(), region_fd=descriptor)
    engine.pwrite(bytes(4096), 0)
    try:
        file_id = swap_file.path.stat().st_ino
        assert file_in_use.in_region(descriptor) == file_id
        assert file_in_use.file_id(os.getpid()) in (file_id, None)  # the process may have other regions
        found = list(file_checks.backing_file(Config("swap0", swap_file.url()), 4 * MIB, used_file_id=file_id))
        assert "swap0: file" not in bad(found)
        copy = swap_file.path.with_name("copy")
        copy.write_bytes(bytes(4 * MIB))
        copy.replace(swap_file.path)
        found = list(file_checks.backing_file(Config("swap0", swap_file.url()), 4 * MIB, used_file_id=file_id))
        assert "another file under this name" in bad(found)["swap0: file"]
        older = os.pread(descriptor, region.LAST_PLACE_BYTES, region.LAST_PLACE_OFFSET)
        os.pwrite(descriptor, bytes([older[40] ^ 1]), region.LAST_PLACE_OFFSET + 40)
        os.pwrite(descriptor, bytes(region.LAST_PLACE_BYTES), region.LAST_PLACE_OFFSET + region.LAST_PLACE_BYTES)
        assert file_in_use.in_region(descriptor) is None
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("configured", "found", "attached", "advice"),
    [
        (256 * MIB, 128 * MIB, 128 * MIB, 'nbdnfs grow swap0 256M --restart, or size = "128M"'),
        (2048 * MIB, 128 * MIB, None, 'nbdnfs grow swap0 2G, or size = "128M"'),
        (128 * MIB, 256 * MIB, None, 'size = "256M"'),
        (MIB, MIB + 4096, None, 'size = "1028K"'),
        (MIB, MIB + 512, None, "name another file"),
    ],
)
def test_another_size_than_configured(configured: int, found: int, attached: int | None, advice: str) -> None:
    """The file can grow, and not shrink; or the configuration is made to fit."""
    settings = dataclasses.replace(SETTINGS, size_bytes=configured)
    (one,) = (one for one in findings(facts(size_bytes=found), settings, attached) if not one.good)
    assert one.subject == "swap0: file size"
    assert one.advice == f"an existing file is used with the size that it has: {advice}"
    if '"' in advice:
        assert backing_size.parse(advice.split('"')[1], Path("/")) == found


def test_settings_decide() -> None:
    """Without a size in the configuration any is right, and a missing file is not; without owner, no record counts."""
    settings = dataclasses.replace(SETTINGS, size_bytes=0)
    assert bad(findings(facts(size_bytes=2 * MIB), settings)) == {}
    assert list(bad(findings(None, settings))) == ["swap0: file"]
    assert bad(findings(facts(OTHER), dataclasses.replace(SETTINGS, owner=False))) == {}
    assert bad(findings(facts(head=header(16384)))) == {}
    assert bad(findings(facts(head=header(16384)), dataclasses.replace(SETTINGS, owner=False))) == {
        "swap0: swap area": "for pages of 16 KiB"
    }
    before = dataclasses.replace(ME, boot="e" * 32)
    assert bad(findings(facts(before))) == {}
    assert list(bad(findings(facts(before), attached_bytes=MIB))) == ["swap0: owner record"]


def test_a_record_of_the_version_before() -> None:
    """It does not say which PID namespace its owner is in: after an upgrade with swap on, nothing is wrong with it."""
    me = dataclasses.replace(ME, pid_namespace=4026531836)
    record = owner_record.new(ME, "keeper:swap1", None, "held")
    known = facts(record=FoundRecord(record.to_bytes(), record), is_used=True)
    known = dataclasses.replace(known, me=me)
    (one,) = (one for one in findings(known, dataclasses.replace(SETTINGS, name="swap1")) if "owner" in one.subject)
    assert (one.good, one.found) == (True, "this machine owns the file")


@pytest.mark.parametrize(
    ("holder", "found", "advice"),
    [
        ("keeper:swap0", "as swap0", "give swap1 a file of its own, or first: nbdnfs down swap0"),
        ("serve:12:34", "as process 12", "give swap1 a file of its own, or first: end process 12, nbdnfs serve"),
    ],
)
def test_a_file_that_this_machine_uses(holder: str, found: str, advice: str) -> None:
    """As another device, or over nbdnfs serve: the start would refuse it. What has ended there is an earlier use."""
    record = owner_record.new(ME, holder, None, "held")
    known = facts(record=FoundRecord(record.to_bytes(), record), is_used=True)
    settings = dataclasses.replace(SETTINGS, name="swap1")
    (one,) = (one for one in findings(known, settings) if not one.good)
    assert one == Finding("swap1: owner record", False, f"this machine uses the file, {found}", advice)
    known = dataclasses.replace(known, is_used=False)
    (one,) = (one for one in findings(known, settings) if one.subject == "swap1: owner record")
    assert (one.good, one.found) == (True, "of an earlier use by this machine")


@pytest.mark.parametrize("is_up", [True, False])
def test_whether_the_owner_runs_here(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch, is_up: bool) -> None:
    """A keeper is asked for by its device's name, a process by its pid and start time."""
    asked = []
    monkeypatch.setattr(name_lock, "holder", lambda name, *_, **__: asked.append(name) or (1 if is_up else None))
    settings = Config("swap1", swap_file.url(), size_bytes=swap_file.size_bytes)
    ownership.claim(swap_file.url(), HOLDER, owner_record.identity())
    assert ("swap1: owner record" in bad(list(file_checks.backing_file(settings, None)))) is is_up
    assert asked == ["swap0"]
    ownership.release(swap_file.url(), HOLDER, owner_record.identity())
    ownership.claim(swap_file.url(), ownership.serve_holder(), owner_record.identity())
    assert f"process {os.getpid()}" in bad(list(file_checks.backing_file(settings, None)))["swap1: owner record"]


@pytest.mark.parametrize("head", [header(4096, version=0), b"LUKS\xba\xbe" + bytes(65530), b"\1" * 100])
def test_a_file_that_the_start_would_refuse(head: bytes) -> None:
    """What is no swap area for the keeper is none for doctor: ten letters without the version, and other data."""
    assert list(bad(findings(facts(head=head)))) == ["swap0: swap area"]


def test_a_server_that_hangs() -> None:
    """It gets its deadline, and no more."""
    forever = threading.Event()

    def hang(url: str) -> FileFacts | None:
        forever.wait()
        return None

    (found,) = file_checks.backing_file(SETTINGS, None, look=hang, deadline_s=0.1)
    forever.set()
    assert (found.subject, found.good) == ("swap0: server", False)
    assert found.found == "nas: no answer within 0.1 s"


def test_an_error_of_the_server() -> None:
    """It is the finding, with its own remedy."""

    def fail(url: str) -> FileFacts | None:
        raise UnavailableError("nas refuses the connection", "start the NFS server there")

    (found,) = file_checks.backing_file(SETTINGS, None, look=fail)
    assert (found.found, found.advice) == ("nas refuses the connection", "start the NFS server there")


def test_a_real_file(swap_file: FileOnServer) -> None:
    """Size, mode, header and owner as a server has them; a file that is not there; nothing is changed."""
    swap_file.path.chmod(0o600)
    with swap_file.path.open("r+b") as file:
        file.write(header(4096))
    settings = Config("swap0", swap_file.url(), size_bytes=swap_file.path.stat().st_size)
    assert bad(list(file_checks.backing_file(settings, None))) == {}
    ownership.claim(swap_file.url(), HOLDER, machine("box2"))
    before = sorted(swap_file.path.parent.iterdir())
    assert list(bad(list(file_checks.backing_file(settings, None)))) == ["swap0: owner record"]
    assert sorted(swap_file.path.parent.iterdir()) == before
    swap_file.path.unlink()
    found = list(file_checks.backing_file(settings, None))
    assert found[-1].found == "does not exist yet; the first start makes it"


def test_a_file_that_may_not_be_written(swap_file: FileOnServer) -> None:
    """A user who may only read it, as on a read-only export."""
    swap_file.path.chmod(0o644)
    settings = Config("swap0", swap_file.url(uid=65534, gid=65534), size_bytes=swap_file.size_bytes)
    found = list(file_checks.backing_file(settings, None))
    assert "uid 65534" in bad(found)["swap0: server"]


def test_a_server_that_is_stopped(own_ganesha: Ganesha, tmp_path: Path) -> None:
    """It accepts connections, and answers nothing: the finding comes at the deadline."""
    settings = Config("swap0", own_ganesha.url("x"), size_bytes=MIB)
    own_ganesha.pause()
    try:
        (found,) = file_checks.backing_file(settings, None, deadline_s=0.5)
    finally:
        own_ganesha.resume()
    assert not found.good
