# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's generic-netlink family "nbd": CONNECT, DISCONNECT, RECONFIGURE, STATUS and LINK_DEAD.

Names, numbers and nesting are those of include/uapi/linux/nbd-netlink.h, types those of nbd_attr_policy in
drivers/block/nbd.c (Linux 4.12 to 6.12 agree on both). pyroute2 encodes and decodes the messages, through its
generic-netlink classes `genlmsg`, `ctrlmsg` and `nla`. The socket is a plain one, for three reasons:

- Deadlines. GenericNetlinkSocket of pyroute2 has none, and waits in asyncio from 0.9 on.
- It repeats a request that is answered with EBUSY for nine seconds; here EBUSY is the answer.
- Memory. The keeper is a locked process of at most 24 MiB that holds this module, which adds 1.3 MB to the
  13.9 MB of CPython 3.11 with the modules that the keeper has anyway, in all versions from 0.7.2 to 0.9.7.
  `import pyroute2` adds 19 to 21 MB; GenericNetlinkSocket alone, without the package's root module, 1.7 MB in
  0.7.2 and 0.7.7, 9.2 MB in 0.9.7.

After import and one `NbdNetlink.open` nothing more is imported, so that a resident process can use it under memory
pressure. A request allocates kernel memory with GFP_KERNEL: such a process must be an IO flusher (prctl(2)).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
import socket
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

from nbdnfs.errors import (
    BusyError,
    ConfigError,
    NbdnfsError,
    NoInputError,
    NoMemoryError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
    is_of_want,
)
from nbdnfs.kernel import state as kernel_state

DEFAULT_TIMEOUT_S = 5.0

# NBD_ATTR_CLIENT_FLAGS, include/uapi/linux/nbd.h
CFLAG_DESTROY_ON_DISCONNECT = 1 << 0
CFLAG_DISCONNECT_ON_CLOSE = 1 << 1

_FAMILY = "nbd"
_FAMILY_VERSION = 1
_MULTICAST_GROUP = "nbd_mc_group"

_CMD_CONNECT = 1
_CMD_DISCONNECT = 2
_CMD_RECONFIGURE = 3
_CMD_LINK_DEAD = 4
_CMD_STATUS = 5

# include/uapi/linux/netlink.h and genetlink.h
_NETLINK_GENERIC = 16
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_NLA_F_NESTED = 1 << 15
_GENL_ID_CTRL = 16
_CTRL_CMD_GETFAMILY = 3
_CTRL_VERSION = 1

_HEADER_BYTES = 16
# Stands for a descriptor that is not known yet: no other number in a message has these bytes.
_PLACEHOLDER = 0x7FA1B2C3
_RECEIVE_BYTES = 32 * 1024


def _import_messages() -> Any:
    """pyroute2.netlink without pyroute2/__init__.py, which imports the whole library (19 MB).

    During the import an empty module stands in for the root module of the package. A process that has imported
    pyroute2 already, or a version that fails this way, is served by the ordinary import.
    """
    spec = None if "pyroute2" in sys.modules else importlib.util.find_spec("pyroute2")
    if spec is not None and spec.submodule_search_locations is not None:
        root = types.ModuleType("pyroute2")
        root.__path__ = list(spec.submodule_search_locations)
        sys.modules["pyroute2"] = root
        try:
            return importlib.import_module("pyroute2.netlink")
        except (ImportError, AttributeError):
            for name in [name for name in sys.modules if name.startswith("pyroute2.")]:
                del sys.modules[name]
        finally:
            del sys.modules["pyroute2"]
    try:
        return importlib.import_module("pyroute2.netlink")
    except ImportError:
        raise ConfigError(
            "the Python package pyroute2 is not installed",
            "install it (Debian: apt install python3-pyroute2)",
        ) from None


_messages = _import_messages()
_genlmsg: Any = _messages.genlmsg
_ctrlmsg: Any = _messages.ctrlmsg
_nla: Any = _messages.nla
_nlmsg: Any = _messages.nlmsg


class NbdMessage(_genlmsg):  # type: ignore[misc]
    """A request or an answer. The 64-bit attributes are plain NLA_U64: the family has no padding
    attribute."""

    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets", _NLA_F_NESTED),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "device_list", _NLA_F_NESTED),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(_nla):  # type: ignore[misc]
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item", _NLA_F_NESTED))

        class item(_nla):  # type: ignore[misc]
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class device_list(_nla):  # type: ignore[misc]
        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item", _NLA_F_NESTED))

        class item(_nla):  # type: ignore[misc]
            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


class _Ack(_nlmsg):  # type: ignore[misc]
    """struct nlmsgerr without the request that it quotes."""

    fields = (("error", "i"),)


class NbdNetlink:
    """One open netlink socket on which requests are made, one at a time. Not for several threads at once.

    `sock` is exclusively its own. Every call but `status` raises PermissionDeniedError without CAP_SYS_ADMIN in the
    initial user namespace, and each raises UnavailableError when no answer comes within `timeout_s` seconds after the
    kernel has done its work. It works inside sendmsg(2), for which there is no time limit; see `disconnect`.
    """

    def __init__(self, sock: socket.socket, family_id: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._sock = sock
        self._family_id = family_id
        self._timeout_s = timeout_s
        self._sequence = 0

    @classmethod
    def open(cls, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> NbdNetlink:
        """A socket to the running kernel. UnavailableError, with a hint, without the
        driver."""
        sock = _open_socket()
        try:
            family_id, _ = _find_family(sock, _FAMILY, timeout_s)
        except BaseException:
            sock.close()
            raise
        return cls(sock, family_id, timeout_s=timeout_s)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> NbdNetlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(
        self,
        sockets: Sequence[int],
        *,
        size_bytes: int,
        block_size_bytes: int,
        server_flags: int,
        backend: str,
        timeout_s: int,
        dead_conn_timeout_s: int,
        index: int | None = None,
        client_flags: int = 0,
    ) -> int:
        """Attach a device to `sockets` (descriptors in the transmission phase) and return its index.

        nbd_genl_connect. Without `index` the kernel takes a free device or makes one. Several sockets need
        CAN_MULTI_CONN in `server_flags`. `timeout_s` 0 never declares a slow server dead. The kernel holds
        the sockets from now on; the descriptors may be closed. BusyError: the device is attached or open.
        """
        message = self._message(_CMD_CONNECT)
        _add(message, "INDEX", index)
        _add(message, "SIZE_BYTES", size_bytes)
        _add(message, "BLOCK_SIZE_BYTES", block_size_bytes)
        _add(message, "TIMEOUT", timeout_s)
        _add(message, "SERVER_FLAGS", server_flags)
        _add(message, "CLIENT_FLAGS", client_flags)
        _add_sockets(message, sockets)
        _add(message, "DEAD_CONN_TIMEOUT", dead_conn_timeout_s)
        _add_backend(message, backend)
        answer = self._ask(message, "attach a device" if index is None else f"attach /dev/nbd{index}")
        got = answer.get_attr("NBD_ATTR_INDEX")
        if got is None:
            raise NbdnfsError("the kernel attached a device, but did not say which")
        return int(got)

    def reconfigure(
        self,
        index: int,
        sockets: Sequence[int],
        *,
        backend: str,
        timeout_s: int | None = None,
        dead_conn_timeout_s: int | None = None,
    ) -> None:
        """Give an attached device new sockets for its dead ones; `backend` is the one that CONNECT had.

        nbd_genl_reconfigure. While all its sockets live, the kernel reports success and drops the new ones
        (nbd_reconnect_socket: ENOSPC): success does not say that the kernel took it.
        NbdnfsError: no such device, not attached, or the backend differs; the kernel does not say which.
        NoMemoryError: for the request, or only for its answer; whether the kernel took a socket is not known.
        """
        message = self._message(_CMD_RECONFIGURE)
        _add(message, "INDEX", index)
        _add(message, "TIMEOUT", timeout_s)
        _add_sockets(message, sockets)
        _add(message, "DEAD_CONN_TIMEOUT", dead_conn_timeout_s)
        _add_backend(message, backend)
        self._order(message, f"reconnect /dev/nbd{index}")

    def reconfigure_request(self, index: int, *, backend: str) -> tuple[bytes, int]:
        """`reconfigure` as bytes for another process to send on a socket of its own, and where in them the descriptor
        of the new socket belongs: four bytes in the machine's order."""
        message = self._message(_CMD_RECONFIGURE)
        _add(message, "INDEX", index)
        _add_sockets(message, [_PLACEHOLDER])
        _add_backend(message, backend)
        _finish(message, self._family_id, 0, _NLM_F_REQUEST | _NLM_F_ACK)
        data = bytes(message.data)
        wanted = _PLACEHOLDER.to_bytes(4, sys.byteorder)
        assert data.count(wanted) == 1
        return data, data.index(wanted)

    def fileno(self) -> int:
        return self._sock.fileno()

    def disconnect(self, index: int) -> None:
        """Take a device down; requests in flight fail. It stays attached until the last process that has it open closes
        it.

        nbd_genl_disconnect. Success also for a device that is not attached. The kernel first notifies the server
        (send_disconnects): a server that is stopped and reads nothing blocks the caller here, and signals have no
        effect, until it continues or dies. Killing it helps; a dead server does no harm.
        """
        message = self._message(_CMD_DISCONNECT)
        _add(message, "INDEX", index)
        self._order(message, f"detach /dev/nbd{index}")

    def status(self, index: int | None = None) -> dict[int, bool]:
        """Index ▸ "connected", of one device or of all. Empty when there is no such device.

        nbd_genl_status. "connected" says only that a configuration exists: true while the socket is dead, and true for
        a device that a process merely has open.
        """
        message = self._message(_CMD_STATUS)
        _add(message, "INDEX", index)
        devices = self._ask(message, "list the devices").get_attr("NBD_ATTR_DEVICE_LIST")
        items = devices.get_attrs("NBD_DEVICE_ITEM") if devices is not None else []
        return {item.get_attr("NBD_DEVICE_INDEX"): bool(item.get_attr("NBD_DEVICE_CONNECTED")) for item in items}

    def _message(self, command: int) -> Any:
        message = NbdMessage()
        message["cmd"] = command
        message["version"] = _FAMILY_VERSION
        message["attrs"] = []
        return message

    def _order(self, message: Any, what: str) -> None:
        """Send a request whose only answer is the acknowledgement."""
        self._sequence += 1
        _exchange(
            self._sock,
            message,
            self._family_id,
            self._sequence,
            _NLM_F_REQUEST | _NLM_F_ACK,
            self._timeout_s,
            what,
        )

    def _ask(self, message: Any, what: str) -> Any:
        """Send a request that is answered by a message of the family, and return that."""
        self._sequence += 1
        answer = _exchange(self._sock, message, self._family_id, self._sequence, _NLM_F_REQUEST, self._timeout_s, what)
        if answer is None:
            raise NbdnfsError(f"cannot {what}: the kernel's answer is empty")
        return _decode(NbdMessage, answer)


class LinkDeadEvents:
    """LINK_DEAD on the multicast group nbd_mc_group: poll `fileno()`, then `read()`.

    Best effort: the kernel sends none when it has no memory (nbd_mcast_index), and drops events that are not read in
    time. A program that depends on them polls as well.
    """

    def __init__(self, sock: socket.socket, family_id: int) -> None:
        self._sock = sock
        self._family_id = family_id
        sock.setblocking(False)

    @classmethod
    def open(cls, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> LinkDeadEvents:
        """Join the group. The same errors as NbdNetlink.open."""
        sock = _open_socket()
        try:
            family_id, groups = _find_family(sock, _FAMILY, timeout_s)
            if _MULTICAST_GROUP not in groups:
                raise UnavailableError(f"the kernel's nbd driver has no multicast group {_MULTICAST_GROUP}")
            sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, groups[_MULTICAST_GROUP])
        except OSError as error:
            sock.close()
            raise _error(error.errno or 0, f"listen to {_MULTICAST_GROUP}") from None
        except BaseException:
            sock.close()
            raise
        return cls(sock, family_id)

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self) -> list[int]:
        """The indexes of the devices of which a socket has died since the last call; does not block."""
        indexes: list[int] = []
        while True:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return indexes
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # events were dropped, later ones may follow
                    continue
                raise
            if _header(data)["type"] != self._family_id:
                continue
            message = _decode(NbdMessage, data)
            if message["cmd"] == _CMD_LINK_DEAD:
                indexes.append(int(message.get_attr("NBD_ATTR_INDEX")))

    def close(self) -> None:
        self._sock.close()


def _open_socket() -> socket.socket:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
        sock.bind((0, 0))
    except OSError as error:
        raise UnavailableError(f"cannot open a generic netlink socket: {error.strerror}") from None
    return sock


def _find_family(sock: socket.socket, name: str, timeout_s: float) -> tuple[int, dict[str, int]]:
    """The number of a generic-netlink family, and its multicast groups by name."""
    message = _ctrlmsg()
    message["cmd"] = _CTRL_CMD_GETFAMILY
    message["version"] = _CTRL_VERSION
    message["attrs"] = [("CTRL_ATTR_FAMILY_NAME", name)]

    def missing(code: int, what: str) -> NbdnfsError:
        if code == errno.ENOENT:
            return UnavailableError(f"the kernel's {name} driver is not loaded", kernel_state.nbd_module().hint)
        return _error(code, what)

    answer = _exchange(sock, message, _GENL_ID_CTRL, 0, _NLM_F_REQUEST, timeout_s, f"find the {name} driver", missing)
    if answer is None:
        raise NbdnfsError(f"cannot find the {name} driver: the kernel's answer is empty")
    family = _decode(_ctrlmsg, answer)
    groups = family.get_attr("CTRL_ATTR_MCAST_GROUPS") or []
    return int(family.get_attr("CTRL_ATTR_FAMILY_ID")), {
        group.get_attr("CTRL_ATTR_MCAST_GRP_NAME"): int(group.get_attr("CTRL_ATTR_MCAST_GRP_ID")) for group in groups
    }


def _error(code: int, what: str) -> NbdnfsError:
    """The kernel's errno for a request that was to do `what`, as an error with a hint."""
    reason = os.strerror(code)
    if code in (errno.EPERM, errno.EACCES):
        return PermissionDeniedError(f"cannot {what}: {reason}", "this needs CAP_SYS_ADMIN: run it as root")
    if code == errno.EBUSY:
        return BusyError(f"cannot {what}: the device is in use", "detach it first, or use another one")
    if code in (errno.ENOENT, errno.ENODEV):
        return NoInputError(f"cannot {what}: {reason}", "list the devices: ls /sys/block")
    if is_of_want(OSError(code, reason)):
        return NoMemoryError(f"cannot {what}: {reason}", "the kernel's log says more: dmesg | tail")
    # EINVAL: no such device, going down, not configured, another backend (nbd_genl_connect and its sisters)
    return NbdnfsError(f"cannot {what}: {reason}", "the kernel's log says more: dmesg | tail")


def _exchange(
    sock: socket.socket,
    message: Any,
    message_type: int,
    sequence: int,
    flags: int,
    timeout_s: float,
    what: str,
    to_error: Callable[[int, str], NbdnfsError] = _error,
) -> bytes | None:
    """Send one request and return the bytes of the answer; None for a bare acknowledgement.

    Answers to earlier requests, whose deadline had passed, are dropped by their sequence number.
    """
    _finish(message, message_type, sequence, flags)
    try:
        sock.settimeout(timeout_s)
        sock.send(message.data)
        # counted from here: the kernel works inside send, for any time, and its outcome counts
        deadline = time.monotonic() + timeout_s
        while True:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError
            sock.settimeout(remaining_s)
            data = sock.recv(_RECEIVE_BYTES)
            header = _header(data)
            if header["sequence_number"] != sequence:
                continue
            if header["type"] != _NLMSG_ERROR:
                return data
            code = -_decode(_Ack, data)["error"]
            if code:
                raise to_error(code, what)
            return None
    except TimeoutError:
        raise UnavailableError(f"cannot {what}: the kernel did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise to_error(error.errno or 0, what) from None


def _finish(message: Any, message_type: int, sequence: int, flags: int) -> None:
    message["header"]["type"] = message_type
    message["header"]["flags"] = flags
    message["header"]["sequence_number"] = sequence
    message["header"]["pid"] = 0
    message.encode()


def _header(data: bytes) -> dict[str, int]:
    if len(data) < _HEADER_BYTES:
        raise NbdnfsError(f"the kernel's netlink answer is truncated: {len(data)} bytes")
    header: dict[str, int] = _decode(_nlmsg, data[:_HEADER_BYTES])["header"]
    return header


def _decode(kind: Any, data: bytes) -> Any:
    message = kind(data)
    message.decode()
    return message


def _add(message: Any, name: str, value: int | None) -> None:
    if value is not None:
        message["attrs"].append((f"NBD_ATTR_{name}", value))


def _add_sockets(message: Any, sockets: Sequence[int]) -> None:
    items = [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", descriptor)]}) for descriptor in sockets]
    message["attrs"].append(("NBD_ATTR_SOCKETS", {"attrs": items}))


def _add_backend(message: Any, backend: str) -> None:
    """With its final NUL, which nla_strdup and nla_strcmp strip (lib/nlattr.c)."""
    with contextlib.suppress(UnicodeEncodeError):
        if "\0" not in backend and backend.encode():
            message["attrs"].append(("NBD_ATTR_BACKEND_IDENTIFIER", backend))
            return
    raise UsageError(f"{backend!r} cannot be a backend identifier", "use one line of UTF-8 text")
