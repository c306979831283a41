# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs attach` and `nbdnfs detach`: a kernel device for a server that runs already, without a keeper.

`detach` refuses what would cost data: a device that is swapped on, mounted, stacked upon or open. Both take the kernel
(an `NbdNetlink`) and the root folder as arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from nbdnfs.errors import NbdnfsError, NoInputError, PermissionDeniedError, UnavailableError, UsageError
from nbdnfs.keeper import hibernation
from nbdnfs.kernel import device_in_use, nbd_device, nbd_handshake
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_device import DEFAULT_TIMEOUT_S, Attached
from nbdnfs.kernel.state import NbdDevice
from nbdnfs.kernel.waiting import wait_until
from nbdnfs.kernel.warm_up import warm_up

if TYPE_CHECKING:
    from nbdnfs.kernel.nbd_netlink import NbdNetlink


def run_attach(args: argparse.Namespace) -> int:
    """Print the path of the device. Errors as `attach`."""
    print(attach(args.socket, args.device, warm=not args.no_warm_up).path)
    return 0


def run_detach(args: argparse.Namespace) -> int:
    """Errors as `detach`."""
    detach(args.device)
    return 0


def backend_of_socket(socket_path: Path) -> str:
    """The backend identifier of a device on that socket, as /sys/block/nbdN/backend shows it."""
    return f"nbdnfs:{os.path.abspath(socket_path)}"


def attach(
    socket_path: Path,
    device: str | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    warm: bool = False,
    netlink: NbdNetlink | None = None,
    root: Path = kernel_state.ROOT,
) -> Attached:
    """Attach `device` ("/dev/nbd0"; without one, a free one) to the NBD server on `socket_path`.

    Returns once the node is there and has the export's size; `timeout_s` bounds the handshake and that wait, each.
    `warm` includes `warm_up`, and its errors. Leaves no device behind when it fails.

    BusyError: the device is attached already, or open. NoInputError: no such device or socket. UsageError: not an nbd
    disk, or an export that the kernel cannot take. UnavailableError: no driver, or no server behind the socket.
    PermissionDeniedError: not root.
    """
    wanted = None
    if device is not None:
        wanted = _named(device, root)
        if wanted.attached:
            raise device_in_use.already_attached(wanted, root)
    _require_socket(socket_path)  # before what is said about the driver
    with contextlib.ExitStack() as stack:
        kernel = netlink if netlink is not None else stack.enter_context(_open_netlink())
        sock = stack.enter_context(_connect(socket_path, timeout_s))
        attached = nbd_device.attach(
            kernel,
            sock,
            nbd_handshake.negotiate(sock, timeout_s=timeout_s),
            backend=backend_of_socket(socket_path),
            source=f"the export on {socket_path}",
            index=None if wanted is None else wanted.index,
            timeout_s=timeout_s,
            root=root,
        )
        if warm:
            try:
                warm_up(Path(attached.path))
            except BaseException:
                with contextlib.suppress(NbdnfsError):
                    device_in_use.disconnect(kernel, attached.index, root)
                raise
        hibernation.forbid(attached.name, root)
        return attached


def detach(
    device: str,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    netlink: NbdNetlink | None = None,
    root: Path = kernel_state.ROOT,
) -> None:
    """Take `device` down, and return once it is, within `timeout_s` seconds.

    BusyError: it is in use; the hint says how to end that. NoInputError: no such device, or not attached. UsageError:
    not an nbd disk. UnavailableError: it stays. PermissionDeniedError: not root.
    """
    state = _named(device, root)
    path = f"/dev/{state.name}"
    if not state.attached:
        raise NoInputError(f"{path} is not attached", "there is nothing to do; lsblk lists the devices that are")
    with contextlib.ExitStack() as stack:
        kernel = netlink if netlink is not None else stack.enter_context(_open_netlink())
        device_in_use.disconnect(kernel, state.index, root)
    if not wait_until(lambda: not nbd_device.is_attached(state.name, root), timeout_s):
        raise UnavailableError(
            f"{path} is disconnected, but still there after {timeout_s:g} s",
            "a process has it open; the device goes when that closes it",
        )
    hibernation.permit(state.name, root)


def _require_socket(path: Path) -> None:
    """Errors as in `attach`."""
    try:
        is_socket = stat.S_ISSOCK(path.stat().st_mode)
    except OSError as error:
        raise _explain(error, path) from None
    if not is_socket:
        raise UsageError(f"{path} is not a socket", _serve_hint(path))


def _connect(path: Path, timeout_s: float) -> socket.socket:
    """A socket that is connected to the server on `path`. Errors as in `attach`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise _explain(error, path, timeout_s) from None
        raise
    return sock


def _serve_hint(path: Path) -> str:
    return f"start the server first: nbdnfs serve URL --socket {path}"


def _explain(error: OSError, path: Path, timeout_s: float = 0.0) -> NbdnfsError:
    hint = _serve_hint(path)
    if isinstance(error, TimeoutError):
        return UnavailableError(
            f"the server on {path} accepted no connection within {timeout_s:g} s", "see what it is waiting for: its log"
        )
    if error.errno == errno.ENOENT:
        return NoInputError(f"there is no socket {path}", hint)
    if error.errno == errno.ECONNREFUSED:
        return UnavailableError(f"no server listens on {path}", hint)
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(f"permission denied on the socket {path}", "run as root, or as the server's user")
    # a path of more than 107 bytes has no errno
    return UsageError(f"cannot connect to {path}: {error.strerror or error}", "give another path")


def _named(device: str, root: Path) -> NbdDevice:
    """The state of the nbd disk that the user names: "/dev/nbd0", "nbd0", or any other path to the node."""
    hint = "give an nbd device, such as /dev/nbd0"
    path = os.path.abspath(device)
    name = device if re.fullmatch(r"nbd\d+(p\d+)?", device) else path.removeprefix("/dev/")
    if re.fullmatch(r"nbd\d+(p\d+)?", name) is None:
        node = root / path.lstrip("/")
        number = kernel_state.device_number(node)
        if number is None:
            if node.exists():
                raise UsageError(f"'{device}' is not a block device", hint)
            raise NoInputError(f"there is no device '{device}'", hint)
        name = kernel_state.block_name(number, root) or ""
    match = re.fullmatch(r"(nbd\d+)(p\d+)?", name)
    if match is None:
        raise UsageError(f"'{device}' is not an nbd device", hint)
    if match[2]:
        raise UsageError(f"'{device}' is a partition", f"give the whole device: /dev/{match[1]}")
    state = kernel_state.nbd_device(name, root)
    if state is not None:
        return state
    module = kernel_state.nbd_module(root)
    if module.loaded:
        raise NoInputError(f"there is no device /dev/{name}", "list those that exist: ls -d /sys/block/nbd*")
    raise UnavailableError(
        f"there is no device /dev/{name}: the kernel's nbd driver is not loaded",
        module.hint,
    )


def _open_netlink() -> NbdNetlink:
    from nbdnfs.kernel.nbd_netlink import NbdNetlink

    return NbdNetlink.open()
