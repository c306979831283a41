# SPDX-License-Identifier: LGPL-2.1-or-later
"""Errors of the engine as errors for the user: which kind, and that each says what to do. Servers are fakes."""

from __future__ import annotations

import errno
import os
import socket

import pytest
from support.fake_files import failure
from support.fake_nas import FakeNas
from support.nfs_server import LOOPBACK, free_ports
from support.sunrpc import PROG_MISMATCH, PROG_UNAVAIL, SUCCESS, RpcCall, RpcServer, u32

from nbdnfs import nfs_url
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
from nbdnfs.nas import explain, rpc_probe

URL = nfs_url.parse("nfs://nas/export/box.swap")


@pytest.mark.parametrize(
    ("phase", "number", "kind"),
    [
        ("open", errno.ENOENT, NoInputError),
        ("open", errno.EISDIR, NoInputError),
        ("open", errno.ENOTDIR, NoInputError),
        ("open", errno.EACCES, PermissionDeniedError),
        ("open", errno.EPERM, PermissionDeniedError),
        ("open", errno.EROFS, PermissionDeniedError),
        ("open", errno.EINVAL, ConfigError),
        ("open", errno.EFBIG, ConfigError),
        ("open", errno.EBUSY, BusyError),
        ("open", errno.ENOSPC, CannotCreateError),
        ("open", errno.EDQUOT, CannotCreateError),
        ("mount", errno.ENOENT, NoInputError),
        ("mount", errno.EACCES, PermissionDeniedError),
    ],
)
def test_kinds(phase: str, number: int, kind: type[NbdnfsError]) -> None:
    """Each error has its kind, names the server, and has a hint."""
    found = explain.open_error(failure(number, phase), URL, "192.0.2.1")
    assert type(found) is kind
    assert "nas" in found.message
    assert found.hint


@pytest.mark.parametrize(("phase", "kind"), [("open", IOFailureError), ("mount", UnavailableError)])
def test_other_errors(phase: str, kind: type[NbdnfsError]) -> None:
    """An unexpected error keeps the system's text."""
    found = explain.open_error(failure(errno.EMFILE, phase), URL, "192.0.2.1")
    assert type(found) is kind
    assert os.strerror(errno.EMFILE) in found.message


def test_the_port_without_an_answer() -> None:
    """A failed connection names the port that refuses, and its service."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = nfs_url.parse(f"nfs://127.0.0.1/export/box.swap?version=4&nfsport={port}")
    found = explain.open_error(failure(errno.ECONNREFUSED, "connect"), url, "127.0.0.1")
    assert type(found) is UnavailableError
    assert f"on port {port} (NFS): connection refused" in found.message
    assert "firewall" in found.hint


def connection_error(url: str) -> UnavailableError | PermissionDeniedError:
    """The error for a connection that failed for a reason that libnfs does not give."""
    found = explain.open_error(failure(errno.ETIMEDOUT, "connect"), nfs_url.parse(url), LOOPBACK)
    assert isinstance(found, (UnavailableError, PermissionDeniedError))
    assert found.hint
    return found


class Service(RpcServer):
    """The NULL calls of some versions of one program; others are answered with `otherwise`."""

    def __init__(self, program: int, versions: tuple[int, ...], otherwise: int = PROG_MISMATCH) -> None:
        super().__init__()
        self._offers = {(program, version) for version in versions}
        self._otherwise = otherwise

    def _arrived(self, call: RpcCall) -> None:
        self._answer_at(call, 0.0)

    def _run_call(self, call: RpcCall) -> tuple[int, bytes]:
        if (call.program, call.version) in self._offers:
            return SUCCESS, b""
        return self._otherwise, u32(4, 4) if self._otherwise == PROG_MISMATCH else b""


def portmapper_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Ask that port, in the place of 111."""
    monkeypatch.setattr(explain, "_PORTMAPPER_PORT", port)


def test_a_server_that_accepts_connections_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that hangs."""
    monkeypatch.setattr(rpc_probe, "_PROBE_TIMEOUT_S", 0.2)
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        found = connection_error(f"nfs://{LOOPBACK}/export/box.swap?version=4&nfsport={port}")
    assert f"accepts connections on port {port} (NFS), but does not answer" in found.message


def test_no_portmapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, with the way to do without it."""
    with FakeNas() as nas:
        portmapper_at(monkeypatch, free_ports(1)[0])
        found = connection_error(f"nfs://{LOOPBACK}/export/box.swap?nfsport={nas.port}")
    assert "(portmapper): connection refused" in found.message
    assert "nfsport=2049&mountport=" in found.hint


def test_a_blocked_mountd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portmapper answers, and the port that it names does not."""
    (portmapper,) = free_ports(1)
    portmapper_at(monkeypatch, portmapper)
    with FakeNas(portmap_port=portmapper) as nas:
        nas.stop_mountd()
        found = connection_error(f"nfs://{LOOPBACK}/export/box.swap")
        assert f"on port {nas.mount_port} (mount): connection refused" in found.message
        assert "firewall" in found.hint
        # the same with the ports in the URL
        assert f"on port {nas.mount_port} (mount)" in connection_error(nas.url("/export/box.swap")).message


def test_a_portmapper_that_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The NFS server behind it does not run."""
    with Service(100000, (2,)) as portmapper:
        portmapper_at(monkeypatch, portmapper.port)
        monkeypatch.setattr(rpc_probe, "registered_port", lambda *arguments: 0)
        monkeypatch.setattr(explain, "_NFS_PORT", free_ports(1)[0])
        found = connection_error(f"nfs://{LOOPBACK}/export/box.swap")
    assert "has no mount and NFS service for NFS version 3" in found.message


@pytest.mark.parametrize("has_portmapper", [False, True])
def test_a_server_of_version_4_only(monkeypatch: pytest.MonkeyPatch, has_portmapper: bool) -> None:
    """With a portmapper or without one, as such servers are."""
    portmapper_at(monkeypatch, free_ports(1)[0])
    with Service(100003, (4,)) as nfs, Service(100005, (3,)) as mount:
        ports = f"nfsport={nfs.port}" + (f"&mountport={mount.port}" if has_portmapper else "")
        found = connection_error(f"nfs://{LOOPBACK}/export/box.swap?{ports}")
    assert "offers NFS version 4 only" in found.message
    assert "version=4" in found.hint


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.ETIMEDOUT, "offers NFS version 3, but does not answer every call"), (errno.ECONNRESET, "answers on all")],
)
def test_a_server_that_answers_now(number: int, text: str) -> None:
    """Each service answers when it is asked again: neither version nor port is to blame."""
    with FakeNas() as nas:
        url = nfs_url.parse(nas.url("/export/box.swap"))
        found = explain.open_error(failure(number, "connect"), url, LOOPBACK)
    assert type(found) is UnavailableError
    assert text in found.message
    assert "version" not in found.hint
    assert "try again" in found.hint


def test_another_service_on_the_port() -> None:
    """Each of the two ports, by name."""
    with FakeNas() as nas, Service(100005, (1,)) as old, Service(100000, (2,), PROG_UNAVAIL) as other:
        found = connection_error(nas.url("/export/box.swap", mountport=old.port))
        assert f"does not offer mount version 3 on port {old.port}" in found.message
        found = connection_error(nas.url("/export/box.swap", nfsport=other.port))
        assert f"does not offer NFS version 3 on port {other.port}" in found.message


@pytest.mark.parametrize("phase", ["mount", "open"])
def test_a_reserved_port_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """Most servers refuse others: that may be the reason, and is said to a process without the privilege only."""
    for may, says in ((False, True), (True, False)):
        monkeypatch.setattr(rpc_probe, "may_use_reserved_ports", lambda may=may: may)
        found = explain.open_error(failure(errno.EACCES, phase), URL, "192.0.2.1")
        assert type(found) is PermissionDeniedError
        assert ("port below 1024" in found.message and "insecure" in found.hint) == says


def test_a_small_transfer_size() -> None:
    """libnfs refuses to mount; the figure is in its text."""
    error = failure(errno.EINVAL, "mount")
    error.strerror = "server max wsize of 4096"
    found = explain.open_error(error, URL, "192.0.2.1")
    assert type(found) is ConfigError
    assert "at most 4096 bytes be written in one call (wtmax)" in found.message


def test_calls_that_are_put_off_for_too_long() -> None:
    """Whatever the call was."""
    for phase in ("connect", "mount", "open", "name"):
        found = explain.open_error(failure(errno.EAGAIN, phase), URL, "192.0.2.1")
        assert type(found) is UnavailableError
        assert "asks to try again later" in found.message
