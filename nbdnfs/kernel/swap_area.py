# SPDX-License-Identifier: LGPL-2.1-or-later
"""A device as swap: its signature, swapon, swapoff. mkswap(8), swapon(8) and swapoff(8) do the work."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from nbdnfs import programs, quantities, swap_header
from nbdnfs.errors import BusyError, CannotCreateError, IOFailureError, UnavailableError
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.state import Swap
from nbdnfs.sizes import KERNEL_PAGE_BYTES

_MKSWAP_TIMEOUT_S = 300.0

# Memory that must stay available once everything that is swapped out is back: for the kernel, and for the worker
# while it reads the pages.
_MARGIN_BYTES = 16 << 20
_PROGRESS_EVERY_S = 1.0
# swapoff(8): ENOMEM, in whatever language it says so.
_SWAPOFF_NO_MEMORY = 2

# Called with the bytes that are still swapped out, and those at the beginning.
Progress = Callable[[int, int], None]


def enable(
    path: Path,
    *,
    priority: int | None,
    label: str,
    discard: bool,
    is_owned: bool,
    look: Callable[[], int | None],
    page_bytes: int = KERNEL_PAGE_BYTES,
) -> None:
    """Swap to a device. First make a swap area of it where it has none that this kernel can use, and warm it up.

    is_owned    this machine has the owner record of the file: then a swap area of another page size may be replaced
    look        what the file holds by then: the page size of its swap area, None for zeros, CannotCreateError for data
    page_bytes  the kernel's page

    The device itself does not say what the file holds: where pages are encrypted, all that an earlier boot or another
    program has left there reads as zeros, less the kernel's first page.

    CannotCreateError: it holds something else. NbdnfsError: the warm-up, mkswap or swapon fails.
    """
    if swap_page_bytes(path, page_bytes) != page_bytes:
        made_for = look()
        if made_for is not None:
            _replace(path, made_for, page_bytes, is_owned=is_owned)
        programs.run(
            [
                *(programs.find_program("mkswap", "util-linux"), "--pagesize", str(page_bytes)),
                *("--label", label[:15], str(path)),
            ],
            what=f"making a swap area on {path}",
            timeout_s=_MKSWAP_TIMEOUT_S,
        )
    from nbdnfs.kernel import warm_up  # here: the resident keeper has this module too

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


def swap_page_bytes(path: Path, page_bytes: int = KERNEL_PAGE_BYTES) -> int | None:
    """The page size that the device's swap area is for; None where it has none. IOFailureError when it cannot be read.

    `page_bytes` is the kernel's, as in swap_header.page_bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        start = os.pread(descriptor, swap_header.HEAD_BYTES, 0)
    except OSError as error:
        raise IOFailureError(f"{path} cannot be read: {error.strerror}", "see the journal of the worker") from None
    finally:
        os.close(descriptor)
    return swap_header.page_bytes(start, page_bytes)


def _replace(path: Path, made_for: int, page_bytes: int, *, is_owned: bool) -> None:
    """Say that a swap area of another page size is replaced, or refuse that: CannotCreateError."""
    pages = f"pages of {made_for >> 10} KiB, and this kernel has pages of {page_bytes >> 10} KiB"
    if not is_owned:
        raise CannotCreateError(
            f"{path} is a swap area for {pages}",
            "another machine may use it: name another file, or let nbdnfs see to that with owner = true",
        )
    print(f"nbdnfs: {path} was a swap area for {pages}: it is made again", file=sys.stderr, flush=True)


def find(path: str, root: Path = kernel_state.ROOT) -> Swap | None:
    """The device's line in /proc/swaps; None while it is not in use as swap."""
    for swap in kernel_state.swaps(root):
        if swap.path.removesuffix(" (deleted)") == path:
            return swap
    return None


def refuse_unless_it_fits(swap: Swap, root: Path = kernel_state.ROOT) -> None:
    """BusyError when what is swapped out to `swap` has no room in memory and in the other swap areas, or where a cgroup
    has no room for its part. Changes nothing."""
    memory = kernel_state.meminfo(root)
    elsewhere = sum(
        other.size_bytes - other.used_bytes for other in kernel_state.swaps(root) if other.path != swap.path
    )
    room = memory.available_bytes + elsewhere - _MARGIN_BYTES
    if swap.used_bytes > room:
        raise BusyError(
            f"{quantities.format_size(swap.used_bytes)} are swapped out to {swap.path}, and there is room for"
            f" {quantities.format_size(max(room, 0))}: swap stays on",
            "free memory, or add another swap area, and try again",
        )
    _refuse_small_cgroups(swap, elsewhere, root)


def _refuse_small_cgroups(swap: Swap, elsewhere_bytes: int, root: Path) -> None:
    """BusyError with the name of a cgroup in which swapoff would have a process killed, or brought to a standstill."""
    from nbdnfs.kernel import cgroups  # here: the resident keeper has this module too

    found = cgroups.too_small(swap.used_bytes, elsewhere_bytes, root)
    if found is None:
        return
    size = quantities.format_size
    at_most = "up to " if len(kernel_state.swaps(root)) > 1 else ""  # the kernel does not say what lies where
    outcome = "be killed for lack of memory" if found.limit == "memory.max" else "come to a standstill"
    raise BusyError(
        f"the cgroup {found.path} has {at_most}{size(found.coming_bytes)} swapped out to {swap.path},"
        f" and its {found.limit} of {size(found.limit_bytes)} leaves room for {size(found.room_bytes)}:"
        f" its processes would {outcome}; swap stays on",
        f"end its processes, or raise its limit to {size(found.wanted_bytes)} or more, for example:"
        f" echo {found.wanted_bytes} > /sys/fs/cgroup{found.path}/{found.limit}",
    )


def disable(swap: Swap, progress: Progress, root: Path = kernel_state.ROOT) -> None:
    """swapoff, however long that takes, with `progress` about every second. Interrupted, the swap stays on.

    BusyError: no room in memory. UnavailableError: swapoff fails for another reason, or is not installed. The message
    says what has come back by then, and whether the kernel has killed a process meanwhile.
    """
    path = swap.path.removesuffix(" (deleted)")
    total_bytes = swap.used_bytes
    oom_kills = kernel_state.vmstat(root).oom_kills

    def look() -> None:
        now = find(path, root)  # it is listed until the end, counting down
        progress(min(now.used_bytes, total_bytes) if now is not None else 0, total_bytes)

    # an exception ends swapoff with a signal, at which try_to_unuse gives up (mm/swapfile.c)
    status, errors = programs.watch([programs.find_program("swapoff", "mount"), path], look, every_s=_PROGRESS_EVERY_S)
    if status == 0:
        progress(0, total_bytes)
        return
    text = errors.strip().splitlines()[-1] if errors.strip() else _ended_with(status)
    message = f"{_state_after_failure(path, total_bytes, oom_kills, root)}: {text}"
    if status in (_SWAPOFF_NO_MEMORY, -signal.SIGKILL):  # the OOM killer takes swapoff itself first
        raise BusyError(message, "free memory, and try again")
    raise UnavailableError(message, "see the kernel's log: dmesg | tail")


def _ended_with(status: int) -> str:
    return f"swapoff was ended by signal {-status}" if status < 0 else f"swapoff ended with exit status {status}"


def _state_after_failure(path: str, total_bytes: int, oom_kills: int, root: Path) -> str:
    """What swapoff has left, in words. The kernel takes the area back into use (mm/swapfile.c: swapoff)."""
    size = quantities.format_size
    now = find(path, root)
    if now is None:
        return f"{path} is not in use as swap any more, though swapoff failed"
    back_bytes = max(0, total_bytes - now.used_bytes)
    state = f"{path} stays in use as swap; {size(back_bytes)} of {size(total_bytes)} are back in memory"
    killed = kernel_state.vmstat(root).oom_kills - oom_kills
    return state + (f", and the kernel killed {killed} process(es) for lack of memory meanwhile" if killed > 0 else "")
