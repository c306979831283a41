# SPDX-License-Identifier: LGPL-2.1-or-later
"""The limits of memory cgroups (v2), against what swapoff brings back into them.

swapoff charges each page to the cgroup that had it swapped out (mm/swapfile.c: unuse_pte), and to every ancestor of
that. At memory.max the kernel reclaims inside the cgroup, and where nothing is left to reclaim it kills a process
there, whatever the machine has free: Documentation/admin-guide/cgroup-v2.rst.

Changes nothing. Where the memory controller is in use by cgroup v1, there is nothing to read, and nothing is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdnfs.kernel.state import ROOT, read_int, read_text

_FOLDER = "sys/fs/cgroup"
# memory.current lags by what each CPU has charged in advance (mm/memcontrol.c: MEMCG_CHARGE_BATCH, 64 pages), and the
# page tables of what comes back are charged, too.
_MARGIN_BYTES = 1 << 20


@dataclass(frozen=True)
class TooSmall:
    """A cgroup without room for what it has swapped out.

    path           below /sys/fs/cgroup: "/system.slice/job.service"
    limit          "memory.max", or "memory.high", above which its processes are throttled until they stand still
    limit_bytes    the value of that file
    current_bytes  charged to it now
    coming_bytes   what comes back at most
    room_bytes     how much of that the limit leaves room for: what can be reclaimed counts as free
    wanted_bytes   the least limit that has room for all of it
    """

    path: str
    limit: str
    limit_bytes: int
    current_bytes: int
    coming_bytes: int
    room_bytes: int
    wanted_bytes: int


def too_small(on_device_bytes: int, elsewhere_bytes: int, root: Path = ROOT) -> TooSmall | None:
    """The first cgroup that cannot take back what it has on a swap device; None where each one can.

    on_device_bytes  what is swapped out to the device in all
    elsewhere_bytes  room in the other swap areas, to which a cgroup may swap out meanwhile

    The kernel does not say on which device a cgroup's pages are. So each is taken to have as much on this one as it may
    have: all that it has swapped out, and no more than the device holds.
    """
    used_bytes = 0
    for group in _children(root / _FOLDER):
        excess_bytes, culprit = _excess(group, on_device_bytes, root)
        used_bytes += excess_bytes
        if culprit is not None and used_bytes > elsewhere_bytes:
            return culprit
    return None


def _excess(group: Path, on_device_bytes: int, root: Path) -> tuple[int, TooSmall | None]:
    """What must go to other swap areas, for this cgroup and those in it, and the cgroup that has too little room.

    More than can go there is an excess of all that may come: it fits nowhere.
    """
    coming_bytes = min(_swapped_out_bytes(group), on_device_bytes)
    if coming_bytes <= 0:
        return 0, None  # nor has any that is inside
    inner_bytes, culprit = 0, None
    for child in _children(group):
        excess_bytes, found = _excess(child, on_device_bytes, root)
        inner_bytes += excess_bytes
        culprit = culprit or found
    own_bytes = 0
    for limit in ("memory.max", "memory.high"):
        found = _exceeded(group, limit, coming_bytes, root)
        if found is not None and coming_bytes - found.room_bytes > own_bytes:
            own_bytes = coming_bytes - found.room_bytes
            culprit = found
    excess_bytes = max(inner_bytes, own_bytes)
    allowed_bytes = read_int(group / "memory.swap.max")  # None: "max"
    # what comes back frees as much of memory.swap.max; one that was lowered since may be exceeded
    if allowed_bytes is not None and excess_bytes > max(
        0, allowed_bytes - ((read_int(group / "memory.swap.current") or 0) - coming_bytes)
    ):
        return _NOWHERE_BYTES, culprit
    return excess_bytes, culprit


# More than any swap area has.
_NOWHERE_BYTES = 1 << 62


def _exceeded(group: Path, limit: str, coming_bytes: int, root: Path) -> TooSmall | None:
    limit_bytes = read_int(group / limit)  # None: "max", or the cgroup has just been removed
    current_bytes = read_int(group / "memory.current")
    if limit_bytes is None or current_bytes is None:
        return None
    wanted_bytes = current_bytes - _reclaimable_bytes(group) + coming_bytes + _MARGIN_BYTES
    if wanted_bytes <= limit_bytes:
        return None
    room_bytes = max(0, limit_bytes - (wanted_bytes - coming_bytes))
    path = f"/{group.relative_to(root / _FOLDER)}"
    return TooSmall(path, limit, limit_bytes, current_bytes, coming_bytes, room_bytes, wanted_bytes)


def _swapped_out_bytes(group: Path) -> int:
    """By the cgroup and those in it, less the pages that are in memory as well, whose slots are not free yet."""
    swapped_bytes = read_int(group / "memory.swap.current") or 0
    return swapped_bytes - _stat(group).get("swapcached", 0)


def _reclaimable_bytes(group: Path) -> int:
    """File pages that can be dropped without writing them: those not used lately, and half of the others, which its
    programs need to run. Less what is protected for cgroups inside (memory.min)."""
    stat = _stat(group)
    clean_bytes = (
        stat.get("inactive_file", 0)
        + stat.get("active_file", 0) // 2
        - stat.get("file_dirty", 0)
        - stat.get("file_writeback", 0)
    )
    for child in _children(group):
        protected = (read_text(child / "memory.min") or "0").strip()
        charged_bytes = read_int(child / "memory.current") or 0
        clean_bytes -= min(int(protected), charged_bytes) if protected.isdigit() else charged_bytes  # "max"
    return max(0, clean_bytes)


def _stat(group: Path) -> dict[str, int]:
    found = re.findall(r"^(\w+) (\d+)$", read_text(group / "memory.stat") or "", re.MULTILINE)
    return {key: int(value) for key, value in found}


def _children(group: Path) -> Iterator[Path]:
    """In the order of their names; none where it has just been removed."""
    try:
        yield from sorted(path for path in group.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return
