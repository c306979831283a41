# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every engine promises, shown on each against a real server, over each NFS version that its libnfs does.

An engine owns its file while it is open: tests look at the file after a flush, and change it before they open.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import second_reader
from support.nfs_server import LOOPBACK, Ganesha

from nbdnfs import engine
from nbdnfs.errors import ConfigError
from nbdnfs.worker import reference_engine

PAGE = 4096
MIB = 1 << 20
SIZE = 16 * MIB


def over_libnfs(url: str, address: str) -> engine.Engine:
    """One that makes its transfers over NFSv3 through libnfs, as it does where a server's answers are unusual."""
    return engine.Engine(url, address, transport="libnfs")


def encrypted(url: str, address: str) -> engine.Engine:
    """One whose pages are encrypted on the server, with a region so small that most are read from there."""
    return engine.Engine(url, address, encrypt=True, region_pages=256)


ENGINES: dict[str, Callable[[str, str], engine.Engine | reference_engine.Engine]] = {
    "c": engine.Engine,
    "c-over-libnfs": over_libnfs,
    "c-encrypted": encrypted,
    "libnfs-python": reference_engine.Engine,
}
IS_REFERENCE_POSSIBLE = sys.version_info < (3, 12)
# libnfs 4.0 cannot write over NFSv4; that it is refused is a test of the messages
VERSIONS = (3, 4) if int(engine.libnfs_version.split(".")[0]) >= 5 else (3,)
COMBINATIONS = [
    (name, version)
    for name in ENGINES
    if name != "libnfs-python" or IS_REFERENCE_POSSIBLE
    for version in VERSIONS
    if name != "c-over-libnfs" or version == 3  # over NFSv4 there is no other way
]


class Device:
    """An engine and the file behind it."""

    def __init__(
        self, kind: Callable[[str, str], engine.Engine | reference_engine.Engine], url: str, path: Path
    ) -> None:
        self.engine = kind(url, LOOPBACK)
        self.url = url
        self.path = path
        self.before = path.read_bytes()
        self.is_encrypted = isinstance(self.engine, engine.Engine) and self.engine.is_encrypted
        if self.is_encrypted:  # only what it has written means anything to it
            self.engine.pwrite(self.before, 0)

    def read(self, offset: int, length: int) -> bytes:
        """Through the engine."""
        buffer = bytearray(length)
        self.engine.pread(buffer, offset)
        return bytes(buffer)

    def file(self) -> bytes:
        """The file behind the server's back, after a flush. Where it is encrypted, the device: it is not readable."""
        self.engine.flush()
        if not self.is_encrypted:
            return self.path.read_bytes()
        return self.read(0, SIZE)


_numbers = itertools.count()


@contextlib.contextmanager
def new_device(server: Ganesha, name: str, version: int) -> Iterator[Device]:
    """A device over a file of random bytes."""
    path = server.export_path / f"conformance-{next(_numbers)}"
    path.write_bytes(os.urandom(SIZE))
    device = Device(ENGINES[name], server.url(path.name, version), path)
    yield device
    device.engine.close()
    path.unlink()


def each_engine(combinations: list[tuple[str, int]] = COMBINATIONS, **options: str) -> Callable[..., Any]:
    return pytest.fixture(params=combinations, ids=lambda pair: f"{pair[0]}-nfsv{pair[1]}", **options)


@each_engine(scope="module")
def device(request: pytest.FixtureRequest, ganesha: Ganesha) -> Iterator[Device]:
    """One device for all tests of a combination; each puts in what it needs."""
    with new_device(ganesha, *request.param) as device:
        yield device


@each_engine([pair for pair in COMBINATIONS if pair[0] != "c-encrypted"], scope="module")
def plain_device(request: pytest.FixtureRequest, ganesha: Ganesha) -> Iterator[Device]:
    """One whose file can be read."""
    with new_device(ganesha, *request.param) as device:
        yield device


@each_engine()
def fresh_device(request: pytest.FixtureRequest, ganesha: Ganesha) -> Iterator[Device]:
    """One that has done nothing yet."""
    with new_device(ganesha, *request.param) as device:
        yield device


def test_size_is_that_of_the_file(device: Device) -> None:
    """In bytes."""
    assert device.engine.size_bytes == device.path.stat().st_size == SIZE


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, PAGE), (SIZE - PAGE, PAGE), (PAGE, 3 * PAGE), (MIB - PAGE, 2 * PAGE), (5 * MIB, 8 * MIB), (0, SIZE)],
)
def test_reads_what_the_file_holds(fresh_device: Device, offset: int, length: int) -> None:
    """One page, the last one, across the server's largest transfer, many transfers, everything."""
    expected = fresh_device.before[offset : offset + length]
    assert fresh_device.read(offset, length) == expected
    assert fresh_device.read(offset, length) == expected


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, PAGE), (SIZE - PAGE, PAGE), (PAGE, 3 * PAGE), (MIB - PAGE, 2 * PAGE), (5 * MIB, 8 * MIB), (0, SIZE)],
)
def test_writes_into_the_file(device: Device, offset: int, length: int) -> None:
    """After a flush the file has the bytes where they belong, every other byte is as it was, and so is its size."""
    expected = bytearray(device.file())
    expected[offset : offset + length] = data = os.urandom(length)
    device.engine.pwrite(data, offset)
    assert device.file() == expected
    assert device.read(offset, length) == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_takes_any_buffer(device: Device, kind: Callable[[bytes], bytes]) -> None:
    """Writes take what has the buffer protocol; reads fill a slice of something larger in place."""
    data = os.urandom(2 * PAGE)
    device.engine.pwrite(kind(data), PAGE)
    target = bytearray(4 * PAGE)
    device.engine.pread(memoryview(target)[PAGE : 3 * PAGE], PAGE)
    assert target == bytes(PAGE) + data + bytes(PAGE)


near_page_borders = st.builds(
    lambda page, delta: page * PAGE + delta,
    st.integers(-2, SIZE // PAGE + 2),
    st.sampled_from([0, 0, 1, -1, 511, 512]),
)
offsets = st.one_of(
    near_page_borders,
    st.sampled_from([2**31, 2**32, 2**63 - PAGE, 2**63, 2**64 - PAGE, 2**64, 2**64 + PAGE, -(2**64)]),
    st.integers(),
)
lengths = st.sampled_from([0, 1, 512, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 64 * 1024])


@given(offset=offsets, length=lengths)
@settings(max_examples=200, deadline=None)
def test_what_is_not_whole_pages_inside_the_device_is_einval(device: Device, offset: int, length: int) -> None:
    """Unaligned, out of range, past 64 bits, empty: EINVAL from read, write and trim. Everything else is done."""
    is_possible = length > 0 and length % PAGE == offset % PAGE == 0 and 0 <= offset <= SIZE - length
    device.engine.flush()
    before = device.path.stat()
    data = device.read(offset, length) if is_possible else bytes(length)
    for request in (
        lambda: device.engine.pread(bytearray(length), offset),
        lambda: device.engine.pwrite(data, offset),
        lambda: device.engine.trim(length, offset),
    ):
        if is_possible:
            request()
        else:
            with pytest.raises(OSError, match="Invalid argument") as caught:
                request()
            assert caught.value.errno == errno.EINVAL
    device.engine.flush()
    after = device.path.stat()
    assert after.st_size == SIZE
    assert is_possible or after.st_mtime_ns == before.st_mtime_ns


PAGES = 24  # few, so that the requests of the model meet
runs = st.integers(0, PAGES - 1).flatmap(lambda first: st.tuples(st.just(first), st.integers(1, PAGES - first)))
# What fills the first page of a write; those that follow count up. Pages of one 32-bit word are a case of their own.
words = st.tuples(st.sampled_from([4, 8]), st.integers(0, 2**31))
operations = st.one_of(
    st.tuples(st.sampled_from(["write", "write with fua"]), runs, words),
    st.tuples(st.just("read"), runs),
    st.tuples(st.just("trim"), runs),
    st.tuples(st.just("flush")),
)


class Model:
    """The device as a list of pages. None: trimmed, and not written since: it may read as anything."""

    def __init__(self, content: bytes) -> None:
        self.pages: list[bytes | None] = [content[i * PAGE : (i + 1) * PAGE] for i in range(PAGES)]

    def check(self, first: int, data: bytes) -> None:
        for number in range(len(data) // PAGE):
            expected = self.pages[first + number]
            assert expected is None or data[number * PAGE : (number + 1) * PAGE] == expected, f"page {first + number}"


@given(st.lists(operations, max_size=30))
@settings(max_examples=60, deadline=None)
def test_behaves_like_an_array_of_pages(device: Device, operations: list[tuple]) -> None:
    """Reads, writes, trims and flushes in any order, against a model; after a flush the file agrees with it too."""
    model = Model(device.read(0, PAGES * PAGE))
    for name, *arguments in operations:
        if name == "flush":
            model.check(0, device.file()[: PAGES * PAGE])
            continue
        first, count = arguments[0]
        if name == "read":
            model.check(first, device.read(first * PAGE, count * PAGE))
        elif name == "trim":
            device.engine.trim(count * PAGE, first * PAGE)
            model.pages[first : first + count] = [None] * count
        else:
            width, word = arguments[1]
            pages = [(word + number).to_bytes(width) * (PAGE // width) for number in range(count)]
            device.engine.pwrite(b"".join(pages), first * PAGE, name == "write with fua")
            model.pages[first : first + count] = pages
            if name == "write with fua" and not device.is_encrypted:
                model.check(first, device.path.read_bytes()[first * PAGE : (first + count) * PAGE])
    model.check(0, device.read(0, PAGES * PAGE))
    model.check(0, device.file()[: PAGES * PAGE])


def test_trim_keeps_the_blocks(device: Device) -> None:
    """A trimmed page still has its room on the server: a full NAS cannot take swap away."""
    device.engine.pwrite(os.urandom(SIZE), 0)
    device.engine.flush()
    before = device.path.stat()
    assert before.st_blocks * 512 >= SIZE
    device.engine.trim(SIZE, 0)
    device.engine.flush()
    after = device.path.stat()
    assert (after.st_blocks, after.st_size) == (before.st_blocks, SIZE)


def test_flush_of_nothing(device: Device) -> None:
    """It returns, and the file is as it was."""
    before = device.file()
    device.engine.flush()
    assert device.file() == before


@pytest.mark.skipif(not second_reader.IS_POSSIBLE, reason=second_reader.WHY_NOT)
def test_another_implementation_reads_the_same(plain_device: Device) -> None:
    """What the engine has written, libnfs-python's file object reads, over NFS."""
    data = os.urandom(2 * MIB)
    plain_device.engine.pwrite(data, 3 * MIB)
    plain_device.engine.flush()
    assert second_reader.read(plain_device.url, 3 * MIB, len(data)) == data


def test_the_reference_engine_is_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.12 and later it ends with a line that says which Python it needs and what to use instead."""
    if IS_REFERENCE_POSSIBLE:
        monkeypatch.setattr(reference_engine, "sys", types.SimpleNamespace(version_info=(3, 13, 5)))
    with pytest.raises(ConfigError, match=r"needs Python 3\.11, this is 3\.1\d$") as caught:
        reference_engine.Engine("nfs://nas/export/swap", LOOPBACK)
    assert caught.value.hint == "use the standard engine: engine=c"
