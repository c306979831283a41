# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns what libnfs and the server answered into one line of what is wrong and one of what to do."""

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
# RFC 1057 (portmapper), RFC 1813 (NFS): what libnfs asks when the URL does not say
_PORTMAPPER_PORT = 111
_NFS_PORT = 2049


def refuse_unsupported(url: NfsUrl, libnfs_version: str) -> None:
    """Raise ConfigError where this libnfs cannot do what the URL asks."""
    if url.version == 4 and int(libnfs_version.split(".")[0]) < 5:
        raise ConfigError(
            f"NFSv4 needs libnfs 5.0 or newer: {libnfs_version} cannot write a page over it (sahlberg/libnfs#319)",
            "use version=3, or a system with a newer libnfs (Debian 13)",
        )


def explain(error: OSError, url: NfsUrl, address: str) -> NbdnfsError:
    """The user's view of an error that opening `url` on `address` raised (`nbdnfs.engine.NfsError`).

    Where the connection failed, each port is tried once more to say which one and how: libnfs tells no more
    than that there was none. That takes up to 2 s for each of at most two ports.
    """
    number = error.errno or 0
    phase = getattr(error, "phase", "open")
    if phase == "connect":
        return _explain_connection(error, url, address)
    if phase == "mount":
        return _explain_mount(error, url)
    path = url.path
    if number == errno.ENOENT:
        return NoInputError(
            f"there is no file {path} on {url.host}",
            "make it with: nbdnfs create URL --size SIZE; or check the path",
        )
    if number == errno.EISDIR:
        return NoInputError(f"{path} on {url.host} is a directory", "name a file in it, for example .../%H.swap")
    if number == errno.ENOTDIR:
        return NoInputError(f"a part of {path} on {url.host} is no directory", "check the path")
    if number in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(
            f"{url.host} does not let uid {url.options.get('uid', os.geteuid())} read and write {path}",
            "check the file's owner and mode, that the export is neither read-only nor squashes root, or give uid= and"
            " gid= in the URL",
        )
    if number == errno.EROFS:
        return PermissionDeniedError(f"{url.host} exports {path} read-only", "export it for reading and writing")
    if number == errno.EINVAL:
        return ConfigError(
            f"{path} on {url.host} cannot be a device: {error.strerror or 'it is no regular file'}",
            "make a file of whole 4096-byte pages: nbdnfs create URL --size SIZE",
        )
    if number == errno.EBUSY:
        return BusyError(f"{path} on {url.host} is in use", "try again when it is not")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return CannotCreateError(f"{url.host} has no room for {path}", "free space there, or ask for a smaller size")
    return IOFailureError(f"cannot open {path} on {url.host}: {_words(error)}")


def _words(error: OSError) -> str:
    return error.strerror or os.strerror(error.errno or errno.EIO)


def _explain_mount(error: OSError, url: NfsUrl) -> NbdnfsError:
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
    return UnavailableError(f"cannot mount {url.directory} on {url.host}: {_words(error)}")


def _explain_connection(error: OSError, url: NfsUrl, address: str) -> NbdnfsError:
    if error.errno == errno.EINVAL:
        return ConfigError(f"libnfs does not take the URL '{url.text}': {_words(error)}")
    nfs_port = url.options.get("nfsport", _NFS_PORT if url.version == 4 else _PORTMAPPER_PORT)
    ports = {nfs_port: "NFS" if nfs_port != _PORTMAPPER_PORT else "portmapper"}
    if url.version == 3:
        mount_port = url.options.get("mountport", _PORTMAPPER_PORT)
        ports.setdefault(mount_port, "mount" if mount_port != _PORTMAPPER_PORT else "portmapper")
    for port, service in ports.items():
        trouble = _probe(address, port)
        if trouble is not None:
            return UnavailableError(
                f"no answer from {url.host} ({address}) on port {port} ({service}): {trouble}",
                "check that the NFS server runs and that no firewall is in between",
            )
    return UnavailableError(
        f"{url.host} ({address}) takes connections, but NFS version {url.version} does not answer: {_words(error)}",
        "check that the server offers this version, and the ports in the URL",
    )


def _probe(address: str, port: int) -> str | None:
    """What is wrong with a TCP connection to `port`, None when it can be made."""
    try:
        socket.create_connection((address, port), timeout=_PROBE_TIMEOUT_S).close()
    except TimeoutError:
        return "timed out"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
