# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backing files of one directory of a NAS: who owns each, and since when its owner has been silent.

Ages are by the server's clock, which a file that is made and removed shows. All goes over one connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import re
import secrets
import time

from nbdnfs import nfs_url
from nbdnfs.engine import NfsFile
from nbdnfs.errors import BusyError, NoInputError
from nbdnfs.nas import existing_file, owner_record, ownership, remote_file
from nbdnfs.nas.owner_record import RECORD_BYTES, Identity
from nbdnfs.nas.record_file import FoundRecord
from nbdnfs.nfs_url import NfsUrl
from nbdnfs.sizes import SLOT_BYTES

_PART = re.compile(r"\..+\.[0-9a-f]{12}\.part", re.DOTALL)
_RECORD = re.compile(r"\..+\.owner", re.DOTALL)
_ANY_NAME = "-"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file. `owner` has neither data nor record where the file has none; its `age_s` is the owner's silence.

    kind      "file"; "part": what a creator has not completed; "record": the owner record of a file that is missing
    mtime_us  when the file last changed, by the server's clock
    """

    kind: str
    name: str
    size_bytes: int
    mode: int
    mtime_us: int
    age_s: float
    owner: FoundRecord


@dataclasses.dataclass(frozen=True)
class Folder:
    """A directory: `target` is the URL of some name in it."""

    target: NfsUrl
    address: str

    def entries(self) -> list[Entry]:
        """What may be for swap, by name: files with an owner record, files of mode 0600, parts. NbdnfsError."""
        with remote_file.directory(self.target, self.address) as directory:
            now_us = self._server_time_us()
            names = set(remote_file.retry(directory.names))
            # a hidden file is for swap where it has a record: else that would be taken for one of a missing file
            files = {name for name in names if not name.startswith(".") or owner_record.name_of(name) in names}
            records = {owner_record.name_of(name) for name in files}
            found = [_entry(directory, name, now_us, names) for name in sorted(files)]
            found += [_part(directory, name, now_us) for name in sorted(names - files) if _PART.fullmatch(name)]
            lone = sorted(name for name in names - records if _RECORD.fullmatch(name))
            found += [_lone_record(directory, name, now_us) for name in lone]
        return [entry for entry in found if entry is not None]

    def _server_time_us(self) -> int:
        """The server's clock; this machine's where nothing can be written there."""
        url = self.target.sibling(f".nbdnfs-{secrets.token_hex(6)}.time")
        try:
            clock = remote_file.create_exclusively(url.text, self.address, 0o600, own_name=True)
        except OSError:
            return time.time_ns() // 1000
        with remote_file.closing(clock):
            try:
                return remote_file.stat(clock)["mtime_us"]
            finally:
                with contextlib.suppress(OSError):
                    remote_file.unlink_if_exists(clock, f"/{url.name}")

    def remove_silent(self, entry: Entry, me: Identity, silent_s: float) -> bool:
        """Remove a file and its record. False: its owner has come back, or this machine uses it. BusyError: the file is
        not as it was listed. CannotCreateError: it is not swap. Other NbdnfsError."""
        target = self.target.sibling(entry.name)
        holder = ownership.serve_holder()
        self._refuse_if_changed(entry)
        if entry.kind == "file":
            existing_file.refuse_unless_swap(target, self.address)
        if not ownership.take_silent(target.text, holder, me, entry.owner, silent_s):
            return False
        try:
            if entry.kind == "file":
                with remote_file.directory(target, self.address) as directory:
                    remote_file.unlink_if_exists(directory, f"/{entry.name}")
        finally:
            ownership.release_or_log(target.text, holder, me)
        return True

    def _refuse_if_changed(self, entry: Entry) -> None:
        """BusyError: the file was created or changed since it was listed."""
        with (
            remote_file.explained(self.target, self.address),
            remote_file.directory(self.target, self.address) as directory,
        ):
            try:
                now = remote_file.retry(lambda: directory.lookup(f"/{entry.name}", False))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                return
        if entry.kind != "file" or (now["mtime_us"], now["size"]) != (entry.mtime_us, entry.size_bytes):
            raise BusyError("the file has changed since it was listed", "run this again")


def find(url: str) -> Folder:
    """The directory that a URL names, or that the file which it names lies in. NbdnfsError."""
    if url.partition("?")[0].endswith("/"):
        path, mark, options = url.partition("?")
        target = nfs_url.parse(f"{path}{_ANY_NAME}{mark}{options}")
        return Folder(target, target.resolve())
    file = nfs_url.parse(url)
    address = file.resolve()
    inside = nfs_url.build(file.host, file.path, _ANY_NAME, file.options)
    try:
        with remote_file.directory(inside, address):
            return Folder(inside, address)
    except NoInputError:
        return Folder(file, address)


def _entry(directory: NfsFile, name: str, now_us: int, names: set[str]) -> Entry | None:
    owner = FoundRecord()
    if (record_name := owner_record.name_of(name)) in names:
        owner = _record(directory, record_name, now_us)
    entry = _looked_up(directory, "file", name, now_us, owner)
    if entry is None or owner.data is not None:
        return entry
    return entry if entry.mode == 0o600 and entry.size_bytes and entry.size_bytes % SLOT_BYTES == 0 else None


def _part(directory: NfsFile, name: str, now_us: int) -> Entry | None:
    return _looked_up(directory, "part", name, now_us, FoundRecord())


def _lone_record(directory: NfsFile, name: str, now_us: int) -> Entry | None:
    """The record of a file that was removed. Where the name is a hash, it is not known which."""
    owner = _record(directory, name, now_us)
    if owner.record is None:
        return None
    entry = _looked_up(directory, "record", name, now_us, owner)
    return dataclasses.replace(entry, name=name[1:].removesuffix(".owner")) if entry is not None else None


def _looked_up(directory: NfsFile, kind: str, name: str, now_us: int, owner: FoundRecord) -> Entry | None:
    """None: it is gone by now, or not a regular file."""
    try:
        found = remote_file.retry(lambda: directory.lookup(f"/{name}", False))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    if not found["is_regular"]:
        return None
    age_s = max(0.0, (now_us - found["mtime_us"]) / 1e6)
    return Entry(kind, name, found["size"], found["mode"], found["mtime_us"], age_s, owner)


def _record(directory: NfsFile, name: str, now_us: int) -> FoundRecord:
    try:
        found = remote_file.retry(lambda: directory.lookup(f"/{name}", False))
        data = remote_file.retry(lambda: directory.read_beside(f"/{name}", RECORD_BYTES + 1))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return FoundRecord()
        if error.errno in (errno.EACCES, errno.EPERM):
            return FoundRecord(data=b"?")
        raise
    age_s = max(0.0, (now_us - found["mtime_us"]) / 1e6)
    return FoundRecord(data, owner_record.parse(data), found["mtime_us"], age_s)
