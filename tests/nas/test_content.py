# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file is taken for by a look at some places of it."""

from __future__ import annotations

import pytest
from support import fake_files
from support.fake_files import URL, FakeServer

from nbdnfs.engine import NfsFile
from nbdnfs.nas import content, remote_file
from nbdnfs.nas.content import Kind

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """As fake_files.install."""
    return fake_files.install(monkeypatch)


def opened(server: FakeServer, data: bytes) -> NfsFile:
    """A file with that content, open."""
    server.add("swap0", data)
    return remote_file.open_file(URL, "192.0.2.1", read_only=True)


@pytest.mark.parametrize("size_bytes", [0, 512, PAGE, MIB, 40 * MIB])
def test_a_new_file_is_empty(server: FakeServer, size_bytes: int) -> None:
    """Whatever its size."""
    assert content.look(opened(server, bytes(size_bytes))).kind is Kind.EMPTY


@pytest.mark.parametrize("offset", [1, 65535, 65536, MIB - 1, 20 * MIB, 39 * MIB, 40 * MIB - 1])
def test_data_at_either_end_and_in_the_middle(server: FakeServer, offset: int) -> None:
    """One byte there, and it is something else; what the message says of it begins with the page or the head."""
    data = bytearray(40 * MIB)
    data[offset] = 1
    data[20 * MIB : 21 * MIB] = b"\1" * MIB if offset == 20 * MIB else bytes(MIB)
    found = content.look(opened(server, bytes(data)))
    assert found.kind is Kind.OTHER
    assert found.why_not.startswith("begins with neither" if offset < 65536 else "has no swap area, and has data at")


def test_a_swap_area_may_be_followed_by_anything(server: FakeServer) -> None:
    """What is swapped out."""
    head = bytes(1024) + b"\1\0\0\0" + bytes(PAGE - 1024 - 4 - 10) + b"SWAPSPACE2"
    found = content.look(opened(server, head + b"\1" * MIB))
    assert (found.kind, found.size_bytes, found.head[:PAGE]) == (Kind.SWAP, PAGE + MIB, head)


def test_a_luks_header_is_a_kind_of_its_own(server: FakeServer) -> None:
    """Neither swap nor something else."""
    assert content.look(opened(server, b"LUKS\xba\xbe" + b"\1" * MIB)).kind is Kind.LUKS


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ("", []),
        ("00", [(PAGE, 3 * PAGE)]),
        ("11", []),
        ("0110", [(PAGE, 2 * PAGE), (4 * PAGE, 5 * PAGE)]),
        ("101", [(2 * PAGE, 3 * PAGE)]),
    ],
)
def test_gaps(server: FakeServer, pages: str, expected: list[tuple[int, int]]) -> None:
    """Runs of pages that have nothing but zeros, counted from where the range starts."""
    data = b"x" * PAGE + b"".join(bytes(PAGE - 1) + bytes([int(page)]) for page in pages)
    assert list(content.gaps(opened(server, data), PAGE, len(data))) == expected
