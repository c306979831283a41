# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns the errors of libnfs and of the server into one line that says what is wrong, and one that says what to do."""

from __future__ import annotations

import errno
import os
import socket

from nbdnfs.errors import (
    BusyError,
    CannotCreateError,
    ConfigError,
    IOFailureError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
    UnavailableError,
)
from nbdnfs.nfs_url import NfsUrl

_PROBE_TIMEOUT_S = 2.0
# RFC 1057 (portmapper), RFC 1813 (NFS): the ports that libnfs uses when the URL has none
_PORTMAPPER_PORT = 111
_NFS_PORT = 2049


def refuse_unsupported(url: NfsUrl, libnfs_version: str) -> None:
    """ConfigError: this version of libnfs cannot do what the URL asks for."""
    if url.version == 4 and int(libnfs_version.split(".")[0]) < 5:
        raise ConfigError(
            f"NFSv4 needs libnfs 5.0 or newer: {libnfs_version} cannot write a page over it (sahlberg/libnfs#319)",
            "use version=3, or a system with a newer libnfs (Debian 13)",
        )


def is_about_the_file(error: OSError) -> bool:
    """Whether an error concerns the file itself, and neither the connection nor the mount."""
    return _phase(error) == "open"


def _phase(error: OSError) -> str:
    return str(getattr(error, "phase", "open"))


def open_error(error: OSError, url: NfsUrl, address: str) -> NbdnfsError:
    """The NbdnfsError for an error that opening `url` on `address` raised (`nbdnfs.engine.NfsError`).

    Where the connection failed, each port is tried once more to find which one and how: libnfs reports only that there
    was no connection. That takes up to 2 s for each of at most two ports.

    NoInputError: the file or its directory does not exist, or is something else. PermissionDeniedError: the server
    does not permit it. ConfigError: the file or the URL cannot be used. BusyError, CannotCreateError: in use, or no
    room. UnavailableError: no answer. IOFailureError: anything else.
    """
    number, phase = error.errno or 0, _phase(error)
    if number == errno.EAGAIN:
        return put_off_error(url)
    if phase == "connect":
        return _connection_error(error, url, address)
    if phase == "mount":
        return _mount_error(error, url)
    path = url.path
    if number == errno.ENOENT:
        return NoInputError(
            f"there is no file {path} on {url.host}",
            "create it: nbdnfs create URL --size SIZE; or check the path",
        )
    if number == errno.EISDIR:
        return NoInputError(f"{path} on {url.host} is a directory", "name a file in it, for example .../%H.swap")
    if number == errno.ENOTDIR:
        return NoInputError(f"a part of {path} on {url.host} is not a directory", "check the path")
    if number in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(
            f"{url.host} does not let uid {url.options.get('uid', os.geteuid())} read and write {path}",
            "check the file's owner and mode, and that the export is not read-only and does not squash root; or give"
            " uid= and gid= in the URL",
        )
    if number == errno.EROFS:
        return PermissionDeniedError(f"{url.host} exports {path} read-only", "export it read-write")
    if number == errno.EINVAL:
        return ConfigError(
            f"{path} on {url.host} cannot be a device: {error.strerror or 'it is not a regular file'}",
            "create a file of whole 4096-byte pages: nbdnfs create URL --size SIZE",
        )
    if number == errno.EBUSY:
        return BusyError(f"{path} on {url.host} is in use", "try again later")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return CannotCreateError(f"{url.host} has no room for {path}", "free space there, or ask for a smaller size")
    return IOFailureError(f"cannot open {path} on {url.host}: {words(error)}")


def put_off_error(url: NfsUrl) -> UnavailableError:
    """The server asked to try again later (NFS3ERR_JUKEBOX, NFS4ERR_DELAY) for longer than that is done."""
    return UnavailableError(
        f"{url.host} keeps putting off calls for {url.path}: it asks to try again later",
        "see whether the server brings the file back from slow storage, or is starting up; then try again",
    )


def words(error: OSError) -> str:
    """The text of an error: the engine's, or that of its number."""
    return error.strerror or os.strerror(error.errno or errno.EIO)


def _mount_error(error: OSError, url: NfsUrl) -> NbdnfsError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NoInputError(
            f"{url.host} has no directory {url.directory} to mount",
            f"see what it exports: showmount -e {url.host}",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(
            f"{url.host} does not let this machine mount {url.directory}",
            f"check the path and the export's list of clients: showmount -e {url.host}",
        )
    return UnavailableError(f"cannot mount {url.directory} on {url.host}: {words(error)}")


def _connection_error(error: OSError, url: NfsUrl, address: str) -> NbdnfsError:
    if error.errno == errno.EINVAL:
        return ConfigError(f"libnfs rejects the URL '{url.text}': {words(error)}")
    nfs_port = url.options.get("nfsport", _NFS_PORT if url.version == 4 else _PORTMAPPER_PORT)
    ports = {nfs_port: "NFS" if nfs_port != _PORTMAPPER_PORT else "portmapper"}
    if url.version == 3:
        mount_port = url.options.get("mountport", _PORTMAPPER_PORT)
        ports.setdefault(mount_port, "mount" if mount_port != _PORTMAPPER_PORT else "portmapper")
    for port, service in ports.items():
        failure = _probe(address, port)
        if failure is not None:
            return UnavailableError(
                f"no answer from {url.host} ({address}) on port {port} ({service}): {failure}",
                "check that the NFS server is running, and that no firewall blocks the port",
            )
    return UnavailableError(
        f"{url.host} ({address}) accepts connections, but does not answer NFS version {url.version}: {words(error)}",
        "check that the server offers this version, and check the ports in the URL",
    )


def _probe(address: str, port: int) -> str | None:
    """Why no TCP connection to `port` can be made; None when one can."""
    try:
        socket.create_connection((address, port), timeout=_PROBE_TIMEOUT_S).close()
    except TimeoutError:
        return "timed out"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
