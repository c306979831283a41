# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker that takes over a region knows the file as the one before it did: by its handle, and by its bytes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator

import pytest
from support.engines import PAGE, OpenEngine, opening, read_pages, write_pages, write_pages_and_flush
from support.fake_nas import FakeNas, NasCall, Oddities
from support.sunrpc import record

from nbdnfs.engine import Engine, NfsError
from nbdnfs.region import LAST_PLACE_BYTES, LAST_PLACE_OFFSET

PAGES = 64
OPTIONS = {"region_pages": 256, "silence_ms": 300, "connect_timeout_s": 2}
# What finds a file by its name.
BY_NAME = ("MOUNT_NULL", "MNT", "EXPORT", "LOOKUP", "ACCESS")


@pytest.fixture
def region_fd() -> Iterator[int]:
    descriptor = os.memfd_create("region", os.MFD_ALLOW_SEALING)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def open_engine() -> Iterator[OpenEngine]:
    with opening(**OPTIONS) as open_it:
        yield open_it


def first_worker(nas: FakeNas, open_engine: OpenEngine, region_fd: int, path: str = "/export/swap") -> bytes:
    """Has a region with known pages, and pages that the NAS does not have. Returns what must be read from now on."""
    content = bytearray(os.urandom(PAGES * PAGE))
    nas.add(path, bytes(content))
    engine = open_engine(nas.url(path), region_fd=region_fd)
    for page in range(0, PAGES, 4):
        write_pages_and_flush(engine, page, bytes(content[page * PAGE : (page + 1) * PAGE]))
    content[PAGE : 2 * PAGE] = os.urandom(PAGE)
    nas.jukebox("WRITE")
    write_pages(engine, 1, bytes(content[PAGE : 2 * PAGE]))
    engine.close()
    nas.end_faults()
    return bytes(content)


def check(engine: Engine, content: bytes) -> None:
    """Every page, those that the last worker left included; they reach the NAS."""
    for page in range(PAGES):
        assert read_pages(engine, page) == content[page * PAGE : (page + 1) * PAGE], page
    engine.flush()


@pytest.mark.parametrize("connections", [1, 4])
def test_mountd_is_dead(open_engine: OpenEngine, region_fd: int, connections: int) -> None:
    """The handle outlives the worker: nothing is asked for by its name."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        nas.stop_mountd()
        before = len(nas.calls(*BY_NAME))
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd, connections=connections), content)
        assert len(nas.calls(*BY_NAME)) == before
        assert nas.content("/export/swap") == content


def test_the_file_has_another_name(open_engine: OpenEngine, region_fd: int) -> None:
    """It is the same file."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        with nas.files() as tree:
            folder = tree.make_directories("/export")
            tree.rename(folder, "swap", folder, "moved")
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd), content)
        assert nas.content("/export/moved") == content


@pytest.mark.parametrize("folder", ["/export", "/export/a/b"])
@pytest.mark.parametrize("alive", [True, False], ids=["while a worker ran", "between two workers"])
def test_the_server_numbers_its_files_again(
    open_engine: OpenEngine, region_fd: int, folder: str, *, alive: bool
) -> None:
    """As FUSE file systems do at a boot: the bytes decide, for this worker and each one after it."""
    path = f"{folder}/swap"
    with FakeNas(Oddities(new_fileids=True, new_handles=True, new_fsid=True)) as nas:
        content = first_worker(nas, open_engine, region_fd, path)
        if alive:
            engine = open_engine(nas.url(path), region_fd=region_fd)
            nas.restart()
            check(engine, content)
            engine.close()
        else:
            nas.restart()
        for _ in range(2):
            engine = open_engine(nas.url(path), region_fd=region_fd)
            check(engine, content)
            engine.close()
        nas.stop_mountd()
        check(open_engine(nas.url(path), region_fd=region_fd), content)


def make_again(nas: FakeNas, content: bytes, *, same_number: bool) -> None:
    """Remove the file and make another under its name, with its number or without."""
    with nas.files() as tree:
        parent, old = tree.find("/export"), tree.find("/export/swap")
        assert parent is not None
        assert old is not None
        number = old.fileid
        tree.remove(parent, "swap")
        node = tree.add("/export/swap", content)
        if same_number:
            node.fileid = number


@pytest.mark.parametrize("same_number", [True, False])
def test_another_file_has_the_name(open_engine: OpenEngine, region_fd: int, *, same_number: bool) -> None:
    """Also one that has been given the number of the old one: it is refused, and not written to."""
    with FakeNas() as nas:
        first_worker(nas, open_engine, region_fd)
        other = os.urandom(PAGES * PAGE)
        make_again(nas, other, same_number=same_number)
        with pytest.raises(NfsError, match="belongs to another backing file") as caught:
            open_engine(nas.url("/export/swap"), region_fd=region_fd)
        assert caught.value.errno == errno.EINVAL
        assert nas.content("/export/swap") == other


@pytest.mark.parametrize("same_number", [True, False])
def test_zeros_recognise_no_file(open_engine: OpenEngine, region_fd: int, *, same_number: bool) -> None:
    """A new file has zeros where the old one had: the pages with something in them decide."""
    with FakeNas() as nas:
        nas.add("/export/swap", os.urandom(PAGES * PAGE))
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd)
        for page in range(PAGES):
            write_pages(engine, page, os.urandom(PAGE) if page == PAGES // 2 + 1 else bytes(PAGE))
        engine.flush()
        engine.close()
        make_again(nas, bytes(PAGES * PAGE), same_number=same_number)
        with pytest.raises(NfsError, match="belongs to another backing file"):
            open_engine(nas.url("/export/swap"), region_fd=region_fd)
        assert nas.content("/export/swap") == bytes(PAGES * PAGE)


def test_the_file_was_truncated(open_engine: OpenEngine, region_fd: int) -> None:
    with FakeNas() as nas:
        first_worker(nas, open_engine, region_fd)
        with nas.files() as tree:
            node = tree.find("/export/swap")
            assert node is not None
            node.resize((PAGES - 1) * PAGE)
        with pytest.raises(NfsError, match="belongs to another backing file"):
            open_engine(nas.url("/export/swap"), region_fd=region_fd)


@pytest.mark.parametrize("status", [5, 13, 22], ids=["IO", "ACCES", "INVAL"])
def test_a_server_that_does_not_take_the_handle(open_engine: OpenEngine, region_fd: int, status: int) -> None:
    """Another server may be behind the address, with the same files: the file is opened by its name."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        nas.fail("GETATTR", status, times=1)
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd), content)
        assert nas.struck("GETATTR")


def test_a_server_that_is_away(open_engine: OpenEngine, region_fd: int) -> None:
    """The next worker does not start, and says that nothing answers; the one after it goes on."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        nas.stop()
        with pytest.raises(NfsError) as caught:
            open_engine(nas.url("/export/swap"), region_fd=region_fd)
        assert caught.value.errno in (errno.ECONNREFUSED, errno.ENXIO)
        nas.start()
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd), content)


def test_a_region_of_a_version_that_kept_nothing(open_engine: OpenEngine, region_fd: int) -> None:
    """There are zeros: the file is opened by its name, and kept for the next worker."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        os.pwrite(region_fd, bytes(2 * LAST_PLACE_BYTES), LAST_PLACE_OFFSET)
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd)
        engine.close()
        nas.stop_mountd()
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd), content)


def test_a_worker_that_was_killed_while_it_kept_the_place(open_engine: OpenEngine, region_fd: int) -> None:
    """The older one counts: the file has had other numbers since, and is recognised by its bytes."""
    with FakeNas(Oddities(new_fileids=True, new_handles=True)) as nas:
        content = first_worker(nas, open_engine, region_fd)
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd)
        nas.restart()
        check(engine, content)
        engine.close()
        places = [os.pread(region_fd, LAST_PLACE_BYTES, LAST_PLACE_OFFSET + at) for at in (0, LAST_PLACE_BYTES)]
        numbers = [int.from_bytes(place[8:16], sys.byteorder) for place in places]
        assert min(numbers) > 0
        newer = numbers.index(max(numbers))
        at = LAST_PLACE_OFFSET + newer * LAST_PLACE_BYTES
        for damaged in range(0, LAST_PLACE_BYTES - 8, 16):
            byte = bytes([places[newer][damaged] ^ 1])
            os.pwrite(region_fd, byte, at + damaged)
            engine = open_engine(nas.url("/export/swap"), region_fd=region_fd)
            check(engine, content)
            engine.close()
            os.pwrite(region_fd, places[newer], at)


def test_a_page_that_is_read_wrong(open_engine: OpenEngine, region_fd: int) -> None:
    """One wrong answer to the only page that is known does not make it another file."""
    with FakeNas(Oddities(new_handles=True)) as nas:
        content = os.urandom(PAGES * PAGE)
        nas.add("/export/swap", content)
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd)
        write_pages_and_flush(engine, 9, content[9 * PAGE : 10 * PAGE])
        engine.close()
        nas.restart()
        wrong = []

        def change(call: NasCall, message: bytes) -> bytes | None:
            if call.op != "READ" or wrong:
                return None
            wrong.append(call)
            return record(message[:-1] + bytes([message[-1] ^ 1]))

        nas.mutate(change)
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd)
        assert wrong
        assert read_pages(engine, 9) == content[9 * PAGE : 10 * PAGE]
