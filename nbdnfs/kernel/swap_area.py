# SPDX-License-Identifier: LGPL-2.1-or-later
"""A device as swap: signature, swapon, and the way back. mkswap(8), swapon(8) and swapoff(8) do the work.

    python -m nbdnfs.kernel.swap_area DEVICE PRIORITY LABEL [--discard]

is what the keeper starts in a process of its own: reading a device whose worker has died waits for the next
worker, and the keeper is who brings it.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

from nbdnfs import programs, quantities
from nbdnfs.errors import BusyError, CannotCreateError, IOFailureError, NbdnfsError, UnavailableError
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.state import Swap
from nbdnfs.sizes import KERNEL_PAGE_BYTES

# include/linux/swap.h: union swap_header, at the end of the first of the kernel's pages
_SIGNATURE = b"SWAPSPACE2"
_PIECE_BYTES = 1 << 20
_MKSWAP_TIMEOUT_S = 300.0

# Memory that must stay available when all that is swapped out has come in: the kernel's own needs, and the
# worker's while it brings the pages.
_MARGIN_BYTES = 16 << 20
_PROGRESS_EVERY_S = 1.0

# Called with the bytes that are still swapped out, and those at the beginning.
Progress = Callable[[int, int], None]


def enable(path: Path, *, priority: int | None, label: str, discard: bool) -> None:
    """Swap to a device; make a swap area of it first where it is all zeros, and have the worker warm.

    CannotCreateError: it holds something else. NbdnfsError: the warm-up, mkswap or swapon fails.
    """
    if not has_signature(path):
        refuse_data(path)
        programs.run(
            [programs.find_program("mkswap", "util-linux"), "--label", label[:15], str(path)],
            what=f"making a swap area on {path}",
            timeout_s=_MKSWAP_TIMEOUT_S,
        )
    from nbdnfs.kernel import warm_up  # here: keepers have this module too, and start again and again

    warm_up.warm_up(path, timeout_s=_MKSWAP_TIMEOUT_S)
    programs.run(
        [
            programs.find_program("swapon", "mount"),
            *(["--priority", str(priority)] if priority is not None and priority >= 0 else []),
            *(["--discard"] if discard else []),
            str(path),
        ],
        what=f"swapping to {path}",
        timeout_s=_MKSWAP_TIMEOUT_S,
    )


def has_signature(path: Path) -> bool:
    """Whether mkswap has been there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        page = os.pread(descriptor, KERNEL_PAGE_BYTES, 0)
    except OSError as error:
        raise IOFailureError(f"{path} cannot be read: {error.strerror}", "see the journal of the worker") from None
    finally:
        os.close(descriptor)
    return page.endswith(_SIGNATURE)


def refuse_data(path: Path) -> None:
    """CannotCreateError unless every byte is zero. Reads all of it: that happens once in a backing file's life."""
    # O_DIRECT: whole pieces, past a page cache that reads single pages of a device without read-ahead
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        offset = 0
        zeros = bytes(_PIECE_BYTES)
        with mmap.mmap(-1, _PIECE_BYTES) as piece:
            while count := os.preadv(descriptor, [piece], offset):
                if piece[:count] != zeros[:count]:
                    raise CannotCreateError(
                        f"{path} is neither swap nor empty: there is data at {quantities.format_size(offset)}",
                        "swap would destroy it; name another file, or make this one anew: nbdnfs create --force",
                    )
                offset += count
    except OSError as error:
        raise IOFailureError(f"{path} cannot be read: {error.strerror}", "see the journal of the worker") from None
    finally:
        os.close(descriptor)


def find(path: str, root: Path = kernel_state.ROOT) -> Swap | None:
    """The device's line in /proc/swaps; None while nobody swaps to it."""
    for swap in kernel_state.swaps(root):
        if swap.path.removesuffix(" (deleted)") == path:
            return swap
    return None


def refuse_unless_it_fits(swap: Swap, root: Path = kernel_state.ROOT) -> None:
    """BusyError when what is swapped out to `swap` has no room in memory and in the other swap areas."""
    memory = kernel_state.meminfo(root)
    elsewhere = sum(
        other.size_bytes - other.used_bytes for other in kernel_state.swaps(root) if other.path != swap.path
    )
    room = memory.available_bytes + elsewhere - _MARGIN_BYTES
    if swap.used_bytes > room:
        raise BusyError(
            f"{quantities.format_size(swap.used_bytes)} are swapped out to {swap.path}, and there is room for"
            f" {quantities.format_size(max(room, 0))}: nothing has been changed",
            "end something that needs memory, or add another swap area, and try again",
        )


def disable(swap: Swap, progress: Progress, root: Path = kernel_state.ROOT) -> None:
    """swapoff, however long that takes, with `progress` about every second. Interrupted, the swap stays on.

    BusyError: no room. NbdnfsError: swapoff fails otherwise.
    """
    path = swap.path.removesuffix(" (deleted)")
    total_bytes = swap.used_bytes

    def look() -> None:
        now = find(path, root)  # in the list until the end, counting down
        progress(min(now.used_bytes, total_bytes) if now is not None else 0, total_bytes)

    # interrupted, it ends by a signal, at which try_to_unuse gives up
    status, errors = programs.watch([programs.find_program("swapoff", "mount"), path], look, every_s=_PROGRESS_EVERY_S)
    if status != 0:
        text = errors.strip().splitlines()[-1] if errors.strip() else f"exit status {status}"
        if "Cannot allocate memory" in text:
            raise BusyError(f"{path} stays in use as swap: {text}", "end something that needs memory, and try again")
        raise UnavailableError(f"{path} stays in use as swap: {text}", "see the kernel's log: dmesg | tail")
    progress(0, total_bytes)


def _main(arguments: list[str]) -> int:
    path, priority, label, *flags = arguments
    try:
        enable(
            Path(path),
            priority=int(priority) if priority != "-" else None,
            label=label,
            discard="--discard" in flags,
        )
    except NbdnfsError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
