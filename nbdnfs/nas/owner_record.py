# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who owns a backing file: the record beside it, and what a newcomer may do about it. No I/O on the server here.

The record is `.NAME.owner` beside the file NAME, always 512 bytes of text, one `key value` a line in the order of
`_FIELDS`, filled up with empty lines. The worker that owns the file writes ten digits of it every `refresh_ms`
(nbdnfs/engine/owner.c, which knows where they are) and nothing else ever; all other changes are a new file in the
record's place. docs/decisions/0009 says why.

The keeper has this module in its locked memory: what makes hashes (OpenSSL) is imported where one is made.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import socket
import time
from pathlib import Path

from nbdnfs.errors import ConfigError

RECORD_BYTES = 512
# An owner that lives has marked its record within so many of its refresh times: what it may be late, and a bit.
_STALE_REFRESHES = 2.5
# A look at the record permits writes for so many of them: engine/owner.c.
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

# machine-id(5): the id itself is not to be shown around; a keyed hash of it is.
_APPLICATION = b"nbdnfs backing file owner"


@dataclasses.dataclass(frozen=True)
class Timing:
    """How often an owner looks at its record and marks it, and how long a write that was let out may be on its way
    (TCP_USER_TIMEOUT of nfsio_connect.c is 25 s)."""

    refresh_ms: int = 10_000
    in_flight_ms: int = 30_000

    @property
    def stops_within_ms(self) -> int:
        return _PERMITTED_REFRESHES * self.refresh_ms + self.in_flight_ms


TIMING = Timing()


@dataclasses.dataclass(frozen=True)
class Identity:
    """This machine, now. `machine` and `hardware` are hashes, "-" where it has none; `boot` is new with each boot."""

    machine: str
    boot: str
    hardware: str
    host: str


def identity(root: Path = Path("/")) -> Identity:
    """Who this machine is: machine-id(5), the kernel's boot id, and what the firmware says. ConfigError: no boot id.

    The machine id of a system without a disk may be a new one at each boot. The firmware's (SMBIOS, or the device tree
    of a board) stays; that is why both count.
    """
    hardware = _text(root / "sys/class/dmi/id/product_uuid") or _text(root / "proc/device-tree/serial-number")
    host = re.sub(r"[^!-~]", "?", socket.gethostname())[:64]
    return Identity(_hashed(_text(root / "etc/machine-id")), boot_id(root), _hashed(hardware.lower()), host or "?")


def boot_id(root: Path = Path("/")) -> str:
    """A number that no other boot of any machine has. ConfigError: the kernel does not tell."""
    boot = _text(root / "proc/sys/kernel/random/boot_id").replace("-", "")
    if not re.fullmatch(_HEX, boot):
        raise ConfigError("the kernel tells no boot id", "mount /proc")
    return boot


def plugin_settings(file_name: str, boot: str, timing: Timing = TIMING) -> dict[str, str]:
    """What the plugin is to know of the record of a file that has been claimed in this boot: worker_config.py."""
    return {"owner": f"{boot}/{timing.refresh_ms}", "owner_record": name_of(file_name)}


def keeper_holder(name: str) -> str:
    """The holder of the device of /etc/nbdnfs/NAME.toml."""
    return f"keeper:{name}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _hashed(text: str) -> str:
    """32 digits; "-" for an id that is none: empty, all the same digit, or systemd's "uninitialized"."""
    if len(set(text.replace("-", ""))) < 2 or text == "uninitialized":
        return "-"
    import hashlib
    import hmac

    return hmac.new(text.encode(), _APPLICATION, hashlib.sha256).hexdigest()[:32]


def name_of(file_name: str) -> str:
    """The name of the record of the file with that name, in the same directory."""
    if len(file_name.encode()) <= 200:  # NAME_MAX is 255 bytes nearly everywhere
        return f".{file_name}.owner"
    import hashlib

    return f".nbdnfs.{hashlib.sha256(file_name.encode()).hexdigest()[:32]}.owner"


@dataclasses.dataclass(frozen=True)
class Record:
    """A record. `claim` is a number that no other record has; `claimed` is by its owner's clock and for people only.

    state             held; waiting: taken over, but the one before may still write; free: given up
    stops_within_ms   so long after it has been taken over, nothing of its owner's is on its way any more
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
        values = {key: str(getattr(self, key.replace("-", "_"))) for key in _FIELDS}
        values["refreshed"] = f"{self.refreshed:010d}"
        text = "\n".join([_MAGIC, *(f"{key} {value}" for key, value in values.items())]) + "\n"
        return text.encode().ljust(RECORD_BYTES, b"\n")

    @property
    def stale_after_s(self) -> float:
        """Without a sign of life for so long, its owner may write no more before it has looked again."""
        return self.refresh_ms * _STALE_REFRESHES / 1000


def parse(data: bytes) -> Record | None:
    """The record in `data`, every byte checked; None when it is none."""
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
    """A record of `me` that takes the place of `before`."""
    return Record(
        state=state,
        machine=me.machine,
        boot=me.boot,
        hardware=me.hardware,
        claim=os.urandom(16).hex(),
        generation=before.generation % 9_999_999_999 + 1 if before is not None else 1,
        refresh_ms=timing.refresh_ms,
        stops_within_ms=timing.stops_within_ms,
        claimed=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        holder=holder,
        host=me.host,
    )


class Verdict(enum.Enum):
    """What a newcomer may do about the record that is there."""

    CREATE = "there is none: make one"
    KEEP = "it is ours"
    REPLACE = "it was ours, and nobody uses it: take its place"
    WATCH = "it is from an earlier boot of ours, but looks alive: see whether it is"
    TAKE = "take its place, and wait until the one before has certainly stopped"
    REFUSE_FRESH = "another machine lives with it"
    REFUSE_STALE = "another machine's, which shows no sign of life"
    REFUSE_BUSY = "something else on this machine uses it"
    REFUSE_DAMAGED = "it cannot be read"


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
    """What `holder` of `me` may do about what was `found` (bytes: something that is no record).

    age_s         since the owner's last sign of life, by the server's clock alone
    holder_lives  whether the record's holder runs on this machine; only asked where it is one of this boot
    watched       it has shown no sign of life for as long as a living owner must
    """
    if found is None:
        return Verdict.CREATE
    if isinstance(found, bytes):
        return Verdict.TAKE if steal else Verdict.REFUSE_DAMAGED
    if found.state == "free":
        return Verdict.TAKE  # not REPLACE: another newcomer may think the same at the same time
    if found.boot == me.boot and found.machine == me.machine:
        if found.holder != holder and holder_lives:
            return Verdict.REFUSE_BUSY
        if found.state == "waiting":
            return Verdict.TAKE
        return Verdict.KEEP if found.holder == holder else Verdict.REPLACE
    is_stale = watched or age_s >= found.stale_after_s
    if _is_same(found.machine, me.machine) or _is_same(found.hardware, me.hardware):
        if is_stale:
            return Verdict.TAKE if found.state == "waiting" else Verdict.REPLACE
        if not steal:
            return Verdict.WATCH
    if steal:
        return Verdict.TAKE
    return Verdict.REFUSE_STALE if is_stale else Verdict.REFUSE_FRESH


def _is_same(one: str, other: str) -> bool:
    return one == other != "-"
