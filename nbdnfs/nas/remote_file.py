# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on files of a server that backing files and owner records share: open, look up, unlink, and try again.

Paths are relative to the directory of the URL, with a slash in front: "/box.swap".
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from nbdnfs.engine import NfsFile
from nbdnfs.errors import NoInputError
from nbdnfs.nas import explain, patience
from nbdnfs.nfs_url import NfsUrl

if TYPE_CHECKING:
    from nbdnfs.engine._engine import FileStat

# How often the connection may break during one operation.
_BREAKS_PER_OPERATION = 20
_RETRY_PAUSE_S = 0.2
# The engine's own defaults.
_CONNECT_TIMEOUT_S = 15
_GONE_LIMIT_MS = 300_000

T = TypeVar("T")


def sibling_url(target: NfsUrl, name: str) -> str:
    """The URL of another name in the same directory."""
    return target.sibling(name).text


def open_file(
    url: str,
    address: str,
    *,
    read_only: bool,
    connect_timeout_s: int = _CONNECT_TIMEOUT_S,
    gone_limit_ms: int = _GONE_LIMIT_MS,
) -> NfsFile:
    """The file, open. OSError, with `phase`; see `nbdnfs.engine.NfsError`. EAGAIN as `patience.until_done`."""
    return patience.until_done(
        lambda: NfsFile(
            url, address, read_only=read_only, connect_timeout_s=connect_timeout_s, gone_limit_ms=gone_limit_ms
        ),
        url.partition("?")[0],
    )


def open_existing(
    url: str,
    address: str,
    *,
    read_only: bool,
    connect_timeout_s: int = _CONNECT_TIMEOUT_S,
    gone_limit_ms: int = _GONE_LIMIT_MS,
) -> NfsFile | None:
    """As `open_file`, but None when the file does not exist."""
    try:
        return open_file(
            url, address, read_only=read_only, connect_timeout_s=connect_timeout_s, gone_limit_ms=gone_limit_ms
        )
    except OSError as error:
        if error.errno == errno.ENOENT and explain.is_about_the_file(error):
            return None
        raise


def create_exclusively(
    url: str, address: str, mode: int, *, gone_limit_ms: int = _GONE_LIMIT_MS, own_name: bool = False
) -> NfsFile:
    """A new file, open. OSError, with `phase`: EEXIST when the name is taken. EAGAIN as `patience.until_done`.

    own_name  nothing else makes a file of this name. A server may make it and put off what opening it asks next: then
              the next try opens what is there
    """
    was_put_off = False

    def make() -> NfsFile:
        nonlocal was_put_off
        exclusive = not (own_name and was_put_off)
        try:
            return NfsFile(url, address, create=True, exclusive=exclusive, mode=mode, gone_limit_ms=gone_limit_ms)
        except OSError as error:
            was_put_off = was_put_off or error.errno == errno.EAGAIN
            raise

    return patience.until_done(make, url.partition("?")[0])


def stat(file: NfsFile) -> FileStat:
    """The attributes of an open file, on whatever connection it takes."""
    return retry(file.stat)


def file_id(file: NfsFile, path: str) -> int | None:
    """The file id of what has the name `path` in the directory of `file`; None when nothing has."""
    try:
        return retry(lambda: file.lookup(path))["ino"]
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def is_symbolic_link(file: NfsFile, path: str) -> bool:
    """Whether the name `path` in the directory of `file`, a regular file, is that of a symbolic link to one."""
    return not retry(lambda: file.lookup(path, False))["is_regular"]


def unlink_if_exists(file: NfsFile, path: str) -> None:
    """Remove the name `path` in the directory of `file`."""
    try:
        retry(lambda: file.unlink(path))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def retry(operation: Callable[[], T]) -> T:
    """Do an operation, and again when the connection breaks under it or no answer comes. The server may do it twice.

    Waits for a server that is away for as long as that takes, as writes do; EAGAIN as `patience.until_done`. OSError
    for anything else.
    """
    breaks = 0
    while True:
        try:
            return patience.until_done(operation, "a name or attributes")
        except OSError as error:
            breaks += error.errno == errno.ECONNRESET
            if error.errno not in (errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT) or breaks > _BREAKS_PER_OPERATION:
                raise
        patience.pause(_RETRY_PAUSE_S)


@contextlib.contextmanager
def closing(file: NfsFile) -> Iterator[NfsFile]:
    """Close the file at the end, unless an interrupted write still runs: then the end of the process closes it."""
    try:
        yield file
    finally:
        with contextlib.suppress(RuntimeError):
            file.close()


@contextlib.contextmanager
def directory(target: NfsUrl, address: str) -> Iterator[NfsFile]:
    """The URL's directory, open for operations on names, which read no file. Errors as `explain.open_error`."""
    with explained(target, address):
        try:
            opened = patience.until_done(lambda: NfsFile(target.text, address, names_only=True), target.directory)
        except OSError as error:
            if explain.is_about_the_file(error) and error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NoInputError(f"{target.host} has no directory {target.directory}", "check the URL") from None
            raise
        with closing(opened):
            yield opened


@contextlib.contextmanager
def explained(target: NfsUrl, address: str) -> Iterator[None]:
    """Turn an OSError of the engine into an NbdnfsError, as `explain.open_error`."""
    try:
        yield
    except OSError as error:
        raise explain.open_error(error, target, address) from None
