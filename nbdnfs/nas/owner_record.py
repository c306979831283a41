# SPDX-License-Identifier: LGPL-2.1-or-later
"""The owner record of a backing file: its format, and what a claimant may do about one. No I/O on the server here.

The record is `.NAME.owner` beside the file NAME: always 512 bytes of text, one `key value` on each line, in the order
of `_FIELDS`, and then empty lines. The worker that owns the file overwrites ten digits every `refresh_ms`
(engine/nfs/owner_watch.c has their offset), and nothing else is ever written to it; any other change is a new file in
its place. docs/decisions/0009 says why.

The keeper has this module in its locked memory, so that hashlib (OpenSSL) is imported only where a hash is made.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import socket
import time
from pathlib import Path

from nbdnfs import machine_ids
from nbdnfs.errors import ConfigError

RECORD_BYTES = 512
# A live owner has refreshed its record within this many refresh times, delays included.
_STALE_REFRESHES = 2.5
# Reading the record permits writes for this many refresh times: engine/nfs/owner_watch.c.
_PERMITTED_REFRESHES = 2

_MAGIC = "nbdnfs owner 1"
_HEX = r"[0-9a-f]{32}"
_FIELDS = {
    "refreshed": r"[0-9]{10}",
    "state": r"held|waiting|free",
    "machine": rf"{_HEX}|-",
    "boot": _HEX,
    "hardware": rf"{_HEX}|-",
    "claim": _HEX,
    "generation": r"[1-9][0-9]{0,9}",
    "refresh-ms": r"[1-9][0-9]{0,7}",
    "stops-within-ms": r"[1-9][0-9]{0,7}",
    "claimed": r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z",
    "holder": r"keeper:[A-Za-z0-9_.-]{1,64}|serve:[0-9]{1,10}:[0-9]{1,20}",
    "host": r"[!-~]{1,64}",
}

# machine-id(5): the id itself is confidential; a keyed hash of it may be published.
_APPLICATION = b"nbdnfs backing file owner"

# A claim's number ends with this mark and the inode number of a PID namespace. Versions before this one have random
# digits there, and compare numbers as a whole: the format of the record is the same for both.
_NAMESPACE_MARK = "0001"
_CLAIM_WITH_NAMESPACE = re.compile(rf"[0-9a-f]{{20}}{_NAMESPACE_MARK}([0-9a-f]{{8}})")
# include/linux/proc_ns.h, PROC_PID_INIT_INO: the namespace of a kernel that has only one.
_FIRST_NAMESPACE = 0xEFFF_FFFC

# Where a machine id that systemd could not write down for good is, machine-id(5).
_TRANSIENT_MACHINE_ID = "run/machine-id"


@dataclasses.dataclass(frozen=True)
class Timing:
    """How often an owner reads and refreshes its record, and how long a write that was sent may be in flight (the
    engine's TCP_USER_TIMEOUT is 25 s)."""

    refresh_ms: int = 10_000
    in_flight_ms: int = 30_000

    @property
    def stops_within_ms(self) -> int:
        """How long after the loss of its record no write of the owner is in flight any more."""
        return _PERMITTED_REFRESHES * self.refresh_ms + self.in_flight_ms


TIMING = Timing()
# After this time, a claimant that has made an empty record and not written it is taken to have died.
EMPTY_STALE_AFTER_S = TIMING.refresh_ms * _STALE_REFRESHES / 1000


@dataclasses.dataclass(frozen=True)
class Identity:
    """This machine in one boot. `machine` and `hardware` are hashes ("-": none); `boot` is new at each boot.

    With `has_new_machine_id` the machine id may be another at each boot, too. `pid_namespace` is a number of the
    processes that this one sees; 0: it cannot say which it sees.
    """

    machine: str
    boot: str
    hardware: str
    host: str
    has_new_machine_id: bool = False
    pid_namespace: int = 0


def identity(root: Path = Path("/")) -> Identity:
    """The identity of this machine: machine-id(5), the kernel's boot id and the firmware's id. ConfigError: no boot id.

    A diskless system may have a new machine id at each boot, while the firmware's id (SMBIOS, or the device tree of a
    board) stays. Hence both.
    """
    host = re.sub(r"[^!-~]", "?", socket.gethostname())[:64]
    machine, hardware = _hashed(machine_ids.read(root / "etc/machine-id")), _hashed(machine_ids.hardware_id(root))
    return Identity(machine, boot_id(root), hardware, host or "?", _is_machine_id_volatile(root), _pid_namespace(root))


def _pid_namespace(root: Path) -> int:
    """The inode number of this process's PID namespace (namespaces(7)): what it does not see of that has ended.

    0 where /proc does not show all of it: it is another namespace's, or hides other users' processes (hidepid=,
    proc(5)), of which PID 1 is one.
    """
    try:
        if os.readlink(root / "proc/self") != str(os.getpid()) or not machine_ids.read(root / "proc/1/stat"):
            return 0
        return os.stat(root / "proc/self/ns/pid").st_ino
    except FileNotFoundError:
        return _FIRST_NAMESPACE if (root / "proc/self/stat").exists() else 0
    except OSError:
        return 0


def _is_machine_id_volatile(root: Path) -> bool:
    """Whether /etc/machine-id may be gone after this boot: systemd says so, or its file system may be (proc(5))."""
    if (root / _TRANSIENT_MACHINE_ID).exists():
        return True
    _, kind = machine_ids.machine_id_mount(root)
    return kind in machine_ids.VOLATILE_FILE_SYSTEMS


def boot_id(root: Path = Path("/")) -> str:
    """32 hexadecimal digits that no other boot of any machine has. ConfigError: /proc does not have them."""
    boot = machine_ids.read(root / "proc/sys/kernel/random/boot_id").replace("-", "")
    if not re.fullmatch(_HEX, boot):
        raise ConfigError("the kernel reports no boot id", "mount /proc")
    return boot


def plugin_settings(file_name: str, boot: str, timing: Timing = TIMING) -> dict[str, str]:
    """The plugin's settings for a file that was claimed in this boot."""
    return {"owner": f"{boot}/{timing.refresh_ms}", "owner_record": name_of(file_name)}


def keeper_holder(name: str) -> str:
    """The holder that stands for the keeper of the device `name`."""
    return f"keeper:{name}"


def shown_holder(holder: str) -> str:
    """A device by its name, or a process by its number."""
    kind, _, rest = holder.partition(":")
    return rest if kind == "keeper" else f"process {rest.partition(':')[0]}"


def _hashed(text: str) -> str:
    """32 digits; "-" for what is not an id of one machine."""
    if not machine_ids.is_own(text):
        return "-"
    import hashlib
    import hmac

    return hmac.new(text.encode(), _APPLICATION, hashlib.sha256).hexdigest()[:32]


def name_of(file_name: str) -> str:
    """The name of a file's record, in the same directory."""
    data = file_name.encode(errors="surrogateescape")
    # NAME_MAX is 255 bytes nearly everywhere; nbdkit's settings are UTF-8, and the worker logs the name
    if len(data) <= 200 and not any(ord(it) < 32 or "\ud800" <= it < "\ue000" for it in file_name):
        return f".{file_name}.owner"
    import hashlib

    return f".nbdnfs.{hashlib.sha256(data).hexdigest()[:32]}.owner"


@dataclasses.dataclass(frozen=True)
class Record:
    """A record. `claim` is a number that no other record has (`_claim_number`); `claimed` is by its owner's clock, and
    for display only.

    state             held; waiting: taken over, but the previous owner may still write; free: released
    stops_within_ms   how long after the record was replaced no write of its owner is in flight any more
    """

    state: str
    machine: str
    boot: str
    hardware: str
    claim: str
    generation: int
    refresh_ms: int
    stops_within_ms: int
    claimed: str
    holder: str
    host: str
    refreshed: int = 0

    def to_bytes(self) -> bytes:
        """The 512 bytes of the record."""
        values = {key: str(getattr(self, key.replace("-", "_"))) for key in _FIELDS}
        values["refreshed"] = f"{self.refreshed:010d}"
        text = "\n".join([_MAGIC, *(f"{key} {value}" for key, value in values.items())]) + "\n"
        return text.encode().ljust(RECORD_BYTES, b"\n")

    @property
    def pid_namespace(self) -> int:
        """The PID namespace of its holder; 0 where that is not known: of a version before this one, too."""
        found = _CLAIM_WITH_NAMESPACE.fullmatch(self.claim)
        return int(found[1], 16) if found is not None else 0

    def is_of(self, me: Identity, holder: str) -> bool:
        """Whether `holder` of `me` has claimed it, and no other of the same name in another PID namespace."""
        is_other_namespace = 0 != self.pid_namespace != me.pid_namespace != 0
        return (self.machine, self.boot, self.holder) == (me.machine, me.boot, holder) and not is_other_namespace

    @property
    def stale_after_s(self) -> float:
        """After this time without a sign of life, the owner may not write before it has read the record again."""
        return self.refresh_ms * _STALE_REFRESHES / 1000


def parse(data: bytes) -> Record | None:
    """The record in `data`, with every byte checked; None when `data` is not a record."""
    if len(data) != RECORD_BYTES or not data.isascii():
        return None
    lines = data.decode().rstrip("\n").split("\n")
    if len(lines) != len(_FIELDS) + 1 or lines[0] != _MAGIC:
        return None
    values: dict[str, str | int] = {}
    for line, (key, pattern) in zip(lines[1:], _FIELDS.items(), strict=True):
        found_key, _, value = line.partition(" ")
        if found_key != key or not re.fullmatch(pattern, value):
            return None
        is_number = key in ("refreshed", "generation", "refresh-ms", "stops-within-ms")
        values[key.replace("-", "_")] = int(value) if is_number else value
    return Record(**values)  # type: ignore[arg-type]


def new(me: Identity, holder: str, before: Record | None, state: str, timing: Timing = TIMING) -> Record:
    """A record of `me` that replaces `before`, claimed now."""
    return Record(
        state=state,
        machine=me.machine,
        boot=me.boot,
        hardware=me.hardware,
        claim=_claim_number(me),
        generation=before.generation % 9_999_999_999 + 1 if before is not None else 1,
        refresh_ms=timing.refresh_ms,
        stops_within_ms=timing.stops_within_ms,
        claimed=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        holder=holder,
        host=me.host,
    )


def _claim_number(me: Identity) -> str:
    """32 digits: random ones, and the PID namespace where that is known."""
    if not 0 < me.pid_namespace < 1 << 32:
        return os.urandom(16).hex()
    return f"{os.urandom(10).hex()}{_NAMESPACE_MARK}{me.pid_namespace:08x}"


class Verdict(enum.Enum):
    """What a claimant may do about the current record."""

    CREATE = "there is none: create one"
    KEEP = "the claimant owns it"
    REPLACE = "it is of the claimant's machine and not in use: replace it"
    WATCH = "it is of the claimant's machine, or still empty, and its owner cannot be seen, but looks alive: watch it"
    TAKE = "replace it, and wait until its owner has certainly stopped"
    REFUSE_FRESH = "another machine owns it and is alive"
    REFUSE_STALE = "another machine owns it and shows no sign of life"
    REFUSE_BUSY = "something else on this machine uses the file"
    REFUSE_DAMAGED = "it is not a valid record"


REFUSALS = (Verdict.REFUSE_FRESH, Verdict.REFUSE_STALE, Verdict.REFUSE_BUSY, Verdict.REFUSE_DAMAGED)


def decide(
    found: Record | bytes | None,
    me: Identity,
    holder: str,
    *,
    age_s: float,
    holder_lives: bool,
    watched: bool = False,
    steal: bool = False,
) -> Verdict:
    """What `holder` of `me` may do about what was `found` (bytes: something that is not a record; None: nothing).

    age_s         seconds since the owner's last sign of life, by the server's clock alone
    holder_lives  whether the record's holder is seen to run on this machine; counts for a record of this boot only
    watched       the record was not refreshed for as long as a live owner would take at most
    """
    if found is None:
        return Verdict.CREATE
    if isinstance(found, bytes):
        if found or steal:
            return Verdict.TAKE if steal else Verdict.REFUSE_DAMAGED
        # made on a server without hard links (record_file.py): by a claimant that is about to write it, or that died
        return Verdict.TAKE if watched or age_s >= EMPTY_STALE_AFTER_S else Verdict.WATCH
    if found.state == "free":
        return Verdict.TAKE  # not REPLACE: another claimant may decide the same at the same time
    is_same_hardware = _is_same(found.hardware, me.hardware)
    is_other_hardware = not is_same_hardware and "-" not in (found.hardware, me.hardware)
    is_stale = watched or age_s >= found.stale_after_s
    if found.boot == me.boot and found.machine == me.machine and not is_other_hardware:
        if found.holder != holder and holder_lives:
            return Verdict.REFUSE_BUSY
        if found.state == "waiting":
            return Verdict.TAKE
        if found.pid_namespace == me.pid_namespace != 0:
            return Verdict.KEEP if found.holder == holder else Verdict.REPLACE
        # A holder in another container may live unseen, one with the same name too. Not KEEP or REPLACE when it is
        # stale: it may be slow, or cut off, and what it has sent may be in flight.
        return Verdict.TAKE if is_stale or steal else Verdict.WATCH
    is_other_machine_id = found.machine != me.machine and "-" not in (found.machine, me.machine)
    if me.has_new_machine_id and is_same_hardware:
        is_other_machine_id = False
    is_stranger = is_other_machine_id or is_other_hardware  # one id that is the same may be shared
    if not is_stranger and (_is_same(found.machine, me.machine) or is_same_hardware):
        if is_stale:
            may_live = found.boot == me.boot  # in another container, with a machine id of its own
            return Verdict.TAKE if found.state == "waiting" or may_live else Verdict.REPLACE
        if not steal:
            return Verdict.WATCH
    if steal:
        return Verdict.TAKE
    return Verdict.REFUSE_STALE if is_stale else Verdict.REFUSE_FRESH


def _is_same(one: str, other: str) -> bool:
    return one == other != "-"
