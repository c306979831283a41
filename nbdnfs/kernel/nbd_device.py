# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel nbd device: attached to the socket of an NBD server, found by its backend identifier, given another socket.

`attach` makes the "hard" device: no request ever fails because the server is slow or away. TIMEOUT 0 never declares a
slow server dead; DEAD_CONN_TIMEOUT keeps requests waiting for another socket; queue/io_timeout makes the kernel send
requests again soon after it has one (drivers/block/nbd.c: nbd_xmit_timeout, nbd_handle_cmd).

`nbdnfs attach` and the keeper share this module. The keeper stays resident: once an `NbdKernel` is made, finding,
reconnecting and disconnecting its device imports and opens nothing more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbdnfs.errors import BusyError, NbdnfsError, UnavailableError, UnreadableError, UsageError
from nbdnfs.kernel import device_in_use, nbd_settings, openers
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_handshake import Export
from nbdnfs.kernel.waiting import wait_until
from nbdnfs.sizes import SLOT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdnfs.kernel.nbd_netlink import NbdNetlink
    from nbdnfs.kernel.state import NbdDevice

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 10.0
# How long a failed attach tries to take its device down again, while what the kernel says of it cannot be read.
_TAKE_DOWN_S = 10.0


@dataclass(frozen=True)
class Attached:
    """A device that is attached. `size_bytes` is 0 while the kernel does not show it."""

    index: int
    size_bytes: int

    @property
    def name(self) -> str:
        return f"nbd{self.index}"

    @property
    def path(self) -> str:
        return f"/dev/{self.name}"


def backend_of(name: str) -> str:
    """The backend identifier of the device of /etc/nbdnfs/NAME.toml, as /sys/block/nbdN/backend shows it."""
    return f"nbdnfs:{name}"


def find(backend: str, root: Path = kernel_state.ROOT) -> Attached | None:
    """The attached device with that backend, or None. One that is being taken down has no backend any more."""
    for state in kernel_state.nbd_devices(root):
        if state.attached and state.backend == backend:
            return Attached(state.index, state.size_bytes)
    return None


def attach(
    netlink: NbdNetlink,
    sock: socket.socket,
    export: Export,
    *,
    backend: str,
    source: str,
    index: int | None = None,
    dead_conn_timeout_s: int = nbd_settings.DEAD_CONN_TIMEOUT_S,
    io_timeout_ms: int = nbd_settings.IO_TIMEOUT_MS,
    max_sectors_kb: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    root: Path = kernel_state.ROOT,
) -> Attached:
    """Attach a device to `sock`, on which the server has just offered `export`, and set its queue up for swap.

    index           N of nbdN; without it, the kernel chooses a free device
    source          what has the export, for messages: "the backing file"
    max_sectors_kb  the largest request, no larger than the server takes; without it, the kernel's own value or
                    nbd_settings.MAX_REQUEST_KIB, whichever is smaller

    Returns once the node is there and has the export's size, which may take `timeout_s` seconds. Leaves no device
    behind when it fails.

    BusyError: the device is attached already, or open, or another one is attached to this backend. The caller sees to
    it that no other process attaches one at the same time. UsageError: the kernel cannot take this export.
    UnavailableError: the device does not appear. PermissionDeniedError: not root.
    """
    check(export, source)
    if (already := find(backend, root)) is not None:
        raise BusyError(
            f"{already.path} is attached to {backend} already, and a second device would overwrite its pages",
            f"use that one, or detach it first: nbdnfs detach {already.path}",
        )

    def connect() -> int:
        return netlink.connect(
            [sock.fileno()],
            index=index,
            size_bytes=export.size_bytes,
            block_size_bytes=SLOT_BYTES,
            server_flags=int(export.flags),
            backend=backend,
            timeout_s=0,
            dead_conn_timeout_s=dead_conn_timeout_s,
        )

    try:
        attached = Attached(_connect(connect, index, root), export.size_bytes)
    except BusyError:  # an answer: the device has not been attached
        raise
    except BaseException:
        _take_down_unanswered(netlink, backend, root)
        raise
    try:
        state = _wait_until_there(attached, timeout_s, root)
        _set_up_queue(state, export, io_timeout_ms, max_sectors_kb, root)
    except BaseException:
        with contextlib.suppress(NbdnfsError):
            _take_down(netlink, attached, root)
        raise
    return attached


def _connect(connect: Callable[[], int], index: int | None, root: Path) -> int:
    """CONNECT, again for a while where a process merely has the chosen device open; its index."""
    try:
        return connect()
    except BusyError as refusal:
        if index is None:
            raise
        return device_in_use.retry_while_opened(connect, refusal, f"nbd{index}", root)


class Reconnection:
    """What another process needs to give a device another socket, without opening anything: a context manager that
    closes it here.

    netlink        a generic-netlink socket of its own. The kernel asks for CAP_SYS_ADMIN of who has opened it and of
                   who sends (net/netlink/af_netlink.c: netlink_ns_capable)
    request        what to send on it, with the socket's descriptor at `descriptor_at`
    backend        the identifier, which `backend_file` reads as one line for as long as this attachment lasts
    """

    def __init__(self, attached: Attached, backend: str, root: Path = kernel_state.ROOT) -> None:
        """UnavailableError, PermissionDeniedError: as NbdNetlink.open. OSError: the device is not attached."""
        from nbdnfs.kernel.nbd_netlink import NbdNetlink  # `status` has this module too

        self.backend = backend
        with contextlib.ExitStack() as stack:
            netlink = stack.enter_context(NbdNetlink.open())
            self.netlink = netlink.fileno()
            self.request, self.descriptor_at = netlink.reconfigure_request(attached.index, backend=backend)
            self.backend_file = os.open(root / "sys/block" / attached.name / "backend", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self.backend_file)
            self._stack = stack.pop_all()

    def __enter__(self) -> Reconnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def check(export: Export, source: str) -> None:
    """UsageError where the kernel cannot take the export: it makes whole requests of 4 KiB and more."""
    if export.size_bytes == 0 or export.size_bytes % SLOT_BYTES:
        raise UsageError(
            f"the size of {source}, {export.size_bytes} bytes, is not a multiple of {SLOT_BYTES}",
            f"make the backing file a multiple of {SLOT_BYTES} bytes long",
        )
    if not export.min_block_bytes <= SLOT_BYTES <= export.max_block_bytes:
        raise UsageError(
            f"the server of {source} takes requests of {export.min_block_bytes} to"
            f" {export.max_block_bytes} bytes, not of {SLOT_BYTES}",
            f"start it with a block size of {SLOT_BYTES} bytes",
        )


def _take_down(netlink: NbdNetlink, attached: Attached, root: Path) -> None:
    """As device_in_use.disconnect, again while it is not known whether the device is in use: nothing else would ever
    take it down."""

    def is_decided() -> bool:
        try:
            device_in_use.disconnect(netlink, attached.index, root)
        except UnreadableError:
            return False
        return True

    wait_until(is_decided, _TAKE_DOWN_S)


def _take_down_unanswered(netlink: NbdNetlink, backend: str, root: Path) -> None:
    """Take down what CONNECT has attached although it has failed. The kernel makes its answer when the device is there,
    and sends none where it has no memory for that (drivers/block/nbd.c: nbd_connect_reply). It handles a request
    before the send of it returns, so that nothing is attached later."""

    def is_decided() -> bool:
        try:
            attached = find(backend, root)
        except UnreadableError:
            return False
        if attached is not None:
            with contextlib.suppress(NbdnfsError):
                _take_down(netlink, attached, root)
        return True

    wait_until(is_decided, _TAKE_DOWN_S)


def _wait_until_there(attached: Attached, timeout_s: float, root: Path) -> NbdDevice:
    """Until the block device has its size, and udev (or devtmpfs) has made its node. What cannot be read just now is
    not there yet. UnreadableError: not in time. UnavailableError: it is not there in time."""
    state: NbdDevice | None = None
    unreadable: UnreadableError | None = None

    def is_there() -> bool:
        nonlocal state, unreadable
        try:
            state, unreadable = kernel_state.nbd_device(attached.name, root), None
        except UnreadableError as error:
            unreadable = error
            return False
        node = root / "dev" / attached.name
        return state is not None and state.size_bytes == attached.size_bytes and node.exists()

    is_in_time = wait_until(is_there, timeout_s)
    if unreadable is not None:
        raise unreadable
    if not is_in_time or state is None:
        raise UnavailableError(
            f"the kernel attached {attached.name}, but {attached.path} does not show its size within {timeout_s:g} s",
            "see the kernel's log: dmesg | tail",
        )
    return state


def _set_up_queue(
    device: NbdDevice, export: Export, io_timeout_ms: int, max_sectors_kb: int | None, root: Path
) -> None:
    """A setting that this kernel does not have, or refuses, costs a line in the log and no more."""
    settings = nbd_settings.queue(io_timeout_ms)
    wanted_kb = nbd_settings.MAX_REQUEST_KIB if max_sectors_kb is None else max_sectors_kb
    wanted_kb = min(wanted_kb, export.max_block_bytes // 1024)
    found_kb = device.max_sectors_kb
    if found_kb is not None and (found_kb > wanted_kb or (max_sectors_kb is not None and found_kb != wanted_kb)):
        settings["max_sectors_kb"] = str(wanted_kb)
    for setting, value in settings.items():
        try:
            nbd_settings.write_queue(device.name, setting, value, root)
        except OSError as error:
            log.warning("%s: queue/%s stays as it is (%s)", device.name, setting, error.strerror)


class NbdKernel:
    """The kernel's side of one device, for its keeper: keeper.Kernel. One thread only."""

    def __init__(
        self,
        backend: str,
        *,
        io_timeout_ms: int = nbd_settings.IO_TIMEOUT_MS,
        max_sectors_kb: int | None = None,
        device: str | None = None,
        root: Path = kernel_state.ROOT,
    ) -> None:
        """Open both netlink sockets. UnavailableError without the driver; PermissionDeniedError comes later, on use.

        device  "/dev/nbd0" for that one and no other
        """
        from nbdnfs.kernel.nbd_netlink import LinkDeadEvents, NbdNetlink  # `status` has this module too

        self._backend = backend
        self._io_timeout_ms = io_timeout_ms
        self._max_sectors_kb = max_sectors_kb
        self._index = None if device is None else _index_of(device)
        self._root = root
        with contextlib.ExitStack() as stack:
            self._netlink = stack.enter_context(NbdNetlink.open())
            self._events = LinkDeadEvents.open()
            stack.pop_all()

    def fileno(self) -> int:
        """Readable when `dead_links` has news."""
        return self._events.fileno()

    def dead_links(self) -> list[int]:
        """The devices, of any owner, whose socket died since the last call. Best effort; does not wait."""
        return self._events.read()

    def find(self) -> Attached | None:
        """Our device, if it is attached."""
        return find(self._backend, self._root)

    def attach(self, sock: socket.socket, export: Export) -> Attached:
        """As the function `attach`."""
        return attach(
            self._netlink,
            sock,
            export,
            backend=self._backend,
            source="the backing file",
            index=self._index,
            io_timeout_ms=self._io_timeout_ms,
            max_sectors_kb=self._max_sectors_kb,
            root=self._root,
        )

    def reconnect(self, attached: Attached, sock: socket.socket) -> None:
        """Offer the device another socket for its dead one. Success does not say that the kernel took it.

        NbdnfsError: the device is no longer attached, or has another backend.
        """
        self._netlink.reconfigure(attached.index, [sock.fileno()], backend=self._backend)

    def refuse_if_used(self, attached: Attached) -> None:
        """BusyError where the kernel's lists have a use of it: swap, a mount, a device on top. At once."""
        state = kernel_state.nbd_device(attached.name, self._root)
        if state is not None:
            device_in_use.refuse_if_used(state, self._root)

    def disconnect(self, attached: Attached) -> None:
        """Take it down; requests that wait for it fail. BusyError: it is in use, and stays. Takes seconds.

        This process's own children do not count as a use of it.
        """
        ours = openers.descendants(os.getpid(), self._root)
        device_in_use.disconnect(self._netlink, attached.index, self._root, ours=ours)

    def fail_requests(self, attached: Attached) -> None:
        """As device_in_use.fail_requests."""
        device_in_use.fail_requests(self._netlink, attached.index)


def is_attached(name: str, root: Path = kernel_state.ROOT) -> bool:
    """Whether the device `name` ("nbd0") is attached to anything."""
    state = kernel_state.nbd_device(name, root)
    return state is not None and state.attached


def _index_of(device: str) -> int:
    match = re.fullmatch(r"(?:/dev/)?nbd(\d+)", device)
    if match is None:
        raise UsageError(f"'{device}' is not an nbd device", "give one such as /dev/nbd0, or none for any free one")
    return int(match[1])
