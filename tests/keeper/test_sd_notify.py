# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's notification protocol against a socket that stands for PID 1."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdnfs.keeper import sd_notify
from nbdnfs.keeper.sd_notify import Notifier


class FakeSystemd:
    """Receives notifications, and keeps the descriptors that come with FDSTORE=1."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(5)

    def receive(self) -> tuple[list[str], list[int]]:
        data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 4)
        return data.decode().split("\n"), descriptors


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[FakeSystemd, str]]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@nbdnfs-test-{os.getpid()}"
    fake = FakeSystemd(address)
    yield fake, address
    fake.socket.close()


def test_send(systemd: tuple[FakeSystemd, str]) -> None:
    """One datagram with a line for each assignment."""
    fake, address = systemd
    with contextlib.closing(Notifier({"NOTIFY_SOCKET": address})) as notifier:
        assert notifier.send("READY=1", "STATUS=swap is on")
    assert fake.receive() == (["READY=1", "STATUS=swap is on"], [])


def test_store(systemd: tuple[FakeSystemd, str]) -> None:
    """What was parked under the name goes first; the descriptor that arrives is the same open file, and is kept
    although nothing can be polled on it."""
    fake, address = systemd
    region = os.memfd_create("test")
    os.write(region, b"pages")
    with contextlib.closing(Notifier({"NOTIFY_SOCKET": address})) as notifier:
        assert notifier.store("region", region)
    os.close(region)
    assert fake.receive() == (["FDSTOREREMOVE=1", "FDNAME=region"], [])
    lines, (descriptor,) = fake.receive()
    assert lines == ["FDSTORE=1", "FDNAME=region", "FDPOLL=0"]
    assert os.pread(descriptor, 10, 0) == b"pages"
    os.close(descriptor)


def test_a_store_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what has the name may still be there, nothing is added: systemd would have two of that name."""
    sent: list[str] = []
    monkeypatch.setattr(Notifier, "send", lambda self, *lines, descriptors=(): sent.extend(lines))
    assert not Notifier({}).store("region", 0)
    assert sent == ["FDSTOREREMOVE=1", "FDNAME=region"]


def test_without_a_listener(tmp_path: Path) -> None:
    """Without systemd, and with one that has ended or does not read, messages are dropped and nothing waits."""
    assert not Notifier({}).send("READY=1")
    with contextlib.closing(Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")})) as notifier:
        assert not notifier.send("READY=1")
    fake = FakeSystemd(str(tmp_path / "full"))
    with contextlib.closing(Notifier({"NOTIFY_SOCKET": str(tmp_path / "full")})) as notifier:
        sent = [notifier.send("STATUS=x") for _ in range(1000)]
    assert sent[0]
    assert not sent[-1]
    fake.socket.close()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog(environment: dict[str, str], expected: float | None) -> None:
    """As sd_watchdog_enabled(3) has it."""
    assert Notifier(environment).watchdog_s == expected


def test_listen_fds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors come back under their names; of two with one name the last; none is for our children."""
    low = fcntl.fcntl(0, fcntl.F_DUPFD, 700)  # three in a row, as systemd hands them down
    os.close(low)
    for number, name in enumerate("abc"):
        descriptor = os.memfd_create(name)
        os.dup2(descriptor, low + number)
        os.close(descriptor)
    monkeypatch.setattr(sd_notify, "LISTEN_FDS_START", low)
    found = sd_notify.listen_fds(
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "region:region:other"}
    )
    assert found == {"region": low + 1, "other": low + 2}
    assert not os.get_inheritable(low + 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(low)
    for descriptor in found.values():
        os.close(descriptor)


def test_listen_fds_of_another_process() -> None:
    """$LISTEN_PID names the process that they are for."""
    assert sd_notify.listen_fds({"LISTEN_PID": "1", "LISTEN_FDS": "3"}) == {}
    assert sd_notify.listen_fds({}) == {}
