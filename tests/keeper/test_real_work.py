# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the keeper's helpers are asked to do, and that the keeper prints what they print."""

from __future__ import annotations

import sys

import pytest
from support.waiting import wait_until

from nbdnfs.config import Config
from nbdnfs.keeper.helper_process import HelperProcess
from nbdnfs.keeper.real_work import RealWork, has_loop, plugin_settings

# finds nbdkit
pytestmark = pytest.mark.server

URL = "nfs://nas/export/a.swap"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The arguments of the helpers, which are not started."""
    arguments: list[tuple[str, ...]] = []
    monkeypatch.setattr(RealWork, "_answering", lambda self, *words, status="": arguments.append(words))
    return arguments


@pytest.mark.parametrize(("settings", "encrypt"), [({}, "1"), ({"encrypt": False}, "0")])
def test_pages_are_encrypted_unless_that_is_not_wanted(settings: dict[str, bool], encrypt: str) -> None:
    """What the worker is told."""
    assert plugin_settings(Config("swap0", URL, owner=False, **settings), URL, "192.0.2.1")["encrypt"] == encrypt


@pytest.mark.parametrize(
    ("configured", "processors", "attached_kib", "found"),
    [
        (None, 1, None, True),
        (None, 1, 128, True),
        (None, 2, None, False),
        (False, 1, None, False),
        (True, 2, None, True),
        (True, 2, 1024, True),
        (True, 2, 1028, False),
        (None, 1, 4096, False),
    ],
)
def test_loop(*, configured: bool | None, processors: int, attached_kib: int | None, found: bool) -> None:
    """By itself on one processor; never for a device that sends requests that are too large for it."""
    settings = Config("swap0", URL, loop=configured)
    assert has_loop(settings, processors=processors, attached_kib=attached_kib) is found


def test_a_new_file_only_after_a_while(asked: list[tuple[str, ...]]) -> None:
    """At boot it must have been missing for long; otherwise it is created at once."""
    settings = Config("swap0", URL, size_bytes=1 << 20, owner=False)
    for new_file_after_s in (150.0, 0.0):
        RealWork(settings, URL, "192.0.2.1", new_file_after_s=new_file_after_s).provision()
    assert [words[3:] for words in asked] == [
        ("--wait", "--size=1048576", "--new-file-after=150s"),
        ("--wait", "--size=1048576", "--new-file-after=0s"),
    ]


def test_the_file_is_looked_for_in_any_case(asked: list[tuple[str, ...]]) -> None:
    """Also where it is neither to be created nor to be claimed."""
    RealWork(Config("swap0", URL, owner=False), URL, "192.0.2.1").provision()
    RealWork(Config("swap0", URL), URL, "192.0.2.1").provision()
    assert asked == [("nbdnfs", "claim", URL, "--wait"), ("nbdnfs", "claim", URL, "--wait", "--holder=keeper:swap0")]


def run(program: str) -> tuple[list[str], HelperProcess]:
    helper = HelperProcess([sys.executable, "-c", program], {})
    lines: list[str] = []

    def has_ended() -> bool:
        is_over = helper.status() is not None
        lines.extend(helper.lines())
        return is_over

    wait_until(has_ended, what="the helper ends", timeout_s=30)
    return lines, helper


def test_what_a_helper_prints() -> None:
    """Both streams, in whole lines, whatever bytes they have; of an error, the line that says what is wrong."""
    lines, helper = run(
        "import os; os.write(2, b'nbdnfs: 10%\\nnbdnfs: there is no f\\xff'); os.write(1, b'ile\\nnbdnfs: create it')"
    )
    assert lines == ["nbdnfs: 10%", "nbdnfs: there is no f\ufffdile", "nbdnfs: create it"]
    assert helper.error_line == lines[1]
    assert helper.descriptors() == []


def test_a_helper_that_leaves_a_process_behind() -> None:
    """What holds the pipe is not waited for."""
    lines, helper = run("import os; os.fork() or os.execv('/bin/sleep', ['sleep', '5']); print('done')")
    assert lines == ["done"]
    assert helper.descriptors() == []
