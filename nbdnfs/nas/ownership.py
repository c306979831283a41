# SPDX-License-Identifier: LGPL-2.1-or-later
"""Take a backing file for this machine, and give it up: the record beside it, on the server. Decision 0009.

Whoever has the record's name is the owner. A first record comes to its name by a hard link, which fails where there is
one; a later one takes the place of the one before by a rename, so that what its owner still writes goes elsewhere.
Whatever the answers said (one may have got lost, another newcomer may have been quicker): who has the name is read at
the end. Whether an owner lives is told by the server's clock, from when it last wrote and when we did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdnfs import nfs_url, proc_stat
from nbdnfs.engine import NfsFile, libnfs_version
from nbdnfs.errors import (
    CannotCreateError,
    NbdnfsError,
    NoInputError,
    OwnedError,
    PermissionDeniedError,
    UnavailableError,
)
from nbdnfs.kernel import state as kernel_state
from nbdnfs.nas import explain, owner_record
from nbdnfs.nas.owner_record import RECORD_BYTES, REFUSALS, TIMING, Identity, Record, Timing, Verdict
from nbdnfs.nfs_url import NfsUrl

log = logging.getLogger(__name__)

# Newcomers that are quicker than this one, one after the other, before it gives up.
_TRIES = 5
_TIMEOUT_S = 15
# A record whose file is gone has another by now: that is an answer, and nothing to wait for.
_GONE_LIMIT_MS = 1
_WATCH_PAUSE_S = 1.0
# For giving up: the machine may be going down, and the server with it.
_RELEASE_TIMEOUT_S = 5

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Found:
    """What has the record's name. `record` is None where nothing has, or something that is no record.

    data      its bytes; None where there is none
    mtime_us  its last sign of life, by the server's clock
    age_s     how long ago that was, by the same clock; None where nobody has asked for it
    """

    data: bytes | None = None
    record: Record | None = None
    mtime_us: int = 0
    age_s: float | None = None

    def text(self) -> str:
        """Who it is, since when, and whether it lives, in one line."""
        if self.record is None:
            return "nobody" if self.data is None else "somebody whose owner record is damaged"
        if self.record.state == "free":
            return f"nobody ({self.record.host} had it last)"
        alive = ""
        if self.age_s is not None:
            lives = self.age_s < self.record.stale_after_s
            alive = (
                f", last sign of life {_duration(self.age_s)} ago"
                if lives
                else (f", no sign of life for {_duration(self.age_s)}")
            )
        return f"{self.record.host} (since {self.record.claimed}{alive})"


def serve_holder() -> str:
    """This very process, as holder."""
    return f"serve:{os.getpid()}:{proc_stat.start_time_ticks(os.getpid())}"


def claim(
    url: str,
    holder: str,
    me: Identity,
    *,
    steal: bool = False,
    say: Say = log.warning,
    timing: Timing = TIMING,
    root: Path = Path("/"),
) -> Record:
    """Make the file `me`'s, or see that it is. Takes up to about a minute where somebody must have stopped first.

    `steal` takes it from another machine, which stops writing. `root` is where this machine's devices and processes are
    looked up. OwnedError: it is another machine's, or something else on this one uses it. UnavailableError: the server
    went away meanwhile; try again. Others as `diagnose.explain`.
    """
    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    with _explained(target, None) as address:
        # what cannot be used is not taken, and what is wrong with it is said before what is wrong with a record
        NfsFile(target.text, address).close()
        place = _Place(target, address)
        found = place.look()
        if _decide(found, me, holder, root, steal=steal) is Verdict.KEEP:
            assert found.record is not None
            return found.record
        for _ in range(_TRIES):
            with _Newcomer(place) as newcomer:
                record = _try_once(place, newcomer, me, holder, root, steal=steal, say=say, timing=timing)
            if record is not None:
                return record
            steal = False  # somebody else was quicker: that one is not meant
    raise UnavailableError(f"{target.path} on {target.host} is taken by others all the time", "try again")


def refuse_if_owned(url: str, me: Identity, root: Path = Path("/")) -> None:
    """OwnedError when somebody uses the file, or may: another machine, or anything on this one."""
    target = nfs_url.parse(url)
    with _explained(target, None) as address:
        place = _Place(target, address)
        if place.look().data is None:
            return
        with _Newcomer(place) as newcomer:
            found = newcomer.look()
        verdict = _decide(found, me, "", root)  # "" holds nothing: whatever lives is something else
        if verdict in (*REFUSALS, Verdict.WATCH):
            raise _refusal(verdict, found, target)


def look(url: str) -> Found:
    """Who has the file. Makes nothing on the server, and so cannot tell `age_s`. Errors as `diagnose.explain`."""
    target = nfs_url.parse(url)
    with _explained(target, None) as address:
        return _Place(target, address).look()


def release(url: str, holder: str, me: Identity, *, address: str | None = None) -> bool:
    """Give the file up, so that any machine may have it. False when it was not `holder`'s. Tries once.

    The record is marked as free before its name is taken away: should the name go to another record in between, or
    taking it away fail, nothing is lost.
    """
    target = nfs_url.parse(url)
    with _explained(target, address) as found_address:
        place = _Place(target, found_address)
        file = place.open(read_only=False, connect_timeout_s=_RELEASE_TIMEOUT_S)
        if file is None:
            return False
        with contextlib.closing(file):
            record = owner_record.parse(_read(file))
            if record is None or (record.machine, record.boot, record.holder) != (me.machine, me.boot, holder):
                return False
            file.pwrite(dataclasses.replace(record, state="free").to_bytes(), 0)
            if file.lookup(place.path)["ino"] == file.stat()["ino"]:
                file.unlink(place.path)
            return True


# One attempt


def _try_once(
    place: _Place,
    newcomer: _Newcomer,
    me: Identity,
    holder: str,
    root: Path,
    *,
    steal: bool,
    say: Say,
    timing: Timing,
) -> Record | None:
    """Decide, act, and see whether it is ours then: None when somebody else was quicker."""
    found, verdict = _watch(newcomer, me, holder, root, steal=steal, say=say)
    if verdict is Verdict.KEEP:
        return found.record
    if verdict in REFUSALS:
        raise _refusal(verdict, found, place.target)
    ours = owner_record.new(me, holder, found.record, "waiting" if verdict is Verdict.TAKE else "held", timing)
    newcomer.write(ours)
    if verdict is not Verdict.CREATE:
        # as late as can be: a record that has come meanwhile is not the one that was judged
        if not _is_the_same(place.look(), found):
            return None
        newcomer.rename()
    elif not newcomer.link():
        ours = dataclasses.replace(ours, state="waiting")
        newcomer.write(ours)
        newcomer.rename()
    if ours.state == "waiting":
        wait_s = max(ours.stops_within_ms, found.record.stops_within_ms if found.record is not None else 0) / 1000
        before = found.record.host if found.record is not None and found.record.state != "free" else "another machine"
        say(f"waiting {_duration(wait_s)}, until {before} has certainly stopped to write")
        time.sleep(wait_s)
    return _settle(place, ours)


def _watch(
    newcomer: _Newcomer, me: Identity, holder: str, root: Path, *, steal: bool, say: Say
) -> tuple[Found, Verdict]:
    """What there is, and what may be done about it. Waits to see whether a record lives where that decides."""
    first = found = newcomer.look()
    began_s = time.monotonic()
    while (verdict := _decide(found, me, holder, root, steal=steal)) is Verdict.WATCH:
        assert found.record is not None
        assert first.record is not None
        if found is first:
            say(
                f"the owner record is this machine's from before it was started anew, and {_duration(found.age_s or 0)}"
                " old: seeing whether anybody else uses it"
            )
        elif found.data != first.data:
            return found, Verdict.REFUSE_FRESH
        if time.monotonic() - began_s >= found.record.stale_after_s:
            return found, _decide(found, me, holder, root, watched=True)
        time.sleep(min(_WATCH_PAUSE_S, found.record.stale_after_s / 10))
        found = newcomer.look()
    return found, verdict


def _settle(place: _Place, ours: Record) -> Record | None:
    """Read who has the name now; a record that waited is in force then. None: it is another's."""
    file = place.open(read_only=False)
    if file is None:
        return None
    with contextlib.closing(file):
        found = owner_record.parse(_read(file))
        if found is None or found.claim != ours.claim:
            return None
        held = dataclasses.replace(ours, state="held")
        if found.state != "held":
            file.pwrite(held.to_bytes(), 0)
        return held


def _is_the_same(one: Found, other: Found) -> bool:
    """Whether it is the same record, however often it has been marked."""
    if one.record is None or other.record is None:
        return one.data == other.data
    return dataclasses.replace(one.record, refreshed=0) == dataclasses.replace(other.record, refreshed=0)


def _decide(
    found: Found, me: Identity, holder: str, root: Path, *, watched: bool = False, steal: bool = False
) -> Verdict:
    record = found.record
    return owner_record.decide(
        record if record is not None else found.data,
        me,
        holder,
        age_s=found.age_s or 0.0,
        holder_lives=record is not None and record.boot == me.boot and _lives(record.holder, root),
        watched=watched,
        steal=steal,
    )


def _lives(holder: str, root: Path) -> bool:
    """Whether it runs on this machine: a keeper's device is attached, a process is the one that it was."""
    kind, _, rest = holder.partition(":")
    if kind == "keeper":
        # nbd_device.backend_of
        return any(state.attached and state.backend == f"nbdnfs:{rest}" for state in kernel_state.nbd_devices(root))
    pid, _, ticks = rest.partition(":")
    return proc_stat.start_time_ticks(int(pid), root) == int(ticks)


def _refusal(verdict: Verdict, found: Found, target: NfsUrl) -> OwnedError:
    what, record = f"{target.path} on {target.host}", found.record
    if verdict is Verdict.REFUSE_BUSY:
        assert record is not None
        kind, _, rest = record.holder.partition(":")
        return OwnedError(
            f"{what} is in use on this machine, by {rest if kind == 'keeper' else 'process ' + rest.partition(':')[0]}",
            "give each device a file of its own, or end that one first",
        )
    if verdict is Verdict.REFUSE_DAMAGED or record is None:
        return OwnedError(
            f"the owner record of {what} ({owner_record.name_of(target.name)}) is damaged: nobody knows who has it",
            "when no other machine uses it: nbdnfs up NAME --steal",
        )
    if verdict is Verdict.REFUSE_STALE:
        return OwnedError(
            f"{what} is the swap of {found.text()}",
            "when that machine is down for good: nbdnfs up NAME --steal; it cannot write to the file then",
        )
    return OwnedError(
        f"{what} is in use as swap by {found.text()}",
        f"nbdnfs down there first, or give each machine its own file (%H, %m). --steal ends what {record.host} has"
        " swapped out",
    )


# Names on the server


class _Place:
    """The record's name, and the directory that it is in."""

    def __init__(self, target: NfsUrl, address: str) -> None:
        self.target = target
        self.address = address
        self.path = f"/{owner_record.name_of(target.name)}"

    def url(self, name: str) -> str:
        """Of another name in the directory."""
        path, mark, options = self.target.text.partition("?")
        return path.removesuffix(self.target.name) + name + mark + options

    def open(self, *, read_only: bool, connect_timeout_s: int = _TIMEOUT_S) -> NfsFile | None:
        """What has the name now; None when nothing has. It stays the same file when the name gets another."""
        try:
            return NfsFile(
                self.url(self.path[1:]),
                self.address,
                read_only=read_only,
                connect_timeout_s=connect_timeout_s,
                gone_limit_ms=_GONE_LIMIT_MS,
            )
        except OSError as error:
            if error.errno == errno.ENOENT and getattr(error, "phase", "open") == "open":
                return None
            raise

    def look(self) -> Found:
        file = self.open(read_only=True)
        if file is None:
            return Found()
        with contextlib.closing(file):
            data = _read(file)
            return Found(data, owner_record.parse(data), file.stat()["mtime_us"])


class _Newcomer:
    """A file of a name of its own, which is to become the record. Not for use once it has: then `place` has it."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._name = f"{place.path[1:]}.{secrets.token_hex(6)}"
        try:
            # others may read who has the file
            self._file = NfsFile(
                place.url(self._name),
                place.address,
                create=True,
                exclusive=True,
                mode=0o644,
                gone_limit_ms=_GONE_LIMIT_MS,
            )
        except OSError as error:
            raise _cannot_make(error, place) from None

    def __enter__(self) -> _Newcomer:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink(f"/{self._name}")
        self._file.close()

    def look(self) -> Found:
        """With the age: what is written now has the server's time."""
        found = self._place.look()
        self._file.pwrite(b"\n", RECORD_BYTES - 1)
        age_s = (self._file.stat()["mtime_us"] - found.mtime_us) / 1e6
        return dataclasses.replace(found, age_s=max(0.0, age_s))

    def write(self, record: Record) -> None:
        self._file.pwrite(record.to_bytes(), 0)

    def link(self) -> bool:
        """Give it the record's name, which must be free. False where the server has no hard links. Who has the name
        then is to be read."""
        try:
            self._file.link(f"/{self._name}", self._place.path)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL):
                return False
            if error.errno != errno.EEXIST:
                raise
        return True

    def rename(self) -> None:
        """Give it the record's name, whoever has that."""
        self._file.rename(f"/{self._name}", self._place.path)


def _read(file: NfsFile) -> bytes:
    buffer = bytearray(RECORD_BYTES + 1)
    return bytes(buffer[: file.pread(buffer, 0)])


def _cannot_make(error: OSError, place: _Place) -> NbdnfsError:
    target = place.target
    where = f"{target.directory} on {target.host}"
    if getattr(error, "phase", "open") == "open":
        if error.errno == errno.ENOENT:
            return NoInputError(f"{target.host} has no directory {target.directory}", "make it there first")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return PermissionDeniedError(
                f"uid {target.options.get('uid', os.getuid())} may not make an owner record in {where}",
                "let that user write there, or do without the protection from a second machine: owner = false in the"
                " configuration, serve --no-owner",
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CannotCreateError(f"no room for an owner record of 512 bytes in {where}", "free space there")
    return explain.explain(error, target, place.address)


@contextlib.contextmanager
def _explained(target: NfsUrl, address: str | None) -> Iterator[str]:
    """The server's address; an OSError of the engine becomes what the user can understand."""
    resolved = target.resolve() if address is None else address
    try:
        yield resolved
    except OSError as error:
        if error.errno in (errno.ECONNRESET, errno.ENOTCONN, errno.ESTALE):
            raise UnavailableError(f"{target.host} went away while {target.path} was taken", "try again") from None
        raise explain.explain(error, target, resolved) from None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
