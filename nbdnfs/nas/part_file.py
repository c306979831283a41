# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part file: the name under which a new backing file grows, until it is complete and gets its own name.

The name is `.NAME.<hash>.part`, beside the final one; `<hash>` stands for this machine.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import socket

from nbdnfs import nfs_url, quantities
from nbdnfs.engine import NfsFile
from nbdnfs.errors import CannotCreateError, NbdnfsError, NoInputError, PermissionDeniedError, UsageError
from nbdnfs.nas import explain, remote_file, zeros
from nbdnfs.nfs_url import NfsUrl

log = logging.getLogger(__name__)


def name_of(target: NfsUrl) -> str:
    """The part file's name on this machine: the same at each call, and another one on each machine."""
    try:
        machine = nfs_url.machine_id()
    except UsageError:  # some small systems have none
        machine = ""
    data = target.name.encode(errors="surrogateescape")
    digest = hashlib.sha256(b"\0".join([machine.encode(), os.fsencode(socket.gethostname()), data])).hexdigest()[:12]
    # NAME_MAX is 255 bytes nearly everywhere
    name = target.name if len(data) <= 200 else "nbdnfs"
    return f".{name}.{digest}.part"


def open_or_create(target: NfsUrl, part_name: str, address: str, size_bytes: int) -> NfsFile:
    """The part file, open for writing: that of an interrupted call where it can be completed, else a new one.

    Errors: see `_cannot_create`, and PermissionDeniedError where root is squashed.
    """
    part_url = remote_file.sibling_url(target, part_name)
    try:
        part = remote_file.open_existing(part_url, address, read_only=False)
        if part is not None:
            found = remote_file.stat(part)
            # With a second name it is a backing file in use by now. With other permissions it was not created here. Too
            # long, it was to become a larger file, and nothing here truncates.
            if found["nlink"] == 1 and found["mode"] == 0o600 and found["size"] <= size_bytes:
                log.info("resuming an interrupted create at %s", quantities.format_size(found["size"]))
            else:
                with remote_file.closing(part):
                    remote_file.unlink_if_exists(part, f"/{part_name}")
                part = None
        if part is None:
            part = remote_file.create_exclusively(part_url, address, 0o600, own_name=True)
    except OSError as error:
        raise _cannot_create(error, target, address) from None
    return part


def _cannot_create(error: OSError, target: NfsUrl, address: str) -> NbdnfsError:
    """The NbdnfsError for an OSError that creating a file in the URL's directory raised.

    NoInputError: there is no such directory. PermissionDeniedError, CannotCreateError: no permission, or no room.
    Others as `explain.open_error`.
    """
    if explain.is_about_the_file(error):
        uid = _own_uid(target)
        if error.errno == errno.ENOENT:
            return NoInputError(f"{target.host} has no directory {target.directory}", "create it there first")
        if error.errno in (errno.EACCES, errno.EPERM) and uid == 0:
            return PermissionDeniedError(
                f"{target.host} does not let root create a file in {target.directory}: root is squashed there",
                "export it with no_root_squash, or give the directory owner's uid= and gid= in the URL",
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return PermissionDeniedError(
                f"{target.host} does not let uid {uid} create a file in {target.directory}",
                "let that user write there, or give the directory owner's uid= and gid= in the URL",
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return zeros.no_room(error, target, 0)
    return explain.open_error(error, target, address)


def refuse_squashed(part: NfsFile, part_name: str, target: NfsUrl) -> None:
    """PermissionDeniedError, with the file removed, when the server gave the new file another owner.

    Every user that the server maps to that owner could read what is swapped out. The URL can allow that with uid=.
    NFSv4 sends owners as names, which need not translate: they prove nothing.
    """
    found = remote_file.stat(part)
    own_uid = _own_uid(target)
    if found["uid"] == own_uid or target.version != 3:
        return
    remote_file.unlink_if_exists(part, f"/{part_name}")
    raise PermissionDeniedError(
        f"{target.host} squashes {'root' if own_uid == 0 else f'uid {own_uid}'}: a new file in {target.directory} "
        f"belongs to uid {found['uid']}, which could read what is swapped out",
        f"export it with no_root_squash, or accept that: uid={found['uid']}&gid={found['gid']} in the URL",
    )


def _own_uid(target: NfsUrl) -> int:
    """The uid that the server sees: libnfs sends getuid() unless the URL has another."""
    return target.options.get("uid", os.getuid())


def remove_leftover(existing: NfsFile, target: NfsUrl) -> None:
    """Finish a call that died after giving the file its name and before removing the part file's."""
    part_path = f"/{name_of(target)}"
    if remote_file.file_id(existing, part_path) == remote_file.stat(existing)["ino"]:
        remote_file.unlink_if_exists(existing, part_path)


def give_final_name(part: NfsFile, part_name: str, target: NfsUrl) -> None:
    """Give the complete part file the name of the backing file. CannotCreateError: another file has the name now.

    By a hard link, which replaces nothing. On a server without hard links by a rename, with a gap between the lookup
    and the rename. The answer to either proves little, because a repeated request may fail where the first one
    succeeded: so the name is looked up afterwards.
    """
    old, new = f"/{part_name}", f"/{target.name}"
    own_id = remote_file.stat(part)["ino"]
    failure: OSError | None = None
    for operation in (part.link, part.rename):
        try:
            remote_file.retry(functools.partial(operation, old, new))
        except OSError as error:
            failure = error
        found_id = remote_file.file_id(part, new)
        if found_id == own_id:
            remote_file.unlink_if_exists(part, old)
            return
        if found_id is not None:
            raise CannotCreateError(
                f"{target.path} on {target.host} was created by another machine at the same time",
                "use that file, or run this again with --force to overwrite it",
            )
    raise failure or OSError(errno.EIO, "the server does not give the file its name")
