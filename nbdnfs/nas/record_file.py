# SPDX-License-Identifier: LGPL-2.1-or-later
"""The owner record as a file on the server: the one that has the record's name, and a candidate for the name.

A first record gets its name by a hard link, which fails where the name exists. On a server without hard links it is
created under its name, which fails then, too, but leaves it empty for a moment. A later record replaces its predecessor
by a rename, so that what the predecessor's owner still writes goes to a file without a name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
from collections.abc import Callable
from typing import TypeVar

from nbdnfs.engine import NfsFile
from nbdnfs.errors import CannotCreateError, NbdnfsError, NoInputError, PermissionDeniedError
from nbdnfs.nas import explain, owner_record, patience, remote_file
from nbdnfs.nas.owner_record import RECORD_BYTES, Record
from nbdnfs.nfs_url import NfsUrl

# A file that lost its name while it was open has been replaced: that is an answer, and nothing to wait for.
_GONE_LIMIT_MS = 1
_CONNECT_TIMEOUT_S = 15
# What LINK answers where there are no hard links differs widely (NOTSUPP, PERM, ACCES, INVAL, IO, XDEV, ...). These say
# nothing about that; any other trouble shows again when the record is created under its name.
_NOT_ABOUT_LINKS = (errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class FoundRecord:
    """What has the record's name.

    data      its bytes; None where nothing has the name
    record    the record in them; None where they are not one
    mtime_us  its last sign of life, in microseconds of the server's clock
    age_s     how long ago that was, by the same clock; None where it was not asked for
    """

    data: bytes | None = None
    record: Record | None = None
    mtime_us: int = 0
    age_s: float | None = None

    def text(self) -> str:
        """The owner, since when it has the file, and its last sign of life, in one line."""
        if self.record is None:
            return "no machine" if self.data is None else "a machine whose owner record is damaged"
        if self.record.state == "free":
            return f"no machine ({self.record.host} had it last)"
        alive = ""
        if self.age_s is not None:
            is_fresh = self.age_s < self.record.stale_after_s
            alive = ", last sign of life {} ago" if is_fresh else ", no sign of life for {}"
            alive = alive.format(duration(self.age_s))
        return f"{self.record.host} (since {self.record.claimed}{alive})"

    def is_same_record(self, other: FoundRecord) -> bool:
        """Whether it is the same record, however often its owner has refreshed it."""
        if self.record is None or other.record is None:
            return self.data == other.data
        return dataclasses.replace(self.record, refreshed=0) == dataclasses.replace(other.record, refreshed=0)


class RecordFile:
    """The record's name in the directory of a backing file, and access to the file that has the name."""

    def __init__(self, target: NfsUrl, address: str) -> None:
        self.target = target
        self.address = address
        self.name = owner_record.name_of(target.name)
        self.path = f"/{self.name}"

    def open(self, *, read_only: bool, connect_timeout_s: int = _CONNECT_TIMEOUT_S) -> NfsFile | None:
        """The file that has the name now; None when none has. It stays the same file when another gets the name."""
        return remote_file.open_existing(
            remote_file.sibling_url(self.target, self.name),
            self.address,
            read_only=read_only,
            connect_timeout_s=connect_timeout_s,
            gone_limit_ms=_GONE_LIMIT_MS,
        )

    def read(self) -> FoundRecord:
        """What has the name now, without `age_s`. Writes nothing."""
        file = self.open(read_only=True)
        if file is None:
            return FoundRecord()
        with contextlib.closing(file):
            data = read_all(file)
            mtime_us = patience.until_done(file.stat, self.name)["mtime_us"]
            return FoundRecord(data, owner_record.parse(data), mtime_us)

    def create(self, data: bytes) -> None:
        """Make the record with this content, unless something has the name."""
        try:
            file = remote_file.create_exclusively(
                remote_file.sibling_url(self.target, self.name), self.address, 0o644, gone_limit_ms=_GONE_LIMIT_MS
            )
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise _cannot_create(error, self) from None
            return
        with contextlib.closing(file):
            file.pwrite(data, 0)


class CandidateRecord:
    """A file with a name of its own that may get the record's name. A context: its own name is removed at the end.

    Not to be written any more once it has the record's name. Creating it raises the errors of `_cannot_create`.
    """

    def __init__(self, location: RecordFile) -> None:
        self._location = location
        self._name = f"{location.name}.{secrets.token_hex(6)}"
        try:
            # other users may read who owns the file
            self._file = remote_file.create_exclusively(
                remote_file.sibling_url(location.target, self._name),
                location.address,
                0o644,
                gone_limit_ms=_GONE_LIMIT_MS,
                own_name=True,
            )
        except OSError as error:
            raise _cannot_create(error, location) from None

    def __enter__(self) -> CandidateRecord:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError, patience.Interrupted):
            self._until_done(lambda: self._file.unlink(f"/{self._name}"))
        self._file.close()

    def _until_done(self, operation: Callable[[], T]) -> T:
        return patience.until_done(operation, self._name)

    def read_current(self) -> FoundRecord:
        """What has the record's name now, with `age_s`: a write to the candidate shows the server's time."""
        found = self._location.read()
        self._file.pwrite(b"\n", RECORD_BYTES - 1)
        age_s = (self._until_done(self._file.stat)["mtime_us"] - found.mtime_us) / 1e6
        return dataclasses.replace(found, age_s=max(0.0, age_s))

    def write(self, record: Record) -> None:
        """Make the candidate this record."""
        self._file.pwrite(record.to_bytes(), 0)

    def link(self) -> bool:
        """Give it the record's name, unless another file has that. False: the server makes no hard links.

        Which file has the name afterwards is to be read.
        """
        try:
            self._until_done(lambda: self._file.link(f"/{self._name}", self._location.path))
        except OSError as error:
            if error.errno in _NOT_ABOUT_LINKS:
                raise
            return error.errno == errno.EEXIST
        return True

    def rename(self) -> None:
        """Give it the record's name, and take that from the file that has it."""
        self._until_done(lambda: self._file.rename(f"/{self._name}", self._location.path))


def read_all(file: NfsFile) -> bytes:
    """The content of an open record, with one byte more where the file is too long."""
    buffer = bytearray(RECORD_BYTES + 1)
    return bytes(buffer[: file.pread(buffer, 0)])


def duration(seconds: float) -> str:
    """A duration in one unit: 42 s, 5 min, 3 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _cannot_create(error: OSError, location: RecordFile) -> NbdnfsError:
    """The NbdnfsError for an OSError that creating a record raised.

    NoInputError: there is no such directory. PermissionDeniedError, CannotCreateError: no permission, or no room.
    Others as `explain.open_error`.
    """
    target = location.target
    directory = f"{target.directory} on {target.host}"
    if explain.is_about_the_file(error):
        if error.errno == errno.ENOENT:
            return NoInputError(f"{target.host} has no directory {target.directory}", "create it there first")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return PermissionDeniedError(
                f"uid {target.options.get('uid', os.getuid())} may not create an owner record in {directory}",
                "let that user write there, or give up the protection from a second machine: owner = false in the"
                " configuration, or serve --no-owner",
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CannotCreateError(
                f"no room for an owner record of {RECORD_BYTES} bytes in {directory}", "free space there"
            )
    return explain.open_error(error, target, location.address)
