# SPDX-License-Identifier: LGPL-2.1-or-later
"""Creates and inspects backing files.

A backing file consists of real zeros, never of holes: on a full NAS a hole is lost swap. It grows under a name of its
own (part_file.py), and a later `create` completes it. When it is complete, a hard link gives it its name, which fails
where the name exists. So a file that has its name is complete, and no existing file is overwritten by accident.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from nbdnfs import backing_size, nfs_url, quantities
from nbdnfs.engine import libnfs_version
from nbdnfs.errors import CannotCreateError, ConfigError, NoInputError
from nbdnfs.nas import creator_lock, explain, owner_record, ownership, part_file, remote_file, zeros
from nbdnfs.nas.zeros import Progress
from nbdnfs.nfs_url import NfsUrl

if TYPE_CHECKING:
    from nbdnfs.engine._engine import FileStat

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BackingFile:
    """The server's attributes of a backing file. `mode` is its permission bits."""

    size_bytes: int
    mode: int
    fileid: int
    allocated_bytes: int


def inspect(url: str) -> BackingFile:
    """The attributes of a URL's file. UsageError, NoHostError: the URL is wrong. Others as `explain.open_error`."""
    target = nfs_url.parse(url)
    address = target.resolve()
    with (
        remote_file.explained(target, address),
        remote_file.closing(remote_file.open_file(target.text, address, read_only=True)) as file,
    ):
        found = remote_file.stat(file)
    return BackingFile(size_bytes=found["size"], mode=found["mode"], fileid=found["ino"], allocated_bytes=found["used"])


def exists(url: str) -> bool:
    """Whether a URL's file exists. Errors as `inspect`, except that for a missing file."""
    try:
        inspect(url)
    except NoInputError:
        return False
    return True


def create(url: str, size_bytes: int, *, force: bool = False, progress: Progress | None = None) -> None:
    """Create a backing file of `size_bytes` zero bytes, mode 0600, with every block written.

    An existing file is refused without `force`. With it, the whole file is overwritten with zeros, and grows to the
    size; it is never made smaller, and never overwritten while it has an owner. An error or an interruption
    (KeyboardInterrupt, patience.Interrupted) removes what was written; after SIGKILL or a power failure, the same call
    completes it (with `force` on an existing file: from the start). It waits for a server that is away.

    UsageError: the size or the URL is impossible. CannotCreateError: the file exists, or the server has no room.
    PermissionDeniedError: no permission, or root is squashed. ConfigError: other users may read an existing file.
    BusyError: this machine is already creating the file. IOFailureError: the server fails to write. OwnedError: the
    file is in use as swap. Others as `explain.open_error`.
    """
    backing_size.check(size_bytes, f"{size_bytes} bytes")
    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    address = target.resolve()
    report = progress or (lambda _done, _total: None)
    with creator_lock.held(target, address), remote_file.explained(target, address):
        existing = remote_file.open_existing(target.text, address, read_only=not force)
        if existing is None:
            _create_new(target, address, size_bytes, report)
            return
        with remote_file.closing(existing):
            part_file.remove_leftover(existing, target)
            _check_may_overwrite(remote_file.stat(existing), target, size_bytes, force)
            ownership.refuse_alias(existing, target)
            ownership.refuse_if_owned(url, owner_record.identity())
            zeros.refuse_unless_room(existing, target, size_bytes)
            zeros.write_zeros(existing, 0, size_bytes, target, report)
            zeros.warn_unless_allocated(existing, target, size_bytes)


def _create_new(target: NfsUrl, address: str, size_bytes: int, report: Progress) -> None:
    part_name = part_file.name_of(target)
    with remote_file.closing(part_file.open_or_create(target, part_name, address, size_bytes)) as part:
        try:
            part_file.refuse_squashed(part, part_name, target)
            zeros.refuse_unless_room(part, target, size_bytes)
            written_bytes = remote_file.stat(part)["size"]
            chunk_bytes = zeros.CHUNK_BYTES
            start = max(0, written_bytes - zeros.WINDOW_CHUNKS * chunk_bytes) // chunk_bytes * chunk_bytes
            zeros.write_zeros(part, start, size_bytes, target, report)
            part_file.give_final_name(part, part_name, target, address)
        except BaseException:
            # a NAS that hidden files fill up is a problem for all its users
            if not part_file.remove(part, part_name):
                log.warning("%s stays on %s: the next create here completes or removes it", part_name, target.host)
            raise
    # `part` would look for the name that its file has lost
    with remote_file.closing(remote_file.open_file(target.text, address, read_only=True)) as file:
        zeros.warn_unless_allocated(file, target, size_bytes)


def _check_may_overwrite(found: FileStat, target: NfsUrl, size_bytes: int, force: bool) -> None:
    path, size = f"{target.path} on {target.host}", quantities.format_size(found["size"])
    if not found["is_regular"]:
        raise NoInputError(f"{path} is not a regular file", "name a file, for example .../%H.swap")
    if not force:
        raise CannotCreateError(
            f"{path} already exists ({size})", "use it as it is, or overwrite it with zeros: --force"
        )
    if found["size"] > size_bytes:
        raise CannotCreateError(
            f"{path} has {size} ({found['size']} bytes): it is never made smaller",
            f"ask for {found['size']} bytes or more, or remove the file",
        )
    if found["mode"] & 0o077:
        raise ConfigError(
            f"{path} is open to other users (mode {found['mode']:04o}): they could read what is swapped out",
            "chmod 600 it, or remove it and create it again",
        )
