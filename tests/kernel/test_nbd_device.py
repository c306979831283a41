# SPDX-License-Identifier: LGPL-2.1-or-later
"""One attach, for the command and the keeper, against a golden tree that answers to CONNECT and DISCONNECT."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.nbd_tree import SIZE_BYTES, FakeNetlink, make_machine

from nbdnfs.errors import BusyError, NbdnfsError, NoMemoryError, UnavailableError, UnreadableError, UsageError
from nbdnfs.kernel import device_in_use, nbd_device, nbd_netlink
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.nbd_handshake import Export, TransmissionFlags

EXPORT = Export(SIZE_BYTES, TransmissionFlags(0x10D), 1, 4096, 1 << 25)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_machine(tmp_path / "root")


@pytest.fixture
def kernel(root: Path) -> FakeNetlink:
    return FakeNetlink(root)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def attach(kernel: FakeNetlink, sock: socket.socket, export: Export = EXPORT, **settings: Any) -> Attached:
    settings = {"backend": "nbdnfs:swap0", "source": "the backing file", "root": kernel.root} | settings
    return nbd_device.attach(kernel, sock, export, **settings)  # type: ignore[arg-type]


def test_attach(kernel: FakeNetlink, sock: socket.socket, root: Path) -> None:
    """Found by its backend afterwards; with the timeouts and the queue that were asked for."""
    assert nbd_device.find("nbdnfs:swap0", root) is None
    attached = attach(kernel, sock, dead_conn_timeout_s=60, io_timeout_ms=500)
    assert (attached.name, attached.path) == ("nbd2", "/dev/nbd2")
    assert nbd_device.find("nbdnfs:swap0", root) == attached == Attached(2, SIZE_BYTES)
    assert kernel.connects[0]["dead_conn_timeout_s"] == 60
    queue = root / "sys/block/nbd2/queue"
    for setting, value in (("io_timeout", "500"), ("nr_requests", "16"), ("scheduler", "none"), ("read_ahead_kb", "0")):
        assert (queue / setting).read_text() == value


@pytest.mark.parametrize("setting", ["io_timeout", "scheduler"])
def test_a_kernel_without_a_setting(
    kernel: FakeNetlink, sock: socket.socket, root: Path, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    """The setting is a help, not a need: its absence is logged, and no file is made."""
    connect = kernel.connect

    def connect_on_an_old_kernel(sockets: list[int], **settings: Any) -> int:
        index = connect(sockets, **settings)
        (root / f"sys/block/nbd0/queue/{setting}").unlink()
        return index

    kernel.connect = connect_on_an_old_kernel  # type: ignore[method-assign]
    attach(kernel, sock, index=0)
    assert not (root / f"sys/block/nbd0/queue/{setting}").exists()
    assert f"queue/{setting} stays as it is" in caplog.text


@pytest.mark.parametrize(
    ("wanted_kb", "server_max_kb", "expected"),
    [
        (None, 64, "64"),
        (None, 32 << 10, "128"),
        (None, 1280, "128"),
        (256, 32 << 10, "256"),
        (2048, 32 << 10, "2048"),
        (2048, 512, "512"),
        (1280, 32 << 10, "1280\n"),
    ],
)
def test_largest_request(
    kernel: FakeNetlink, sock: socket.socket, root: Path, wanted_kb: int | None, server_max_kb: int, expected: str
) -> None:
    """As asked for, but no larger than the server takes; 128 KiB unless asked. The kernel's own value here is 1280."""
    attach(kernel, sock, Export(SIZE_BYTES, EXPORT.flags, 1, 4096, server_max_kb << 10), max_sectors_kb=wanted_kb)
    assert (root / "sys/block/nbd2/queue/max_sectors_kb").read_text() == expected


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (Export(0, EXPORT.flags), "the size of the backing file, 0 bytes, is not a multiple of 4096"),
        (Export(SIZE_BYTES + 512, EXPORT.flags), "is not a multiple of 4096"),
        (Export(SIZE_BYTES, EXPORT.flags, 8192, 8192, 1 << 25), "takes requests of 8192 to"),
        (Export(SIZE_BYTES, EXPORT.flags, 512, 512, 2048), "to 2048 bytes, not of 4096"),
    ],
)
def test_exports_that_the_kernel_cannot_take(
    kernel: FakeNetlink, sock: socket.socket, export: Export, message: str
) -> None:
    """A size or block size that does not go with requests of 4 KiB is refused before CONNECT."""
    with pytest.raises(UsageError, match=message) as caught:
        attach(kernel, sock, export)
    assert caught.value.hint
    assert kernel.connects == []


def test_no_device_is_left_behind(kernel: FakeNetlink, sock: socket.socket) -> None:
    """A device that does not show its size is given up at the deadline, and taken down again."""
    kernel.forgets_size = True
    with pytest.raises(UnavailableError, match=r"does not show its size within 0\.1 s"):
        attach(kernel, sock, index=0, timeout_s=0.1)
    assert kernel.disconnects == [0]


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str, errors: int, *, after: int = 0) -> None:
    """There is no memory for kernel_state.NAME, so often, once it has been called `after` times."""
    read, calls = getattr(kernel_state, name), itertools.count()

    def fail(*arguments: Any) -> Any:
        if after <= next(calls) < after + errors:
            raise UnreadableError("cannot read /sys: Cannot allocate memory")
        return read(*arguments)

    monkeypatch.setattr(kernel_state, name, fail)


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("cannot attach a device: the kernel did not answer within 10 s"),
        NoMemoryError("cannot attach a device: No buffer space available"),
        NbdnfsError("the kernel attached a device, but did not say which"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("unreadable", [0, 2])
def test_a_connect_whose_answer_does_not_come(
    kernel: FakeNetlink,
    sock: socket.socket,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    unreadable: int,
) -> None:
    """The kernel has attached the device all the same: it is found by its backend, and taken down, as soon as /sys can
    be read."""
    connect, find, refusals = kernel.connect, nbd_device.find, [1] * unreadable

    def connect_without_an_answer(sockets: list[int], **settings: Any) -> int:
        connect(sockets, **settings)
        monkeypatch.setattr(nbd_device, "find", find_later)
        raise error

    def find_later(backend: str, root: Path) -> Attached | None:
        if refusals:
            refusals.pop()
            raise UnreadableError("cannot read /sys/block: Cannot allocate memory")
        return find(backend, root)

    kernel.connect = connect_without_an_answer  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        attach(kernel, sock)
    assert refusals == []
    assert find("nbdnfs:swap0", root) is None
    assert kernel.disconnects == [2]


def test_a_connect_that_the_kernel_refuses_takes_nothing_down(kernel: FakeNetlink, sock: socket.socket) -> None:
    """Another one may have attached the device just now: that one keeps it."""
    connect = kernel.connect

    def too_late(sockets: list[int], **settings: Any) -> int:
        connect(sockets, **settings)
        raise BusyError("cannot attach a device: Device or resource busy")

    kernel.connect = too_late  # type: ignore[method-assign]
    with pytest.raises(BusyError):
        attach(kernel, sock)
    assert kernel.disconnects == []


def test_a_device_that_cannot_be_read_yet(
    kernel: FakeNetlink, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at again, and its queue is set up."""
    unreadable(monkeypatch, "nbd_device", 3, after=2)  # find() has looked at two
    attach(kernel, sock, index=0)
    assert kernel.disconnects == []
    assert (kernel.root / "sys/block/nbd0/queue/max_sectors_kb").read_text().strip() != "1280"


def test_a_device_that_cannot_be_read_in_time(
    kernel: FakeNetlink, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the error; and the device is taken down once it can be read."""
    monkeypatch.setattr(nbd_device, "_wait_until_there", lambda *arguments: kernel_state.swaps(kernel.root))
    unreadable(monkeypatch, "swaps", 4)
    with pytest.raises(UnreadableError):
        attach(kernel, sock, index=0)
    assert kernel.disconnects == [0]


def test_a_device_that_another_program_uses_stays(
    kernel: FakeNetlink, sock: socket.socket, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been put to use as soon as it was there: then a failed set-up is no reason to take it down."""
    (root / "sys/block/nbd0/holders/dm-0").mkdir(parents=True)
    monkeypatch.setattr(nbd_device, "_set_up_queue", lambda *arguments: pytest.fail("it fails"))
    with pytest.raises(pytest.fail.Exception):
        attach(kernel, sock, index=0)
    assert kernel.disconnects == []


def test_a_device_that_never_can_be_read(
    kernel: FakeNetlink, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was wrong is said, and not that the device does not come up."""
    monkeypatch.setattr(nbd_device, "wait_until", lambda is_there, timeout_s: is_there())
    unreadable(monkeypatch, "nbd_device", 1, after=2)
    with pytest.raises(UnreadableError, match="Cannot allocate memory"):
        attach(kernel, sock, index=0)


def test_a_use_that_the_kernel_lists(
    kernel: FakeNetlink, sock: socket.socket, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is attached; a device that is gone is not used."""
    attached = attach(kernel, sock)
    monkeypatch.setattr(nbd_netlink.NbdNetlink, "open", lambda: contextlib.nullcontext(kernel))
    monkeypatch.setattr(nbd_netlink.LinkDeadEvents, "open", lambda: None)
    opened = nbd_device.NbdKernel("nbdnfs:swap0", root=root)
    opened.refuse_if_used(attached)
    (root / f"sys/block/{attached.name}/holders/dm-0").mkdir(parents=True)
    with pytest.raises(BusyError, match="in use by dm-0"):
        opened.refuse_if_used(attached)
    opened.refuse_if_used(Attached(77, SIZE_BYTES))


def test_one_device_for_a_backend(kernel: FakeNetlink, sock: socket.socket, root: Path) -> None:
    """A second one would write over the pages of the first."""
    attached = attach(kernel, sock)
    with pytest.raises(BusyError, match=f"{attached.path} is attached to nbdnfs:swap0 already"):
        attach(kernel, sock)
    with pytest.raises(BusyError):
        attach(kernel, sock, index=0)
    assert len(kernel.connects) == 1


@pytest.mark.parametrize(("refusals", "index", "works"), [(2, 0, True), (1000, 0, False), (1, None, False)])
def test_a_busy_device(
    kernel: FakeNetlink,
    sock: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    refusals: int,
    index: int | None,
    works: bool,
) -> None:
    """udev opens a device for a moment after its detach: one that is named is tried again, for a while."""
    connect = kernel.connect
    left = iter(range(refusals))

    def busy(sockets: list[int], **settings: Any) -> int:
        if next(left, None) is not None:
            raise BusyError("cannot attach: the device is in use")
        return connect(sockets, **settings)

    monkeypatch.setattr(kernel, "connect", busy)
    monkeypatch.setattr(device_in_use, "_OPENERS_GRACE_S", 0.1)
    if works:
        assert attach(kernel, sock, index=index).index == index
    else:
        with pytest.raises(BusyError, match="cannot attach: the device is in use"):
            attach(kernel, sock, index=index)
        assert kernel.connects == []


def test_is_attached(kernel: FakeNetlink, root: Path) -> None:
    """By the file pid of sysfs; a device that does not exist is not attached."""
    assert [nbd_device.is_attached(f"nbd{index}", root) for index in (0, 1, 9)] == [False, True, False]


@pytest.mark.parametrize("device", ["/dev/sda", "nbd", "/dev/nbd0p1", ""])
def test_the_keepers_device_is_an_nbd_device(device: str) -> None:
    """A wrong name is refused before a netlink socket is opened."""
    with pytest.raises(UsageError, match="is not an nbd device"):
        nbd_device.NbdKernel("nbdnfs:swap0", device=device)


@pytest.mark.parametrize(("device", "index"), [("/dev/nbd0", 0), ("nbd12", 12), ("/dev/nbd007", 7)])
def test_the_number_of_the_keepers_device(device: str, index: int) -> None:
    """With the folder or without."""
    assert nbd_device._index_of(device) == index


def test_imports() -> None:
    """`status` has this module as well: netlink does not come with it."""
    code = "import sys, nbdnfs.kernel.nbd_device;print([m for m in sys.modules if 'netlink' in m or m == 'queue'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_what_another_process_needs_to_reconnect(
    kernel: FakeNetlink, sock: socket.socket, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is complete but for the socket, and a file by which the attachment is known. All is closed here,
    also where the device is not there."""
    attached = attach(kernel, sock)
    opened: list[socket.socket] = []

    def open_netlink() -> nbd_netlink.NbdNetlink:
        opened.append(sock.dup())
        return nbd_netlink.NbdNetlink(opened[-1], 42)

    monkeypatch.setattr(nbd_netlink.NbdNetlink, "open", open_netlink)
    with nbd_device.Reconnection(attached, "nbdnfs:swap0", root) as prepared:
        assert prepared.netlink == opened[0].fileno()
        assert b"nbdnfs:swap0\0" in prepared.request
        assert len(prepared.request) >= prepared.descriptor_at + 4
        assert os.pread(prepared.backend_file, 64, 0).decode().strip() == prepared.backend
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(prepared.backend_file)
    with pytest.raises(FileNotFoundError):
        nbd_device.Reconnection(Attached(9, SIZE_BYTES), "nbdnfs:swap0", root)
    assert [one.fileno() for one in opened] == [-1, -1]
