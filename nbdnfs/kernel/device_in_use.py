# SPDX-License-Identifier: LGPL-2.1-or-later
"""What "in use" means for an nbd device, the errors that say so, and the two ways to take a device down.

A device is in use while it is swapped on, mounted, stacked upon or open: taking it down then costs data. This is the
one definition for everything that takes a device down, and `disconnect` is how that is done. The keeper has this module
in locked memory. docs/decisions/0022.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdnfs.errors import BusyError, UnreadableError, is_of_want
from nbdnfs.kernel import openers
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.state import NbdDevice
from nbdnfs.kernel.waiting import wait_until

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from nbdnfs.kernel.nbd_netlink import NbdNetlink

log = logging.getLogger(__name__)

# udev opens a device that has just appeared, been detached or been written to, and closes it again soon: it is given
# this time. With a dead server its open never returns, and only DISCONNECT ends that: then udev does not count.
_OPENERS_GRACE_S = 3.0
_UDEV = frozenset({"(udev-worker)", "systemd-udevd"})
_PROBE_TIMEOUT_S = 2.0


def refuse_if_in_use(device: NbdDevice, root: Path = kernel_state.ROOT, *, ours: frozenset[int] = frozenset()) -> None:
    """BusyError, with what ends it as the hint, when the disk or one of its partitions is in use.

    May take a few seconds. The lists come first, for the message; then an exclusive open, because no list has
    everything (a mount in another namespace, a file system of several devices). `ours`: processes of the caller, such
    as a mkswap(8) that a dead server holds up. They are given the same time as udev, and then do not count.
    """
    _close(_claim_if_unused(device, root, ours))


def disconnect(
    netlink: NbdNetlink, index: int, root: Path = kernel_state.ROOT, *, ours: frozenset[int] = frozenset()
) -> None:
    """Take nbdN down unless it is in use; requests that wait for it fail. As `refuse_if_in_use`, and as NbdNetlink.

    Between look and DISCONNECT the device stays claimed, so that swapon(2) or mount(2) does not come in between.
    """
    device = kernel_state.nbd_device(f"nbd{index}", root)
    claim = _claim_if_unused(device, root, ours) if device is not None and device.attached else None
    try:
        netlink.disconnect(index)
    finally:
        _close(claim)


def fail_requests(netlink: NbdNetlink, index: int) -> None:
    """Take nbdN down although it is in use, where nothing can serve it any more: its requests fail, instead of waiting
    for ever. For a file that another machine has taken, and for nothing else."""
    netlink.disconnect(index)


def refuse_if_used(device: NbdDevice, root: Path = kernel_state.ROOT) -> None:
    """BusyError as `refuse_if_in_use`, by the kernel's lists alone: at once, and whether the server answers or not."""
    paths = _paths(device)
    _refuse_swap(device, paths, root)
    _refuse_mounts_and_holders(device, paths, root)


def refuse_other_uses(device: NbdDevice, root: Path = kernel_state.ROOT, *, ours: frozenset[int] = frozenset()) -> None:
    """As `refuse_if_in_use`, but swap on the disk itself does not count: the caller turns it off first. Nor is the
    kernel asked for a claim, which that swap has."""
    paths = _paths(device)
    _refuse_swap(device, paths, root, but=paths[0])
    _refuse_mounts_and_holders(device, paths, root)
    _refuse_openers(paths, root, ours)


def _claim_if_unused(device: NbdDevice, root: Path, ours: frozenset[int]) -> int | None:
    """A descriptor that claims the device, for the caller to close; None where it does not open in time. BusyError."""
    refuse_if_used(device, root)
    _refuse_openers(_paths(device), root, ours)
    if any(pid in ours for pid, _ in _openers(_paths(device), root)):
        return None  # that one waits for the server, and has the claim
    return _claim(root / "dev" / device.name)


def _refuse_openers(paths: list[str], root: Path, ours: frozenset[int]) -> None:
    if not wait_until(lambda: not list(_openers(paths, root)), _OPENERS_GRACE_S):
        users = _texts((pid, name) for pid, name in _openers(paths, root) if name not in _UDEV and pid not in ours)
        if users:
            raise BusyError(f"{paths[0]} is open in {', '.join(users)}", "end that first")


def _paths(device: NbdDevice) -> list[str]:
    return [f"/dev/{name}" for name in (device.name, *device.partitions)]


def _refuse_mounts_and_holders(device: NbdDevice, paths: list[str], root: Path) -> None:
    for mount in kernel_state.mounts(root):
        if mount.device_number in device.device_numbers or mount.source in paths:
            raise BusyError(f"{mount.source} is mounted on {mount.mount_point}", f"umount {mount.mount_point}")
    # a loop device is in no list of holders, nor does it claim the disk
    above = [*device.holders, *(name for name, file in kernel_state.loops(root).items() if file in paths)]
    if above:
        swap = _swap_on(above[0], root)
        raise BusyError(
            f"{paths[0]} is in use by {', '.join(above)}{', which is swapped on' if swap else ''}",
            f"{f'swapoff {swap}, then ' if swap else ''}take {above[0]} down first (see lsblk)",
        )


def _swap_on(name: str, root: Path) -> str | None:
    """The path under which the block device `name` is swap, if it is."""
    number = (kernel_state.read_text(root / "sys/block" / name / "dev") or "").strip()
    for swap in kernel_state.swaps(root):
        path = swap.path.removesuffix(" (deleted)")
        is_it = swap.kind == "partition" and number and kernel_state.device_number(root / path.lstrip("/")) == number
        if path == f"/dev/{name}" or is_it:
            return path
    return None


def already_attached(device: NbdDevice, root: Path = kernel_state.ROOT) -> BusyError:
    """The error for a device that is to be attached and is."""
    pid = device.connector_pid or 0
    from nbdnfs.kernel import processes  # here: the resident keeper has this module too

    process = processes.process(pid, root)
    return BusyError(
        f"/dev/{device.name} is already attached, by process {pid}"
        f" ({'which has ended' if process is None else process.name})"
        f" to {device.backend or 'an unnamed backend'}",
        f"omit the device to use any free one, or detach it first: nbdnfs detach /dev/{device.name}",
    )


def retry_while_opened(connect: Callable[[], int], refusal: BusyError, name: str, root: Path) -> int:
    """Call `connect` (CONNECT for the device `name`) until it succeeds, and return what it returns.

    The kernel refuses a device, with EBUSY and `refusal`, also while a process merely has it open, as udev does for a
    moment when a device has just been detached. BusyError when that does not end, or it has been attached meanwhile.
    """
    index: int | None = None

    def is_decided() -> bool:
        nonlocal refusal, index
        state = kernel_state.nbd_device(name, root)
        if state is not None and state.attached:
            raise already_attached(state, root)
        try:
            index = connect()
        except BusyError as error:
            refusal = error
        return index is not None

    wait_until(is_decided, _OPENERS_GRACE_S)
    if index is not None:
        return index
    users = _texts(_openers([f"/dev/{name}"], root))
    if users:
        raise BusyError(f"/dev/{name} is open in {', '.join(users)}", "end that first, or use another device")
    raise refusal


def _refuse_swap(device: NbdDevice, paths: list[str], root: Path, *, but: str = "") -> None:
    for swap in kernel_state.swaps(root):
        path = swap.path.removesuffix(" (deleted)")
        if path == but:
            continue
        if path in paths or (
            # a swap file is not looked at: it may lie on the share that hangs
            swap.kind == "partition" and kernel_state.device_number(root / path.lstrip("/")) in device.device_numbers
        ):
            raise BusyError(
                f"{paths[0]} is in use as swap ({swap.path}, {swap.used_bytes >> 20} MiB swapped out)",
                f"swapoff {swap.path}",
            )


def _openers(paths: list[str], root: Path) -> Iterator[tuple[int, str]]:
    for path in paths:
        yield from openers.openers(path, root)


def _texts(found: Iterator[tuple[int, str]]) -> list[str]:
    return [f"{name} (process {pid})" for pid, name in found]


def _claim(node: Path) -> int | None:
    """An exclusive open. BusyError: swap, a mount in any namespace, or another device holds the disk or a partition.

    The kernel refuses it before any I/O (block/bdev.c: bd_prepare_to_claim). An open of a device that is free goes on
    to read the partition table, and with a dead server no signal ends that: it is left to a thread. So no answer in
    time means that nothing has the device claimed; DISCONNECT ends the wait, and is what is wanted then. Where there is
    no node, or no permission, there is nothing to find out either. UnreadableError: there is no memory or descriptor to
    ask with, so it is not known.
    """
    lock = threading.Lock()
    found: list[int] = []
    refusals: list[OSError] = []
    is_abandoned = False

    def open_it() -> None:
        try:
            descriptor = os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            refusals.append(error)
            return
        with lock:
            if not is_abandoned:
                found.append(descriptor)
                return
        os.close(descriptor)

    thread = threading.Thread(target=open_it, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no memory for one, or too many
        raise UnreadableError(f"cannot look at {node}: {error}", "free memory, and try again") from None
    thread.join(_PROBE_TIMEOUT_S)
    with lock:
        is_abandoned = not found
    if any(refusal.errno == errno.EBUSY for refusal in refusals):
        raise BusyError(
            f"/dev/{node.name} is claimed by the kernel: swap, a mount in another namespace, or a device on top",
            "see lsblk, swapon --show and lsns -t mnt",
        )
    for refusal in refusals:
        if is_of_want(refusal):
            raise UnreadableError(f"cannot open {node}: {refusal.strerror}", "free memory, and try again")
    if not found and not refusals:
        log.warning("%s does not open: its server does not answer", node)
    return found[0] if found else None


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
