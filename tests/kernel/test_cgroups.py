# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits of cgroups: what swapoff must not bring back, on trees of files as /sys/fs/cgroup has them."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdnfs.errors import BusyError
from nbdnfs.kernel import cgroups, swap_area
from nbdnfs.kernel.state import Swap

MIB = 1 << 20
SWAPS = "Filename Type Size Used Priority\n/dev/nbd0 partition 262144 {used_kib} 100\n"
MEMINFO = "MemTotal: 262144 kB\nMemFree: 1 kB\nMemAvailable: 200000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"


@dataclass
class Group:
    """A cgroup as a test wants it; what is charged inside is charged to it as well, as the kernel does."""

    anonymous_mib: int = 0
    file_mib: int = 0  # half of it used lately
    swapped_mib: int = 0
    on_device_mib: int = 0  # of swapped_mib: what really lies on the device
    max_mib: int | None = None
    high_mib: int | None = None
    swap_max_mib: int | None = None
    inside: list[Group] = field(default_factory=list)

    def sum(self, name: str) -> int:
        return int(getattr(self, name)) + sum(group.sum(name) for group in self.inside)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        limits = {"memory.max": self.max_mib, "memory.high": self.high_mib, "memory.swap.max": self.swap_max_mib}
        for name, limit in limits.items():
            (folder / name).write_text("max\n" if limit is None else f"{limit * MIB}\n")
        file_bytes = self.sum("file_mib") * MIB
        (folder / "memory.min").write_text("0\n")
        (folder / "memory.current").write_text(f"{self.sum('anonymous_mib') * MIB + file_bytes}\n")
        (folder / "memory.swap.current").write_text(f"{self.sum('swapped_mib') * MIB}\n")
        half = file_bytes // 2
        (folder / "memory.stat").write_text(
            f"anon 1\nfile {file_bytes}\nfile_dirty 0\nfile_writeback 0\nswapcached 0\n"
            f"inactive_file {half}\nactive_file {file_bytes - half}\n"
        )
        for number, group in enumerate(self.inside):
            group.write(folder / f"g{number}")

    def missing_mib(self) -> int:
        """What must go to other swap areas for sure: the least amount with which every limit holds. -1: impossible."""
        inner = [group.missing_mib() for group in self.inside]
        if -1 in inner:
            return -1
        missing = sum(inner)
        needed = self.sum("anonymous_mib") + self.sum("on_device_mib")
        for limit in (self.max_mib, self.high_mib):
            if limit is not None and self.sum("on_device_mib"):
                missing = max(missing, min(needed - limit, self.sum("on_device_mib")))
        left = self.sum("swapped_mib") - self.sum("on_device_mib")
        if self.swap_max_mib is not None and missing > max(0, self.swap_max_mib - left):
            return -1
        return missing


def tree(root: Path, *groups: Group) -> Path:
    (root / "sys/fs/cgroup").mkdir(parents=True)
    for number, group in enumerate(groups):
        group.write(root / f"sys/fs/cgroup/g{number}")
    return root


def check(root: Path, on_device_mib: int, elsewhere_mib: int = 0) -> cgroups.TooSmall | None:
    return cgroups.too_small(on_device_mib * MIB, elsewhere_mib * MIB, root)


def test_a_job_in_a_small_cgroup(tmp_path: Path) -> None:
    """16 MiB swapped out in a cgroup of 10 MiB: named, with the figures and with what to do; nothing is changed."""
    root = tree(tmp_path, Group(anonymous_mib=9, swapped_mib=16, max_mib=10))
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/swaps").write_text(SWAPS.format(used_kib=16 << 10))
    swap = Swap("/dev/nbd0", "partition", 256 * MIB, 16 * MIB, 100)
    with pytest.raises(BusyError) as caught:
        swap_area.refuse_unless_it_fits(swap, root)
    assert caught.value.message == (
        "the cgroup /g0 has 16 MiB swapped out to /dev/nbd0, and its memory.max of 10 MiB leaves room for 0 B: its"
        " processes would be killed for lack of memory; swap stays on"
    )
    assert f"echo {26 * MIB} > /sys/fs/cgroup/g0/memory.max" in caught.value.hint


@pytest.mark.parametrize(
    ("group", "limit"),
    [
        (Group(swapped_mib=16), None),
        (Group(swapped_mib=16, max_mib=17), None),
        (Group(swapped_mib=16, max_mib=16), "memory.max"),  # nothing left for page tables
        (Group(swapped_mib=16, max_mib=100, high_mib=10), "memory.high"),
        (Group(anonymous_mib=16, max_mib=10), None),  # nothing is swapped out
        (Group(swapped_mib=16, file_mib=40, max_mib=50), None),  # clean file pages make room
        (Group(swapped_mib=16, file_mib=12, max_mib=19), "memory.max"),  # a program needs some of them
        (Group(max_mib=10, inside=[Group(swapped_mib=16)]), "memory.max"),  # an ancestor's limit
        (Group(inside=[Group(swapped_mib=16, max_mib=10)]), "memory.max"),
        (Group(max_mib=20, inside=[Group(swapped_mib=10), Group(swapped_mib=11)]), "memory.max"),  # both together
    ],
)
def test_limits(tmp_path: Path, group: Group, limit: str | None) -> None:
    """The tightest limit on the way to the root counts, whichever file it stands in."""
    found = check(tree(tmp_path, group), 64)
    assert (found.limit if found else None) == limit


def test_another_swap_area(tmp_path: Path) -> None:
    """What does not fit may go there, as far as there is room, for all cgroups together, and memory.swap.max allows."""
    small = Group(anonymous_mib=8, swapped_mib=16, max_mib=10)
    root = tree(tmp_path / "a", small, Group())
    assert check(root, 64, 14) is not None
    assert check(root, 64, 16) is None
    assert check(tree(tmp_path / "b", small, small), 64, 20) is not None
    assert check(tree(tmp_path / "c", Group(8, 0, 16, 16, 10, None, 14)), 64, 64) is not None


def test_only_what_is_on_the_device(tmp_path: Path) -> None:
    """A cgroup cannot get back more than the device has."""
    root = tree(tmp_path, Group(swapped_mib=100, max_mib=10))
    assert check(root, 9) is None
    assert check(root, 10) is not None


def test_pages_in_memory_as_well(tmp_path: Path) -> None:
    """A page of the swap cache is charged already."""
    root = tree(tmp_path, Group(anonymous_mib=8, swapped_mib=8, max_mib=9))
    assert check(root, 64) is not None
    (root / "sys/fs/cgroup/g0/memory.stat").write_text(f"swapcached {8 * MIB}\n")
    assert check(root, 64) is None


def test_protected_pages(tmp_path: Path) -> None:
    """What memory.min protects inside is not reclaimed."""
    root = tree(tmp_path, Group(max_mib=50, inside=[Group(swapped_mib=16, file_mib=40)]))
    assert check(root, 64) is None
    (root / "sys/fs/cgroup/g0/g0/memory.min").write_text("max\n")
    assert check(root, 64) is not None


def test_no_cgroups(tmp_path: Path) -> None:
    """Without cgroup v2, with files that vanish, or that hold something else: nothing is found, nothing raised."""
    assert check(tmp_path, 64) is None
    root = tree(tmp_path, Group(swapped_mib=16, max_mib=10))
    (root / "sys/fs/cgroup/g0/memory.current").write_text("?\n")
    assert check(root, 64) is None
    shutil.rmtree(root / "sys/fs/cgroup/g0")
    assert check(root, 64) is None


sizes = st.integers(0, 20)
limits = st.none() | st.integers(0, 40)


def groups(inside: st.SearchStrategy[list[Group]]) -> st.SearchStrategy[Group]:
    def make(sizes: tuple[int, int, int, int], limits: list[int | None], inside: list[Group]) -> Group:
        anonymous, file, swapped, on_device = sizes
        return Group(anonymous, file, swapped, min(on_device, swapped), *limits, inside)

    return st.builds(make, st.tuples(sizes, sizes, sizes, sizes), st.lists(limits, min_size=3, max_size=3), inside)


trees = st.lists(groups(st.lists(groups(st.just([])), max_size=2)), min_size=1, max_size=3)


@given(trees, sizes)
def test_it_never_allows_what_exceeds(found: list[Group], elsewhere_mib: int) -> None:
    """Where it says yes, every limit holds with all pages of the device back, and the rest fits elsewhere."""
    on_device_mib = sum(group.sum("on_device_mib") for group in found)
    with tempfile.TemporaryDirectory() as folder:
        root = tree(Path(folder) / "root", *found)
        if check(root, on_device_mib, elsewhere_mib) is not None:
            return
    missing = [group.missing_mib() for group in found]
    assert -1 not in missing
    assert sum(missing) <= elsewhere_mib
