# SPDX-License-Identifier: LGPL-2.1-or-later
"""What "in use" means for an nbd device, and the errors that say so.

A device is in use while it is swapped on, mounted, stacked upon or open: taking it down then costs data. This is the
one definition for everything that takes a device down.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdnfs.errors import BusyError
from nbdnfs.kernel import processes
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.state import NbdDevice
from nbdnfs.kernel.waiting import wait_until

log = logging.getLogger(__name__)

# udev opens a device that has just appeared, been detached or been written to, and closes it again soon: it is given
# this time. With a dead server its open never returns, and only DISCONNECT ends that: then udev does not count.
_OPENERS_GRACE_S = 3.0
_UDEV = frozenset({"(udev-worker)", "systemd-udevd"})
_PROBE_TIMEOUT_S = 2.0


def refuse_if_in_use(device: NbdDevice, root: Path = kernel_state.ROOT) -> None:
    """BusyError, with what ends it as the hint, when the disk or one of its partitions is in use.

    May take a few seconds. The lists come first, for the message; then an exclusive open, because no list has
    everything (a mount in another namespace, a file system of several devices).
    """
    paths = [f"/dev/{name}" for name in (device.name, *device.partitions)]
    _refuse_swap(device, paths, root)
    for mount in kernel_state.mounts(root):
        if mount.device_number in device.device_numbers or mount.source in paths:
            raise BusyError(f"{mount.source} is mounted on {mount.mount_point}", f"umount {mount.mount_point}")
    # a loop device is in no list of holders, nor does it claim the disk
    above = [*device.holders, *(name for name, file in kernel_state.loops(root).items() if file in paths)]
    if above:
        raise BusyError(f"{paths[0]} is in use by {', '.join(above)}", f"take {above[0]} down first (see lsblk)")
    if not wait_until(lambda: not list(_openers(paths, root)), _OPENERS_GRACE_S):
        users = _texts((pid, name) for pid, name in _openers(paths, root) if name not in _UDEV)
        if users:
            raise BusyError(f"{paths[0]} is open in {', '.join(users)}", "end that first")
    if _is_claimed(root / "dev" / device.name):
        raise BusyError(
            f"{paths[0]} is claimed by the kernel: swap, a mount in another namespace, or a device on top",
            "see lsblk, swapon --show and lsns -t mnt",
        )


def already_attached(device: NbdDevice, root: Path = kernel_state.ROOT) -> BusyError:
    """The error for a device that is to be attached and is."""
    pid = device.connector_pid or 0
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


def _refuse_swap(device: NbdDevice, paths: list[str], root: Path) -> None:
    for swap in kernel_state.swaps(root):
        path = swap.path.removesuffix(" (deleted)")
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
        yield from processes.openers(path, root)


def _texts(openers: Iterator[tuple[int, str]]) -> list[str]:
    return [f"{name} (process {pid})" for pid, name in openers]


def _is_claimed(node: Path) -> bool:
    """Whether swap, a mount in any namespace, or another device holds the disk or a partition of it.

    The kernel then refuses an exclusive open (block/bdev.c: bd_prepare_to_claim).

    In a thread of its own: the first open since CONNECT reads the partition table, from a server that may be dead, and
    no signal ends that. No answer in time counts as "no": DISCONNECT ends the wait, and is what is wanted then.
    """
    import queue
    import threading

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
