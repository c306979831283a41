# SPDX-License-Identifier: LGPL-2.1-or-later
"""Single answers that the hostile run found: each is given once, and the request that got it ends well all the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from support.engines import PAGE, read_pages
from support.fake_nas import FakeNas, NasCall
from support.nfs_server import LOOPBACK
from support.sunrpc import record, u32
from support.waiting import DEADLINE_S, in_background

from hostile.run import client_process
from nbdnfs.engine import Engine

RESULTS = 24  # where the results begin in a reply
CONTENT = os.urandom(64 * PAGE)
PATH = "/export/swap"
OPTIONS: dict[str, Any] = {"region_pages": 256, "read_ahead_pages": 0, "silence_ms": 300, "connect_timeout_s": 1}


@pytest.fixture
def nas() -> Iterator[FakeNas]:
    with FakeNas() as nas:
        nas.add(PATH, CONTENT)
        yield nas


@pytest.fixture
def engine(nas: FakeNas) -> Iterator[Engine]:
    engine = Engine(nas.url(PATH), LOOPBACK, **OPTIONS)
    yield engine
    in_background(engine.close).result(DEADLINE_S)


def answer_once(nas: FakeNas, op: str, word: int, change: bytes, *, ends: bool) -> None:
    """In the next answer to `op`, `change` stands from a word of the results on; `ends`: and then nothing."""
    at = RESULTS + 4 * word

    def changed(call: NasCall, message: bytes) -> bytes | None:
        if call.op != op or len(message) < at + len(change):
            return None
        nas.mutate(None)
        return record(message[:at] + change + (b"" if ends else message[at + len(change) :]))

    nas.mutate(changed)


@pytest.mark.parametrize("status", [3, 64, 77, 10009, 1 << 31, 0xFFFF_FFFF])
def test_a_status_that_there_is_not(nas: FakeNas, engine: Engine, status: int) -> None:
    """No nfsstat3 has this number: it says nothing about the file, and is no error to the reader."""
    answer_once(nas, "READ", 0, u32(status, 0), ends=True)
    assert in_background(read_pages, engine, 5).result(DEADLINE_S) == CONTENT[5 * PAGE : 6 * PAGE]


@pytest.mark.parametrize("page", [5, 63])
@pytest.mark.parametrize("word", [23, 25])
@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE + 1, 0xFFFF_FFFF])
def test_a_count_that_is_not_the_datas(nas: FakeNas, engine: Engine, page: int, word: int, count: int) -> None:
    """RFC 1813, 3.3.6: `count` is the number of bytes in `data`. Neither is to be believed then, nor that it was the
    end of the file, where the last page is."""
    answer_once(nas, "READ", word, u32(count), ends=False)
    assert in_background(read_pages, engine, page).result(DEADLINE_S) == CONTENT[page * PAGE : (page + 1) * PAGE]


def test_an_end_that_is_not_the_files(nas: FakeNas, engine: Engine) -> None:
    """The answer to another READ, well-formed, shorter, and at the end of the file: it is asked again."""
    results: list[bytes] = []

    def changed(call: NasCall, message: bytes) -> bytes | None:
        if call.op != "READ":
            return None
        if not results:
            results.append(message[RESULTS:])
            return None
        nas.mutate(None)
        return record(message[:RESULTS] + results[0])

    nas.mutate(changed)
    assert in_background(read_pages, engine, 63).result(DEADLINE_S) == CONTENT[63 * PAGE :]
    assert in_background(read_pages, engine, 8, 8).result(DEADLINE_S) == CONTENT[8 * PAGE : 16 * PAGE]


@pytest.mark.parametrize("op", ["LOOKUP", "FSINFO", "GETATTR", "ACCESS", "MNT"])
@pytest.mark.parametrize("word", [0, 1, 2, 10])
def test_stale_handles_and_lengths_without_end(nas: FakeNas, op: str, word: int) -> None:
    """What is asked when the handle is stale is not libnfs's to parse: it allocates whatever a length says.

    The engine is in a process of its own, which may crash.
    """
    task = {"phase": "read", "url": nas.url(PATH), "page": 5, "options": OPTIONS}
    with client_process(task) as client:
        assert client.line(DEADLINE_S) == "open", client.said()
        answer_once(nas, op, word, u32(0xFFFF_FFF0), ends=False)
        nas.expire_handles()
        client.say("read")
        assert client.line(DEADLINE_S) == CONTENT[5 * PAGE : 6 * PAGE].hex(), client.said()
