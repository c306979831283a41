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
from support.fake_nfs import NFS3ERR_IO, NFS3ERR_JUKEBOX
from support.nfs_server import LOOPBACK
from support.sunrpc import record, u32
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs import nfs_url
from nbdnfs.commands.file_in_use import crc32c
from nbdnfs.engine import Engine, NfsError
from nbdnfs.nas.explain import open_error
from nbdnfs.region import FILE_REPLACED, LAST_PLACE_BYTES, LAST_PLACE_OFFSET

PAGES = 64
OPTIONS = {"region_pages": 256, "silence_ms": 300, "connect_timeout_s": 2}
# How pages travel: over a wire the file is known by its handle, over libnfs (as with NFSv4) it is opened by its name.
BOTH_TRANSPORTS = pytest.mark.parametrize("transport", ["wire", "libnfs"])
# What finds a file by its name.
BY_NAME = ("MOUNT_NULL", "MNT", "EXPORT", "LOOKUP", "ACCESS")


@pytest.fixture
def open_engine() -> Iterator[OpenEngine]:
    with opening(**OPTIONS) as open_it:
        yield open_it


def first_worker(
    nas: FakeNas, open_engine: OpenEngine, region_fd: int, path: str = "/export/swap", transport: str = "wire"
) -> bytes:
    """Has a region with known pages, and pages that the NAS does not have. Returns what must be read from now on."""
    content = bytearray(os.urandom(PAGES * PAGE))
    nas.add(path, bytes(content))
    engine = open_engine(nas.url(path), region_fd=region_fd, transport=transport)
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


def patch_place(region_fd: int, changes: dict[int, bytes]) -> None:
    """Change the newest place that was kept, which stays whole. Offsets are of struct nfsio_known."""
    at = max(
        (LAST_PLACE_OFFSET, LAST_PLACE_OFFSET + LAST_PLACE_BYTES),
        key=lambda offset: int.from_bytes(os.pread(region_fd, 8, offset + 8), sys.byteorder),
    )
    place = bytearray(os.pread(region_fd, LAST_PLACE_BYTES, at))
    for offset, data in changes.items():
        place[16 + offset : 16 + offset + len(data)] = data
    place[:4] = crc32c(bytes(place[4:])).to_bytes(4, sys.byteorder)
    os.pwrite(region_fd, place, at)


_FILE = 32  # struct nfsio_handle: its length, and 64 bytes
_DIRECTORY = _FILE + 68


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {_FILE: (65).to_bytes(4, sys.byteorder)},
        {_FILE: b"\xff" * 4},
        {_DIRECTORY: (65).to_bytes(4, sys.byteorder)},
        {28: bytes(4)},  # mount_bytes
        {28: (1000).to_bytes(4, sys.byteorder)},
    ],
    ids=str,
)
def test_a_place_that_cannot_be(open_engine: OpenEngine, region_fd: int, changes: dict[int, bytes]) -> None:
    """It is whole, and says what no worker says: the file is looked for by its name. A whole one that is right is
    believed."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        patch_place(region_fd, changes)
        before = len(nas.calls("MNT"))
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd), content)
        assert (len(nas.calls("MNT")) > before) is bool(changes)


# An answer to READ with attributes: xid, kind, reply, verifier, status, status of NFS, attributes
_READ_HEAD = 24 + 4 + 4 + 84


@pytest.mark.parametrize("transport", ["wire", "libnfs"])
def test_a_page_that_is_read_as_nothing(open_engine: OpenEngine, transport: str) -> None:
    """As at the end of a file: it neither identifies the file nor is an error; the page is read again."""
    struck = []

    def change(call: NasCall, message: bytes) -> bytes | None:
        if call.op != "READ" or len(struck) == 1:
            return None
        struck.append(call)
        return record(message[:_READ_HEAD] + u32(0, 1, 0))

    with FakeNas(Oddities(new_fileids=True, new_handles=True, new_fsid=True)) as nas:
        content = os.urandom(PAGES * PAGE)
        nas.add("/export/swap", content)
        engine = open_engine(nas.url("/export/swap"), transport=transport)
        for page in range(0, PAGES, 4):
            write_pages_and_flush(engine, page, content[page * PAGE : (page + 1) * PAGE])
        nas.mutate(change)
        nas.restart()
        check(engine, content)
        assert len(struck) == 1


@pytest.mark.parametrize("bytes_each", [512, 1000, 4096, 5000])
def test_a_server_that_moves_little(open_engine: OpenEngine, region_fd: int, bytes_each: int) -> None:
    """Less than a page in each READ and WRITE, and more before: libnfs would not mount it, and swap goes on."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        nas.become(Oddities(rtmax=bytes_each, wtmax=bytes_each))
        before = len(nas.calls("READ", "WRITE"))
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd)
        check(engine, content)
        assert nas.content("/export/swap") == content
        assert max(call.count for call in nas.calls("READ", "WRITE")[before:]) <= bytes_each


def test_a_shorter_file_has_the_name(open_engine: OpenEngine, region_fd: int) -> None:
    """It is not the file, whatever its bytes are, and it is not written to."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd)
        shorter = content[: 60 * PAGE]
        make_again(nas, shorter, same_number=True)
        reading = in_background(read_pages, engine, 62)
        wait_until(lambda: engine.counters()["file_state"] == FILE_REPLACED, "it is another file")
        assert not reading.done()
        assert nas.content("/export/swap") == shorter
        make_again(nas, content, same_number=False)
        assert reading.result(DEADLINE_S) == content[62 * PAGE : 63 * PAGE]


@pytest.mark.parametrize("kind", [2, 5])
def test_a_handle_that_is_a_directory_once(open_engine: OpenEngine, kind: int) -> None:
    """Over a new connection, for one answer: the file is looked for by its name, and is the same."""
    struck = []

    def change(call: NasCall, message: bytes) -> bytes | None:
        if call.op != "GETATTR" or struck:
            return None
        struck.append(call)
        return record(message[:28] + u32(kind) + message[32:])

    with FakeNas() as nas:
        content = os.urandom(PAGES * PAGE)
        nas.add("/export/swap", content)
        engine = open_engine(nas.url("/export/swap"))
        nas.mutate(change)
        nas.disconnect()
        check(engine, content)
        assert struck
        assert len(nas.calls("LOOKUP")) >= 2


@pytest.mark.parametrize("old", ["wire", "libnfs"])
@pytest.mark.parametrize("new", ["wire", "libnfs"])
@pytest.mark.parametrize("kept", [True, False], ids=["place kept", "no place kept"])
def test_the_server_numbers_its_files_again_for_any_next_worker(
    open_engine: OpenEngine, region_fd: int, old: str, new: str, *, kept: bool
) -> None:
    """Whatever way to the file this worker and the last one use, and however little the server moves at once."""
    with FakeNas(Oddities(new_fileids=True, new_handles=True, new_fsid=True, shortest_bytes=512)) as nas:
        content = first_worker(nas, open_engine, region_fd, transport=old)
        if not kept:
            forget_place(region_fd)
        nas.restart()
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=new), content)
        assert nas.content("/export/swap") == content


@BOTH_TRANSPORTS
def test_a_file_that_nothing_has_changed(open_engine: OpenEngine, region_fd: int, transport: str) -> None:
    """It is known by its handle: no page of it is compared, so a NAS that has lost what it had is still this file."""
    with FakeNas() as nas:
        content = os.urandom(PAGES * PAGE)
        nas.add("/export/swap", content)
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=transport)
        for page in range(PAGES):
            write_pages(engine, page, content[page * PAGE : (page + 1) * PAGE])
        engine.flush()
        engine.close()
        before = len(nas.calls("READ"))
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=transport)
        assert len(nas.calls("READ")) == before
        check(engine, content)


@pytest.mark.parametrize("fault", ["none", "refused", "wrong"])
def test_the_server_numbers_its_files_again_under_libnfs(open_engine: OpenEngine, fault: str) -> None:
    """While a worker runs that has its pages from libnfs: the bytes decide, also where the first page that is asked for
    is refused, or is read wrong once."""
    struck = []

    def change(call: NasCall, message: bytes) -> bytes | None:
        if call.op != "READ" or struck:
            return None
        struck.append(call)
        return record(message[:-1] + bytes([message[-1] ^ 1]))

    with FakeNas(Oddities(new_fileids=True, new_handles=True, new_fsid=True)) as nas:
        content = os.urandom(PAGES * PAGE)
        nas.add("/export/swap", content)
        engine = open_engine(nas.url("/export/swap"), transport="libnfs")
        for page in range(0, PAGES, 4):
            write_pages_and_flush(engine, page, content[page * PAGE : (page + 1) * PAGE])
        before = len(nas.calls("READ"))
        if fault == "refused":
            nas.fail("READ", NFS3ERR_IO, times=1)
        elif fault == "wrong":
            nas.mutate(change)
        nas.restart()
        check(engine, content)
        assert len(nas.calls("READ")) > before + PAGES - PAGES // 4, "more than the pages that it has not kept"
        assert nas.struck("READ")
        assert bool(struck) is (fault == "wrong")


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


@BOTH_TRANSPORTS
@pytest.mark.parametrize("kept", [True, False], ids=["place kept", "no place kept"])
@pytest.mark.parametrize("same_number", [True, False])
def test_another_file_has_the_name(
    open_engine: OpenEngine, region_fd: int, transport: str, *, kept: bool, same_number: bool
) -> None:
    """Also one that has been given the number of the old one: it is refused, and not written to."""
    with FakeNas() as nas:
        first_worker(nas, open_engine, region_fd, transport=transport)
        other = os.urandom(PAGES * PAGE)
        make_again(nas, other, same_number=same_number)
        if not kept:
            forget_place(region_fd)
        with pytest.raises(NfsError, match="belongs to another backing file") as caught:
            open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=transport)
        assert caught.value.errno == errno.EINVAL
        said = open_error(caught.value, nfs_url.parse(nas.url("/export/swap")), LOOPBACK)
        assert said.hint == (
            "put the file that the device was started with under this name again, with the size that it had"
        )
        assert nas.content("/export/swap") == other


def test_another_file_before_the_second_connection(open_engine: OpenEngine) -> None:
    """Over libnfs each connection opens the file by name: if they find different files, opening the engine fails."""
    with FakeNas() as nas:
        nas.add("/export/swap", bytes(PAGES * PAGE))
        mounts = []

        def change(call: NasCall, _message: bytes) -> bytes | None:
            if call.op == "MNT":
                mounts.append(call)
                if len(mounts) == 2:
                    make_again(nas, bytes(PAGES * PAGE), same_number=False)
            return None

        nas.mutate(change)
        with pytest.raises(NfsError, match="another file was given its name while it was opened") as caught:
            open_engine(nas.url("/export/swap"), transport="libnfs", connections=2)
        assert caught.value.errno == errno.EAGAIN, "the next try finds one file"
        said = open_error(caught.value, nfs_url.parse(nas.url("/export/swap")), LOOPBACK)
        assert said.hint == "try again when the file is no longer being replaced"
        assert len(mounts) == 2


@BOTH_TRANSPORTS
@pytest.mark.parametrize("same_number", [True, False])
@pytest.mark.parametrize("status", [NFS3ERR_IO, NFS3ERR_JUKEBOX])
def test_a_page_that_cannot_be_read(
    open_engine: OpenEngine, region_fd: int, transport: str, status: int, *, same_number: bool
) -> None:
    """It may be a bad sector, and says nothing about the file: the other pages decide. One that comes later is waited
    for."""
    with FakeNas(Oddities(new_fileids=not same_number, new_handles=True)) as nas:
        content = first_worker(nas, open_engine, region_fd, transport=transport)
        nas.restart()
        nas.fail("READ", status, times=1)
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=transport), content)
        assert nas.struck("READ")


@pytest.mark.parametrize("count", [4096, 1 << 20, 0xFFFFFFFF])
def test_a_server_that_returns_more_than_is_missing(open_engine: OpenEngine, region_fd: int, count: int) -> None:
    """A page comes in two pieces, and the second one is too long: nothing is written beyond the page."""
    struck = []

    def change(call: NasCall, message: bytes) -> bytes | None:
        if call.op != "READ" or len(struck) == 2:
            return None
        struck.append(call)
        if len(struck) == 1:
            return record(message[:_READ_HEAD] + u32(1, 0, 1) + bytes(4))
        return record(message[:_READ_HEAD] + u32(count, 0, 4096) + bytes(4096))

    with FakeNas(Oddities(new_handles=True)) as nas:
        content = first_worker(nas, open_engine, region_fd, transport="libnfs")
        nas.restart()
        nas.mutate(change)
        with pytest.raises(NfsError) as caught:
            open_engine(nas.url("/export/swap"), region_fd=region_fd, transport="libnfs")
        assert (caught.value.errno, caught.value.phase) == (errno.EPROTO, "connect")
        check(open_engine(nas.url("/export/swap"), region_fd=region_fd, transport="libnfs"), content)
        assert len(struck) == 2


@pytest.mark.parametrize(("status", "number"), [(13, errno.EACCES), (70, errno.ESTALE)])
def test_a_refusal_that_is_about_the_file(open_engine: OpenEngine, region_fd: int, status: int, number: int) -> None:
    """Not about a page: it is not for the other pages to decide."""
    with FakeNas(Oddities(new_handles=True)) as nas:
        first_worker(nas, open_engine, region_fd, transport="libnfs")
        nas.restart()
        nas.fail("READ", status)
        with pytest.raises(NfsError) as caught:
            open_engine(nas.url("/export/swap"), region_fd=region_fd, transport="libnfs")
        assert caught.value.errno == number


@BOTH_TRANSPORTS
def test_no_page_can_be_read(open_engine: OpenEngine, region_fd: int, transport: str) -> None:
    """It is not known whose file it is: the worker does not start, and does not say that it is another one."""
    with FakeNas(Oddities(new_handles=True)) as nas:
        first_worker(nas, open_engine, region_fd, transport=transport)
        nas.restart()
        nas.fail("READ", NFS3ERR_IO)
        with pytest.raises(NfsError) as caught:
            open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=transport)
        assert (caught.value.errno, caught.value.phase) == (errno.EIO, "connect")


@BOTH_TRANSPORTS
def test_a_fifo_has_the_name(open_engine: OpenEngine, transport: str) -> None:
    """A first worker has no region to compare it with, and does not say that it has."""

    def change(call: NasCall, message: bytes) -> bytes | None:
        is_file = call.op == "GETATTR" and message[28:32] == u32(1)
        return record(message[:28] + u32(7) + message[32:]) if is_file else None

    with FakeNas() as nas:
        nas.add("/export/swap", bytes(PAGES * PAGE))
        nas.mutate(change)
        with pytest.raises(NfsError) as caught:
            open_engine(nas.url("/export/swap"), transport=transport)
        assert (caught.value.errno, caught.value.strerror) == (errno.EINVAL, "")


@BOTH_TRANSPORTS
@pytest.mark.parametrize("same_number", [True, False])
def test_zeros_recognise_no_file(open_engine: OpenEngine, region_fd: int, transport: str, *, same_number: bool) -> None:
    """A new file has zeros where the old one had: the pages with something in them decide."""
    with FakeNas() as nas:
        nas.add("/export/swap", os.urandom(PAGES * PAGE))
        engine = open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=transport)
        for page in range(PAGES):
            write_pages(engine, page, os.urandom(PAGE) if page == PAGES // 2 + 1 else bytes(PAGE))
        engine.flush()
        engine.close()
        make_again(nas, bytes(PAGES * PAGE), same_number=same_number)
        with pytest.raises(NfsError, match="belongs to another backing file"):
            open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=transport)
        assert nas.content("/export/swap") == bytes(PAGES * PAGE)


@BOTH_TRANSPORTS
@pytest.mark.parametrize("pages", [PAGES - 1, PAGES + 1])
def test_the_file_has_another_size(open_engine: OpenEngine, region_fd: int, transport: str, pages: int) -> None:
    with FakeNas() as nas:
        first_worker(nas, open_engine, region_fd, transport=transport)
        with nas.files() as tree:
            node = tree.find("/export/swap")
            assert node is not None
            node.resize(pages * PAGE)
        with pytest.raises(NfsError, match="belongs to another backing file"):
            open_engine(nas.url("/export/swap"), region_fd=region_fd, transport=transport)


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


def forget_place(region_fd: int) -> None:
    os.pwrite(region_fd, bytes(2 * LAST_PLACE_BYTES), LAST_PLACE_OFFSET)


def test_a_region_of_a_version_that_kept_nothing(open_engine: OpenEngine, region_fd: int) -> None:
    """There are zeros: the file is opened by its name, and kept for the next worker."""
    with FakeNas() as nas:
        content = first_worker(nas, open_engine, region_fd)
        forget_place(region_fd)
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
        for damaged in (4, 8, *range(0, LAST_PLACE_BYTES - 8, 16)):
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
