# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a server puts off (NFS3ERR_JUKEBOX), wherever it comes, and waits that can be ended."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest
from support.fake_files import failure
from support.fake_nas import FakeNas
from support.nfs_server import LOOPBACK
from support.owner_records import HOLDER, QUICK, machine
from support.waiting import DEADLINE_S, in_background

from nbdnfs.engine import NfsFile
from nbdnfs.errors import UnavailableError
from nbdnfs.nas import backing_file, owner_record, ownership, patience
from nbdnfs.nas.patience import Interrupted

SIZE = 1 << 20
PATH = "/export/box.swap"


class PutOff:
    """An operation that is put off so often; `number` is the errno."""

    def __init__(self, times: int, number: int = errno.EAGAIN) -> None:
        self.left = times
        self.number = number

    def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise failure(self.number, "name")
        return "done"


def test_until_done(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The pauses grow up to five seconds, one line is logged, and other errors are raised at once."""
    slept_s: list[float] = []
    monkeypatch.setattr(time, "sleep", slept_s.append)
    assert patience.until_done(PutOff(9), "a test") == "done"
    assert slept_s == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert [record.getMessage() for record in caplog.records] == [
        "the server asks to try again later (a test); trying for 120 s"
    ]
    assert patience.until_done(PutOff(0), "a test") == "done"
    for number in (errno.EIO, errno.ECONNRESET):
        with pytest.raises(OSError, match=r".") as caught:
            patience.until_done(PutOff(1, number), "a test")
        assert caught.value.errno == number


def test_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the limit, with the server's error."""
    now_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now_s.__setitem__(0, now_s[0] + seconds))
    with pytest.raises(OSError, match=r".") as caught:
        patience.until_done(PutOff(1000), "a test")
    assert caught.value.errno == errno.EAGAIN
    assert now_s == [patience.PUT_OFF_LIMIT_S]


def test_pauses_that_can_be_ended() -> None:
    """At once, in the thread that says so; in others they are slept."""
    stop = threading.Event()

    def wait() -> None:
        with patience.interruptible(stop):
            patience.pause(600)

    waiting = in_background(wait)
    patience.pause(0.001)
    stop.set()
    assert isinstance(waiting.exception(10), Interrupted)
    patience.pause(0.001)
    with patience.interruptible(stop), pytest.raises(Interrupted):
        patience.until_done(PutOff(1), "a test")


@pytest.mark.parametrize(
    "op", ["FSINFO", "GETATTR", "LOOKUP", "ACCESS", "CREATE", "WRITE", "LINK", "REMOVE", "READ", "RENAME"]
)
def test_any_call_may_be_put_off(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Creating a file, and claiming, stealing, keeping and releasing it."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.01)
    with FakeNas() as nas:
        url, box1, box2 = nas.url(PATH), machine("box1"), machine("box2")

        def put_off() -> None:
            nas.end_faults()
            nas.jukebox(op, times=3)

        put_off()
        backing_file.create(url, SIZE)
        assert nas.names("/export") == ["box.swap"]
        put_off()
        ownership.claim(url, HOLDER, box1, timing=QUICK)
        put_off()
        ownership.claim(url, HOLDER, box2, steal=True, timing=QUICK, report=lambda line: None)
        put_off()
        ownership.claim(url, HOLDER, box2)
        put_off()
        assert ownership.release(url, HOLDER, box2)
        assert nas.names("/export") == ["box.swap"]


def test_a_server_that_only_puts_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so, and nothing is left behind."""
    monkeypatch.setattr(patience, "PUT_OFF_LIMIT_S", 0.3)
    with FakeNas() as nas:
        nas.add(PATH, bytes(SIZE))
        for op in ("LOOKUP", "CREATE", "LINK"):
            nas.jukebox(op)
            with pytest.raises(UnavailableError, match="asks to try again later"):
                ownership.claim(nas.url(PATH), HOLDER, machine("box1"))
            nas.end_faults()
            assert nas.names("/export") == ["box.swap"]


def test_names_of_any_bytes() -> None:
    """Blanks, what ends a path in other URLs, percent signs with and without digits, and bytes that are not UTF-8:
    created, claimed, written and read under that name."""
    names = {"my file.swap": "my%20file.swap", "a%20b": "a%2520b", "ex?port#1": "ex%3Fport%231", "é\n": "%C3%A9%0A"}
    with FakeNas() as nas:
        for name, escaped in names.items():
            url = nas.url(f"/export/{escaped}")
            backing_file.create(url, SIZE)
            record = ownership.claim(url, HOLDER, machine("box1"))
            assert record.state == "held"
            file = NfsFile(url, LOOPBACK)
            file.pwrite(name.encode(), 0)
            file.close()
            assert nas.content(f"/export/{name}").startswith(name.encode())
            assert nas.names("/export") == sorted([owner_record.name_of(name), name])
            with nas.files() as tree:
                found = tree.find("/export")
                assert found is not None
                found.entries.clear()


def test_within_a_limit() -> None:
    """What the work returns and raises; what does not end in time, or before a signal, is left alone."""
    assert patience.within(DEADLINE_S, lambda: 5) == 5

    def fail() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        patience.within(DEADLINE_S, fail)
    never, stop = threading.Event(), threading.Event()
    with pytest.raises(patience.TimeLimitError):
        patience.within(0.2, lambda: never.wait(DEADLINE_S))
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Interrupted):
        patience.within(DEADLINE_S, lambda: never.wait(DEADLINE_S), stop)
    never.set()


@pytest.mark.parametrize("by_signal", [False, True])
def test_a_release_whose_write_is_not_answered(tmp_path: Path, by_signal: bool) -> None:
    """It ends at its limit, or by a signal, and the error says that the server is silent. The server may mark the
    record as free later: the next keeper of that name gets a record that this cannot reach."""
    (tmp_path / "run/nbdnfs").mkdir(parents=True)
    me, stop = machine("box1"), threading.Event()
    with FakeNas() as nas:
        nas.add(PATH, bytes(SIZE))
        url = nas.url(PATH)
        first = ownership.claim(url, HOLDER, me, root=tmp_path)
        nas.drop("WRITE", times=None, executed=False)
        if by_signal:
            threading.Timer(0.5, stop.set).start()
        with pytest.raises(UnavailableError, match="a signal came" if by_signal else "has not answered for 1 s"):
            ownership.release(url, HOLDER, me, root=tmp_path, stop=stop, limit_s=DEADLINE_S if by_signal else 1.0)
        nas.end_faults()
        second = ownership.claim(url, HOLDER, me, root=tmp_path)
        assert second.generation == first.generation + 1
        assert ownership.claim(url, HOLDER, me, root=tmp_path) == second
        assert ownership.release(url, HOLDER, me, root=tmp_path)
    assert list((tmp_path / "run/nbdnfs").iterdir()) == []
