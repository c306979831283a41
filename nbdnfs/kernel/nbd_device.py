# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach a kernel nbd device to a server's Unix socket, and take it down again.

`attach` makes the "hard" device: no request ever fails because the server is slow or gone. TIMEOUT 0 never
declares a slow server dead; DEAD_CONN_TIMEOUT keeps requests waiting for another socket; queue/io_timeout
makes the kernel send lost ones again soon after it got one (drivers/block/nbd.c: nbd_xmit_timeout,
nbd_handle_cmd).

`detach` refuses whatever could cost somebody data: a device that is swapped on, mounted, stacked upon or
open. Both take the kernel (an `NbdNetlink`) and the root folder as arguments.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbdnfs.errors import (
    BusyError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from nbdnfs.kernel import nbd_handshake, nbd_settings, processes
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_settings import DEAD_CONN_TIMEOUT_S, IO_TIMEOUT_MS, MAX_REQUEST_KIB
from nbdnfs.kernel.state import NbdDevice
from nbdnfs.kernel.warm_up import warm_up as warm_up  # part of setting a device up
from nbdnfs.sizes import SLOT_BYTES

if TYPE_CHECKING:
    from nbdnfs.kernel.nbd_netlink import NbdNetlink

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 10.0

# udev looks at a device that has just appeared, or was written to, and lets go of it by itself: it is given
# some time, and then overruled. With a dead server it hangs in there for good, and only DISCONNECT frees it.
_OPENERS_GRACE_S = 3.0
_UDEV = frozenset({"(udev-worker)", "systemd-udevd"})
_PROBE_TIMEOUT_S = 2.0
_POLL_S = 0.02


@dataclass(frozen=True)
class Attachment:
    """A device that is up: its node, the N of nbdN, its size."""

    path: Path
    index: int
    size_bytes: int


def backend_of(socket_path: Path) -> str:
    """The backend identifier of a device on that socket, as /sys/block/nbdN/backend shows it."""
    return f"nbdnfs:{os.path.abspath(socket_path)}"


def attach(
    socket_path: Path,
    device: str | None = None,
    *,
    backend: str | None = None,
    dead_conn_timeout_s: int = DEAD_CONN_TIMEOUT_S,
    io_timeout_ms: int = IO_TIMEOUT_MS,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    warm: bool = False,
    netlink: NbdNetlink | None = None,
    root: Path = kernel_state.ROOT,
) -> Attachment:
    """Attach `device` ("/dev/nbd0"; without one, a free one) to the NBD server on `socket_path`.

    Returns once the node is there and has the export's size; `timeout_s` bounds the handshake and that wait,
    each. `backend` defaults to `backend_of(socket_path)`. `warm` includes `warm_up`, and its errors. Leaves no device
    behind when it fails.

    BusyError: the device is attached already, or open. NoInputError: no such device or socket. UsageError: no nbd
    disk, or an export that the kernel cannot take. UnavailableError: no driver, or no server behind the
    socket. PermissionDeniedError: not root.
    """
    wanted = None
    if device is not None:
        wanted = _find(device, root)
        if wanted.attached:
            raise _attached_already(wanted, root)
    with contextlib.ExitStack() as stack:
        kernel = netlink if netlink is not None else stack.enter_context(_open_netlink())
        sock, export = connect(socket_path, timeout_s=timeout_s)
        stack.enter_context(sock)

        def take(index: int | None) -> int:
            return kernel.connect(
                [sock.fileno()],
                index=index,
                size_bytes=export.size_bytes,
                block_size_bytes=SLOT_BYTES,
                server_flags=int(export.flags),
                backend=backend_of(socket_path) if backend is None else backend,
                timeout_s=0,
                dead_conn_timeout_s=dead_conn_timeout_s,
            )

        index = take(None) if wanted is None else _insist(take, wanted, root)
        try:
            attachment = _settle(index, export, io_timeout_ms, timeout_s, root)
            if warm:
                warm_up(attachment.path)
            return attachment
        except BaseException:
            # it is ours since a moment ago, and nobody was told of it
            with contextlib.suppress(NbdnfsError):
                kernel.disconnect(index)
            raise


def detach(
    device: str,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    netlink: NbdNetlink | None = None,
    root: Path = kernel_state.ROOT,
) -> None:
    """Take `device` down, and return once it is, within `timeout_s` seconds.

    BusyError: it is swapped on, mounted, stacked upon or open; the hint says how to end that. NoInputError:
    no such device, or not attached. UsageError: no nbd disk. UnavailableError: it does not go.
    PermissionDeniedError: not root.
    """
    state = _find(device, root)
    path = f"/dev/{state.name}"
    if not state.attached:
        raise NoInputError(f"{path} is not attached", "there is nothing to do; see lsblk for those that are")
    _refuse_in_use(state, root)
    with contextlib.ExitStack() as stack:
        kernel = netlink if netlink is not None else stack.enter_context(_open_netlink())
        kernel.disconnect(state.index)
    if not _wait(lambda: not _is_attached(state.name, root), timeout_s):
        raise UnavailableError(
            f"{path} is disconnected, but has not gone within {timeout_s:g} s",
            "somebody has it open; it goes when that ends",
        )


def _insist(take: Callable[[int], int], wanted: NbdDevice, root: Path) -> int:
    """CONNECT `wanted`, which the kernel refuses (EBUSY) also while somebody merely has it open.

    udev does that for a moment when a device has just been detached.
    """
    refusal: BusyError | None = None
    index: int | None = None

    def is_taken() -> bool:
        nonlocal refusal, index
        try:
            index = take(wanted.index)
        except BusyError as error:
            refusal = error
        return index is not None or _is_attached(wanted.name, root)

    _wait(is_taken, _OPENERS_GRACE_S)
    if index is not None:
        return index
    state = kernel_state.nbd_device(wanted.name, root)
    if state is not None and state.attached:
        raise _attached_already(state, root)
    users = [f"{name} (process {pid})" for pid, name in _openers([f"/dev/{wanted.name}"], root)]
    if users:
        raise BusyError(f"/dev/{wanted.name} is open in {', '.join(users)}", "end that first, or take another device")
    assert refusal is not None
    raise refusal


def connect(socket_path: Path, *, timeout_s: float) -> tuple[socket.socket, nbd_handshake.Export]:
    """A socket to the NBD server that the kernel can be given, and what the server offers.

    Connecting and shaking hands may take `timeout_s` seconds each. Errors as in `attach`.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _connect(sock, socket_path, timeout_s)
        export = nbd_handshake.negotiate(sock, timeout_s=timeout_s)
        _check(export, socket_path)
    except BaseException:
        sock.close()
        raise
    return sock, export


def _connect(sock: socket.socket, path: Path, timeout_s: float) -> None:
    hint = f"start the server first: nbdnfs serve URL --socket {path}"
    sock.settimeout(timeout_s)
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise UsageError(f"{path} is not a socket", hint)
        sock.connect(str(path))
    except TimeoutError:
        raise UnavailableError(f"the server on {path} accepts no connection within {timeout_s:g} s") from None
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise NoInputError(f"there is no socket {path}", hint) from None
        if error.errno == errno.ECONNREFUSED:
            raise UnavailableError(f"no server listens on {path}", hint) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise PermissionDeniedError(f"the socket {path} may not be used", "run as its owner") from None
        # a path of more than 107 bytes has no errno
        raise UsageError(f"cannot connect to {path}: {error.strerror or error}", "give another path") from None


def _check(export: nbd_handshake.Export, socket_path: Path) -> None:
    """Whether the kernel can take it: 4 KiB requests, all of them full."""
    if export.size_bytes == 0 or export.size_bytes % SLOT_BYTES:
        raise UsageError(
            f"the export on {socket_path} has {export.size_bytes} bytes, no multiple of {SLOT_BYTES}",
            "make the backing file a multiple of 4096 bytes long",
        )
    if not export.min_block_bytes <= SLOT_BYTES <= export.max_block_bytes:
        raise UsageError(
            f"the server on {socket_path} takes requests of {export.min_block_bytes} to"
            f" {export.max_block_bytes} bytes, not of {SLOT_BYTES}",
            "start it with a block size of 4096 bytes",
        )


def _settle(index: int, export: nbd_handshake.Export, io_timeout_ms: int, timeout_s: float, root: Path) -> Attachment:
    """Set the queue up, and wait until the block device is there in full."""
    name = f"nbd{index}"

    def is_up() -> bool:
        state = kernel_state.nbd_device(name, root)
        return state is not None and state.size_bytes == export.size_bytes and (root / "dev" / name).exists()

    if not _wait(is_up, timeout_s):
        raise UnavailableError(
            f"the kernel attached {name}, but /dev/{name} does not show its size within {timeout_s:g} s",
            "see the kernel's log: dmesg | tail",
        )
    for setting, value in nbd_settings.queue(io_timeout_ms).items():
        _set_queue(name, setting, value, root)
    state = kernel_state.nbd_device(name, root)
    largest_kb = min(export.max_block_bytes // 1024, MAX_REQUEST_KIB)
    if state is not None and state.max_sectors_kb is not None and state.max_sectors_kb > largest_kb:
        _set_queue(name, "max_sectors_kb", str(largest_kb), root)
    return Attachment(Path("/dev") / name, index, export.size_bytes)


def _set_queue(name: str, setting: str, value: str, root: Path) -> None:
    """Write one queue setting. A kernel that has it not, or forbids it, costs a line in the log, no more."""
    try:
        nbd_settings.write_queue(name, setting, value, root)
    except OSError as error:
        log.warning("%s: queue/%s stays as it is (%s)", name, setting, error.strerror)


def _find(device: str, root: Path) -> NbdDevice:
    """The state of the nbd disk that the user names: "/dev/nbd0", "nbd0", or any other path to the node."""
    path = os.path.abspath(device)
    name = device if re.fullmatch(r"nbd\d+(p\d+)?", device) else path.removeprefix("/dev/")
    if re.fullmatch(r"nbd\d+(p\d+)?", name) is None:
        node = root / path.lstrip("/")
        number = kernel_state.device_number(node)
        if number is None:
            if node.exists():
                raise UsageError(f"'{device}' is no block device", "give an nbd device, such as /dev/nbd0")
            raise NoInputError(f"there is no device '{device}'", "give an nbd device, such as /dev/nbd0")
        name = kernel_state.block_name(number, root) or ""
    match = re.fullmatch(r"(nbd\d+)(p\d+)?", name)
    if match is None:
        raise UsageError(f"'{device}' is no nbd device", "give an nbd device, such as /dev/nbd0")
    if match[2]:
        raise UsageError(f"'{device}' is a partition", f"give the whole device: /dev/{match[1]}")
    state = kernel_state.nbd_device(name, root)
    if state is not None:
        return state
    module = kernel_state.nbd_module(root)
    if module.loaded:
        raise NoInputError(f"there is no device /dev/{name}", "see which there are: ls -d /sys/block/nbd*")
    raise UnavailableError(
        f"there is no device /dev/{name}: the kernel's nbd driver is not loaded",
        "load it as root: modprobe nbd" if module.available else "use a kernel that has it: CONFIG_BLK_DEV_NBD",
    )


def _attached_already(state: NbdDevice, root: Path) -> NbdnfsError:
    pid = state.connector_pid or 0
    process = processes.process(pid, root)
    return BusyError(
        f"/dev/{state.name} is attached already, by process {pid}"
        f" ({'which has ended' if process is None else process.name})"
        f" to {state.backend or 'an unnamed backend'}",
        f"leave the device out to get a free one, or detach it first: nbdnfs detach /dev/{state.name}",
    )


def _refuse_in_use(state: NbdDevice, root: Path) -> None:
    """BusyError when anybody uses the disk or one of its partitions.

    The lists first, for the message; then the kernel's own word, because no list has everything (a mount in
    another namespace, a file system of several devices).
    """
    paths = [f"/dev/{name}" for name in (state.name, *state.partitions)]
    for swap in kernel_state.swaps(root):
        path = swap.path.removesuffix(" (deleted)")
        if path in paths or (
            # of a file's path nothing is asked: it may lie on the share that hangs
            swap.kind == "partition" and kernel_state.device_number(root / path.lstrip("/")) in state.device_numbers
        ):
            raise BusyError(
                f"{paths[0]} is in use as swap ({swap.path}, {swap.used_bytes >> 20} MiB swapped out)",
                f"swapoff {swap.path}",
            )
    for mount in kernel_state.mounts(root):
        if mount.device_number in state.device_numbers or mount.source in paths:
            raise BusyError(f"{mount.source} is mounted on {mount.mount_point}", f"umount {mount.mount_point}")
    # a loop device is in no list of holders, nor does it claim the disk
    above = [*state.holders, *(name for name, file in kernel_state.loops(root).items() if file in paths)]
    if above:
        raise BusyError(f"{paths[0]} carries {', '.join(above)}", f"take {above[0]} down first (see lsblk)")
    if not _wait(lambda: not list(_openers(paths, root)), _OPENERS_GRACE_S):
        users = [f"{name} (process {pid})" for pid, name in _openers(paths, root) if name not in _UDEV]
        if users:
            raise BusyError(f"{paths[0]} is open in {', '.join(users)}", "end that first")
    if _is_claimed(root / "dev" / state.name):
        raise BusyError(
            f"{paths[0]} is claimed by the kernel: swap, a mount in another namespace, or a device on top",
            "see lsblk, swapon --show and lsns -t mnt",
        )


def _openers(paths: list[str], root: Path) -> Iterator[tuple[int, str]]:
    for path in paths:
        yield from processes.openers(path, root)


def _is_claimed(node: Path) -> bool:
    """Whether swap, a mount in whatever namespace, or another device holds the disk or a partition of it.

    The kernel then refuses an exclusive open (block/bdev.c: bd_prepare_to_claim).

    In a thread of its own: the first open since CONNECT reads the partition table, from a server that may be
    gone, and no signal ends that. No answer in time counts as "no": DISCONNECT ends the wait, and is what is
    wanted then.
    """
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def probe() -> None:
        try:
            os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            answers.put(False)
        except OSError as error:
            answers.put(error.errno == errno.EBUSY)

    threading.Thread(target=probe, daemon=True).start()
    try:
        return answers.get(timeout=_PROBE_TIMEOUT_S)
    except queue.Empty:
        log.warning("%s does not open: its server does not answer", node)
        return False


def _is_attached(name: str, root: Path) -> bool:
    state = kernel_state.nbd_device(name, root)
    return state is not None and state.attached


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether `condition` comes true in time. Polled: sysfs announces none of what is waited for here."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _open_netlink() -> NbdNetlink:
    from nbdnfs.kernel.nbd_netlink import NbdNetlink

    return NbdNetlink.open()
