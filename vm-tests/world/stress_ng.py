# SPDX-License-Identifier: LGPL-2.1-or-later
"""stress-ng's stressors of memory, each with --verify, in a memory cgroup that is much smaller than what they use."""

from __future__ import annotations

import re

from vmtest.machine import Result

from world.benches import Place
from world.suite import Bench, Part, Suite, Test, last_words, limited

_SWAP_MIB = 768
_MEMORY_MIB = 512
_LIMIT_MIB = 64
_SECONDS = 8
# It kills its stressors when their time is up, and waits for pages of theirs that are on the NAS.
_TIMEOUT_S = 300.0
# Those that are not in its class "vm".
_MORE = ("swap", "memfd")
# Where the default is less than the cgroup has, or all of the machine's memory. Several work at once.
_SIZES = {
    "vm": "--vm 2 --vm-bytes 192m",
    "memfd": "--memfd 2 --memfd-bytes 192m",
    "mmap": "--mmap 2 --mmap-bytes 128m",
    "shm": "--shm 2 --shm-bytes 32m",
    "shm-sysv": "--shm-sysv 2 --shm-sysv-bytes 32m",
    "bigheap": "--bigheap 1 --bigheap-growth 1m",
}


def suite(place: Place) -> Suite:
    """Its class vm, and the stressors swap and memfd."""
    prepare = lambda: place.swap(_SWAP_MIB, memory_mib=_MEMORY_MIB, limit_mib=_LIMIT_MIB)  # noqa: E731
    return Suite("stress-ng", (Part("swap", prepare, _tests),))


def _tests(bench: Bench) -> list[Test]:
    # It lists them after "class 'vm' stressors:", and ends as if that were wrong.
    listed = bench.guest.run("stress-ng --class 'vm?' 2>&1; true").stdout
    names = listed.rpartition("stressors:")[2].split()
    return [_test(name) for name in sorted({*names, *_MORE})]


def _test(name: str) -> Test:
    command = (
        f"mkdir -p /var/tmp/stress && exec stress-ng {_SIZES.get(name, f'--{name} 1')} --verify --timeout {_SECONDS}"
        " --temp-path /var/tmp/stress --oomable"
    )
    # What a stressor allocates without an end is killed, as it asks to be.
    return Test(name, limited(command), _TIMEOUT_S, judged, allow={"oom", "nomem"})


# What it says whatever happens.
_USUAL = re.compile(r"setting to|dispatching|run completed|skipped:|passed:|failed:|untrustworthy|No stress workers")
_NOTHING_LEFT = "No stress workers invoked"
_SKIPPED = re.compile(r"skipped: [1-9]")


def judged(result: Result) -> tuple[str, str]:
    """Its exit statuses are in stress-ng(1): 3 is too few resources, 4 not on this machine; 1 if nothing was left.

    What failed is not "not run", although something else of it was skipped.
    """
    lines = (result.stderr + result.stdout).splitlines()
    complaints = [line for line in lines if ("fail:" in line or "error:" in line) and _NOTHING_LEFT not in line]
    is_empty = any(_NOTHING_LEFT in line for line in lines)
    if complaints or not (result.status in (0, 3, 4) or (result.status == 1 and is_empty)):
        return "failed", f"{result.status}: {_words(complaints[0] if complaints else last_words(result))}"
    if result.status or is_empty or any(_SKIPPED.search(line) for line in lines):
        return "not run", _words(next((line for line in lines if not _USUAL.search(line)), last_words(result)))
    return "passed", ""


def _words(line: str) -> str:
    """Without the program's name and number: the same reason is to be one row."""
    return line.partition("]")[2].strip() or line.strip()
