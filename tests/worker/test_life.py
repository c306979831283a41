# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker up to the engine: what it refuses before it is a standby. tests/keeper and tests/plugin have the rest."""

from __future__ import annotations

import os
import socket

import pytest

from nbdnfs import region
from nbdnfs.errors import ConfigError, UsageError
from nbdnfs.worker import life, protocol, settings


def worker(url: str, **values: str) -> life.Worker:
    return life.Worker(settings.parse({"url": url, "lock": "off", **values}))


@pytest.mark.parametrize(
    ("libnfs", "version", "is_refused"), [("4.0.0", 4, True), ("4.0.0", 3, False), ("5.0.2", 4, False)]
)
def test_nfs4_with_an_old_libnfs(monkeypatch: pytest.MonkeyPatch, libnfs: str, version: int, is_refused: bool) -> None:
    """Refused by the worker, because its keeper does not load libnfs; a percent sign in the URL is not a specifier."""
    monkeypatch.setattr(life, "libnfs_version", libnfs)
    made = worker(f"nfs://nas/export/100%.swap?version={version}", address="192.0.2.7")
    if is_refused:
        with pytest.raises(ConfigError, match=r"NFSv4 needs libnfs 5\.0"):
            made.prepare()
    else:
        made.prepare()


def test_a_url_without_an_address_is_checked() -> None:
    """nbdkit started by hand."""
    with pytest.raises(UsageError, match=r"the URL .nfs://nas/export/"):
        worker("nfs://nas/export/").prepare()


def test_a_region_of_another_version() -> None:
    """Said before READY: the worker that knows the region goes on."""
    descriptor = region.create()
    os.write(descriptor, region.MAGIC + b"\xff\0\0\0" + bytes(4096))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        made = worker(
            "nfs://nas/export/x", address="192.0.2.7", region_fd=str(descriptor), control_fd=str(theirs.fileno())
        )
        with pytest.raises(ConfigError, match=f"has version 255, this nbdnfs has version {region.VERSION}"):
            made.wait_until_activated()
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(len(protocol.READY))
    os.close(descriptor)


def test_a_worker_without_a_keeper_does_not_wait() -> None:
    """It has no control socket."""
    worker("nfs://nas/export/x", address="192.0.2.7").wait_until_activated()
