# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns the errors of libnfs and of the server into one line that says what is wrong, and one that says what to do."""

from __future__ import annotations

import errno
import os
import re

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
from nbdnfs.nas import rpc_probe
from nbdnfs.nas.rpc_probe import Offer
from nbdnfs.nfs_url import NfsUrl

# RFC 1833 (portmapper), RFC 1813 (NFS): the ports that libnfs uses when the URL has none
_PORTMAPPER_PORT = rpc_probe.PORTMAPPER_PORT
_NFS_PORT = 2049
# REGION_OF_ANOTHER_FILE in nbdnfs/engine/region/region.h
_ANOTHER_FILE = "the region belongs to another backing file"
# nbdnfs/engine/block/opening.c
_REPLACED_MEANWHILE = "another file was given its name while it was opened"
# In the order in which a client asks: the key in the URL, the name and the RPC program.
_SERVICES = {"mountport": ("mount", rpc_probe.MOUNT), "nfsport": ("NFS", rpc_probe.NFS)}


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

    Where the connection failed, each service is asked once more to find which one and how: libnfs reports only that
    there was no connection. That takes up to 2 s for each call, and 20 s in all.

    NoInputError: the file or its directory does not exist, or is something else. PermissionDeniedError: the server
    does not permit it. ConfigError: the file or the URL cannot be used. BusyError, CannotCreateError: in use, or no
    room. UnavailableError: no answer. IOFailureError: anything else.
    """
    number, phase = error.errno or 0, _phase(error)
    if number == errno.EAGAIN and error.strerror == _REPLACED_MEANWHILE:
        return UnavailableError(
            f"{url.path} on {url.host}: {error.strerror}", "try again when the file is no longer being replaced"
        )
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
        if not rpc_probe.may_use_reserved_ports():
            return PermissionDeniedError(
                f"{url.host} does not let uid {url.options.get('uid', os.geteuid())} read and write {path}, and this"
                " process may not use a port below 1024, which most servers ask for",
                "run it as root, or export it with insecure; then check the file's owner and mode",
            )
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
            "put the file that the device was started with under this name again, with the size that it had"
            if error.strerror == _ANOTHER_FILE
            else "create a file of whole 4096-byte pages: nbdnfs create URL --size SIZE",
        )
    if number == errno.EFBIG:
        return ConfigError(
            f"{path} on {url.host} is too large for this machine: {words(error)}",
            "use a smaller file, or a smaller region; each GiB of the file needs a little over 2 MiB of locked memory,"
            " half of that with encrypt = false",
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
        if not rpc_probe.may_use_reserved_ports():
            return PermissionDeniedError(
                f"{url.host} does not let this machine mount {url.directory}, and this process may not use a port below"
                " 1024, which most servers ask for",
                f"run it as root, or export it with insecure; then check the list of clients: showmount -e {url.host}",
            )
        return PermissionDeniedError(
            f"{url.host} does not let this machine mount {url.directory}",
            f"check the path and the export's list of clients: showmount -e {url.host}",
        )
    size = re.search(r"server max ([rw])size of ([0-9]+)", words(error))  # libnfs, nfs_v3.c
    if size is not None:
        what = "read" if size[1] == "r" else "written"
        return ConfigError(
            f"{url.host} lets at most {size[2]} bytes be {what} in one call ({size[1]}tmax): libnfs needs 8192",
            "raise the server's largest transfer size to 8192 bytes or more",
        )
    return UnavailableError(f"cannot mount {url.directory} on {url.host}: {words(error)}")


def _connection_error(error: OSError, url: NfsUrl, address: str) -> NbdnfsError:
    """Asks the services that a client asks, in the same order; the first that fails is the reason."""
    if error.errno == errno.EINVAL:
        return ConfigError(f"libnfs rejects the URL '{url.text}': {words(error)}")
    ports = {key: url.options.get(key, 0) for key in ("mountport", "nfsport")}
    if url.version == 4:
        ports = {"nfsport": ports["nfsport"] or _NFS_PORT}
    elif not all(ports.values()) and (failure := _portmapper_error(url, address)) is not None:
        return failure
    for key, (service, program) in _SERVICES.items():
        if key not in ports:
            continue
        port = ports[key] or rpc_probe.registered_port(address, program, 3, _PORTMAPPER_PORT) or 0
        failure = _service_error(url, address, service, program, port)
        if failure is not None:
            return failure
    if error.errno == errno.ETIMEDOUT:
        return UnavailableError(
            f"{url.host} ({address}) offers NFS version {url.version}, but does not answer every call: {words(error)}",
            "try again; then see whether the server is overloaded, or waits for a disk or a name service",
        )
    return UnavailableError(
        f"{url.host} ({address}) answers on all ports, but the connection for {url.path} failed: {words(error)}",
        "try again; then look at the server's log, and check the ports in the URL",
    )


def _portmapper_error(url: NfsUrl, address: str) -> NbdnfsError | None:
    """What is wrong with the portmapper, or with what it knows; None: nothing."""
    failure = rpc_probe.why_closed(address, _PORTMAPPER_PORT)
    if failure is None:
        known = {
            key: rpc_probe.registered_port(address, program, 3, _PORTMAPPER_PORT)
            for key, (_, program) in _SERVICES.items()
        }
        if None in known.values():
            failure = "no answer"
        elif all(known.values()):
            return None
    if _has_only_version_4(url, address):
        return _only_version_4(url, address)
    if failure is not None:
        return UnavailableError(
            f"no answer from {url.host} ({address}) on port {_PORTMAPPER_PORT} (portmapper): {failure}",
            "start rpcbind there and let the port through; or give both ports in the URL: nfsport=2049&mountport=...",
        )
    missing = " and ".join(_SERVICES[key][0] for key, port in known.items() if not port)
    return UnavailableError(
        f"{url.host} ({address}) has no {missing} service for NFS version 3, as its portmapper says",
        "start the NFS server there, with version 3; or give both ports in the URL: nfsport=2049&mountport=...",
    )


def _has_only_version_4(url: NfsUrl, address: str) -> bool:
    port = url.options.get("nfsport", _NFS_PORT)
    return rpc_probe.offer(address, port, rpc_probe.NFS, 3) is not Offer.YES and (
        rpc_probe.offer(address, port, rpc_probe.NFS, 4) is Offer.YES
    )


def _only_version_4(url: NfsUrl, address: str) -> NbdnfsError:
    return UnavailableError(
        f"{url.host} ({address}) offers NFS version 4 only, and the URL asks for version 3",
        "enable version 3 there, or write version=4 in the URL (with libnfs 5.0 or newer)",
    )


def _service_error(url: NfsUrl, address: str, service: str, program: int, port: int) -> NbdnfsError | None:
    """What is wrong with one service; None: nothing."""
    failure = rpc_probe.why_closed(address, port)
    if failure is not None:
        return UnavailableError(
            f"no answer from {url.host} ({address}) on port {port} ({service}): {failure}",
            "check that the NFS server is running, and that no firewall blocks the port",
        )
    version = url.version if program == rpc_probe.NFS else 3
    found = rpc_probe.offer(address, port, program, version)
    if found is Offer.YES:
        return None
    if found is Offer.REFUSED:
        return PermissionDeniedError(
            f"{url.host} ({address}) refuses calls on port {port} ({service})",
            "export it with sec=sys, and with insecure where this is not run as root",
        )
    if found is Offer.SILENT:
        return UnavailableError(
            f"{url.host} ({address}) accepts connections on port {port} ({service}), but does not answer there",
            "check the server's log, and check the ports in the URL",
        )
    if program == rpc_probe.NFS and version == 3 and _has_only_version_4(url, address):
        return _only_version_4(url, address)
    return UnavailableError(
        f"{url.host} ({address}) does not offer {service} version {version} on port {port}",
        "check that the server offers this version, and check the ports in the URL",
    )
