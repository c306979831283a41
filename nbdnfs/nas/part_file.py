# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part file: the name under which a new backing file grows, until it is complete and gets its own name.

The name is `.NAME.<hash>.part`, beside the final one; `<hash>` stands for this machine, so that what a creator left
behind that was killed is completed by the next one here, and nothing is written into another machine's.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
from collections.abc import Callable

from nbdnfs import quantities, specifiers
from nbdnfs.engine import NfsFile
from nbdnfs.errors import (
    BusyError,
    CannotCreateError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
)
from nbdnfs.nas import explain, owner_record, patience, remote_file, zeros
from nbdnfs.nfs_url import NfsUrl

log = logging.getLogger(__name__)

# A creator writes all the time. What a dead one had in flight arrives within this time.
_WATCH_S = 1.0
_WATCHES = 3
_REMOVAL_LIMIT_S = 5.0


def name_of(target: NfsUrl) -> str:
    """The part file's name on this machine: the same at each call, and another one on each machine.

    A machine whose hardware has no id of its own may have clones: there it holds until the next boot.
    """
    me = owner_record.identity()
    try:
        interface = specifiers.boot_mac()
    except NbdnfsError:
        interface = ""
    is_one_of_a_kind = me.hardware != "-" or interface
    words = [me.machine, me.hardware, me.host, interface, "" if is_one_of_a_kind else me.boot]
    data = target.name.encode(errors="surrogateescape")
    digest = hashlib.sha256(b"\0".join([*(word.encode() for word in words), data])).hexdigest()[:12]
    # NAME_MAX is 255 bytes nearly everywhere
    name = target.name if len(data) <= 200 else "nbdnfs"
    return f".{name}.{digest}.part"


def open_or_create(target: NfsUrl, part_name: str, address: str, size_bytes: int) -> NfsFile:
    """The part file, open for writing: that of a creator that died where it can be completed, else a new one.

    With this machine's lock (creator_lock.py). BusyError: a machine with the same identity is writing it. Other errors:
    see `_cannot_create`, and PermissionDeniedError where root is squashed.
    """
    part_url = remote_file.sibling_url(target, part_name)
    try:
        part = remote_file.open_existing(part_url, address, read_only=False)
        if part is not None:
            _refuse_if_growing(part, target)
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


def _refuse_if_growing(part: NfsFile, target: NfsUrl) -> None:
    """BusyError: something writes to the part file, and it is nothing on this machine, which has the lock."""
    before = remote_file.stat(part)
    for _ in range(_WATCHES):
        patience.pause(_WATCH_S)
        now = remote_file.stat(part)
        if (now["mtime_us"], now["size"]) == (before["mtime_us"], before["size"]):
            return
        before = now
    raise BusyError(
        f"another machine with the same machine id and hardware id is creating {target.path} on {target.host}",
        "give each machine a file of its own; a cloned machine needs a new id: systemd-machine-id-setup",
    )


def remove(part: NfsFile, part_name: str) -> bool:
    """Remove the part file after a failure; False: the server did not do it in time. Does not raise OSError."""
    try:
        with patience.interruptible(None), patience.limited(_REMOVAL_LIMIT_S):
            patience.until_done(lambda: part.unlink(f"/{part_name}"), part_name)
    except OSError as error:
        return error.errno == errno.ENOENT
    return True


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


def give_final_name(part: NfsFile, part_name: str, target: NfsUrl, address: str) -> None:
    """Give the complete part file the name of the backing file. CannotCreateError: another file has the name now.

    By a hard link, which replaces nothing. On a server without hard links by a rename, over an empty file that was
    created exclusively: of several machines one gets the name. The answer to either proves little, because a repeated
    request may fail where the first one succeeded: so the name is looked up afterwards.

    All of that over the directory: `part` finds its file again by a name that it is about to lose.
    """
    old, new, own_id = f"/{part_name}", f"/{target.name}", remote_file.stat(part)["ino"]
    with remote_file.directory(target, address) as directory:
        failure = _attempt(functools.partial(directory.link, old, new))
        found_id = remote_file.file_id(directory, new)
        if found_id is None:
            empty_id = _reserve_name(target, address)
            failure = _attempt(functools.partial(directory.rename, old, new)) or failure
            found_id = remote_file.file_id(directory, new)
            if found_id == empty_id:
                remote_file.unlink_if_exists(directory, new)
                raise failure or OSError(errno.EIO, "the server does not give the file its name")
        if found_id != own_id:
            raise _was_faster(target)
        remote_file.unlink_if_exists(directory, old)


def _attempt(operation: Callable[[], None]) -> OSError | None:
    """Why it failed, perhaps although it was done."""
    try:
        remote_file.retry(operation)
    except OSError as error:
        return error
    return None


def _reserve_name(target: NfsUrl, address: str) -> int:
    """The file id of an empty file under the final name. CannotCreateError: another machine has made one."""
    try:
        with remote_file.closing(remote_file.create_exclusively(target.text, address, 0o600)) as empty:
            return remote_file.stat(empty)["ino"]
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise _was_faster(target) from None
        raise


def _was_faster(target: NfsUrl) -> CannotCreateError:
    return CannotCreateError(
        f"{target.path} on {target.host} was created by another machine at the same time",
        "use that file, or run this again with --force to overwrite it",
    )
