# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker up to the engine: what it refuses before it is a standby. tests/keeper and tests/plugin have the rest."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.fake_files import failure

from nbdnfs import region
from nbdnfs.errors import ConfigError, NoInputError, UnavailableError, UsageError
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
        with pytest.raises(ConfigError, match="has version 255, this nbdnfs knows 2 to 4"):
            made.wait_until_activated()
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(len(protocol.READY))
    os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_while_a_standby_starts(number: signal.Signals) -> None:
    """It waits until nbdkit has set its handlers, which would only remember it, and then ends the process."""
    program = f"""
import os, signal
from nbdnfs.worker import life, settings
values = {{"url": "nfs://nas/export/x", "address": "192.0.2.7", "lock": "off", "control_fd": "0"}}
made = life.Worker(settings.parse(values))
made.prepare()
os.kill(os.getpid(), {int(number)})
signal.signal({int(number)}, lambda *_: None)  # as nbdkit does
print("waits", flush=True)
made.lock_memory()
print("goes on", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-number, "waits\n"), done.stderr


def test_a_worker_without_a_keeper_does_not_wait() -> None:
    """It has no control socket."""
    worker("nfs://nas/export/x", address="192.0.2.7").wait_until_activated()


def test_a_server_that_asks_to_try_again_later(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker without a keeper does so for two minutes, and reports other errors at once."""
    now_s, made = [0.0], worker("nfs://nas/export/x", address="192.0.2.7")
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now_s.__setitem__(0, now_s[0] + seconds))
    answers: list[BaseException | str] = [failure(errno.EAGAIN, "connect"), failure(errno.EAGAIN, "name"), "an engine"]

    def open_engine(timeout_s: int) -> object:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(made, "_open_engine", open_engine)
    assert made.open_engine() == "an engine"
    assert capfd.readouterr().err.count("the server asks to try again later") == 1
    for number, kind, seconds in (
        (errno.EAGAIN, UnavailableError, life.PUT_OFF_LIMIT_S),
        (errno.ENOENT, NoInputError, 0.0),
    ):
        answers[:], now_s[0] = [failure(number)], 0.0
        with pytest.raises(kind):
            made.open_engine()
        assert seconds <= now_s[0] <= seconds + 1
