# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's nbd device as its keeper sees it: found by its backend identifier, attached, given a new socket.

Everything that a recovery calls is imported, opened and looked up when `Link.open` returns. The settings are
those of a "hard" device; see device.py for the reasons.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import programs
from nbdnfs.errors import NbdnfsError, UnavailableError, UsageError
from nbdnfs.kernel import nbd_settings
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_handshake import Export
from nbdnfs.kernel.nbd_netlink import LinkDeadEvents, NbdNetlink
from nbdnfs.kernel.state import NbdDevice
from nbdnfs.sizes import SLOT_BYTES

_APPEARS_S = 10.0
_POLL_S = 0.01


@dataclass(frozen=True)
class Attached:
    """A device that is ours. `size_bytes` is 0 while the kernel does not show it."""

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


def load_driver(root: Path = kernel_state.ROOT) -> None:
    """Have the kernel's nbd driver loaded. UnavailableError where that fails, with a status that says: for good."""
    if not kernel_state.nbd_module(root).loaded:
        try:
            programs.run([programs.find_program("modprobe", "kmod"), "nbd"], what="loading the kernel's nbd driver")
        except NbdnfsError as error:
            missing = UnavailableError(
                f"the kernel's nbd driver is not there: {error.message}", "use a kernel that has CONFIG_BLK_DEV_NBD"
            )
            missing.exit_code = os.EX_OSFILE  # the unit does not try again: systemd/nbdnfs@.service
            raise missing from None


class Link:
    """Netlink to the running kernel, for the device `backend`. One thread only."""

    def __init__(
        self,
        backend: str,
        *,
        io_timeout_ms: int = nbd_settings.IO_TIMEOUT_MS,
        max_sectors_bytes: int | None = None,
        wanted: str | None = None,
        root: Path = kernel_state.ROOT,
    ) -> None:
        """Open both netlink sockets. UnavailableError without the driver, PermissionDeniedError later, on use.

        wanted  "/dev/nbd0" to have that one and no other
        """
        self._backend = backend
        self._io_timeout_ms = io_timeout_ms
        self._max_sectors_bytes = max_sectors_bytes
        self._wanted = wanted
        self._root = root
        with contextlib.ExitStack() as stack:
            self._netlink = stack.enter_context(NbdNetlink.open())
            self._events = LinkDeadEvents.open()
            stack.pop_all()

    def fileno(self) -> int:
        """Readable when `dead_links` has news."""
        return self._events.fileno()

    def dead_links(self) -> list[int]:
        """The devices, anybody's, that lost their socket since the last call. Best effort; does not wait."""
        return self._events.read()

    def find(self) -> Attached | None:
        """Our device, if it is attached."""
        return find(self._backend, self._root)

    def attach(self, sock: socket.socket, export: Export) -> Attached:
        """Make a device on a socket that is past the handshake, its queue set up for swap.

        BusyError: the wanted one is in use. UsageError: the export is none for the kernel, or the wanted one is no nbd
        disk. Leaves no device behind when it fails.
        """
        _check(export)
        index = self._netlink.connect(
            [sock.fileno()],
            index=self._wanted_index(),
            size_bytes=export.size_bytes,
            block_size_bytes=SLOT_BYTES,
            server_flags=int(export.flags),
            backend=self._backend,
            timeout_s=0,
            dead_conn_timeout_s=nbd_settings.DEAD_CONN_TIMEOUT_S,
        )
        attached = Attached(index, export.size_bytes)
        try:
            self._wait_until_there(attached)
        except BaseException:
            with contextlib.suppress(NbdnfsError):
                self._netlink.disconnect(index)
            raise
        self._set_queue(attached)
        return attached

    def reconnect(self, attached: Attached, sock: socket.socket) -> None:
        """Offer the device another socket for its dead one. Success does not say that the kernel took it.

        NbdnfsError: the device is no longer attached, or no longer ours.
        """
        self._netlink.reconfigure(attached.index, [sock.fileno()], backend=self._backend)

    def disconnect(self, attached: Attached) -> None:
        """Take it down; what waits for it fails."""
        self._netlink.disconnect(attached.index)

    def _wanted_index(self) -> int | None:
        if self._wanted is None:
            return None
        match = re.fullmatch(r"(?:/dev/)?nbd(\d+)", self._wanted)
        if match is None:
            raise UsageError(f"'{self._wanted}' is no nbd device", "give one such as /dev/nbd0, or leave it out")
        return int(match[1])

    def _wait_until_there(self, attached: Attached) -> None:
        """Until the block device has its size and udev (or devtmpfs) its node."""
        deadline = time.monotonic() + _APPEARS_S
        while True:
            state = self._state(attached)
            node = self._root / "dev" / attached.name
            if state is not None and state.size_bytes == attached.size_bytes and node.exists():
                return
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"the kernel attached {attached.name}, but {attached.path} does not show its size within"
                    f" {_APPEARS_S:g} s",
                    "see the kernel's log: dmesg | tail",
                )
            time.sleep(_POLL_S)

    def _state(self, attached: Attached) -> NbdDevice | None:
        return kernel_state.nbd_device(attached.name, self._root)

    def _set_queue(self, attached: Attached) -> None:
        """What this kernel refuses is left as it is."""
        settings = nbd_settings.queue(self._io_timeout_ms)
        if self._max_sectors_bytes is not None:
            settings["max_sectors_kb"] = str(self._max_sectors_bytes // 1024)
        for setting, value in settings.items():
            with contextlib.suppress(OSError):
                nbd_settings.write_queue(attached.name, setting, value, self._root)


def _check(export: Export) -> None:
    """Whether the kernel can take it: 4 KiB requests, all of them full."""
    if export.size_bytes == 0 or export.size_bytes % SLOT_BYTES:
        raise UsageError(
            f"the backing file has {export.size_bytes} bytes, no multiple of {SLOT_BYTES}",
            "make it a multiple of 4096 bytes long",
        )
