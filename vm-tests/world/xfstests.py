# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tests of data in xfstests' group quick, with our devices as TEST_DEV and SCRATCH_DEV."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmtest.machine import Result

from world.benches import Place
from world.suite import Bench, Part, Suite, Test, last_words
from world.supplied import missing

# generic/247 writes a file of 500 MiB, and has failed where there is no room for it.
_DEVICE_MIB = 1024
_MEMORY_MIB = 768
_TIMEOUT_S = 900.0
# Groups that are about data: direct I/O, reads and writes, mapped files, fsync before a crash, TRIM.
_OF_DATA = ("aio", "rw", "mmap", "log", "trim")
# What is said of the rest of the group quick.
_OTHERS = {
    f"what is in none of the groups {', '.join(_OF_DATA)}": "names, attributes, quotas, clones and the like: the file"
    " system's own work, of which a device sees the same reads and writes"
}
# The folders of its tests, and what is said of the others.
_ON = {
    "ext4": (("generic", "ext4"), _OTHERS),
    "xfs": (("xfs",), {**_OTHERS, "generic": "they run on ext4; the file system itself is not what is tested"}),
}
# Tests for one call of `check`: inside/check_in_turn.sh.
_ROW = 10
_IN_TURN = Path(__file__).parents[1] / "inside/check_in_turn.sh"


def suite(place: Place) -> Suite:
    """One test after the other. A guest that is lost takes no other test with it."""
    return Suite("xfstests", [_on(place, kind) for kind in _ON], missing(place, "xfstests", "check"))


def _on(place: Place, kind: str) -> Part:
    folders, others = _ON[kind]

    @contextlib.contextmanager
    def prepare() -> Iterator[Bench]:
        with place.plain([_DEVICE_MIB, _DEVICE_MIB], memory_mib=_MEMORY_MIB, extras=["xfstests"]) as bench:
            test, scratch = bench.devices
            settings = (
                f"export TEST_DEV={test} TEST_DIR=/mnt/test SCRATCH_DEV={scratch} SCRATCH_MNT=/mnt/scratch FSTYP={kind}"
            )
            bench.guest.run(
                f"modprobe {kind}; mkdir -p /mnt/test /mnt/scratch && mkfs.{kind} -q {test}"
                f" && echo '{settings}' > /opt/xfstests/local.config",
                600,
            )
            # the users' names are the suite's own; an earlier guest may have made them
            bench.guest.run("for user in fsgqa fsgqa2; do id $user > /dev/null 2>&1 || useradd -m $user; done", 120)
            bench.guest.push(_IN_TURN, "/root/in_turn.sh")
            yield bench
            # a `check` may be under way, for tests that are not waited for any more
            bench.guest.run(
                "kill -s KILL -- -$(cat /root/in_turn/pid) 2> /dev/null; sleep 1; umount /mnt/test /mnt/scratch; true",
                300,
            )

    def tests(bench: Bench) -> list[Test]:
        quick = [name for folder in folders for name in _in_group(bench, folder, "quick")]
        names = in_turn(
            [[name for folder in folders for name in _in_group(bench, folder, group)] for group in _OF_DATA], quick
        )
        return [
            # some have a target of device-mapper make errors; what the device under it makes is one of that
            Test(name, f"sh /root/in_turn.sh /opt/xfstests /root/in_turn {row}", _TIMEOUT_S, judged, allow={"dm"})
            for name, row in in_rows(names)
        ]

    return Part(kind, prepare, tests, others)


def _in_group(bench: Bench, folder: str, group: str) -> list[str]:
    """Of the list that its build makes. `check -n` prints the same, but takes minutes on an emulated processor."""
    listed = bench.guest.run(
        f"grep -w {group} /opt/xfstests/tests/{folder}/group.list || [ $? = 1 ]"
    ).stdout.splitlines()
    return [f"{folder}/{line.split()[0]}" for line in listed if line[0].isdigit()]


def in_turn(groups: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    """Those of `names` that are in a group, once: one of the first group, one of the second, and so on again and
    again."""
    known = set(names)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    return list(dict.fromkeys(name for name in turns if name in known))


def in_rows(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each name, with those that one `check` runs from there on."""
    return [(name, " ".join(names[at : at - at % _ROW + _ROW])) for at, name in enumerate(names)]


# Its seconds, after those of the last time if there were any.
_PASSED = re.compile(r"\S+\s+(\d+s \.\.\.\s+)?\d+s")


def judged(result: Result) -> tuple[str, str]:
    """`check` prints the test's name with its seconds, or with "[not run]" and the reason. Any other line says what is
    wrong."""
    first, *others = result.stdout.rstrip().splitlines() or [""]
    if result.status == 0 and not others:
        if "[not run]" in first:
            return "not run", first.partition("[not run]")[2].strip() or "the suite gives no reason"
        if "[expunged]" in first:
            return "not run", "expunged"
        if _PASSED.fullmatch(first):
            return "passed", ""
    lines = [line.strip() for line in (first, *others) if "output mismatch" in line or line[:5] == "    +"]
    return "failed", " ".join(lines[:3]) or last_words(result)
