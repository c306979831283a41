# SPDX-License-Identifier: LGPL-2.1-or-later
"""The owner record: its format, what is not a record, and what a claimant may do about one."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdnfs.errors import ConfigError
from nbdnfs.nas import owner_record
from nbdnfs.nas.owner_record import RECORD_BYTES, REFUSALS, Identity, Record, Timing, Verdict, decide

# The tree's, not the package's: what is installed has no sources.
SOURCES = Path(__file__).parents[2] / "nbdnfs/engine/nfs"
A, B, C, D = ("a" * 31 + "1", "b" * 31 + "1", "c" * 31 + "1", "d" * 31 + "1")
NAMESPACE = 4026531836
ME = Identity(machine=A, boot=B, hardware=C, host="box1", pid_namespace=NAMESPACE)
HOLDER = "keeper:swap0"

hexadecimal = st.text("0123456789abcdef", min_size=32, max_size=32)
records = st.builds(
    Record,
    state=st.sampled_from(["held", "waiting", "free"]),
    machine=hexadecimal | st.just("-"),
    boot=hexadecimal,
    hardware=hexadecimal | st.just("-"),
    claim=hexadecimal,
    generation=st.integers(1, 9_999_999_999),
    refresh_ms=st.integers(1, 99_999_999),
    stops_within_ms=st.integers(1, 99_999_999),
    claimed=st.just("2026-01-02T03:04:05Z"),
    holder=st.sampled_from(["keeper:" + "n" * 64, "serve:4194304:18446744073709551615"]),
    host=st.text("abcXYZ019.-?", min_size=1, max_size=64),
    refreshed=st.integers(0, 9_999_999_999),
)


def held(**changes: object) -> Record:
    """A record that box2 holds."""
    record = owner_record.new(Identity(D, D, D, "box2", pid_namespace=NAMESPACE), HOLDER, None, "held")
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


@given(records)
def test_round_trip(record: Record) -> None:
    """The longest and the shortest values fit into 512 bytes, and are read back."""
    data = record.to_bytes()
    assert len(data) == RECORD_BYTES
    assert owner_record.parse(data) == record


def test_the_format_is_that_of_the_worker() -> None:
    """The engine writes ten digits at offset 25, and looks for whole lines."""
    data = held(refreshed=1234567890).to_bytes()
    assert data[:25] == b"nbdnfs owner 1\nrefreshed "
    assert data[25:36] == b"1234567890\n"
    assert b"\nstate held\n" in data
    assert f"\nboot {D}\n".encode() in data
    assert b"\nhost box2\n" in data
    source = (SOURCES / "owner_watch.c").read_text()
    assert re.search(r"#define COUNTER_OFFSET 25u", source)
    header = (SOURCES / "owner_watch.h").read_text()
    assert f"#define OWNER_RECORD_BYTES {RECORD_BYTES}u" in header
    assert f"#define OWNER_REFRESH_MS {owner_record.TIMING.refresh_ms}u" in header


@given(records, st.integers(0, RECORD_BYTES - 1), st.integers(0, 255))
@settings(max_examples=300)
def test_one_wrong_byte_is_never_repaired(record: Record, at: int, byte: int) -> None:
    """Bytes that parse are those that would be written: nothing is skipped, trimmed or guessed."""
    data = bytearray(record.to_bytes())
    data[at] = byte
    found = owner_record.parse(bytes(data))
    assert found is None or found.to_bytes() == bytes(data)


@given(st.binary(max_size=600))
def test_other_bytes_are_not_a_record(data: bytes) -> None:
    """Empty, short, long and random files are not records."""
    assert owner_record.parse(data) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("owner 1", "owner 2"),
        lambda text: text.replace("state held", "state mine"),
        lambda text: text.replace("generation 1\n", "generation 01\n"),
        lambda text: text.replace("host box2", "host box 2"),
        lambda text: text.replace("host box2\n", ""),
        lambda text: text.replace("\nstate held\nmachine", "\nmachine").replace("\nboot", "\nstate held\nboot"),
        lambda text: text.replace("host box2\n", "host box2\nmore 1\n"),
        lambda text: text.replace("keeper:swap0", "keeper:"),
    ],
)
def test_damage(spoil: object) -> None:
    """A wrong version, value or order, a missing line and an additional one are rejected."""
    text = held().to_bytes().decode()
    spoilt = spoil(text)  # type: ignore[operator]
    assert spoilt != text
    assert owner_record.parse(spoilt.encode().ljust(RECORD_BYTES, b"\n")[:RECORD_BYTES]) is None


OTHER = {"machine": D, "boot": D, "hardware": D}
EARLIER = {"machine": A, "boot": D, "hardware": C}
# the firmware's id is not known (it needs root), or is one that is known to be shared
EARLIER_WITHOUT_HARDWARE = {"machine": A, "boot": D, "hardware": "-"}
# one machine id, because an image was copied, on other hardware; and one firmware's id on two machines
CLONE = {"machine": A, "boot": D, "hardware": D}
TWIN = {"machine": D, "boot": D, "hardware": C}
NOW = {"machine": A, "boot": B, "hardware": C}


@pytest.mark.parametrize(
    ("record", "age_s", "lives", "verdict", "stolen"),
    [
        (OTHER, 3, False, Verdict.REFUSE_FRESH, Verdict.TAKE),
        (OTHER, 24, False, Verdict.REFUSE_FRESH, Verdict.TAKE),
        (OTHER, 26, False, Verdict.REFUSE_STALE, Verdict.TAKE),
        (OTHER | {"state": "waiting"}, 3, False, Verdict.REFUSE_FRESH, Verdict.TAKE),
        (OTHER | {"state": "free"}, 3, False, Verdict.TAKE, Verdict.TAKE),
        (EARLIER, 26, False, Verdict.REPLACE, Verdict.REPLACE),
        (EARLIER, 3, False, Verdict.WATCH, Verdict.TAKE),
        (EARLIER | {"state": "waiting"}, 26, False, Verdict.TAKE, Verdict.TAKE),
        (EARLIER_WITHOUT_HARDWARE, 26, False, Verdict.REPLACE, Verdict.REPLACE),
        (EARLIER_WITHOUT_HARDWARE, 3, False, Verdict.WATCH, Verdict.TAKE),
        (EARLIER | {"machine": "-"}, 26, False, Verdict.REPLACE, Verdict.REPLACE),
        (CLONE, 26, False, Verdict.REFUSE_STALE, Verdict.TAKE),
        (CLONE, 3, False, Verdict.REFUSE_FRESH, Verdict.TAKE),
        (TWIN, 26, False, Verdict.REFUSE_STALE, Verdict.TAKE),
        (TWIN, 3, False, Verdict.REFUSE_FRESH, Verdict.TAKE),
        (NOW, 3, True, Verdict.KEEP, Verdict.KEEP),
        (NOW, 300, False, Verdict.KEEP, Verdict.KEEP),
        (NOW | {"state": "waiting"}, 3, False, Verdict.TAKE, Verdict.TAKE),
        (NOW | {"holder": "keeper:swap1"}, 300, True, Verdict.REFUSE_BUSY, Verdict.REFUSE_BUSY),
        (NOW | {"holder": "keeper:swap1"}, 3, False, Verdict.REPLACE, Verdict.REPLACE),
        # containers on one host: one boot, several machines
        (NOW | {"machine": D, "hardware": "-"}, 3, True, Verdict.REFUSE_FRESH, Verdict.TAKE),
        # a snapshot of a machine that was started twice: one boot and machine id, other hardware
        (NOW | {"hardware": D}, 3, False, Verdict.REFUSE_FRESH, Verdict.TAKE),
        # two machines without an id are not the same machine
        ({"machine": "-", "boot": D, "hardware": "-"}, 26, False, Verdict.REFUSE_STALE, Verdict.TAKE),
    ],
)
def test_decisions(record: dict[str, str], age_s: float, lives: bool, verdict: Verdict, stolen: Verdict) -> None:
    """What box1 may do about each kind of record, without and with --steal."""
    found = held(**record)
    assert decide(found, ME, HOLDER, age_s=age_s, holder_lives=lives) is verdict
    assert decide(found, ME, HOLDER, age_s=age_s, holder_lives=lives, steal=True) is stolen


def test_a_machine_without_ids() -> None:
    """A machine without any id owns what it claimed in this boot, and nothing from before."""
    me = Identity("-", B, "-", "box1", pid_namespace=NAMESPACE)
    mine = owner_record.new(me, HOLDER, None, "held")
    assert decide(mine, me, HOLDER, age_s=0, holder_lives=False) is Verdict.KEEP
    later = dataclasses.replace(me, boot=C)
    assert decide(mine, later, HOLDER, age_s=100, holder_lives=False) is Verdict.REFUSE_STALE


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        (TWIN, Verdict.REPLACE),
        (TWIN | {"machine": "-"}, Verdict.REPLACE),
        (CLONE, Verdict.REFUSE_STALE),
        (TWIN | {"hardware": "-"}, Verdict.REFUSE_STALE),
        (NOW, Verdict.KEEP),
        # containers on one host, whose owner may be slow
        (NOW | {"machine": D}, Verdict.TAKE),
    ],
)
def test_a_machine_id_that_is_new_at_each_boot(record: dict[str, str], verdict: Verdict) -> None:
    """An image in memory: the firmware's id says which machine it is, and another machine id says nothing."""
    me = dataclasses.replace(ME, has_new_machine_id=True)
    assert decide(held(**record), me, HOLDER, age_s=26, holder_lives=False) is verdict


def test_no_record_and_a_damaged_one() -> None:
    """Without a record, one is created; anything else in its place is refused, unless it is to be stolen."""
    assert decide(None, ME, HOLDER, age_s=0, holder_lives=False) is Verdict.CREATE
    assert decide(b"x", ME, HOLDER, age_s=0, holder_lives=False) is Verdict.REFUSE_DAMAGED
    assert decide(b"x", ME, HOLDER, age_s=0, holder_lives=False, steal=True) is Verdict.TAKE


def test_an_empty_record() -> None:
    """A claimant is about to write it, or has died before it could: the wait is for the one that was only slow."""
    assert decide(b"", ME, HOLDER, age_s=24, holder_lives=False) is Verdict.WATCH
    assert decide(b"", ME, HOLDER, age_s=26, holder_lives=False) is Verdict.TAKE
    assert decide(b"", ME, HOLDER, age_s=0, holder_lives=False, watched=True) is Verdict.TAKE
    assert decide(b"", ME, HOLDER, age_s=0, holder_lives=False, steal=True) is Verdict.TAKE


def test_watched() -> None:
    """The record of an earlier boot that was not refreshed while watched is replaced, however young it is."""
    assert decide(held(**EARLIER), ME, HOLDER, age_s=0, holder_lives=False, watched=True) is Verdict.REPLACE


# Claims without a PID namespace: of a version before, and of a holder that did not know its own.
FROM_BEFORE, FROM_ELSEWHERE = {"claim": A}, {"claim": f"{A[:20]}0001{NAMESPACE + 1:08x}"}


@pytest.mark.parametrize("claim", [FROM_BEFORE, FROM_ELSEWHERE], ids=["not known", "another"])
@pytest.mark.parametrize("holder", [HOLDER, "serve:7:12345"])
@pytest.mark.parametrize("ids", [{}, {"machine": "-", "hardware": "-"}], ids=["with ids", "without ids"])
def test_containers_of_one_machine(claim: dict[str, str], holder: str, ids: dict[str, str]) -> None:
    """A holder in another PID namespace lives unseen, one of the same name too: its file is not taken before it has
    been silent for so long that it may not write, and then with the wait."""
    record = held(**NOW | claim | ids | {"holder": holder})
    me = dataclasses.replace(ME, machine=record.machine, hardware=record.hardware)
    assert decide(record, me, HOLDER, age_s=1, holder_lives=False) is Verdict.WATCH
    assert decide(record, me, HOLDER, age_s=26, holder_lives=False) is Verdict.TAKE
    assert decide(record, me, HOLDER, age_s=1, holder_lives=False, watched=True) is Verdict.TAKE
    assert decide(record, me, HOLDER, age_s=1, holder_lives=False, steal=True) is Verdict.TAKE
    unknowing = dataclasses.replace(me, pid_namespace=0)
    again = dataclasses.replace(record, claim=owner_record.new(unknowing, HOLDER, None, "held").claim)
    assert decide(again, unknowing, HOLDER, age_s=1, holder_lives=False) is Verdict.WATCH


def test_whose_record_it_is() -> None:
    """Its holder's, by name, where it is not known to be in another PID namespace."""
    record = owner_record.new(ME, HOLDER, None, "held")
    assert record.pid_namespace == NAMESPACE
    assert record.is_of(ME, HOLDER)
    assert not record.is_of(ME, "keeper:swap1")
    assert not record.is_of(dataclasses.replace(ME, pid_namespace=NAMESPACE + 1), HOLDER)
    before = dataclasses.replace(record, claim=A)
    assert before.pid_namespace == 0
    assert before.is_of(ME, HOLDER)


def test_the_version_before_reads_the_namespace_as_a_part_of_the_claim() -> None:
    """It wants 32 hexadecimal digits there, and has read no other line."""
    lines = owner_record.new(ME, HOLDER, None, "held").to_bytes().decode().rstrip("\n").split("\n")
    assert len(lines) == 13
    assert re.fullmatch(r"claim [0-9a-f]{32}", lines[6])


def test_the_pid_namespace(tmp_path: Path) -> None:
    """Only where /proc shows all of it: it has the numbers of another one in some containers, or hides processes."""
    me = str(os.getpid())
    assert owner_record.identity().pid_namespace == os.stat("/proc/self/ns/pid").st_ino
    for name in ("sys/kernel/random/boot_id", f"{me}/stat", f"{me}/ns/pid", "1/stat"):
        (tmp_path / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / name).write_text(f"{B}\n")
    (tmp_path / "proc/self").symlink_to(me)
    namespace = tmp_path / "proc" / me / "ns/pid"
    assert owner_record.identity(tmp_path).pid_namespace == namespace.stat().st_ino
    namespace.unlink()  # a kernel that has but one
    assert owner_record.identity(tmp_path).pid_namespace == 0xEFFFFFFC
    (tmp_path / "proc/1/stat").unlink()
    assert owner_record.identity(tmp_path).pid_namespace == 0
    (tmp_path / "proc/self").unlink()
    (tmp_path / "proc/self").symlink_to("1")
    assert owner_record.identity(tmp_path).pid_namespace == 0


identities = st.builds(
    Identity,
    machine=st.sampled_from(["-", A, D]),
    boot=st.sampled_from([B, D]),
    hardware=st.sampled_from(["-", C, D]),
    host=st.just("box"),
    pid_namespace=st.sampled_from([0, NAMESPACE, NAMESPACE + 1]),
)


@given(identities, identities, st.floats(0, 1000), st.booleans(), st.sampled_from(["held", "waiting"]))
def test_a_living_owner_is_never_replaced(me: Identity, owner: Identity, age_s: float, lives: bool, state: str) -> None:
    """With any ids: a fresh record of another machine, boot or PID namespace is refused or watched, and taken with
    --steal only, after the wait in which its owner stops."""
    record = owner_record.new(owner, HOLDER, None, state)
    verdict = decide(record, me, HOLDER, age_s=age_s, holder_lives=lives)
    is_other_hardware = "-" not in (owner.hardware, me.hardware) and owner.hardware != me.hardware
    may_be_unseen = not owner.pid_namespace == me.pid_namespace != 0
    if (owner.boot, owner.machine) != (me.boot, me.machine) or is_other_hardware or (may_be_unseen and state == "held"):
        if age_s < record.stale_after_s:
            assert verdict in (*REFUSALS, Verdict.WATCH)
            assert decide(record, me, HOLDER, age_s=age_s, holder_lives=lives, steal=True) is Verdict.TAKE
        assert verdict is not Verdict.KEEP
    else:
        assert verdict in (Verdict.KEEP, Verdict.TAKE)


def test_the_wait_covers_what_the_owner_may_still_send() -> None:
    """Two refresh times, TCP_USER_TIMEOUT and a margin; a record is stale only after the permission has ended."""
    record = held()
    assert record.stops_within_ms >= 2 * record.refresh_ms + 25_000 + 5_000
    assert record.stale_after_s * 1000 > 2 * record.refresh_ms
    quick = owner_record.new(ME, HOLDER, record, "held", Timing(refresh_ms=100, in_flight_ms=50))
    assert (quick.refresh_ms, quick.stops_within_ms, quick.generation) == (100, 250, 2)
    assert quick.claim != owner_record.new(ME, HOLDER, record, "held").claim


def test_identity(tmp_path: Path) -> None:
    """Hashes of machine-id and SMBIOS, and the boot id; placeholders count as no id; the ids themselves stay secret."""
    files = {
        "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "proc/sys/kernel/random/boot_id": "01234567-89ab-cdef-0123-456789abcdef\n",
        "sys/class/dmi/id/product_uuid": "4C4C4544-0044-4A10-8030-B4C04F4E4D32\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    me = owner_record.identity(tmp_path)
    assert me.boot == "0123456789abcdef0123456789abcdef"
    assert re.fullmatch("[0-9a-f]{32}", me.machine)
    assert re.fullmatch("[0-9a-f]{32}", me.hardware)
    assert me.machine not in (me.boot, me.hardware)
    assert owner_record.parse(owner_record.new(me, HOLDER, None, "held").to_bytes()) is not None

    assert not me.has_new_machine_id

    (tmp_path / "etc/machine-id").write_text("uninitialized\n")
    (tmp_path / "sys/class/dmi/id/product_uuid").write_text("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF\n")
    assert owner_record.identity(tmp_path).machine == owner_record.identity(tmp_path).hardware == "-"
    (tmp_path / "sys/class/dmi/id/product_uuid").unlink()
    board = tmp_path / "proc/device-tree/serial-number"
    board.parent.mkdir(parents=True)
    board.write_bytes(b"100000003d1d1c36\0")
    assert owner_record.identity(tmp_path).hardware not in ("-", me.hardware)
    (tmp_path / "proc/sys/kernel/random/boot_id").unlink()
    with pytest.raises(ConfigError, match="no boot id"):
        owner_record.identity(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "03000200-0400-0500-0006-000700080009",
        "00020003-0004-0005-0006-000700080009",
        "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
        "00000000-0000-0000-0000-000000000000",
        "FEFEFEFE-FEFE-FEFE-FEFE-FEFEFEFEFEFE",
        "12345678-1234-5678-90AB-CDDEEFAABBCC",
        "Not Settable",
        "Not Specified",
        "To Be Filled By O.E.M.",
        "Default string",
        "System Serial Number",
    ],
)
@pytest.mark.parametrize("where", ["sys/class/dmi/id/product_uuid", "proc/device-tree/serial-number"])
def test_ids_that_are_shared_are_not_ids(tmp_path: Path, text: str, where: str) -> None:
    """What firmware has where its maker set nothing: the same on a whole product line."""
    for name, content in {"proc/sys/kernel/random/boot_id": 32 * "a", where: text}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert owner_record.identity(tmp_path).hardware == "-"


@pytest.mark.parametrize(
    ("mounts", "is_new"),
    [
        ([("/", "ext4")], False),
        ([("/", "overlay")], True),
        ([("/", "rootfs"), ("/", "ext4"), ("/etc2", "tmpfs")], False),
        ([("/", "ext4"), ("/etc", "tmpfs")], True),
        ([("/", "overlay"), ("/etc/machine-id", "nfs4")], False),
        ([("/", "nfs"), ("/etc/machine-id", "tmpfs")], True),
    ],
)
def test_where_the_machine_id_is(tmp_path: Path, mounts: list[tuple[str, str]], is_new: bool) -> None:
    """On a file system in memory it is another at each boot."""
    files = {
        "proc/sys/kernel/random/boot_id": 32 * "a",
        "proc/self/mountinfo": "".join(
            f"{number} 1 0:5 / {place} rw,relatime shared:1 - {kind} {kind} rw\n"
            for number, (place, kind) in enumerate(mounts)
        ),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert owner_record.identity(tmp_path).has_new_machine_id == is_new
    (tmp_path / "run").mkdir()
    (tmp_path / "run/machine-id").write_text(32 * "b")
    assert owner_record.identity(tmp_path).has_new_machine_id


def test_names() -> None:
    """The record is a hidden file beside the backing file; a long name is replaced by a hash."""
    assert owner_record.name_of("box.swap") == ".box.swap.owner"
    long = owner_record.name_of("ä" * 120)
    assert len(long.encode()) < 100
    assert long != owner_record.name_of("ä" * 121)
    latin1 = owner_record.name_of("\udce4.swap")  # nbdkit's settings are UTF-8
    assert latin1.isascii()
    assert latin1 != owner_record.name_of("\udcf6.swap")
