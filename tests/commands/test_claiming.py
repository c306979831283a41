# SPDX-License-Identifier: LGPL-2.1-or-later
"""Claims that a signal ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_nas import FakeNas, Oddities
from support.owner_records import HOLDER, machine
from support.waiting import DEADLINE_S, wait_until

from nbdnfs.commands import claiming
from nbdnfs.errors import EndedBySignal, UnavailableError
from nbdnfs.nas import owner_record, ownership
from nbdnfs.nas.owner_record import Record
from nbdnfs.nas.patience import Interrupted

SIZE = 4 << 20
PATH = "/export/box.swap"
RECORD = "/export/.box.swap.owner"
# Two seconds are promised; the rest is for a loaded machine.
SOON_S = 10.0


def test_what_the_work_returns_and_raises() -> None:
    """As if it had been called; a TimeoutError of its own, too."""
    stop = threading.Event()
    assert claiming.run(lambda: 5, stop) == 5

    def fail() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        claiming.run(fail, stop)


def test_work_that_does_not_end() -> None:
    """It is left alone after a moment; what ends in that moment counts."""
    stop, never = threading.Event(), threading.Event()
    stop.set()
    began_s = time.monotonic()
    with pytest.raises(Interrupted):
        claiming.run(lambda: never.wait(60), stop)
    assert time.monotonic() - began_s < SOON_S
    never.set()
    assert claiming.run(lambda: 5, stop) == 5


def test_signals_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is set by SIGTERM meanwhile, and not any more afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    assert claiming.run_until_signal(lambda stop: stop.is_set()) is False
    with pytest.raises(EndedBySignal):
        claiming.run_until_signal(lambda stop: os.kill(os.getpid(), signal.SIGTERM) or stop.wait(DEADLINE_S))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("ends", ["well", "with an error", "never"])
def test_a_signal_unwinds(ends: str) -> None:
    """However the work ends, what has been begun is brought to its end, and nothing more is begun."""
    never = threading.Event()

    def work(stop: threading.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(DEADLINE_S)
        if ends == "with an error":
            raise UnavailableError("the server went away")
        if ends == "never":
            never.wait(DEADLINE_S)

    with pytest.raises(EndedBySignal) as caught:
        claiming.run_until_signal(work, grace_s=0.2)
    never.set()
    assert caught.value.number == signal.SIGTERM


def test_unwinding() -> None:
    """Signals raise where the main thread is, and are as before afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(EndedBySignal) as caught, claiming.unwinding():
            signal.raise_signal(number)
        assert caught.value.number == number
    assert signal.getsignal(signal.SIGTERM) is before


def ended_by(process: subprocess.Popen[str], number: int) -> int:
    """Send the signal; the exit status, which must come soon."""
    began_s = time.monotonic()
    process.send_signal(number)
    status = process.wait(DEADLINE_S)
    assert time.monotonic() - began_s < SOON_S
    return status


@pytest.fixture(params=["claim", "serve"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a command that claims a file; its stderr is a pipe."""

    def run(url: str, *options: str) -> subprocess.Popen[str]:
        own = [f"--holder={HOLDER}", *options] if request.param == "claim" else [f"--socket={tmp_path / 'socket'}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "nbdnfs", request.param, url, *own], stderr=subprocess.PIPE, text=True
        )
        request.addfinalizer(process.communicate)
        request.addfinalizer(process.kill)
        return process

    return run


@pytest.mark.parametrize(
    ("op", "number"), [("LOOKUP", signal.SIGTERM), ("CREATE", signal.SIGINT), ("LINK", signal.SIGTERM)]
)
def test_a_server_that_is_silent(start: Callable[..., subprocess.Popen[str]], op: str, number: int) -> None:
    """The signal ends the claim, whichever call is not answered."""
    with FakeNas() as nas:
        nas.add(PATH, bytes(SIZE))
        nas.drop(op, times=None, executed=False)
        process = start(nas.url(PATH))
        wait_until(lambda: nas.calls(op), f"a {op} arrives")
        assert ended_by(process, number) in (0, -number)


def test_while_it_waits_for_the_owner_before(start: Callable[..., subprocess.Popen[str]]) -> None:
    """The record says that the file is free, which makes the next claimant wait as well; nothing else is left."""
    free = owner_record.new(machine("box2"), HOLDER, None, "free")
    with FakeNas() as nas:
        nas.add(PATH, bytes(SIZE))
        nas.add(RECORD, free.to_bytes())
        process = start(nas.url(PATH))
        assert process.stderr is not None
        while "waiting 50 s" not in (line := process.stderr.readline()):
            assert line
        assert ended_by(process, signal.SIGTERM) in (0, -signal.SIGTERM)
        found = owner_record.parse(nas.content(RECORD))
        assert isinstance(found, Record)
        assert (found.state, found.generation) == ("free", 2)
        assert nas.names("/export") == [".box.swap.owner", "box.swap"]


def test_calls_that_are_put_off(start: Callable[..., subprocess.Popen[str]]) -> None:
    """The candidate for the record is removed again."""
    with FakeNas() as nas:
        nas.add(PATH, bytes(SIZE))
        nas.jukebox("LINK")
        process = start(nas.url(PATH))
        wait_until(lambda: len(nas.calls("LINK")) > 1, "LINK is tried again")
        assert ended_by(process, signal.SIGTERM) in (0, -signal.SIGTERM)
        assert nas.names("/export") == ["box.swap"]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_server_that_answers_no_write_at_the_end_of_serve(tmp_path: Path, signals: int) -> None:
    """The release of the file ends by itself; and at once with a further signal. The record stays."""
    socket = tmp_path / "socket"
    with FakeNas() as nas:
        nas.add(PATH, bytes(SIZE))
        process = subprocess.Popen(
            [sys.executable, "-m", "nbdnfs", "serve", nas.url(PATH), f"--socket={socket}"],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            # two of the claim, and the worker's first look
            wait_until(lambda: len(nas.calls("WRITE")) > 2, "the worker runs")
            nas.drop("WRITE", times=None, executed=False)
            before = len(nas.calls("WRITE"))
            process.send_signal(signal.SIGTERM)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_until(lambda: not children.read_text(), "the worker has ended")
            wait_until(lambda: len(nas.calls("WRITE")) > before, "the record is being released")
            began_s = time.monotonic()
            for _ in range(signals - 1):
                process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
            assert signals == 1 or time.monotonic() - began_s < SOON_S
            assert process.stderr is not None
            assert "the owner record stays" in process.stderr.read()
        finally:
            process.kill()
            process.communicate()


def test_without_hard_links_a_restart_is_quick() -> None:
    """No wait at the first start, nor at the next."""
    with FakeNas(Oddities(has_hard_links=False)) as nas:
        nas.add(PATH, bytes(SIZE))
        for _ in range(2):
            began_s = time.monotonic()
            ownership.claim(nas.url(PATH), HOLDER, me := machine("box1"))
            assert time.monotonic() - began_s < SOON_S
            assert nas.names("/export") == [".box.swap.owner", "box.swap"]
            assert ownership.release(nas.url(PATH), HOLDER, me)


def test_a_limit() -> None:
    """Work that does not end in time is asked to stop, and is an error then; what ends in the grace time counts."""
    stopped = threading.Event()
    with pytest.raises(UnavailableError, match="has not answered for"):
        claiming.run(lambda: stopped.wait(DEADLINE_S), stop := threading.Event(), limit_s=0.05, grace_s=0.05)
    assert stop.is_set()
    stopped.set()
    stop = threading.Event()
    assert claiming.run(lambda: stop.wait(DEADLINE_S) and "done", stop, limit_s=0.05) == "done"
    assert claiming.run(lambda: "done", threading.Event(), limit_s=DEADLINE_S) == "done"
