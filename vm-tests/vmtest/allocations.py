# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pages the kernel allocates on behalf of some threads: where, and with which flags.

The kernel counts them itself, by a histogram trigger on kmem:mm_page_alloc (Documentation/trace/histogram.rst).
The flags are those after the task's own restrictions: mm/page_alloc.c, __alloc_pages() (since 6.10
__alloc_pages_noprof()) applies current_gfp_context() before it allocates and traces.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from vmtest.machine import Machine
from vmtest.outcome import GuestFailedError

_EVENT = "/sys/kernel/tracing/events/kmem/mm_page_alloc"

# include/linux/gfp_types.h; the first eight bits have had these places since 4.13 at the latest.
_GFP_IO, _GFP_FS = 0x40, 0x80
_GFP_DIRECT_RECLAIM, _GFP_KSWAPD_RECLAIM = 0x400, 0x800

# Frames of the allocator itself, which every allocation has.
_PLUMBING = re.compile(
    r"__alloc_pages|alloc_pages|__get_free_pages|get_zeroed_page|__folio_alloc|folio_alloc|vma_alloc_folio|"
    r"new_slab|allocate_slab|___slab_alloc|__slab_alloc|__kmem_cache_alloc|kmem_cache_alloc|__kmalloc|"
    r"kmalloc_|__do_kmalloc|alloc_frozen_pages|__page_frag_cache|trace_event_raw_event|get_page_from_freelist"
)
_FRAMES_SHOWN = 4


@dataclass(frozen=True)
class Site:
    """One way to an allocation: the functions from the innermost out, the flags, how often."""

    functions: tuple[str, ...]
    flags: int
    hits: int

    @property
    def may_enter_io(self) -> bool:
        """Whether reclaim on its behalf may wait for a block device or a file system."""
        return bool(self.flags & (_GFP_IO | _GFP_FS))

    @property
    def flag_names(self) -> str:
        """The flags that decide how it may get its page."""
        names = {_GFP_IO: "IO", _GFP_FS: "FS", _GFP_DIRECT_RECLAIM: "DIRECT_RECLAIM", _GFP_KSWAPD_RECLAIM: "KSWAPD"}
        return "|".join(name for flag, name in names.items() if self.flags & flag) or "none"

    @property
    def place(self) -> str:
        """The innermost functions that show what it is for."""
        callers = [name for name in self.functions if not _PLUMBING.match(name)]
        return " < ".join(callers[:_FRAMES_SHOWN])


@dataclass(frozen=True)
class Histogram:
    """All sites, the most frequent first. `dropped` allocations found no room in the kernel's table."""

    sites: tuple[Site, ...]
    dropped: int

    def table(self) -> str:
        """For people and for docs/memory-pressure.md."""
        merged: dict[tuple[str, int], int] = {}
        names: dict[tuple[str, int], str] = {}
        for site in self.sites:
            key = site.place, site.flags
            merged[key] = merged.get(key, 0) + site.hits
            names[key] = site.flag_names
        rows = [f"| {'pages':>8} | flags | may reclaim by | call site |", "| ---: | --- | --- | --- |"]
        for key, hits in sorted(merged.items(), key=lambda item: -item[1]):
            rows.append(f"| {hits:>8} | {key[1]:#x} | {names[key]} | `{key[0]}` |")
        return "\n".join(rows)


def start(machine: Machine, tids: Collection[int]) -> None:
    """Count the allocations of these threads from now on."""
    condition = " || ".join(f"common_pid == {tid}" for tid in sorted(tids))
    machine.run(
        "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing;"
        f" echo 'hist:keys=stacktrace,gfp_flags.hex:size=8192 if {condition}' > {_EVENT}/trigger"
        " || { cat /sys/kernel/tracing/error_log; exit 1; }"
    )


def read(machine: Machine) -> Histogram:
    """What was counted since `start`, which goes on. GuestFailedError when its form is unknown."""
    return parse(machine.run(f"cat {_EVENT}/hist").stdout)


def parse(text: str) -> Histogram:
    """The content of a `hist` file whose keys are stacktrace and gfp_flags.hex."""
    sites = []
    pattern = r"\{ (?:common_)?stacktrace:(.*?), gfp_flags: (?:0x)?([0-9a-f]+)\s*\} hitcount:\s*(\d+)"
    for stack, flags, hits in re.findall(pattern, text, re.DOTALL):
        functions = tuple(line.strip().partition("+")[0] for line in stack.split("\n") if line.strip())
        sites.append(Site(functions, int(flags, 16), int(hits)))
    dropped = re.search(r"^\s*Dropped: (\d+)", text, re.MULTILINE)
    if dropped is None or len(sites) != text.count("} hitcount:"):
        raise GuestFailedError(f"the kernel's histogram is not understood:\n{text[-2000:]}")
    return Histogram(tuple(sorted(sites, key=lambda site: -site.hits)), int(dropped[1]))
