# SPDX-License-Identifier: LGPL-2.1-or-later
"""attach and detach against a fake kernel: a golden tree that answers to CONNECT and DISCONNECT.

What a real kernel does is tested in vm-tests/.
"""

import contextlib
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
from support.nbd_tree import SIZE_BYTES, FakeNetlink, add_device, make_machine, opened_by

from nbdnfs.commands import attach as commands
from nbdnfs.errors import (
    BusyError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from nbdnfs.kernel import device_in_use
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_device import Attached

FLAGS = 0x10D


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_machine(tmp_path / "root")


@pytest.fixture
def kernel(root: Path) -> FakeNetlink:
    return FakeNetlink(root)


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


def attach(server: Server, kernel: FakeNetlink, name: str | None = None, **settings: Any) -> Attached:
    settings = {"timeout_s": 5, "netlink": kernel, "root": kernel.root} | settings
    return commands.attach(server.path, name, **settings)


def detach(kernel: FakeNetlink, name: str = "/dev/nbd1", timeout_s: float = 5) -> None:
    commands.detach(name, timeout_s=timeout_s, netlink=kernel, root=kernel.root)  # type: ignore[arg-type]


def test_attach(server: Server, kernel: FakeNetlink, root: Path) -> None:
    """The kernel gets size, block size, flags, the timeouts of the hard device and a backend to find it by."""
    assert attach(server, kernel, "/dev/nbd0") == Attached(0, SIZE_BYTES)
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
    assert state.backend == commands.backend_of_socket(server.path)


def test_attach_takes_a_free_device(server: Server, kernel: FakeNetlink) -> None:
    """Without a device the kernel's choice is what is returned."""
    assert attach(server, kernel).path == "/dev/nbd2"


@pytest.mark.parametrize("name", ["/dev/nbd1", "nbd1", "/dev/../dev/nbd1"])
def test_attach_to_a_device_in_use(server: Server, kernel: FakeNetlink, name: str) -> None:
    """Names the process and the backend; nothing reaches the kernel."""
    with pytest.raises(BusyError, match=r"process 4711 \(which has ended\) to nbdnfs:/run/x.sock") as caught:
        attach(server, kernel, name)
    assert "nbdnfs detach /dev/nbd1" in caught.value.hint
    assert kernel.connects == []


def test_attach_to_a_device_of_a_living_process(server: Server, kernel: FakeNetlink, root: Path) -> None:
    """The name of the process that attached it, while it lives."""
    (root / "proc/4711").mkdir()
    (root / "proc/4711/status").write_text("Name: nbd-client\n")
    (root / "proc/4711/stat").write_text("4711 (nbd-client) S" + " 0" * 49 + "\n")
    with pytest.raises(BusyError, match=r"process 4711 \(nbd-client\)"):
        attach(server, kernel, "nbd1")


def busy_for(kernel: FakeNetlink, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """CONNECT answers EBUSY that many times."""
    connect = kernel.connect
    refusals = iter(range(times))

    def busy(sockets: list[int], **settings: Any) -> int:
        if next(refusals, None) is not None:
            raise BusyError("cannot attach: the device is in use")
        return connect(sockets, **settings)

    monkeypatch.setattr(kernel, "connect", busy)
    monkeypatch.setattr(device_in_use, "_OPENERS_GRACE_S", 0.1)


def test_attach_waits_for_a_short_look(server: Server, kernel: FakeNetlink, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle device that udev has open for a moment is busy for the kernel (seen on Linux 6.12)."""
    busy_for(kernel, monkeypatch, 2)
    assert attach(server, kernel, "/dev/nbd0").index == 0


def test_attach_to_an_idle_device_that_is_open(
    server: Server, kernel: FakeNetlink, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names the process that has it open; where none is seen, the kernel's refusal stands."""
    busy_for(kernel, monkeypatch, 1000)
    with pytest.raises(BusyError, match="cannot attach: the device is in use"):
        attach(server, kernel, "/dev/nbd0")
    opened_by(root, 81, "blkid", "/dev/nbd0")
    with pytest.raises(BusyError, match=r"open in blkid \(process 81\)"):
        attach(server, kernel, "/dev/nbd0")


def test_attached_meanwhile(server: Server, kernel: FakeNetlink, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process attaches it between the first look and CONNECT: refused at once, as if it had been before."""

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
        ("/dev/plain", UsageError, "'/dev/plain' is not a block device"),
        ("/dev/sda", UsageError, "'/dev/sda' is not an nbd device"),
        ("", NoInputError, "there is no device ''"),
    ],
)
@pytest.mark.parametrize("command", ["attach", "detach"])
def test_wrong_devices(
    server: Server,
    kernel: FakeNetlink,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    kind: type[NbdnfsError],
    message: str,
) -> None:
    """Each wrong word for a device has a message and a hint of its own, in both commands."""
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


def test_another_path_to_the_device(kernel: FakeNetlink, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    (root / "sys/block").mkdir(parents=True)
    (root / "proc/sys/kernel/osrelease").write_text("6.1.0\n")
    if available:
        (root / "lib/modules/6.1.0").mkdir(parents=True)
        (root / "lib/modules/6.1.0/modules.dep").write_text("kernel/drivers/block/nbd.ko:\n")
    with pytest.raises(UnavailableError, match="driver is not loaded") as caught:
        attach(server, FakeNetlink(root), "/dev/nbd0")
    assert hint in caught.value.hint


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this machine has the nbd driver")
def test_no_driver_on_this_machine(server: Server) -> None:
    """The same from the real netlink socket, where the kernel has no such family."""
    with pytest.raises(UnavailableError, match="nbd driver is not loaded"):
        commands.attach(server.path)


def test_wrong_sockets(kernel: FakeNetlink, tmp_path: Path) -> None:
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
            commands.attach(path, netlink=kernel, root=kernel.root)  # type: ignore[arg-type]
        assert caught.value.hint
    assert kernel.connects == []


def test_a_path_too_long_for_a_socket(kernel: FakeNetlink, tmp_path: Path) -> None:
    """sun_path has 108 bytes; a longer path to a real socket cannot be connected to."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        os.rename(tmp_path / "s", folder / "s")
        with pytest.raises(UsageError, match="too long"):
            commands.attach(folder / "s", netlink=kernel, root=kernel.root)  # type: ignore[arg-type]


def test_a_forbidden_socket(kernel: FakeNetlink, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """EACCES of connect(2), which root does not get."""

    class FakeForbidden(socket.socket):
        def connect(self, _: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(commands.socket, "socket", FakeForbidden)
    with pytest.raises(PermissionDeniedError, match="permission denied on the socket"):
        attach(server, kernel)


def test_a_server_that_says_nothing(kernel: FakeNetlink, tmp_path: Path) -> None:
    """The handshake has the deadline of the call."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(UnavailableError, match=r"within 0\.1 s"):
            commands.attach(tmp_path / "s", timeout_s=0.1, netlink=kernel, root=kernel.root)  # type: ignore[arg-type]


def test_what_the_kernel_refuses(server: Server, kernel: FakeNetlink) -> None:
    """Errors of netlink come through as they are."""
    kernel.error = PermissionDeniedError("no")
    with pytest.raises(PermissionDeniedError):
        attach(server, kernel)
    with pytest.raises(PermissionDeniedError):
        detach(kernel)


def test_a_device_that_does_not_show_its_size(server: Server, kernel: FakeNetlink) -> None:
    """Is given up at the deadline, and taken down again."""
    kernel.forgets_size = True
    with pytest.raises(UnavailableError, match=r"does not show its size within 0\.1 s"):
        attach(server, kernel, "nbd0", timeout_s=0.1)
    assert kernel.disconnects == [0]


def test_the_servers_connection_ends_with_a_failed_attach(server: Server, kernel: FakeNetlink) -> None:
    """Our descriptor is closed whatever happens, or the server would wait for requests for ever."""
    kernel.error = BusyError("no")
    for _ in range(3):
        with pytest.raises(BusyError):
            attach(server, kernel)
    # ResourceWarning is an error in these tests: an unclosed socket would have failed this one


def test_detach(kernel: FakeNetlink, root: Path) -> None:
    """DISCONNECT, and the device is idle when it returns."""
    detach(kernel)
    assert kernel.disconnects == [1]
    state = kernel_state.nbd_device("nbd1", root)
    assert state is not None
    assert not state.attached


def test_detach_what_is_not_attached(kernel: FakeNetlink) -> None:
    """Is an error, so that a script notices a wrong device."""
    with pytest.raises(NoInputError, match="/dev/nbd0 is not attached"):
        detach(kernel, "/dev/nbd0")
    assert kernel.disconnects == []


def test_a_device_that_stays(kernel: FakeNetlink) -> None:
    """The wait for its end has a deadline."""
    kernel.keeps_device = True
    with pytest.raises(UnavailableError, match=r"still there after 0\.1 s"):
        detach(kernel, timeout_s=0.1)


def test_backend_of_a_relative_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The identifier does not depend on where the command was called."""
    monkeypatch.chdir(tmp_path)
    assert commands.backend_of_socket(Path("s")) == f"nbdnfs:{tmp_path}/s"


def test_an_export_that_the_kernel_cannot_take(server: Server, kernel: FakeNetlink) -> None:
    """The message names the socket; nothing reaches the kernel."""
    server.size_bytes = SIZE_BYTES + 512
    with pytest.raises(UsageError, match=f"the export on {server.path}, {SIZE_BYTES + 512} bytes, is not a multiple"):
        attach(server, kernel)
    assert kernel.connects == []


@pytest.mark.parametrize("use", ["swap", "opened"])
def test_detach_refuses_a_device_in_use(
    kernel: FakeNetlink, root: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    """Nothing reaches the kernel; tests/kernel/test_device_in_use.py has all kinds of use."""
    monkeypatch.setattr(device_in_use, "_OPENERS_GRACE_S", 0.05)
    if use == "swap":
        (root / "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/nbd1 partition 65532 10240 -2\n")
    else:
        opened_by(root, 77, "mkfs.ext4", "/dev/nbd1")
    with pytest.raises(BusyError):
        detach(kernel)
    assert kernel.disconnects == []


@pytest.mark.parametrize("fails", [False, True])
def test_warm_up(server: Server, kernel: FakeNetlink, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Part of attach on request; where it fails no device is left behind."""
    warmed: list[Path] = []

    def warm_up(path: Path) -> None:
        warmed.append(path)
        if fails:
            raise UnavailableError("no answer")

    monkeypatch.setattr(commands, "warm_up", warm_up)
    with pytest.raises(UnavailableError) if fails else contextlib.nullcontext():
        attach(server, kernel, warm=True)
    assert warmed == [Path("/dev/nbd2")]
    assert kernel.disconnects == ([2] if fails else [])


def test_importing_this_does_not_load_pyroute2() -> None:
    """It comes with the first attach or detach."""
    code = "import sys, nbdnfs.commands.attach; print([m for m in sys.modules if 'pyroute2' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.stdout == "[]\n"
