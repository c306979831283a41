# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks of `nbdnfs doctor` that ask the server: is it there, and is the backing file what it should be?

All of it happens in a thread with a deadline, because a server that hangs ends no call. Writes nothing on the server.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nbdnfs import backing_size, nfs_url, quantities, swap_header
from nbdnfs.commands import health
from nbdnfs.commands.findings import Finding, judge
from nbdnfs.config import Config
from nbdnfs.errors import NbdnfsError, UnavailableError, UnreadableError
from nbdnfs.sizes import KERNEL_PAGE_BYTES, SLOT_BYTES

if TYPE_CHECKING:
    from nbdnfs.nas.owner_record import Identity
    from nbdnfs.nas.record_file import FoundRecord

# For all that is asked of one server: its name, its services, the file and the record.
DEADLINE_S = 15.0
_CONNECT_TIMEOUT_S = 5
# No record is taken for fresh, and so none has to be watched.
_LONG_AGO_S = 1e9

_MODE = 0o600
T = TypeVar("T")


@dataclass(frozen=True)
class FileFacts:
    """What the server says of a backing file.

    head     its first 64 KiB
    record   what has the name of its owner record
    me       this machine, as the record names it
    file_id  its number on the server
    is_used  whether the record's owner runs on this machine, in this boot
    """

    address: str
    size_bytes: int
    mode: int
    head: bytes
    record: FoundRecord
    me: Identity
    file_id: int | None = None
    is_used: bool = False


def within(seconds: float, work: Callable[[], T], what: str) -> T:
    """What `work` returns or raises. UnavailableError: it does not end in time. Its thread goes on, and ends with the
    process: no signal ends a call of the engine."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise UnavailableError(f"{what}: no answer within {seconds:g} s", "check the server, and the network to it")
    return results[0]


def backing_file(
    settings: Config,
    attached_bytes: int | None,
    *,
    used_file_id: int | None = None,
    look: Callable[[str], FileFacts | None] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Iterator[Finding]:
    """The findings about the file of a device. `attached_bytes` is the size of its block device, None when it is not
    up. `used_file_id`: the number of the file that its worker uses, where that is known."""
    name = settings.name
    try:
        found = within(deadline_s, lambda: (look or _look)(settings.url), nfs_url.parse(settings.url).host)
    except NbdnfsError as error:
        yield Finding(f"{name}: server", False, error.message, error.hint)
        return
    if found is None:
        yield from _missing(settings, attached_bytes)
        return
    yield Finding(f"{name}: server", True, f"answers ({found.address})")
    if attached_bytes is not None and None not in (used_file_id, found.file_id) and used_file_id != found.file_id:
        yield _other_file(name, f"the server has another file under this name now (number {found.file_id})")
        return  # what that one is like says nothing about the device's
    yield judge(
        f"{name}: file mode",
        found.mode == _MODE,
        f"{found.mode:04o}",
        f"others may read or change what is swapped out; on the server: chmod {_MODE:04o} the file",
    )
    yield _size(settings, found, attached_bytes)
    yield _swap_header(settings, found)
    yield _owner(settings, found, is_up=attached_bytes is not None)


def _missing(settings: Config, attached_bytes: int | None) -> Iterator[Finding]:
    name = settings.name
    yield Finding(f"{name}: server", True, "answers")
    if attached_bytes is not None:
        yield _other_file(name, "the server has no file of this name any more")
    elif settings.size_bytes:
        yield Finding(f"{name}: file", True, "does not exist yet; the first start makes it")
    else:
        yield Finding(
            f"{name}: file",
            False,
            "does not exist",
            f"nbdnfs create '{settings.url}' --size 2G, or configure a size",
        )


def _other_file(name: str, what: str) -> Finding:
    """Of a device that is up. A worker holds its file by a handle, which a file keeps when it is renamed."""
    return Finding(
        f"{name}: file",
        False,
        f"{what}; the device may still reach its own by its handle, and nothing need be lost yet",
        health.put_back(name),
    )


def _size(settings: Config, found: FileFacts, attached_bytes: int | None) -> Finding:
    size = quantities.format_size
    subject = f"{settings.name}: file size"
    if attached_bytes is not None and found.size_bytes < attached_bytes:
        return Finding(
            subject,
            False,
            f"{size(found.size_bytes)}, and the device has {size(attached_bytes)}",
            f"the file was truncated: what lay behind its end is lost; {health.restart(settings.name)}",
        )
    configured = f", configured: {size(settings.size_bytes)}" if settings.size_bytes else ""
    return judge(
        subject,
        settings.size_bytes in (0, found.size_bytes),
        f"{size(found.size_bytes)}{configured}",
        "an existing file is used with the size that it has: "
        + _resize(settings, found.size_bytes, is_up=attached_bytes is not None),
    )


def _resize(settings: Config, size_bytes: int, *, is_up: bool) -> str:
    """What to do where file and configuration differ. No command makes a file smaller."""
    ways = []
    if settings.size_bytes > size_bytes:
        ways.append(f"nbdnfs grow {settings.name} {_setting(settings.size_bytes)}{' --restart' if is_up else ''}")
    if size_bytes % SLOT_BYTES == 0 and size_bytes >= backing_size.MIN_BYTES:  # no other can be configured
        ways.append(f'size = "{_setting(size_bytes)}"')
    return ", or ".join(ways or ["name another file"])


def _setting(size_bytes: int) -> str:
    """As a configuration has a size, which is a multiple of SLOT_BYTES."""
    suffix, unit = next((it for it in (("G", 1 << 30), ("M", 1 << 20)) if size_bytes % it[1] == 0), ("K", 1 << 10))
    return f"{size_bytes // unit}{suffix}"


def _swap_header(settings: Config, found: FileFacts) -> Finding:
    """Of another kernel's pages, it cannot be used; the start makes it again where the file has an owner."""
    subject = f"{settings.name}: swap area"
    made_for = swap_header.page_bytes(found.head)
    if made_for is None and any(found.head):
        return Finding(
            subject,
            False,
            "the file begins with neither zeros nor a swap area: the start refuses it",
            "name another file; or overwrite this one with zeros: nbdnfs create --force",
        )
    if made_for is None:
        return Finding(subject, True, "none yet; the first start makes it")
    size = quantities.format_size
    if made_for != KERNEL_PAGE_BYTES and settings.owner:
        return Finding(subject, True, f"for pages of {size(made_for)}: the start makes it again")
    return judge(
        subject,
        made_for == KERNEL_PAGE_BYTES,
        f"for pages of {size(made_for)}",
        f"this kernel has pages of {size(KERNEL_PAGE_BYTES)}: name another file, or set owner = true",
    )


def _owner(settings: Config, found: FileFacts, *, is_up: bool) -> Finding:
    """A device that is up owns its file; one that is not may claim it: owner_record.decide."""
    from nbdnfs.nas import owner_record
    from nbdnfs.nas.owner_record import Verdict

    subject = f"{settings.name}: owner record"
    if not settings.owner:
        return Finding(subject, True, "not looked after (owner = false)")
    record = found.record.record
    holder = owner_record.keeper_holder(settings.name)
    # of a version that did not say in which PID namespace: a claim would wait, and the device that is up has claimed
    is_ours = record is not None and record.state == "held" and record.is_of(found.me, holder)
    verdict = owner_record.decide(
        record if record is not None else found.record.data,
        found.me,
        holder,
        age_s=_LONG_AGO_S,
        holder_lives=found.is_used,
    )
    if verdict is Verdict.KEEP or is_ours:
        return Finding(subject, True, "this machine owns the file")
    if verdict is Verdict.REFUSE_BUSY and record is not None:
        return _used_here(subject, settings.name, record.holder)
    if verdict in owner_record.REFUSALS:
        return Finding(
            subject,
            False,
            f"{found.record.text()} owns the file",
            f"run nbdnfs down there; or, if that machine is down for good, nbdnfs up {settings.name} --steal here",
        )
    text = "none" if record is None or record.state == "free" else "of an earlier use by this machine"
    return judge(
        subject, not is_up, text, "it was removed or replaced while the device is up: another machine may take the file"
    )


def _used_here(subject: str, name: str, holder: str) -> Finding:
    """Another device of this machine has the file, or a process: `holder` as the record names it."""
    from nbdnfs.nas import owner_record

    other = owner_record.shown_holder(holder)
    end = f"nbdnfs down {other}" if holder.startswith("keeper:") else f"end {other}, nbdnfs serve"
    return Finding(
        subject, False, f"this machine uses the file, as {other}", f"give {name} a file of its own, or first: {end}"
    )


def _look(url: str) -> FileFacts | None:
    """None where the file does not exist. NbdnfsError: the server or the file does not answer as it should."""
    from nbdnfs.engine import libnfs_version
    from nbdnfs.nas import explain, owner_record, ownership, remote_file
    from nbdnfs.nas.record_file import RecordFile

    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    address = target.resolve()
    with remote_file.explained(target, address):
        # as the worker does: the server says whether it could write. Nothing is written
        file = remote_file.open_existing(target.text, address, read_only=False, connect_timeout_s=_CONNECT_TIMEOUT_S)
        if file is None:
            return None
        with remote_file.closing(file):
            stat = remote_file.stat(file)
            head = bytearray(min(swap_header.HEAD_BYTES, stat["size"]))
            count = file.pread(head, 0) if head else 0
        record = RecordFile(target, address).read()
    me = owner_record.identity()
    is_used = False
    if record.record is not None and record.record.boot == me.boot:
        with contextlib.suppress(UnreadableError, OSError):  # where it is not known, it is not said
            is_used = ownership.holder_lives(record.record.holder, Path("/"))
    return FileFacts(
        address, stat["size"], stat["mode"] & 0o7777, bytes(head[:count]), record, me, stat["ino"], is_used
    )
