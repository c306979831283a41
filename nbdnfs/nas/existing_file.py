# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file that exists: whether it is what `create` would have made, and how it is made larger or removed.

Larger without a gap: what is added is written, from the window that an interrupted call may have left incomplete. What
a swap area holds that is not in use has no value, so that nothing is lost where both overlap. In any other file the
window is looked at first, and only zeros are overwritten.
"""

from __future__ import annotations

import logging
import threading

from nbdnfs import backing_size, nfs_url, quantities, swap_header
from nbdnfs.engine import NfsFile, libnfs_version
from nbdnfs.errors import CannotCreateError, ConfigError
from nbdnfs.nas import content, creator_lock, explain, ownership, part_file, patience, remote_file, zeros
from nbdnfs.nas.content import Content, Kind
from nbdnfs.nas.zeros import Progress
from nbdnfs.nfs_url import NfsUrl

log = logging.getLogger(__name__)

_MODE = 0o600


def check(url: str, size_bytes: int, *, about: bool = False, fix_mode: bool = False) -> bool:
    """Whether the file exists, and is as `create` would have made it.

    about     a size that is near is right, too
    fix_mode  set a mode that is not 0600

    CannotCreateError: it has another size, or holds something else. ConfigError: another mode. NoInputError: it is not
    a file. Others as `explain.open_error`.
    """
    target = nfs_url.parse(url)
    address = target.resolve()
    with remote_file.explained(target, address):
        existing = remote_file.open_existing(target.text, address, read_only=True)
        if existing is None:
            return False
        with remote_file.closing(existing) as file:
            found_bytes = remote_file.stat(file)["size"]
            if found_bytes != size_bytes and not (about and backing_size.is_near(found_bytes, size_bytes)):
                raise _other_size(target, found_bytes, size_bytes)
            _check(file, target, fix_mode=fix_mode)
    return True


def _other_size(target: NfsUrl, found_bytes: int, wanted_bytes: int) -> CannotCreateError:
    return CannotCreateError(
        f"{target.path} on {target.host} exists, and has {_exactly(found_bytes)}, not {_exactly(wanted_bytes)}",
        f"make it larger: nbdnfs grow URL {wanted_bytes}"
        if found_bytes < wanted_bytes
        else "ask for the size that it has",
    )


def _check(file: NfsFile, target: NfsUrl, *, fix_mode: bool) -> None:
    path, found = f"{target.path} on {target.host}", remote_file.stat(file)
    held = content.look(file)
    if held.kind is Kind.OTHER:
        raise CannotCreateError(
            f"{path} exists, and holds something else: it {held.why_not}",
            "use another name; or overwrite it with zeros: --force",
        )
    if held.kind is Kind.LUKS:
        log.warning("%s begins with a LUKS header: what is in it, swap or other data, cannot be seen", path)
    if found["mode"] == _MODE:
        return
    if not fix_mode:
        raise ConfigError(
            f"{path} has mode {found['mode']:04o}: other users could read what is swapped out"
            if found["mode"] & 0o077
            else f"{path} has mode {found['mode']:04o}, and 0600 is needed",
            "run this again with --fix-mode, or chmod 600 it on the server",
        )
    remote_file.retry(lambda: file.chmod(f"/{target.name}", _MODE))
    log.warning("%s had mode %04o, and has 0600 now", path, found["mode"])


def grow(url: str, size_bytes: int, *, progress: Progress, stop: threading.Event | None = None) -> int:
    """Make the file larger; the bytes that it had before. It is owned by this process meanwhile.

    A swap area on it gets the new size in its header. UsageError: the size is impossible. CannotCreateError: it is
    less than the file has, it holds something else than swap, or the server has no room. Behind a LUKS header may
    be anything: no byte there is changed that is not zero. OwnedError, BusyError: it is in use. patience.Interrupted:
    `stop` was set; the file may be longer by then, and the same call goes on. Others as `ownership.claim`.
    """
    backing_size.check(size_bytes, f"{size_bytes} bytes")
    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    address = target.resolve()
    with (
        patience.interruptible(stop),
        creator_lock.held(target, address),
        ownership.owned_meanwhile(url, ownership.serve_holder(), stop=stop),
        remote_file.explained(target, address),
        remote_file.closing(remote_file.open_file(target.text, address, read_only=False)) as file,
    ):
        return _grow(file, target, size_bytes, progress)


def _grow(file: NfsFile, target: NfsUrl, size_bytes: int, report: Progress) -> int:
    held = content.look(file)
    before_bytes = held.size_bytes
    path = f"{target.path} on {target.host}"
    if size_bytes < before_bytes:
        raise CannotCreateError(
            f"{path} has {_exactly(before_bytes)}: it is never made smaller", "ask for more than that"
        )
    window = max(swap_header.HEAD_BYTES, before_bytes - zeros.WINDOW_CHUNKS * zeros.CHUNK_BYTES)
    start = min(window, before_bytes)
    why_not = held.why_not
    if held.kind is Kind.EMPTY and (offset := zeros.find_other(file, start, before_bytes)) is not None:
        why_not = content.has_data_at(offset)
    if why_not:
        raise CannotCreateError(
            f"{path} holds something else: it {why_not}",
            "check the URL; after an interrupted create --force, repeat that",
        )
    zeros.refuse_unless_room(file, target, size_bytes)
    if held.kind is Kind.LUKS:
        for gap_start, gap_end in content.gaps(file, start, before_bytes):
            zeros.write_zeros(file, gap_start, gap_end, target, lambda _done, _total: None)
        start = before_bytes
    zeros.write_zeros(file, start, size_bytes, target, report)
    if (changed := swap_header.grown(held.head, size_bytes)) is not None:
        file.pwrite(changed, swap_header.INFO_OFFSET)
    zeros.warn_unless_allocated(file, target, size_bytes)
    return before_bytes


def remove(url: str, *, stop: threading.Event | None = None) -> None:
    """Remove the file, its owner record and what this machine's creators left. It is owned by this process meanwhile.

    OwnedError: another machine's, or in use on this one. CannotCreateError: it holds something else than swap.
    Others as `ownership.claim`.
    """
    target = nfs_url.parse(url)
    explain.refuse_unsupported(target, libnfs_version)
    address = target.resolve()
    with patience.interruptible(stop), creator_lock.held(target, address):
        refuse_unless_swap(target, address)
        with (
            ownership.owned_meanwhile(url, ownership.serve_holder(), stop=stop),
            remote_file.directory(target, address) as names,
        ):
            remote_file.unlink_if_exists(names, f"/{target.name}")
            remote_file.unlink_if_exists(names, f"/{part_file.name_of(target)}")


def refuse_unless_swap(target: NfsUrl, address: str) -> Content:
    """What the file holds. NoInputError: there is none. CannotCreateError: it holds something else than swap."""
    with (
        remote_file.explained(target, address),
        remote_file.closing(remote_file.open_file(target.text, address, read_only=True)) as file,
    ):
        found = content.look(file)
    if found.kind is Kind.OTHER:
        raise CannotCreateError(
            f"{target.path} on {target.host} {found.why_not}: it is not removed",
            "check the URL; after an interrupted create --force, repeat that; or remove it on the server",
        )
    return found


def swap_page_bytes(url: str) -> int | None:
    """The page size of the kernel that the file's swap area is for; None where every byte is zero, which takes reading
    all of it: once in the life of a backing file.

    CannotCreateError: it holds something else. Others as `explain.open_error`.
    """
    target = nfs_url.parse(url)
    address = target.resolve()
    with (
        remote_file.explained(target, address),
        remote_file.closing(remote_file.open_file(target.text, address, read_only=True)) as file,
    ):
        found = swap_header.page_bytes(content.head_of(file))
        if found is None and (offset := zeros.find_other(file)) is not None:
            raise CannotCreateError(
                f"{target.path} on {target.host} is neither swap nor empty: there is data at"
                f" {quantities.format_size(offset)}",
                "swap would overwrite it: name another file, or replace this one: nbdnfs create --force",
            )
    return found


def _exactly(size_bytes: int) -> str:
    return f"{quantities.format_size(size_bytes)} ({size_bytes} bytes)"
