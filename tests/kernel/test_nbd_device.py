# SPDX-License-Identifier: LGPL-2.1-or-later
"""attach and detach against a fake kernel: a golden tree that answers to CONNECT and DISCONNECT.

What a real kernel does is tested in vm-tests/.
"""

import errno
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdnfs.errors import (
    BusyError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from nbdnfs.kernel import nbd_device, nbd_handshake
from nbdnfs.kernel import state as kernel_state

SIZE_BYTES = 64 << 20
FLAGS = 0x10D


class FakeKernel:
    """Stands for NbdNetlink: CONNECT and DISCONNECT change the tree as drivers/block/nbd.c changes sysfs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.connects: list[dict[str, Any]] = []
        self.disconnects: list[int] = []
        self.error: NbdnfsError | None = None
        self.forgets_size = False
        self.keeps_device = False

    def connect(self, sockets: list[int], **settings: Any) -> int:
        if self.error is not None:
            raise self.error
        assert all(os.fstat(descriptor) for descriptor in sockets)
        self.connects.append(settings)
        index = settings["index"] if settings["index"] is not None else 2
        if not self.forgets_size:
            add_device(
                self.root, index, size_bytes=settings["size_bytes"], pid=os.getpid(), backend=settings["backend"]
            )
        return index

    def disconnect(self, index: int) -> None:
        if self.error is not None:
            raise self.error
        self.disconnects.append(index)
        if not self.keeps_device:
            (self.root / f"sys/block/nbd{index}/pid").unlink(missing_ok=True)
            (self.root / f"sys/block/nbd{index}/size").write_text("0\n")


def add_device(root: Path, index: int, *, size_bytes: int = 0, pid: int | None = None, backend: str = "") -> Path:
    """A device as sysfs shows it, attached when it has a pid, with its node (a plain file) in dev."""
    folder = root / f"sys/block/nbd{index}"
    (folder / "queue").mkdir(parents=True, exist_ok=True)
    (folder / "size").write_text(f"{size_bytes // 512}\n")
    (folder / "dev").write_text(f"43:{index * 32}\n")
    (folder / "ro").write_text("0\n")
    (folder / "queue/io_timeout").write_text("30000\n")
    (folder / "queue/nr_requests").write_text("128\n")
    (folder / "queue/scheduler").write_text("[mq-deadline] none\n")
    (folder / "queue/read_ahead_kb").write_text("128\n")
    (folder / "queue/max_sectors_kb").write_text("1280\n")
    if pid is not None:
        (folder / "pid").write_text(f"{pid}\n")
        (folder / "backend").write_text(f"{backend}\n")
    (root / "dev").mkdir(exist_ok=True)
    (root / f"dev/nbd{index}").touch()
    return folder


def add_partition(root: Path, index: int) -> Path:
    folder = root / f"sys/block/nbd{index}/nbd{index}p1"
    folder.mkdir()
    (folder / "dev").write_text(f"43:{index * 32 + 1}\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with the driver loaded, nbd0 idle, and nbd1 attached."""
    tree = tmp_path / "root"
    (tree / "sys/module/nbd").mkdir(parents=True)
    (tree / "proc/self").mkdir(parents=True)
    add_device(tree, 0)
    add_device(tree, 1, size_bytes=SIZE_BYTES, pid=4711, backend="nbdnfs:/run/x.sock")
    return tree


@pytest.fixture
def kernel(root: Path) -> FakeKernel:
    return FakeKernel(root)


def use_as_swap(root: Path, path: str, kind: str = "partition") -> None:
    (root / "proc/swaps").write_text(f"Filename Type Size Used Priority\n{path} {kind} 65532 10240 -2\n")


def use_as_mount(root: Path, number: str, source: str) -> None:
    line = f"30 25 {number} / /mnt/data rw shared:7 - ext4 {source} rw\n"
    (root / "proc/self/mountinfo").write_text(line)


class Server:
    """An NBD server that offers one export to whoever connects."""

    size_bytes = SIZE_BYTES
    blocks = (1, 4096, 1 << 25)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client:
                head = struct.pack(">QII", 0x3E889045565A9, 7, 3)
                client.sendall(
                    b"NBDMAGICIHAVEOPT\x00\x03"
                    + head
                    + struct.pack(">IHQH", 12, 0, self.size_bytes, FLAGS)
                    + head
                    + struct.pack(">IHIII", 14, 3, *self.blocks)
                    + struct.pack(">QIII", 0x3E889045565A9, 7, 1, 0)
                )
                while client.recv(4096):
                    pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "s")
    yield running
    running.close()


def attach(server: Server, kernel: FakeKernel, name: str | None = None, **settings: Any) -> nbd_device.Attachment:
    settings = {"timeout_s": 5, "netlink": kernel, "root": kernel.root} | settings
    return nbd_device.attach(server.path, name, **settings)


def detach(kernel: FakeKernel, name: str = "/dev/nbd1", timeout_s: float = 5) -> None:
    nbd_device.detach(name, timeout_s=timeout_s, netlink=kernel, root=kernel.root)  # type: ignore[arg-type]


def test_attach(server: Server, kernel: FakeKernel, root: Path) -> None:
    """The kernel gets size, block size, flags, the timeouts of the hard device and a backend to find it by."""
    assert attach(server, kernel, "/dev/nbd0") == nbd_device.Attachment(Path("/dev/nbd0"), 0, SIZE_BYTES)
    assert kernel.connects == [
        {
            "index": 0,
            "size_bytes": SIZE_BYTES,
            "block_size_bytes": 4096,
            "server_flags": FLAGS,
            "backend": f"nbdnfs:{server.path}",
            "timeout_s": 0,
            "dead_conn_timeout_s": 86400,
        }
    ]
    state = kernel_state.nbd_device("nbd0", root)
    assert state is not None
    assert state.io_timeout_ms == 2000
    assert state.backend == nbd_device.backend_of(server.path)


def test_attach_takes_a_free_device(server: Server, kernel: FakeKernel) -> None:
    """Without a device the kernel's choice is what is returned."""
    assert attach(server, kernel).path == Path("/dev/nbd2")


def test_attach_with_a_backend_and_timeouts_of_ones_own(server: Server, kernel: FakeKernel, root: Path) -> None:
    """The keeper names the device itself."""
    attach(server, kernel, backend="swap0", dead_conn_timeout_s=60, io_timeout_ms=500)
    assert kernel.connects[0]["backend"] == "swap0"
    assert kernel.connects[0]["dead_conn_timeout_s"] == 60
    assert (root / "sys/block/nbd2/queue/io_timeout").read_text() == "500"
    for setting, value in (("nr_requests", "16"), ("scheduler", "none"), ("read_ahead_kb", "0")):
        assert (root / "sys/block/nbd2/queue" / setting).read_text() == value


def test_a_kernel_without_io_timeout(
    server: Server, kernel: FakeKernel, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The setting is a help, not a need: its absence is logged, and no file is made."""
    connect = kernel.connect

    def connect_on_an_old_kernel(sockets: list[int], **settings: Any) -> int:
        index = connect(sockets, **settings)
        (root / "sys/block/nbd0/queue/io_timeout").unlink()
        return index

    kernel.connect = connect_on_an_old_kernel  # type: ignore[method-assign]
    attach(server, kernel, "nbd0")
    assert not (root / "sys/block/nbd0/queue/io_timeout").exists()
    assert "queue/io_timeout stays as it is" in caplog.text


def test_requests_are_no_larger_than_the_server_takes(server: Server, kernel: FakeKernel, root: Path) -> None:
    """max_sectors_kb goes down to the server's largest block, to 128 KiB at most, and never up."""
    server.blocks = (4096, 4096, 64 << 10)
    attach(server, kernel, "nbd0")
    assert (root / "sys/block/nbd0/queue/max_sectors_kb").read_text() == "64"
    server.blocks = (4096, 4096, 32 << 20)
    attach(server, kernel)
    assert (root / "sys/block/nbd2/queue/max_sectors_kb").read_text() == "128"


@pytest.mark.parametrize("name", ["/dev/nbd1", "nbd1", "/dev/../dev/nbd1"])
def test_attach_to_a_device_in_use(server: Server, kernel: FakeKernel, name: str) -> None:
    """Says by whom and to what, and nothing reaches the kernel."""
    with pytest.raises(BusyError, match=r"process 4711 \(which has ended\) to nbdnfs:/run/x.sock") as caught:
        attach(server, kernel, name)
    assert "nbdnfs detach /dev/nbd1" in caught.value.hint
    assert kernel.connects == []


def test_attach_to_a_device_of_a_living_process(server: Server, kernel: FakeKernel, root: Path) -> None:
    """The name of the process that attached it, while it lives."""
    (root / "proc/4711").mkdir()
    (root / "proc/4711/status").write_text("Name: nbd-client\n")
    (root / "proc/4711/stat").write_text("4711 (nbd-client) S" + " 0" * 49 + "\n")
    with pytest.raises(BusyError, match=r"process 4711 \(nbd-client\)"):
        attach(server, kernel, "nbd1")


def busy_for(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """CONNECT answers EBUSY that many times."""
    connect = kernel.connect
    refusals = iter(range(times))

    def busy(sockets: list[int], **settings: Any) -> int:
        if next(refusals, None) is not None:
            raise BusyError("cannot attach: the device is in use")
        return connect(sockets, **settings)

    monkeypatch.setattr(kernel, "connect", busy)
    monkeypatch.setattr(nbd_device, "_OPENERS_GRACE_S", 0.1)


def test_attach_waits_for_a_short_look(server: Server, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle device that udev has open for a moment is busy for the kernel (seen on Linux 6.12)."""
    busy_for(kernel, monkeypatch, 2)
    assert attach(server, kernel, "/dev/nbd0").index == 0


def test_attach_to_an_idle_device_that_is_open(
    server: Server, kernel: FakeKernel, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has it open is named; where nobody is seen, the kernel's refusal stands."""
    busy_for(kernel, monkeypatch, 1000)
    with pytest.raises(BusyError, match="cannot attach: the device is in use"):
        attach(server, kernel, "/dev/nbd0")
    opened_by(root, 81, "blkid", "/dev/nbd0")
    with pytest.raises(BusyError, match=r"open in blkid \(process 81\)"):
        attach(server, kernel, "/dev/nbd0")


def test_somebody_else_was_faster(
    server: Server, kernel: FakeKernel, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attached by another between our look and CONNECT: said as if it had been before, and at once."""

    def busy(sockets: list[int], **settings: Any) -> int:
        add_device(root, 0, size_bytes=SIZE_BYTES, pid=4712, backend="other")
        raise BusyError("cannot attach: the device is in use")

    monkeypatch.setattr(kernel, "connect", busy)
    with pytest.raises(BusyError, match=r"process 4712 .* to other"):
        attach(server, kernel, "/dev/nbd0")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("/dev/nbd9", NoInputError, "there is no device /dev/nbd9"),
        ("/dev/nbd0p1", UsageError, "'/dev/nbd0p1' is a partition"),
        ("/dev/nothing", NoInputError, "there is no device '/dev/nothing'"),
        ("/dev/plain", UsageError, "'/dev/plain' is no block device"),
        ("/dev/sda", UsageError, "'/dev/sda' is no nbd device"),
        ("", NoInputError, "there is no device ''"),
    ],
)
@pytest.mark.parametrize("command", ["attach", "detach"])
def test_devices_that_are_none(
    server: Server,
    kernel: FakeKernel,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    kind: type[NbdnfsError],
    message: str,
) -> None:
    """Each wrong word for a device is told apart, with a hint, in both commands."""
    (root / "dev/plain").touch()
    numbers = {root / "dev/sda": "8:0"}
    monkeypatch.setattr(kernel_state, "device_number", numbers.get)
    link(root, "8:0", "sda")
    with pytest.raises(kind, match=message) as caught:
        attach(server, kernel, name) if command == "attach" else detach(kernel, name)
    assert caught.value.hint
    assert kernel.connects == []
    assert kernel.disconnects == []


def link(root: Path, number: str, name: str) -> None:
    (root / "sys/dev/block").mkdir(parents=True, exist_ok=True)
    (root / "sys/dev/block" / number).symlink_to(f"../../devices/virtual/block/{name}")


def test_another_path_to_the_device(kernel: FakeKernel, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node or symbolic link of another name is followed by its device number."""
    monkeypatch.setattr(kernel_state, "device_number", {root / "srv/swapdisk": "43:32"}.get)
    link(root, "43:32", "nbd1")
    detach(kernel, "/srv/swapdisk")
    assert kernel.disconnects == [1]


@pytest.mark.parametrize(("available", "hint"), [(True, "modprobe nbd"), (False, "CONFIG_BLK_DEV_NBD")])
def test_no_driver(server: Server, tmp_path: Path, available: bool, hint: str) -> None:
    """Without the driver there is no device at all; the hint depends on whether this kernel has the module."""
    root = tmp_path / "other"
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/sys/kernel/osrelease").write_text("6.1.0\n")
    if available:
        (root / "lib/modules/6.1.0").mkdir(parents=True)
        (root / "lib/modules/6.1.0/modules.dep").write_text("kernel/drivers/block/nbd.ko:\n")
    with pytest.raises(UnavailableError, match="driver is not loaded") as caught:
        attach(server, FakeKernel(root), "/dev/nbd0")
    assert hint in caught.value.hint


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this machine has the nbd driver")
def test_no_driver_on_this_machine(server: Server) -> None:
    """The same from the real netlink socket, where the kernel has no such family."""
    with pytest.raises(UnavailableError, match="no nbd driver"):
        nbd_device.attach(server.path)


def test_sockets_that_are_none(kernel: FakeKernel, tmp_path: Path) -> None:
    """A missing path, a file, a dead socket and one that may not be used each have their message and hint."""
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    (tmp_path / "file").touch()
    for path, kind, message in [
        (tmp_path / "none", NoInputError, "there is no socket"),
        (tmp_path / "file", UsageError, "is not a socket"),
        (dead, UnavailableError, "no server listens"),
        (tmp_path / ("x" * 200), NoInputError, "there is no socket"),
        (tmp_path / ("x" * 300), UsageError, "File name too long"),
    ]:
        with pytest.raises(kind, match=message) as caught:
            nbd_device.attach(path, netlink=kernel, root=kernel.root)  # type: ignore[arg-type]
        assert caught.value.hint
    assert kernel.connects == []


def test_a_path_too_long_for_a_socket(kernel: FakeKernel, tmp_path: Path) -> None:
    """sun_path has 108 bytes; a longer path to a real socket cannot be connected to."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        os.rename(tmp_path / "s", folder / "s")
        with pytest.raises(UsageError, match="too long"):
            nbd_device.attach(folder / "s", netlink=kernel, root=kernel.root)  # type: ignore[arg-type]


def test_a_forbidden_socket(kernel: FakeKernel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """EACCES of connect(2), which root does not get."""

    class FakeForbidden(socket.socket):
        def connect(self, _: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(nbd_device.socket, "socket", FakeForbidden)
    with pytest.raises(PermissionDeniedError, match="may not be used"):
        attach(server, kernel)


def test_a_server_that_says_nothing(kernel: FakeKernel, tmp_path: Path) -> None:
    """The handshake has the deadline of the call."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(UnavailableError, match=r"within 0\.1 s"):
            nbd_device.attach(tmp_path / "s", timeout_s=0.1, netlink=kernel, root=kernel.root)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size_bytes", "blocks", "message"),
    [
        (0, (1, 4096, 1 << 25), "has 0 bytes"),
        (SIZE_BYTES + 512, (1, 4096, 1 << 25), "no multiple of 4096"),
        (SIZE_BYTES, (8192, 8192, 1 << 25), "takes requests of 8192 to"),
        (SIZE_BYTES, (512, 512, 2048), "to 2048 bytes, not of 4096"),
    ],
)
def test_exports_that_the_kernel_cannot_take(
    server: Server, kernel: FakeKernel, size_bytes: int, blocks: tuple[int, int, int], message: str
) -> None:
    """A size or block size that does not go with 4 KiB pages is refused before CONNECT."""
    server.size_bytes, server.blocks = size_bytes, blocks
    with pytest.raises(UsageError, match=message):
        attach(server, kernel)
    assert kernel.connects == []


def test_what_the_kernel_refuses(server: Server, kernel: FakeKernel) -> None:
    """Errors of netlink come through as they are."""
    kernel.error = PermissionDeniedError("no")
    with pytest.raises(PermissionDeniedError):
        attach(server, kernel)
    with pytest.raises(PermissionDeniedError):
        detach(kernel)


def test_a_device_that_does_not_show_its_size(server: Server, kernel: FakeKernel) -> None:
    """Is given up at the deadline, and taken down again: it is ours, and nobody knows of it."""
    kernel.forgets_size = True
    with pytest.raises(UnavailableError, match=r"does not show its size within 0\.1 s"):
        attach(server, kernel, "nbd0", timeout_s=0.1)
    assert kernel.disconnects == [0]


def test_the_servers_connection_ends_with_a_failed_attach(server: Server, kernel: FakeKernel) -> None:
    """Our descriptor is closed whatever happens, or the server would wait for requests for ever."""
    kernel.error = BusyError("no")
    for _ in range(3):
        with pytest.raises(BusyError):
            attach(server, kernel)
    # ResourceWarning is an error in these tests: an unclosed socket would have failed this one


def test_detach(kernel: FakeKernel, root: Path) -> None:
    """DISCONNECT, and the device is idle when it returns."""
    detach(kernel)
    assert kernel.disconnects == [1]
    state = kernel_state.nbd_device("nbd1", root)
    assert state is not None
    assert not state.attached


def test_detach_what_is_not_attached(kernel: FakeKernel) -> None:
    """Is an error, so that a script notices a wrong device."""
    with pytest.raises(NoInputError, match="/dev/nbd0 is not attached"):
        detach(kernel, "/dev/nbd0")
    assert kernel.disconnects == []


def test_a_device_that_stays(kernel: FakeKernel) -> None:
    """The wait for its end has a deadline."""
    kernel.keeps_device = True
    with pytest.raises(UnavailableError, match=r"has not gone within 0\.1 s"):
        detach(kernel, timeout_s=0.1)


def refused(kernel: FakeKernel, message: str) -> BusyError:
    with pytest.raises(BusyError, match=message) as caught:
        detach(kernel)
    assert kernel.disconnects == [], "nothing may reach the kernel"
    return caught.value


def test_detach_refuses_swap(kernel: FakeKernel, root: Path) -> None:
    """With the command that ends it."""
    use_as_swap(root, "/dev/nbd1")
    assert refused(kernel, "in use as swap .*10 MiB swapped out").hint == "swapoff /dev/nbd1"


def test_detach_refuses_swap_on_a_deleted_node(kernel: FakeKernel, root: Path) -> None:
    """The kernel appends " (deleted)" to the path of a node that is gone (d_path)."""
    use_as_swap(root, "/dev/nbd1\\040(deleted)")
    refused(kernel, "in use as swap")


def test_detach_refuses_swap_on_a_partition(kernel: FakeKernel, root: Path) -> None:
    """A partition is part of the device."""
    add_partition(root, 1)
    use_as_swap(root, "/dev/nbd1p1")
    assert refused(kernel, "in use as swap").hint == "swapoff /dev/nbd1p1"


@pytest.mark.parametrize("number", ["43:32", "43:33"])
def test_detach_refuses_swap_under_another_name(
    kernel: FakeKernel, root: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """The device number decides, of the disk or of a partition."""
    add_partition(root, 1)
    monkeypatch.setattr(kernel_state, "device_number", {root / "srv/swapdisk": number}.get)
    use_as_swap(root, "/srv/swapdisk")
    assert refused(kernel, "in use as swap").hint == "swapoff /srv/swapdisk"


def test_other_swap_does_not_matter(kernel: FakeKernel, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another disk's swap is none of ours, and a swap file's path is not even looked at."""

    def device_number(path: Path) -> str | None:
        assert path.name == "sda2", "the file may lie on a share that hangs"
        return "8:2"

    monkeypatch.setattr(kernel_state, "device_number", device_number)
    (root / "proc/swaps").write_text("Filename\n/dev/sda2 partition 4 4 1\n/nas/swapfile file 4 4 1\n")
    detach(kernel)


@pytest.mark.parametrize(("number", "source"), [("43:32", "/dev/root"), ("43:33", "x"), ("0:44", "/dev/nbd1")])
def test_detach_refuses_a_mounted_device(kernel: FakeKernel, root: Path, number: str, source: str) -> None:
    """By number, of a partition too, and by name where the file system has a number of its own (btrfs)."""
    add_partition(root, 1)
    use_as_mount(root, number, source)
    assert refused(kernel, "is mounted on /mnt/data").hint == "umount /mnt/data"


def test_detach_refuses_a_device_with_something_on_top(kernel: FakeKernel, root: Path) -> None:
    """dm-crypt, LVM or md on the disk or on a partition of it."""
    (add_partition(root, 1) / "holders/dm-0").mkdir(parents=True)
    assert "dm-0" in refused(kernel, "carries dm-0").hint


def test_detach_refuses_a_device_behind_a_loop_device(kernel: FakeKernel, root: Path) -> None:
    """The kernel counts it neither as a holder nor as a claim (seen on Linux 6.1)."""
    (root / "sys/block/loop4/loop").mkdir(parents=True)
    (root / "sys/block/loop4/loop/backing_file").write_text("/dev/nbd1\n")
    assert "loop4" in refused(kernel, "carries loop4").hint


def opened_by(root: Path, pid: int, name: str, path: str) -> Path:
    folder = root / f"proc/{pid}/fd"
    folder.mkdir(parents=True)
    (root / f"proc/{pid}/comm").write_text(f"{name}\n")
    (folder / "5").symlink_to(path)
    return folder / "5"


def test_detach_refuses_an_open_device(kernel: FakeKernel, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processes that have it open, once udev had its time."""
    monkeypatch.setattr(nbd_device, "_OPENERS_GRACE_S", 0.05)
    opened_by(root, 77, "mkfs.ext4", "/dev/nbd1")
    refused(kernel, r"is open in mkfs\.ext4 \(process 77\)")


def test_detach_waits_for_a_short_look(kernel: FakeKernel, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """udev opens what has just appeared; detach goes on once it has closed it."""
    descriptor = opened_by(root, 78, "(udev-worker)", "/dev/nbd1")
    monkeypatch.setattr(nbd_device.time, "sleep", lambda _: descriptor.unlink())
    detach(kernel)
    assert kernel.disconnects == [1]


def test_detach_overrules_udev(kernel: FakeKernel, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dead server, udev's look at a new device never ends by itself."""
    monkeypatch.setattr(nbd_device, "_OPENERS_GRACE_S", 0.05)
    opened_by(root, 79, "(udev-worker)", "/dev/nbd1")
    detach(kernel)
    assert kernel.disconnects == [1]


def test_detach_refuses_what_the_kernel_claims(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exclusive open that fails is the kernel's word for a use that no list shows."""
    opens: list[tuple[str, int]] = []

    def claimed(path: Path, flags: int) -> int:
        opens.append((path.name, flags))
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(nbd_device.os, "open", claimed)
    refused(kernel, "claimed by the kernel")
    assert opens == [("nbd1", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)]


def test_a_server_that_is_gone_does_not_keep_the_device(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An open that hangs, in the partition table of a dead server, is no reason to keep the device."""
    release = threading.Event()
    real_open = os.open

    def hangs(path: Path, flags: int) -> int:
        release.wait(10)
        return real_open(path, flags)

    monkeypatch.setattr(nbd_device.os, "open", hangs)
    monkeypatch.setattr(nbd_device, "_PROBE_TIMEOUT_S", 0.05)
    before = threading.active_count()
    detach(kernel)
    assert kernel.disconnects == [1]
    assert "does not answer" in caplog.text
    release.set()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(10)
    assert threading.active_count() <= before


def test_connect_hands_back_a_socket_past_the_handshake(server: Server) -> None:
    """For the keeper, which reconnects: a blocking socket and the export."""
    sock, export = nbd_device.connect(server.path, timeout_s=5)
    with sock:
        assert export == nbd_handshake.Export(SIZE_BYTES, nbd_handshake.TransmissionFlags(FLAGS), 1, 4096, 1 << 25)
        assert sock.gettimeout() is None


def test_backend_of_a_relative_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The identifier does not depend on where the command was called."""
    monkeypatch.chdir(tmp_path)
    assert nbd_device.backend_of(Path("s")) == f"nbdnfs:{tmp_path}/s"


def test_importing_device_does_not_load_pyroute2() -> None:
    """It comes with the first attach or detach."""
    code = "import sys, nbdnfs.kernel.nbd_device; print([m for m in sys.modules if 'pyroute2' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.stdout == "[]\n"
