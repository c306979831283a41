# SPDX-License-Identifier: LGPL-2.1-or-later
"""Errors of the engine as errors for the user: which kind, and that each says what to do. No server is asked."""

from __future__ import annotations

import errno
import os
import socket

import pytest
from support.fake_files import failure

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
from nbdnfs.nas import explain

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


def test_a_server_that_accepts_connections_only() -> None:
    """Where the port accepts connections, the error is about the NFS version."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        url = nfs_url.parse(f"nfs://127.0.0.1/export/box.swap?version=4&nfsport={port}")
        found = explain.open_error(failure(errno.ETIMEDOUT, "connect"), url, "127.0.0.1")
    assert type(found) is UnavailableError
    assert "does not answer NFS version 4" in found.message
