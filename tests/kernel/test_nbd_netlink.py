# SPDX-License-Identifier: LGPL-2.1-or-later
"""The generic-netlink family "nbd": bytes, answers and errors, without a kernel that has it.

The vectors are written by hand. A message is struct nlmsghdr (u32 length with itself, u16 type, u16 flags, u32
sequence, u32 port; include/uapi/linux/netlink.h), struct genlmsghdr (u8 command, u8 version, u16 reserved;
genetlink.h) and attributes. An attribute is struct nlattr (u16 length with these four bytes, u16 type with bit 15
for "nested"), its payload, and zeros up to a multiple of four that its length does not count. Commands and attribute
types are the positions in the enums of include/uapi/linux/nbd-netlink.h, payload types are in nbd_attr_policy of
drivers/block/nbd.c. Integers have the machine's byte order; the vectors are little-endian.
"""

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdnfs.errors import (
    BusyError,
    NbdnfsError,
    NoInputError,
    NoMemoryError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from nbdnfs.kernel import nbd_netlink
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_netlink import LinkDeadEvents, NbdNetlink

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the vectors are little-endian")

REPOSITORY = Path(__file__).resolve().parents[2]
FAMILY = 0x1C
REQUEST, REQUEST_ACK = 1, 5
ERROR = 2  # NLMSG_ERROR

Answer = Callable[[int], bytes] | OSError


class FakeKernelSocket:
    """The kernel's end of a netlink socket: keeps the requests, and gives the prepared answers one by one."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.queue: list[bytes] = []
        self.closed = False

    def settimeout(self, timeout_s: float) -> None:
        assert timeout_s > 0

    def send(self, data: bytes) -> int:
        self.requests.append(bytes(data))
        (sequence,) = struct.unpack_from("<I", data, 8)
        for answer in self.answers:
            if isinstance(answer, OSError):
                raise answer
            self.queue.append(answer(sequence))
        return len(data)

    def recv(self, _: int) -> bytes:
        if not self.queue:
            raise TimeoutError
        return self.queue.pop(0)

    def close(self) -> None:
        self.closed = True


def message(kind: int, sequence: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack("<IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def says(command: int, attributes: bytes) -> Answer:
    """An answer of the family, as genlmsg_put_reply makes it."""
    return lambda sequence: message(FAMILY, sequence, struct.pack("<BBH", command, 1, 0) + attributes)


def fails(code: int) -> Answer:
    """NLMSG_ERROR: the errno (0 acknowledges), then the header of the request."""
    return lambda sequence: message(ERROR, sequence, struct.pack("<i", -code) + b"\0" * 16)


def opened(*answers: Answer) -> tuple[NbdNetlink, FakeKernelSocket]:
    sock = FakeKernelSocket(*answers)
    return NbdNetlink(sock, FAMILY, timeout_s=1), sock  # type: ignore[arg-type]


def connect(nbd: NbdNetlink, **changes: object) -> int:
    settings: dict[str, object] = {
        "size_bytes": 8 << 30,
        "block_size_bytes": 4096,
        "server_flags": 0x10D,
        "backend": "nbd/x",
        "timeout_s": 0,
        "dead_conn_timeout_s": 86400,
    }
    return nbd.connect([5, 6], **(settings | changes))  # type: ignore[arg-type]


CONNECTED = says(1, attribute(1, b"\x07\0\0\0"))


def test_connect() -> None:
    """Every attribute, the two sockets nested twice, and the index that the kernel answers with."""
    nbd, sock = opened(CONNECTED)
    assert connect(nbd, index=3, client_flags=2) == 7
    expected = """
        8c000000 1c00 0100 01000000 00000000   length 140, family, NLM_F_REQUEST, sequence 1, port 0
        01 01 0000                             NBD_CMD_CONNECT, NBD_GENL_VERSION
        0800 0100 03000000                     NBD_ATTR_INDEX u32 3
        0c00 0200 0000000002000000             NBD_ATTR_SIZE_BYTES u64 8 GiB
        0c00 0300 0010000000000000             NBD_ATTR_BLOCK_SIZE_BYTES u64 4096
        0c00 0400 0000000000000000             NBD_ATTR_TIMEOUT u64 0
        0c00 0500 0d01000000000000             NBD_ATTR_SERVER_FLAGS u64 0x10d
        0c00 0600 0200000000000000             NBD_ATTR_CLIENT_FLAGS u64 2
        1c00 0780                              NBD_ATTR_SOCKETS, nested, 28 bytes
        0c00 0180                                NBD_SOCK_ITEM, nested, 12 bytes
        0800 0100 05000000                         NBD_SOCK_FD u32 5
        0c00 0180
        0800 0100 06000000
        0c00 0800 8051010000000000             NBD_ATTR_DEAD_CONN_TIMEOUT u64 86400
        0a00 0a00 6e62642f7800 0000            NBD_ATTR_BACKEND_IDENTIFIER "nbd/x" NUL, two zeros
    """
    assert sock.requests == [vector(expected)]


def test_connect_without_an_index() -> None:
    """The kernel chooses where there is no NBD_ATTR_INDEX; the rest moves up."""
    nbd, sock = opened(CONNECTED)
    assert connect(nbd) == 7
    assert sock.requests[0][:4] == b"\x84\0\0\0"
    assert sock.requests[0][20:24] == bytes.fromhex("0c00 0200")


def test_disconnect() -> None:
    """Asks for an acknowledgement, as nothing else is answered."""
    nbd, sock = opened(fails(0))
    nbd.disconnect(3)
    expected = """
        1c000000 1c00 0500 01000000 00000000   length 28, NLM_F_REQUEST | NLM_F_ACK
        02 01 0000                             NBD_CMD_DISCONNECT
        0800 0100 03000000
    """
    assert sock.requests == [vector(expected)]


def test_reconfigure() -> None:
    """Index, sockets and the backend, which the kernel compares; nothing that was not asked for."""
    nbd, sock = opened(fails(0))
    nbd.reconfigure(3, [9], backend="abc")
    expected = """
        34000000 1c00 0500 01000000 00000000
        03 01 0000                             NBD_CMD_RECONFIGURE
        0800 0100 03000000
        1000 0780 0c00 0180 0800 0100 09000000
        0800 0a00 61626300                     "abc" NUL
    """
    assert sock.requests == [vector(expected)]


def test_reconfigure_with_timeouts() -> None:
    """Both timeouts may be changed on a connected device."""
    nbd, sock = opened(fails(0))
    nbd.reconfigure(3, [9], backend="abc", timeout_s=5, dead_conn_timeout_s=60)
    assert vector("0c00 0400 0500000000000000") in sock.requests[0]
    assert vector("0c00 0800 3c00000000000000") in sock.requests[0]


def test_status_of_all_devices() -> None:
    """A list of items as populate_nbd_status writes it: index u32, connected u8; without the nested bit."""

    def item(index: int, connected: int) -> bytes:
        return attribute(1, attribute(1, struct.pack("<I", index)) + attribute(2, bytes([connected])))

    nbd, sock = opened(says(5, attribute(9, item(0, 0) + item(1, 1) + item(15, 0))))
    assert nbd.status() == {0: False, 1: True, 15: False}
    assert sock.requests == [vector("14000000 1c00 0100 01000000 00000000 05 01 0000")]


def test_status_of_one_device() -> None:
    """The index is in the request; the list is empty when there is no such device."""
    nbd, sock = opened(says(5, attribute(9, b"")))
    assert nbd.status(3) == {}
    assert sock.requests == [vector("1c000000 1c00 0100 01000000 00000000 05 01 0000 0800 0100 03000000")]


def test_status_answer_by_hand() -> None:
    """The same decoding from bytes that no helper of these tests made."""
    answer = "2c000000 1c00 0000 01000000 00000000 05 01 0000" + (
        "1800 0980"  # NBD_ATTR_DEVICE_LIST, 24 bytes
        "1400 0180"  # NBD_DEVICE_ITEM, 20 bytes
        "0800 0100 02000000"  # NBD_DEVICE_INDEX 2
        "0500 0200 01 000000"  # NBD_DEVICE_CONNECTED 1, three zeros
    )
    nbd, _ = opened(lambda _: bytes.fromhex(answer))
    assert nbd.status(2) == {2: True}


@pytest.mark.parametrize(
    ("code", "kind", "message_part", "hint"),
    [
        (errno.EPERM, PermissionDeniedError, "cannot attach /dev/nbd3: Operation not permitted", "CAP_SYS_ADMIN"),
        (errno.EBUSY, BusyError, "cannot attach /dev/nbd3: the device is in use", "detach it first"),
        (errno.ENOENT, NoInputError, "No such file", "/sys/block"),
        (errno.EINVAL, NbdnfsError, "Invalid argument", "dmesg"),
        (errno.ENOMEM, NoMemoryError, "Cannot allocate memory", "dmesg"),
    ],
)
def test_the_kernels_refusals(code: int, kind: type[NbdnfsError], message_part: str, hint: str) -> None:
    """Each errno that nbd_genl_connect returns becomes an error with a hint, and is not tried again."""
    nbd, sock = opened(fails(code))
    with pytest.raises(kind, match=message_part) as caught:
        connect(nbd, index=3)
    assert type(caught.value) is kind
    assert hint in caught.value.hint
    assert len(sock.requests) == 1


@pytest.mark.parametrize("order", ["disconnect", "reconfigure"])
def test_refused_orders(order: str) -> None:
    """An error where an acknowledgement is expected."""
    nbd, _ = opened(fails(errno.EPERM))
    with pytest.raises(PermissionDeniedError, match="/dev/nbd3"):
        nbd.disconnect(3) if order == "disconnect" else nbd.reconfigure(3, [4], backend="x")


def test_a_socket_error() -> None:
    """An errno of sendmsg itself is reported the same way."""
    nbd, _ = opened(OSError(errno.ENOBUFS, "No buffer space available"))
    with pytest.raises(NbdnfsError, match="No buffer space"):
        nbd.disconnect(3)


def test_no_answer() -> None:
    """A kernel that says nothing is given up, and its late answer is not taken for the next one."""
    nbd, sock = opened()
    with pytest.raises(UnavailableError, match="within 1 s"):
        nbd.status()
    sock.queue.append(message(FAMILY, 1, b"\5\1\0\0" + attribute(9, attribute(1, attribute(1, b"\1\0\0\0")))))
    sock.answers = [says(5, attribute(9, b""))]
    assert nbd.status() == {}


def test_work_that_takes_the_kernel_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time inside sendmsg(2) does not count: what the kernel did in the end is what is reported."""
    nbd, sock = opened(fails(0))
    clock = [0.0]
    monkeypatch.setattr(nbd_netlink.time, "monotonic", lambda: clock[0])
    send = sock.send

    def slow_send(data: bytes) -> int:
        clock[0] += 60
        return send(data)

    sock.send = slow_send  # type: ignore[method-assign]
    nbd.disconnect(3)


def test_stray_answers_do_not_prolong_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline holds even when other messages keep arriving."""
    clock = iter(range(100))
    monkeypatch.setattr(nbd_netlink.time, "monotonic", lambda: next(clock))
    nbd, sock = opened(*[lambda sequence: message(FAMILY, sequence + 1, b"\5\1\0\0")] * 50)
    with pytest.raises(UnavailableError, match="within 1 s"):
        nbd.status()
    assert len(sock.queue) == 50


def test_a_connect_that_is_only_acknowledged() -> None:
    """nbd_connect_reply may find no memory; then the index is unknown, and that is an error."""
    nbd, _ = opened(fails(0))
    with pytest.raises(NbdnfsError, match="empty"):
        connect(nbd)
    nbd, _ = opened(says(1, b""))
    with pytest.raises(NbdnfsError, match="did not say which"):
        connect(nbd)


def test_a_short_answer() -> None:
    """Fewer bytes than a header are an error of ours."""
    nbd, _ = opened(lambda _: b"\0" * 8)
    with pytest.raises(NbdnfsError, match="is truncated: 8 bytes"):
        nbd.status()


@pytest.mark.parametrize("backend", ["", "a\0b", "\udcff"])
def test_backends_that_cannot_be_compared(backend: str) -> None:
    """The kernel keeps a C string; what is none is refused before anything is sent."""
    nbd, sock = opened(CONNECTED)
    with pytest.raises(UsageError, match="backend identifier"):
        connect(nbd, backend=backend)
    assert sock.requests == []


@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**16 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=16)
)
def test_any_numbers_are_encoded_in_full(size_bytes: int, flags: int, sockets: list[int]) -> None:
    """No value of the types changes the layout: sizes, flags and descriptors stand where the header wants them."""
    nbd, sock = opened(CONNECTED)
    nbd.connect(
        sockets,
        size_bytes=size_bytes,
        block_size_bytes=4096,
        server_flags=flags,
        backend="b",
        timeout_s=0,
        dead_conn_timeout_s=1,
    )
    items = b"".join(attribute(0x8001, attribute(1, struct.pack("<I", descriptor))) for descriptor in sockets)
    attributes = [
        attribute(2, struct.pack("<Q", size_bytes)),
        attribute(3, struct.pack("<Q", 4096)),
        attribute(4, struct.pack("<Q", 0)),
        attribute(5, struct.pack("<Q", flags)),
        attribute(6, struct.pack("<Q", 0)),
        attribute(0x8007, items),
        attribute(8, struct.pack("<Q", 1)),
        attribute(10, b"b\0"),
    ]
    assert sock.requests == [message(FAMILY, 1, b"\1\1\0\0" + b"".join(attributes), flags=REQUEST)]


def test_sequence_numbers_grow() -> None:
    """Each request on one open socket has its own."""
    nbd, sock = opened(fails(0))
    for _ in range(3):
        nbd.disconnect(0)
    assert [struct.unpack_from("<I", request, 8)[0] for request in sock.requests] == [1, 2, 3]


def test_closing() -> None:
    """The with statement closes the socket."""
    nbd, sock = opened()
    with nbd:
        pass
    assert sock.closed


def test_link_dead_events() -> None:
    """nbd_mcast_index: NBD_CMD_LINK_DEAD with the index; several at once; nothing blocks; others are skipped."""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    events = LinkDeadEvents(ours, FAMILY)
    with kernel:
        assert events.read() == []
        kernel.send(bytes.fromhex("1c000000 1c00 0000 00000000 00000000 04 01 0000 0800 0100 02000000"))
        kernel.send(message(FAMILY + 1, 0, b"\4\1\0\0" + attribute(1, b"\1\0\0\0")))
        kernel.send(message(FAMILY, 0, b"\1\1\0\0" + attribute(1, b"\1\0\0\0")))
        kernel.send(message(FAMILY, 0, b"\4\1\0\0" + attribute(1, b"\5\0\0\0")))
        assert events.read() == [2, 5]
        assert events.fileno() == ours.fileno()
    events.close()
    assert ours.fileno() == -1


def test_dropped_events_are_no_error() -> None:
    """ENOBUFS reports that the queue overflowed; later events are read."""

    class FakeOverrunSocket:
        answers: list[bytes | OSError] = [  # noqa: RUF012
            OSError(errno.ENOBUFS, "overrun"),
            message(FAMILY, 0, b"\4\1\0\0" + attribute(1, b"\3\0\0\0")),
            BlockingIOError(),
        ]

        def setblocking(self, flag: bool) -> None:
            assert not flag

        def recv(self, _: int) -> bytes:
            answer = self.answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

    assert LinkDeadEvents(FakeOverrunSocket(), FAMILY).read() == [3]  # type: ignore[arg-type]


def test_events_that_cannot_be_read() -> None:
    """Another error than a full queue is the caller's: it would come again and again."""

    class FakeBrokenSocket:
        def setblocking(self, flag: bool) -> None:
            pass

        def recv(self, _: int) -> bytes:
            raise OSError(errno.ENOMEM, "no memory")

    with pytest.raises(OSError, match="no memory"):
        LinkDeadEvents(FakeBrokenSocket(), FAMILY).read()  # type: ignore[arg-type]


def family_answer(name: bytes, groups: bytes) -> Answer:
    """CTRL_CMD_NEWFAMILY (1) with CTRL_ATTR_FAMILY_ID (1), FAMILY_NAME (2) and MCAST_GROUPS (7)."""
    attributes = attribute(2, name + b"\0") + attribute(1, struct.pack("<H", FAMILY)) + attribute(7, groups)
    return lambda sequence: message(0x10, sequence, b"\1\2\0\0" + attributes)


def test_finding_the_family() -> None:
    """CTRL_CMD_GETFAMILY by name, and the number of the multicast group from the nested answer."""
    group = attribute(1, attribute(2, struct.pack("<I", 11)) + attribute(1, b"nbd_mc_group\0"))
    sock = FakeKernelSocket(family_answer(b"nbd", group))
    assert nbd_netlink._find_family(sock, "nbd", 1) == (FAMILY, {"nbd_mc_group": 11})  # type: ignore[arg-type]
    expected = """
        1c000000 1000 0100 00000000 00000000   GENL_ID_CTRL
        03 01 0000                             CTRL_CMD_GETFAMILY
        0800 0200 6e626400                     CTRL_ATTR_FAMILY_NAME "nbd" NUL
    """
    assert sock.requests == [vector(expected)]


def test_joining_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """LinkDeadEvents.open joins by number; without the group, or without permission, it says so and closes."""
    options: list[tuple[int, int, int]] = []

    class FakeJoiningSocket(FakeKernelSocket):
        def setsockopt(self, *option: int) -> None:
            if self.requests and option[2] == 12:
                raise OSError(errno.EPERM, "no")
            options.append(option)  # type: ignore[arg-type]

        def setblocking(self, _: bool) -> None:
            pass

    def group(number: int, name: bytes = b"nbd_mc_group") -> FakeJoiningSocket:
        nested = attribute(1, attribute(2, struct.pack("<I", number)) + attribute(1, name + b"\0"))
        sock = FakeJoiningSocket(family_answer(b"nbd", nested))
        monkeypatch.setattr(nbd_netlink, "_open_socket", lambda: sock)
        return sock

    group(11)
    LinkDeadEvents.open()
    assert options == [(270, 1, 11)]  # SOL_NETLINK, NETLINK_ADD_MEMBERSHIP
    sock = group(12)
    with pytest.raises(PermissionDeniedError):
        LinkDeadEvents.open()
    assert sock.closed
    sock = group(13, b"another")
    with pytest.raises(UnavailableError, match="no multicast group"):
        LinkDeadEvents.open()
    assert sock.closed


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (lambda: fails(errno.EPERM), PermissionDeniedError, "find the nbd driver"),
        (lambda: fails(errno.EIO), NbdnfsError, "find the nbd driver"),
        (lambda: fails(0), NbdnfsError, "answer is empty"),
    ],
)
def test_a_family_that_is_not_told(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Answer], kind: type[NbdnfsError], text: str
) -> None:
    """An error other than a missing driver, or no error and no number."""
    sock = FakeKernelSocket(answer())
    monkeypatch.setattr(nbd_netlink, "_open_socket", lambda: sock)
    with pytest.raises(kind, match=text) as caught:
        NbdNetlink.open()
    assert "driver is not loaded" not in caught.value.message
    assert sock.closed


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOENT for the family is a missing module, with what to do about it; the socket is closed."""
    sock = FakeKernelSocket(fails(errno.ENOENT))
    monkeypatch.setattr(nbd_netlink, "_open_socket", lambda: sock)
    with pytest.raises(UnavailableError, match="nbd driver is not loaded") as caught:
        NbdNetlink.open()
    assert caught.value.hint == kernel_state.nbd_module().hint
    assert sock.closed


def test_on_the_running_kernel() -> None:
    """The real controller answers: "nlctrl" is family 16 everywhere, and an invented family is missing."""
    with nbd_netlink._open_socket() as sock:
        family_id, groups = nbd_netlink._find_family(sock, "nlctrl", 5)
        assert family_id == 16
        assert "notify" in groups
        with pytest.raises(UnavailableError, match="nbdnfs-none driver is not loaded"):
            nbd_netlink._find_family(sock, "nbdnfs-none", 5)


def python(code: str, *path: Path) -> str:
    """What `code` prints in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, REPOSITORY]))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_resident_process_pays_little() -> None:
    """Import costs under 4 MiB (with the whole of pyroute2 it is 19), and use imports nothing more."""
    printed = python(
        """
import sys, socket, logging, dataclasses, enum, pathlib, nbdnfs.errors

def anonymous_kib():
    with open("/proc/self/status") as status:
        return int(dict(line.split(":", 1) for line in status)["RssAnon"].split()[0])

before_kib = anonymous_kib()
from nbdnfs.kernel import nbd_netlink
import_kib = anonymous_kib() - before_kib
loaded = set(sys.modules)
sock = nbd_netlink._open_socket()
nbd_netlink._find_family(sock, "nlctrl", 5)
nbd = nbd_netlink.NbdNetlink(sock, 16)  # the controller refuses the commands
for call in (lambda: nbd.status(1), lambda: nbd.reconfigure(1, [0], backend="x"), lambda: nbd.disconnect(1)):
    try:
        call()
    except nbd_netlink.NbdnfsError:
        pass
print(import_kib, sorted(set(sys.modules) - loaded), "pyroute2" in sys.modules)
import pyroute2
print(pyroute2.IPRoute.__name__)
"""
    )
    first, second = printed.splitlines()
    import_kib, rest = first.split(" ", 1)
    assert int(import_kib) < 4096
    assert rest == "[] False"
    assert second == "IPRoute", "a later import of the whole library still works"


def test_a_pyroute2_that_needs_its_root_module(tmp_path: Path) -> None:
    """Where the short way to the message classes fails, the ordinary import is used."""
    (tmp_path / "pyroute2/netlink").mkdir(parents=True)
    (tmp_path / "pyroute2/__init__.py").write_text("marker = 1\n")
    (tmp_path / "pyroute2/netlink/__init__.py").write_text(
        "from pyroute2 import marker\nclass Base(dict):\n    fields = ()\ngenlmsg = ctrlmsg = nla = nlmsg = Base\n"
    )
    assert python("from nbdnfs.kernel import nbd_netlink; print(nbd_netlink._messages.marker)", tmp_path) == "1\n"


def test_no_pyroute2(tmp_path: Path) -> None:
    """Its absence is said in one line, with the package to install."""
    (tmp_path / "pyroute2").mkdir()
    (tmp_path / "pyroute2/__init__.py").write_text("raise ImportError\n")
    printed = python(
        """
from nbdnfs.errors import ConfigError
try:
    import nbdnfs.kernel.nbd_netlink
except ConfigError as error:
    print(error.lines())
""",
        tmp_path,
    )
    assert "pyroute2 is not installed" in printed
    assert "python3-pyroute2" in printed


def vector(text: str) -> bytes:
    """The bytes of a vector: hexadecimal words, and after three blanks a remark."""
    return bytes.fromhex("".join(line.strip().split("   ")[0] for line in text.strip().splitlines()))
