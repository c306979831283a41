# SPDX-License-Identifier: LGPL-2.1-or-later
"""xfstests' group quick, with our devices as TEST_DEV and SCRATCH_DEV. Tests of data come first: there are so many
tests that time may be up before all had their turn."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

from vmtest.machine import Result

from world.benches import Place
from world.suite import Bench, Part, Suite, Test, last_words
from world.supplied import missing

_DEVICE_MIB = 512
_MEMORY_MIB = 768
_TIMEOUT_S = 900.0
# Groups of it that are about data: direct I/O, reads and writes, mapped files, fsync before a crash, TRIM.
_OF_DATA = ("aio", "rw", "mmap", "log", "trim")


def suite(place: Place) -> Suite:
    """One test after the other, each by `check`, so that a guest that is lost takes no other test with it."""
    return Suite("xfstests", [_on(place, kind) for kind in ("ext4", "xfs")], missing(place, "xfstests", "check"))


def _on(place: Place, kind: str) -> Part:
    @contextlib.contextmanager
    def prepare() -> Iterator[Bench]:
        with place.plain([_DEVICE_MIB, _DEVICE_MIB], memory_mib=_MEMORY_MIB, extras=["xfstests"]) as bench:
            test, scratch = bench.devices
            settings = (
                f"export TEST_DEV={test} TEST_DIR=/mnt/test SCRATCH_DEV={scratch} SCRATCH_MNT=/mnt/scratch FSTYP={kind}"
            )
            bench.guest.run(
                f"modprobe {kind}; mkdir -p /mnt/test /mnt/scratch && mkfs.{kind} -q {test}"
                f" && echo '{settings}' > /opt/xfstests/local.config && useradd -m fsgqa && useradd -m fsgqa2",
                600,
            )
            yield bench
            bench.guest.run("umount /mnt/test /mnt/scratch; true", 300)

    def tests(bench: Bench) -> list[Test]:
        quick = [name for folder in ("generic", kind) for name in _in_group(bench, folder, "quick")]
        names = in_turn([_in_group(bench, "generic", group) for group in _OF_DATA], quick)
        return [Test(name, f"cd /opt/xfstests && ./check {name}", _TIMEOUT_S, judged) for name in names]

    return Part(kind, prepare, tests)


def _in_group(bench: Bench, folder: str, group: str) -> list[str]:
    """Of the list that its build makes. `check -n` prints the same, but takes minutes on an emulated processor."""
    listed = bench.guest.run(f"grep -w {group} /opt/xfstests/tests/{folder}/group.list").stdout.splitlines()
    return [f"{folder}/{line.split()[0]}" for line in listed if line[0].isdigit()]


def in_turn(groups: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    """All `names` once: one that is in the first of `groups`, one that is in the second, and so on again and again;
    then the others."""
    known = set(names)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    return list(dict.fromkeys([*(name for name in turns if name in known), *names]))


def judged(result: Result) -> tuple[str, str]:
    """`check` prints the test's name with its seconds, or with "[not run]" and the reason."""
    for line in result.stdout.splitlines():
        if "[not run]" in line and result.status == 0:
            return "not run", line.partition("[not run]")[2].strip() or "the suite gives no reason"
        if "[expunged]" in line:
            return "not run", "expunged"
    if result.status == 0 and "Passed all 1 tests" in result.stdout:
        return "passed", ""
    lines = [line.strip() for line in result.stdout.splitlines() if "output mismatch" in line or line[:5] == "    +"]
    return "failed", " ".join(lines[:3]) or last_words(result)
