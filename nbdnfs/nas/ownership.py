# SPDX-License-Identifier: LGPL-2.1-or-later
"""Claims a backing file for this machine, and releases it, by the owner record beside the file. docs/decisions/0009.

The owner is the machine whose record has the record's name. Answers of the server prove nothing (one may get lost, or
another machine may be faster), so the name is read at the end. Whether an owner is alive is judged by the server's
clock alone: from when the owner last wrote, and when this machine did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdnfs import name_lock, nfs_url, proc_stat
from nbdnfs.engine import NfsFile, libnfs_version
from nbdnfs.errors import (
    CannotCreateError,
    ConfigError,
    IOFailureError,
    NbdnfsError,
    OwnedError,
    PermissionDeniedError,
    UnavailableError,
)
from nbdnfs.kernel import state as kernel_state
from nbdnfs.nas import explain, owner_record, part_file, patience, record_file, remote_file
from nbdnfs.nas.owner_record import EMPTY_STALE_AFTER_S, REFUSALS, TIMING, Identity, Record, Timing, Verdict
from nbdnfs.nas.record_file import CandidateRecord, FoundRecord, RecordFile, duration
from nbdnfs.nfs_url import NfsUrl

log = logging.getLogger(__name__)

# Other machines that are faster than this one, one after the other, before it gives up.
_TRIES = 5
_WATCH_PAUSE_S = 1.0
# Short, because the machine may be shutting down, and the server with it.
_RELEASE_TIMEOUT_S = 5
# For all of a release. A transfer has no limit of its own.
_RELEASE_LIMIT_S = 15.0


def serve_holder() -> str:
    """The holder that stands for this process."""
    return f"serve:{os.getpid()}:{proc_stat.start_time_ticks(os.getpid())}"


@dataclasses.dataclass(frozen=True)
class _Claimant:
    """The machine and the holder that want the file. `root`: where the devices and processes of this machine are."""

    me: Identity
    holder: str
    root: Path
    timing: Timing
    report: Callable[[str], None]

    def judge(self, found: FoundRecord, *, watched: bool = False, steal: bool = False) -> Verdict:
        """What may be done about the record that was found; see `owner_record.decide`."""
        record = found.record
        verdict = owner_record.decide(
            record if record is not None else found.data,
            self.me,
            self.holder,
            age_s=found.age_s or 0.0,
            holder_lives=record is not None and record.boot == self.me.boot and holder_lives(record.holder, self.root),
            watched=watched,
            steal=steal,
        )
        # a release may still mark the record as free, or remove the name: not before nothing of it is in flight
        is_unfinished = verdict is Verdict.KEEP and os.path.exists(_release_note(self.holder, self.root))
        return Verdict.TAKE if is_unfinished else verdict


def claim(
    url: str,
    holder: str,
    me: Identity,
    *,
    steal: bool = False,
    report: Callable[[str], None] = log.warning,
    timing: Timing = TIMING,
    root: Path = Path("/"),
    stop: threading.Event | None = None,
) -> Record:
    """Make the machine `me` the owner of the file, or verify that it is; the record that says so.

    Takes up to about a minute where another machine must have stopped first, which `report` gets a line about. `steal`
    takes the file from another machine, which then stops writing. `root` is where this machine's devices and processes
    are looked up.

    OwnedError: another machine owns the file, or something else on this one uses it. ConfigError: the file has other
    names. UnavailableError: the server went away; try again. patience.Interrupted: `stop` was set while this waited;
    a record that was put in place is marked as free. Others as `explain.open_error`, and where no record can be
    created.
    """
    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    claimant = _Claimant(me, holder, root, timing, report)
    with patience.interruptible(stop), _explained(target, None) as address:
        # a file that cannot be used is not claimed, and its error comes before that of a record
        with contextlib.closing(remote_file.open_file(target.text, address, read_only=False)) as file:
            refuse_alias(file, target)
        location = RecordFile(target, address)
        found = location.read()
        if claimant.judge(found, steal=steal) is Verdict.KEEP:
            assert found.record is not None
            return found.record
        for _ in range(_TRIES):
            with CandidateRecord(location) as candidate:
                record = _try_once(location, candidate, claimant, steal=steal)
            if record is not None:
                _forget(_release_note(holder, root))
                return record
            steal = False  # another machine was faster, and is not the one to steal from
    raise UnavailableError(f"other machines keep claiming {target.path} on {target.host}", "try again")


def refuse_alias(file: NfsFile, target: NfsUrl) -> None:
    """ConfigError: the open file of `target` has, or may get, owner records under other names: hard and symbolic links.

    The record stands for the file only where the file has one name. OSError.
    """
    what = f"{target.path} on {target.host}"
    if remote_file.is_symbolic_link(file, f"/{target.name}"):
        raise ConfigError(
            f"{what} is a symbolic link: a machine that uses the file by its own name would not see who owns it",
            "give the URL of the file itself",
        )
    if remote_file.stat(file)["nlink"] > 1:
        part_file.remove_leftover(file, target)
    count = remote_file.stat(file)["nlink"]
    if count > 1:
        raise ConfigError(
            f"{what} has {count} names (hard links): a machine that uses another of them would not see who owns it",
            "remove the other names, on the server: find DIRECTORY -samefile FILE lists them",
        )


def refuse_if_owned(url: str, me: Identity, root: Path = Path("/")) -> None:
    """OwnedError: the file has, or may have, an owner that uses it: another machine, or anything on this one."""
    target = nfs_url.parse(url)
    with _explained(target, None) as address:
        location = RecordFile(target, address)
        if location.read().data is None:
            return
        with CandidateRecord(location) as candidate:
            found = candidate.read_current()
        claimant = _Claimant(me, "", root, TIMING, log.warning)  # "" is no holder: any live one is another
        verdict = claimant.judge(found)
        if verdict in (*REFUSALS, Verdict.WATCH):
            raise _refusal(verdict, found, target)


@contextlib.contextmanager
def owned_meanwhile(
    url: str, holder: str, *, stop: threading.Event | None = None, root: Path = Path("/")
) -> Iterator[None]:
    """This machine owns the file meanwhile. A failure to release it is logged. Errors as `claim`."""
    me = owner_record.identity()
    claim(url, holder, me, stop=stop, root=root)
    try:
        yield
    finally:
        release_or_log(url, holder, me)


def release_or_log(url: str, holder: str, me: Identity) -> None:
    """`release`, where what comes before it may have failed already."""
    try:
        release(url, holder, me)
    except NbdnfsError as error:
        log.warning("the owner record stays: %s", error.message)


def take_silent(url: str, holder: str, me: Identity, expected: FoundRecord, silent_s: float) -> bool:
    """Take the file from a machine that has been silent for `silent_s`, at once. False: it has not, or uses it here.

    Nothing of that machine can be in flight any more, and if it comes back, it finds another record before it writes.
    Errors as `claim`.
    """
    assert silent_s >= 2 * TIMING.stops_within_ms / 1000
    target = nfs_url.parse(url)
    with _explained(target, None) as address:
        location = RecordFile(target, address)
        claimant = _Claimant(me, holder, Path("/"), TIMING, log.warning)
        with CandidateRecord(location) as candidate:
            found = candidate.read_current()
            if not found.is_same_record(expected) or (found.age_s or 0.0) < silent_s:
                return False
            if found.record is None or claimant.judge(found) is Verdict.REFUSE_BUSY:
                return False
            ours = owner_record.new(me, holder, found.record, "held")
            candidate.write(ours)
            now = location.read()
            if not now.is_same_record(found) or now.mtime_us != found.mtime_us:
                return False
            candidate.rename()
        return _settle(location, ours) is not None


def release(
    url: str,
    holder: str,
    me: Identity,
    *,
    address: str | None = None,
    root: Path = Path("/"),
    stop: threading.Event | None = None,
    limit_s: float = _RELEASE_LIMIT_S,
) -> bool:
    """Give the file up, so that any machine may claim it. False: `holder` of `me` did not own it. Tries once.

    `address` is the server's, where it is known. UnavailableError, also: the server has not answered after `limit_s`,
    or `stop` was set; what was sent by then may still be done. Other errors as `claim`.
    """
    target = nfs_url.parse(url)
    note = _release_note(holder, root)
    with contextlib.suppress(OSError):  # there is no /run/nbdnfs, or no right to write there: then no keeper's either
        open(note, "w").close()
    try:
        released = patience.within(limit_s, lambda: _release(target, holder, me, address), stop)
    except patience.TimeLimitError:
        raise UnavailableError(f"{target.host} has not answered for {limit_s:g} s", "see whether it is up") from None
    except patience.Interrupted:
        raise UnavailableError(f"a signal came before {target.host} had answered") from None
    _forget(note)
    return released


def _release_note(holder: str, root: Path) -> str:
    """A file that exists while a keeper's release is not known to have ended: the server may carry it out later, when
    the next keeper of that name has the file. "" for a process, whose number no other one has."""
    kind, _, name = holder.partition(":")
    return str(root / name_lock.FOLDER / f".{name}.release") if kind == "keeper" else ""


def _forget(note: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(note)


def _release(target: NfsUrl, holder: str, me: Identity, address: str | None) -> bool:
    """The record is marked as free before its name is removed: if another record gets the name in between, or the
    removal fails, no harm is done."""
    with patience.limited(_RELEASE_TIMEOUT_S), _explained(target, address) as resolved:
        location = RecordFile(target, resolved)
        file = location.open(read_only=False, connect_timeout_s=_RELEASE_TIMEOUT_S)
        if file is None:
            return False
        with contextlib.closing(file):
            record = owner_record.parse(record_file.read_all(file))
            if record is None or not record.is_of(me, holder):
                return False
            file.pwrite(dataclasses.replace(record, state="free").to_bytes(), 0)
            if not patience.until_done(lambda: _has_name(file, location.path), location.name):
                return True
            patience.until_done(lambda: file.unlink(location.path), location.name)
            return True


def _has_name(file: NfsFile, path: str) -> bool:
    """Whether the open file is the one that has the name. OSError, also where nothing has."""
    return file.lookup(path)["ino"] == file.stat()["ino"]


def _try_once(location: RecordFile, candidate: CandidateRecord, claimant: _Claimant, *, steal: bool) -> Record | None:
    """One attempt; None when another machine was faster. OwnedError as `claim`."""
    found, verdict = _watch(candidate, claimant, steal=steal)
    if verdict is Verdict.KEEP:
        return found.record
    if verdict in REFUSALS:
        raise _refusal(verdict, found, location.target)
    state = "waiting" if verdict is Verdict.TAKE else "held"
    ours = owner_record.new(claimant.me, claimant.holder, found.record, state, claimant.timing)
    candidate.write(ours)
    if verdict is not Verdict.CREATE:
        # as late as possible: a record that came in the meantime is not the one that was judged
        if not location.read().is_same_record(found):
            return None
        candidate.rename()
    elif not candidate.link():
        location.create(ours.to_bytes())
    if ours.state == "waiting":
        _wait_for_silence(location, ours, found.record, claimant)
    return _settle(location, ours)


def _wait_for_silence(location: RecordFile, ours: Record, before: Record | None, claimant: _Claimant) -> None:
    """Until nothing of the owner before is in flight any more. After Interrupted, the next claimant waits again."""
    wait_s = max(ours.stops_within_ms, before.stops_within_ms if before is not None else 0) / 1000
    host = before.host if before is not None and before.state != "free" else "another machine"
    claimant.report(f"waiting {duration(wait_s)}, until {host} has certainly stopped writing")
    try:
        patience.pause(wait_s)
    except patience.Interrupted:
        with contextlib.suppress(OSError):
            _put_into_force(location, ours, "free")
        raise


def _watch(candidate: CandidateRecord, claimant: _Claimant, *, steal: bool) -> tuple[FoundRecord, Verdict]:
    """The current record, and what may be done about it. Where that depends on a living owner, watches for one."""
    first = found = candidate.read_current()
    began_s = time.monotonic()
    while (verdict := claimant.judge(found, steal=steal)) is Verdict.WATCH:
        if not found.is_same_record(first):  # that one was given up: this one's owner may live as well
            first, began_s = found, time.monotonic()
        if found is first:
            claimant.report(_what_is_watched(found, claimant.me))
        elif found.data != first.data:
            return found, Verdict.REFUSE_FRESH
        stale_after_s = found.record.stale_after_s if found.record is not None else EMPTY_STALE_AFTER_S
        if time.monotonic() - began_s >= stale_after_s:
            return found, claimant.judge(found, watched=True)
        patience.pause(min(_WATCH_PAUSE_S, stale_after_s / 10))
        found = candidate.read_current()
    return found, verdict


def _what_is_watched(found: FoundRecord, me: Identity) -> str:
    kind, who = "still empty", "another machine"
    if found.record is not None and found.record.boot == me.boot:
        kind, who = "of this machine", "its owner, which cannot be seen from here (a container?),"
    elif found.record is not None:
        kind = "from this machine's last boot"
    return f"the owner record is {kind}, and {duration(found.age_s or 0)} old: checking whether {who} refreshes it"


def _settle(location: RecordFile, ours: Record) -> Record | None:
    """Read which record has the name now, and put ours into force where it waited. None: another has the name."""
    return _put_into_force(location, ours, "held")


def _put_into_force(location: RecordFile, ours: Record, state: str) -> Record | None:
    """Our record, with this state, where it still has the name."""
    file = location.open(read_only=False)
    if file is None:
        return None
    with contextlib.closing(file):
        found = owner_record.parse(record_file.read_all(file))
        if found is None or found.claim != ours.claim:
            return None
        settled = dataclasses.replace(ours, state=state)
        if found.state != state:
            file.pwrite(settled.to_bytes(), 0)
        return settled


def holder_lives(holder: str, root: Path) -> bool:
    """Whether a holder of this boot runs on this machine: a device has a keeper or is attached, a process has not
    ended. UnreadableError, OSError: it is not known."""
    kind, _, rest = holder.partition(":")
    if kind == "keeper":
        if name_lock.holder(rest, name_lock.KEEPER, root=root) is not None:
            return True
        # nbd_device.backend_of
        return any(state.attached and state.backend == f"nbdnfs:{rest}" for state in kernel_state.nbd_devices(root))
    pid, _, ticks = rest.partition(":")
    return proc_stat.start_time_ticks(int(pid), root) == int(ticks)


def _refusal(verdict: Verdict, found: FoundRecord, target: NfsUrl) -> OwnedError:
    what, record = f"{target.path} on {target.host}", found.record
    if verdict is Verdict.REFUSE_BUSY:
        assert record is not None
        return OwnedError(
            f"{what} is in use on this machine, by {owner_record.shown_holder(record.holder)}",
            "give each device a file of its own, or stop that one first",
        )
    if verdict is Verdict.REFUSE_DAMAGED or record is None:
        return OwnedError(
            f"the owner record of {what} ({owner_record.name_of(target.name)}) is damaged: its owner is unknown",
            "if no other machine uses the file: nbdnfs up NAME --steal",
        )
    if verdict is Verdict.REFUSE_STALE:
        return OwnedError(
            f"{what} is the swap of {found.text()}",
            "if that machine is down for good: nbdnfs up NAME --steal; it cannot write to the file after that",
        )
    return OwnedError(
        f"{what} is in use as swap by {found.text()}",
        "run nbdnfs down there first, or give each machine its own file (%H, %m, %M, %u). With --steal, what"
        f" {record.host} has swapped out is lost",
    )


@contextlib.contextmanager
def _explained(target: NfsUrl, address: str | None) -> Iterator[str]:
    """The server's address; an OSError of the engine becomes an NbdnfsError."""
    resolved = target.resolve() if address is None else address
    try:
        yield resolved
    except OSError as error:
        if error.errno in (errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT, errno.ESTALE) and not _was_opening(error):
            raise UnavailableError(f"{target.host} went away while {target.path} was claimed", "try again") from None
        raise _record_error(error, target) or explain.open_error(error, target, resolved) from None


def _was_opening(error: OSError) -> bool:
    """Whether there was no connection yet: what is wrong with the server can be found out."""
    return getattr(error, "phase", "name") in ("connect", "mount")


def _record_error(error: OSError, target: NfsUrl) -> NbdnfsError | None:
    """The NbdnfsError for a call on the record or its name that failed. None: it was the opening of a file."""
    if getattr(error, "phase", "name") != "name":  # transfers have no phase
        return None
    what = f"the owner record of {target.path} on {target.host}"
    hint = "or give up the protection from a second machine: owner = false in the configuration, or serve --no-owner"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDeniedError(f"no permission to write {what}", f"let that user write there, {hint}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CannotCreateError(f"no room for {what}", f"free space there, {hint}")
    if error.errno == errno.EAGAIN:
        return explain.put_off_error(target)
    return IOFailureError(f"{what} cannot be written: {explain.words(error)}", f"see the server's log, {hint}")
