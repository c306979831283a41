# SPDX-License-Identifier: LGPL-2.1-or-later
"""The warm-up of a device, on files in its place. What it is for is tested in vm-tests/test_memory.py."""

import errno
import fcntl
import itertools
import mmap
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from nbdnfs.errors import (
    BusyError,
    IOFailureError,
    NbdnfsError,
    NoInputError,
    NoMemoryError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from nbdnfs.kernel import warm_up

LARGEST = 128 * 1024
PAGE = 4096


@pytest.fixture
def device(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """An open file of random bytes, and the bytes."""
    content = os.urandom(4 << 20)
    path = tmp_path / "device"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor, content
    os.close(descriptor)


class Recorder:
    """Stands for `os` in the module under test: notes what is asked for, and may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.syncs = 0
        self.threads: set[int] = set()
        self.fail_at: int | None = None
        self.preadv, self.pwrite, self.fsync = os.preadv, os.pwrite, os.fsync
        monkeypatch.setattr(warm_up.os, "preadv", self._preadv)
        monkeypatch.setattr(warm_up.os, "pwrite", self._pwrite)
        monkeypatch.setattr(warm_up.os, "fsync", self._fsync)

    def _preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.threads.add(threading.get_ident())
        self.reads.append((offset, len(buffers[0])))
        if offset == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.preadv(descriptor, buffers, offset)

    def _pwrite(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        self.writes.append((offset, len(buffer)))
        return self.pwrite(descriptor, buffer, offset)

    def _fsync(self, descriptor: int) -> None:
        self.syncs += 1
        self.fsync(descriptor)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def content_of(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def test_everything_works_and_nothing_changes(device: tuple[int, bytes], recorder: Recorder) -> None:
    """Every thread reads and rewrites; a flush; single pages and the largest request; the bytes stay."""
    descriptor, content = device
    done = warm_up.exercise(descriptor, largest_bytes=LARGEST, writable=True)
    assert content_of(descriptor) == content
    assert sorted(recorder.reads) == sorted(recorder.writes)
    assert {length for _, length in recorder.reads} == {PAGE, LARGEST}
    assert recorder.syncs == 1
    assert len(recorder.threads) == warm_up.PARALLEL
    assert done.read_bytes == done.rewritten_bytes == sum(length for _, length in recorder.reads)
    assert done.largest_request_bytes == LARGEST


def test_no_two_threads_share_a_page(device: tuple[int, bytes], recorder: Recorder) -> None:
    """What one thread reads and writes back, no other one touches meanwhile."""
    descriptor, content = device
    warm_up.exercise(descriptor, largest_bytes=LARGEST, writable=True, parallel=4)
    stretch = len(content) // 4
    assert all(offset // stretch == (offset + length - 1) // stretch for offset, length in recorder.writes)


def test_read_only(device: tuple[int, bytes], recorder: Recorder) -> None:
    """Reads alone, no flush."""
    descriptor, _ = device
    done = warm_up.exercise(descriptor, largest_bytes=LARGEST, writable=False)
    assert recorder.reads
    assert (recorder.writes, recorder.syncs, done.rewritten_bytes) == ([], 0, 0)


@pytest.mark.parametrize("pages", [1, 2, 3, 17, 100])
def test_small_devices(tmp_path: Path, recorder: Recorder, pages: int) -> None:
    """A device of a few pages is used within its bounds."""
    content = os.urandom(pages * PAGE)
    path = tmp_path / "small"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDWR)
    try:
        warm_up.exercise(descriptor, largest_bytes=LARGEST, writable=True)
        assert content_of(descriptor) == content
    finally:
        os.close(descriptor)


def test_a_failed_request_is_told(device: tuple[int, bytes], recorder: Recorder) -> None:
    """One of many threads failing is enough, and no thread is left behind."""
    descriptor, content = device
    recorder.fail_at = len(content) // 2
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        warm_up.exercise(descriptor, largest_bytes=LARGEST, writable=True)
    assert content_of(descriptor) == content


class PoorMmap(mmap.mmap):
    """There is no memory for the third one."""

    made: ClassVar[Iterator[int]] = itertools.count(1)

    def __new__(cls, *arguments: int) -> "PoorMmap":
        if next(cls.made) == 3:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return super().__new__(cls, *arguments)


class PoorThread(threading.Thread):
    """The third one cannot be started."""

    made: ClassVar[Iterator[int]] = itertools.count(1)

    def start(self) -> None:
        if next(self.made) == 3:
            raise RuntimeError("can't start new thread")
        super().start()


@pytest.mark.parametrize(
    ("module", "poor", "why"),
    [("mmap", PoorMmap, "Cannot allocate memory"), ("threading", PoorThread, "can't start new thread")],
    ids=["buffer", "thread"],
)
def test_no_memory_for_a_thread(
    device: tuple[int, bytes], recorder: Recorder, monkeypatch: pytest.MonkeyPatch, module: str, poor: Any, why: str
) -> None:
    """It ends at once, with all of its threads: those that have one do not wait for those that have none."""
    poor.made = itertools.count(1)
    monkeypatch.setattr(f"nbdnfs.kernel.warm_up.{module}.{poor.__base__.__name__}", poor)
    before, started_s = threading.active_count(), time.monotonic()
    with pytest.raises(NoMemoryError, match=f"no memory to warm the worker up with: {why}"):
        warm_up.exercise(device[0], largest_bytes=LARGEST, writable=True)
    assert time.monotonic() < started_s + 10
    assert threading.active_count() == before
    assert recorder.reads == []


def test_no_memory_for_the_first_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is that taken for a server that does not answer."""
    monkeypatch.setattr(PoorThread, "made", itertools.count(3))
    monkeypatch.setattr(threading, "Thread", PoorThread)
    with pytest.raises(NoMemoryError, match="can't start new thread"):
        warm_up.warm_up(tmp_path, timeout_s=1)


def test_what_else_goes_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, whatever it is."""

    def fail(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(warm_up, "_warm_up", fail)
    with pytest.raises(MemoryError):
        warm_up.warm_up(tmp_path, timeout_s=30)


def test_not_a_device(tmp_path: Path) -> None:
    """A file, a character device, nothing at all."""
    (tmp_path / "file").write_bytes(bytes(PAGE))
    for path in (tmp_path / "file", Path("/dev/null")):
        with pytest.raises(UsageError, match="is not a block device"):
            warm_up.warm_up(path)
    with pytest.raises(NoInputError):
        warm_up.warm_up(tmp_path / "missing")


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_a_request_that_moves_too_little(
    device: tuple[int, bytes], recorder: Recorder, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """It has failed, although there is no errno."""
    whole = getattr(recorder, call)
    monkeypatch.setattr(recorder, call, lambda *arguments: whole(*arguments) - 1)
    with pytest.raises(OSError, match="returned too few" if call == "preadv" else "took too few"):
        warm_up.exercise(device[0], largest_bytes=LARGEST, writable=True)


@pytest.fixture
def block_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`block_device(size_bytes, read_only=...)`: a file that is said to be one, with requests of up to 128 KiB."""

    def make(size_bytes: int, *, read_only: bool = False) -> Path:
        answers = {warm_up._BLKROGET: struct.pack("i", read_only), warm_up._BLKSECTGET: struct.pack("H", 256)}
        monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
        monkeypatch.setattr(fcntl, "ioctl", lambda descriptor, request, room: answers[request])
        path = tmp_path / "nbd0"
        path.write_bytes(os.urandom(size_bytes))
        return path

    return make


@pytest.mark.parametrize("read_only", [False, True])
def test_a_device(block_device: Callable[..., Path], caplog: pytest.LogCaptureFixture, read_only: bool) -> None:
    """The largest request is what the kernel says; one that is read-only is not written, and a line says so."""
    path = block_device(4 << 20, read_only=read_only)
    content = path.read_bytes()
    with caplog.at_level("INFO"):
        done = warm_up.warm_up(path)
    assert path.read_bytes() == content
    assert done.largest_request_bytes == LARGEST
    assert done.read_bytes > LARGEST
    assert done.rewritten_bytes == (0 if read_only else done.read_bytes)
    assert ("is read-only" in caplog.text) is read_only
    assert f"{done.read_bytes >> 10} KiB read" in caplog.text


def test_a_device_without_a_server(block_device: Callable[..., Path]) -> None:
    """A node that is there and not attached has no bytes."""
    with pytest.raises(UsageError, match="is empty"):
        warm_up.warm_up(block_device(0))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, NoInputError),
        (errno.ENXIO, NoInputError),
        (errno.ENODEV, NoInputError),
        (errno.EBUSY, BusyError),
        (errno.EACCES, PermissionDeniedError),
        (errno.EPERM, PermissionDeniedError),
        (errno.EIO, IOFailureError),
    ],
)
def test_a_device_that_does_not_open(
    block_device: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, number: int, kind: type[NbdnfsError]
) -> None:
    """What to do about it depends on why."""
    path = block_device(PAGE)

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(warm_up.os, "open", refuse)
    with pytest.raises(kind, match=str(path)) as caught:
        warm_up.warm_up(path)
    assert caught.value.hint


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wait has an end, also where a read has none."""
    never = threading.Event()
    monkeypatch.setattr(warm_up, "_warm_up", lambda path: never.wait(60))
    with pytest.raises(UnavailableError, match="did not answer"):
        warm_up.warm_up(tmp_path, timeout_s=0.05)
    never.set()
