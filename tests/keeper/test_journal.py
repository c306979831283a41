# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines with fields: what the journal gets, that nothing waits for it, and what happens where there is none."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_journal import FakeJournal

from nbdnfs import __version__
from nbdnfs.keeper import events
from nbdnfs.keeper.journal import Journal
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier

IDS = {key: value for key, value in vars(events).items() if key.isupper()}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[FakeJournal]:
    made = FakeJournal(tmp_path)
    yield made
    made.close()


@pytest.fixture
def records(tmp_path: Path) -> Records:
    made = Records("swap0", run=tmp_path / "run")
    made.reserve()
    return made


def test_a_change_of_state(journal: FakeJournal, records: Records, capfd: pytest.CaptureFixture[str]) -> None:
    """The text, the id, and the fields; nothing on stderr, which would be the same line again."""
    opened = journal.open()
    Reporter(records, Notifier({}), opened).say("worker 7 serves", events.WORKER_SERVES, pid=7, device="/dev/nbd0")
    assert journal.entry() == {
        "MESSAGE": "nbdnfs: swap0: worker 7 serves",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "nbdnfs",
        "MESSAGE_ID": "48ad2ebfa2bb4bcdb567fc08b32064db",
        "NBDNFS_NAME": "swap0",
        "NBDNFS_VERSION": __version__,
        "NBDNFS_PID": "7",
        "NBDNFS_DEVICE": "/dev/nbd0",
    }
    assert capfd.readouterr().err == ""
    opened.close()


def test_complaints_and_helpers(journal: FakeJournal, records: Records) -> None:
    """They are warnings, and each is said once."""
    opened = journal.open()
    reporter = Reporter(records, Notifier({}), opened)
    for _ in range(2):
        reporter.complain("away", "the server is away")
        reporter.pass_on(["nbdnfs: there is no file"])
    found = [journal.entry(), journal.entry()]
    assert [one["MESSAGE"] for one in found] == ["nbdnfs: swap0: the server is away", "nbdnfs: there is no file"]
    assert {(one["PRIORITY"], one["MESSAGE_ID"]) for one in found} == {("4", events.COMPLAINT)}
    with pytest.raises(BlockingIOError):
        journal.entry()
    opened.close()


@pytest.mark.parametrize(("state", "priority"), [("attach", "7"), (Records.STOLEN, "2")])
def test_steps(
    journal: FakeJournal, records: Records, capfd: pytest.CaptureFixture[str], state: str, priority: str
) -> None:
    """Each step is an entry for who asks for it, and a theft one that is seen; on stderr there is none."""
    opened = journal.open()
    Reporter(records, Notifier({}), opened).state(state)
    found = journal.entry()
    assert (found["NBDNFS_STATE"], found["PRIORITY"], found["MESSAGE_ID"]) == (state, priority, events.STEP)
    Reporter(records, Notifier({})).state(state)
    assert capfd.readouterr().err == ""
    opened.close()


def test_words_cannot_be_fields(journal: FakeJournal, records: Records) -> None:
    """What a server or a file name brings stays within its value, and fits into a datagram."""
    opened = journal.open()
    Reporter(records, Notifier({}), opened).say("a\nMESSAGE_ID=b\n_PID=1", address="x\n\n.SIZE" + "y" * 100_000)
    found = journal.entry()
    assert found["MESSAGE"] == "nbdnfs: swap0: a MESSAGE_ID=b _PID=1"
    assert found["NBDNFS_ADDRESS"].startswith("x  .SIZEyy")
    assert set(found) == {
        *("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "NBDNFS_NAME", "NBDNFS_VERSION", "NBDNFS_ADDRESS"),
    }
    opened.close()


def test_a_full_journal(journal: FakeJournal, records: Records, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing waits for it: while its socket takes no more, lines go to stderr."""
    opened = journal.open()
    reporter = Reporter(records, Notifier({}), opened)
    said = 0
    while not capfd.readouterr().err:
        reporter.say(f"line {said}")
        said += 1
        assert said < 100_000
    taken = 0
    while True:
        try:
            assert journal.entry()["MESSAGE"] == f"nbdnfs: swap0: line {taken}"
        except BlockingIOError:
            break
        taken += 1
    assert taken == said - 1
    reporter.say("back")
    assert journal.entry()["MESSAGE"] == "nbdnfs: swap0: back"
    opened.close()


def test_a_journal_that_is_gone(journal: FakeJournal, records: Records, capfd: pytest.CaptureFixture[str]) -> None:
    """The line goes to stderr; a new journal at the same path gets the next one."""
    opened = journal.open()
    reporter = Reporter(records, Notifier({}), opened)
    os.unlink(journal.path)
    reporter.say("one")
    assert capfd.readouterr().err == "nbdnfs: swap0: one\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as new:
        new.bind(journal.path)
        reporter.say("two")
        assert b"MESSAGE=nbdnfs: swap0: two\n" in new.recv(4096)
    assert capfd.readouterr().err == ""
    opened.close()


@pytest.mark.parametrize("stream", [None, "", "1:2", "x"])
def test_stderr_that_is_not_the_journal(
    journal: FakeJournal, records: Records, capfd: pytest.CaptureFixture[str], stream: str | None
) -> None:
    """By hand, or with the variable of a unit that a shell has inherited: the line is where the caller looks."""
    opened = Journal({} if stream is None else {"JOURNAL_STREAM": stream}, path=journal.path, stderr=journal.stderr)
    assert not opened.is_enabled
    Reporter(records, Notifier({}), opened).say("hello", events.SWAP_ON)
    assert capfd.readouterr().err == "nbdnfs: swap0: hello\n"
    assert not opened.send(MESSAGE="hello")
    with pytest.raises(BlockingIOError):
        journal.entry()
    opened.close()


def test_ids_are_documented() -> None:
    """Each is 128 bits of its own, and in docs/monitoring.md, which has no others."""
    text = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
    assert all(re.fullmatch(r"[0-9a-f]{32}", value) for value in IDS.values())
    assert len(set(IDS.values())) == len(IDS)
    assert set(re.findall(r"\b[0-9a-f]{32}\b", text)) == set(IDS.values())


def test_ids_stay() -> None:
    """Somebody searches for them: an id that changes is a break of what is promised."""
    assert (events.SWAP_ON, events.WORKER_ENDED, events.WORKER_SERVES) == (
        "de739658d6bb453981f8c38cf89d7b9e",
        "27f36e86911146a48c20758788a8faa8",
        "48ad2ebfa2bb4bcdb567fc08b32064db",
    )
