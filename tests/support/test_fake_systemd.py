# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fake systemd stores, forgets and hands over descriptors as sd_pid_notify_with_fds(3) says."""

from __future__ import annotations

import os
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_systemd import FakeSystemd, wait_until_ended
from support.waiting import DEADLINE_S


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    systemd = FakeSystemd(tmp_path)
    yield systemd
    systemd.close()


def notify(systemd: FakeSystemd, *lines: str, descriptor: int | None = None) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(systemd.environment["NOTIFY_SOCKET"])
        socket.send_fds(sender, ["\n".join(lines).encode()], [] if descriptor is None else [descriptor])


def test_stores_under_a_name(systemd: FakeSystemd) -> None:
    """A stored descriptor outlives the sender's; each hand-over gives a copy; FDSTOREREMOVE=1 forgets it."""
    descriptor = os.memfd_create("stored")
    os.write(descriptor, b"kept")
    notify(systemd, "FDSTORE=1", "FDNAME=region", descriptor=descriptor)
    assert systemd.names() == ["region"]
    os.close(descriptor)
    for _ in range(2):
        copy = systemd.hand_over()["region"]
        assert os.pread(copy, 4, 0) == b"kept"
        os.close(copy)
    notify(systemd, "FDSTOREREMOVE=1", "FDNAME=region")
    assert systemd.names() == []


def memfd_with(content: bytes) -> int:
    descriptor = os.memfd_create("stored")
    os.write(descriptor, content)
    return descriptor


def test_a_name_is_stored_twice(systemd: FakeSystemd) -> None:
    """A second descriptor under a name does not replace the first, which is passed on after it; a copy of one that is
    stored is no second one; FDSTOREREMOVE=1 forgets both."""
    for content in (b"old", b"new"):
        descriptor = memfd_with(content)
        for _ in range(2):
            notify(systemd, "FDSTORE=1", "FDNAME=region", descriptor=descriptor)
        systemd.names()
        os.close(descriptor)
    assert systemd.names() == ["region", "region"]
    copy = systemd.hand_over()["region"]
    assert os.pread(copy, 3, 0) == b"old"
    os.close(copy)
    notify(systemd, "FDSTOREREMOVE=1", "FDNAME=region")
    assert systemd.names() == []


def test_a_full_store(systemd: FakeSystemd) -> None:
    """As many as the unit permits; what comes after that is dropped."""
    for number in range(5):
        descriptor = memfd_with(b"")
        notify(systemd, "FDSTORE=1", f"FDNAME={number}", descriptor=descriptor)
        systemd.names()
        os.close(descriptor)
    assert systemd.names() == ["0", "1", "2", "3"]


@pytest.mark.parametrize("is_polled", [True, False])
def test_a_hang_up_drops_it_unless_it_is_not_polled(systemd: FakeSystemd, is_polled: bool) -> None:
    """FDPOLL=0 keeps a socket whose other end has closed."""
    ours, theirs = socket.socketpair()
    lines = ["FDSTORE=1", "FDNAME=worker", *([] if is_polled else ["FDPOLL=0"])]
    notify(systemd, *lines, descriptor=theirs.fileno())
    systemd.names()
    theirs.close()
    ours.close()
    handed_over = systemd.hand_over()
    assert set(handed_over) == (set() if is_polled else {"worker"})
    for descriptor in handed_over.values():
        os.close(descriptor)


def test_loses(systemd: FakeSystemd) -> None:
    """A request to forget does not arrive; a stop of the unit drops everything all the same."""
    ours, theirs = socket.socketpair()
    with ours:
        notify(systemd, "FDSTORE=1", "FDNAME=worker", descriptor=theirs.fileno())
        systemd.names()
        theirs.close()
        systemd.loses = True
        notify(systemd, "FDSTOREREMOVE=1", "FDNAME=worker")
        assert systemd.names() == ["worker"]
        systemd.drop()
        assert systemd.names() == []
        assert select.select([ours], [], [], DEADLINE_S)[0], "the store's copy is closed"


def test_wait_until_ended() -> None:
    """A process that has ended, one that never was, and one that lives."""
    with subprocess.Popen(["/bin/true"]) as ended:
        wait_until_ended(ended.pid)
    wait_until_ended(ended.pid)
    with subprocess.Popen(["/bin/sleep", "60"]) as living:
        with pytest.raises(AssertionError, match=f"process {living.pid} lives"):
            wait_until_ended(living.pid, timeout_s=0.1)
        living.kill()
