# SPDX-License-Identifier: LGPL-2.1-or-later
"""blktests: its tests of a block device, on ours, and its group nbd."""

from __future__ import annotations

from vmtest.machine import Result

from world.benches import Place
from world.suite import Bench, Part, Suite, Test, last_words
from world.supplied import missing

_DEVICE_MIB = 384
_MEMORY_MIB = 512
_TIMEOUT_S = 900.0
_ITS_OWN_SECONDS = 30
_INAPPLICABLE = {
    "nbd/001 to nbd/004": "it starts an nbd-server of its own on /dev/nbd0: it tests the kernel's nbd, not what serves"
    " ours",
    "block/011": "it is for a PCI device",
    "block/019": "it is for a PCI device",
    "block/036": "it is for a kernel with fault injection, which Debian's has not",
}


def suite(place: Place) -> Suite:
    """One test after the other, each by `check`."""
    return Suite(
        "blktests",
        (
            Part(
                "the device",
                lambda: place.plain([_DEVICE_MIB], memory_mib=_MEMORY_MIB, extras=["blktests"]),
                _tests,
                _INAPPLICABLE,
            ),
        ),
        missing(place, "blktests", "check"),
    )


def _tests(bench: Bench) -> list[Test]:
    """Those that take a device: they define test_device()."""
    (device,) = bench.devices
    listed = bench.guest.run("cd /opt/blktests/tests && grep -l '^test_device()' block/[0-9][0-9][0-9]").stdout.split()
    bench.guest.run(f"echo 'TEST_DEVS=({device}) TIMEOUT={_ITS_OWN_SECONDS}' > /opt/blktests/config")
    return [Test(name, f"cd /opt/blktests && ./check -d {name}", _TIMEOUT_S, judged) for name in listed]


def judged(result: Result) -> tuple[str, str]:
    """`check` prints each test's name with its result in brackets, and why below it."""
    lines = result.stdout.splitlines()
    ends = [index for index, line in enumerate(lines) if line.rstrip().endswith(("[passed]", "[failed]", "[not run]"))]
    if not ends:
        return "failed", last_words(result)
    last = lines[ends[-1]]
    if last.rstrip().endswith("[passed]") and result.status == 0:
        return "passed", ""
    why = " ".join(line.strip() for line in lines[ends[-1] + 1 :][:12]) or last.strip()
    return ("not run" if last.rstrip().endswith("[not run]") else "failed"), why
