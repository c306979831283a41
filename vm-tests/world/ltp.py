# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Linux Test Project's tests of swap and of running out of memory."""

from __future__ import annotations

import re

from vmtest.machine import Result

from world.benches import Place
from world.suite import Bench, Part, Suite, Test, last_words
from world.supplied import missing

_SWAP_MIB = 512
# For the tests that make file systems, and swap files on them.
_SECOND_MIB = 448
_MEMORY_MIB = 384
_TIMEOUT_S = 1200.0
# Their own deadlines are for a processor that is not emulated.
_SLOWER = 20
# Of runtest/mm and runtest/syscalls.
_COMMANDS = {
    "swapping01": "swapping01",
    "swapon01": "swapon01",
    "swapon02": "swapon02",
    "swapon03": "swapon03",
    "swapoff01": "swapoff01",
    "swapoff02": "swapoff02",
    "mtest01": "mtest01 -p80",
    "mtest01w": "mtest01 -p80 -w",
    "min_free_kbytes": "min_free_kbytes",
    "oom01": "oom01",
    "oom02": "oom02",
    "oom03": "oom03",
    "oom04": "oom04",
    "oom05": "oom05",
}
_WORDS = re.compile(r"\b(TFAIL|TBROK|TCONF|TWARN): (.*)")
# include/tst_res_flags.h: the exit status is the sum of those that occurred.
_FAILED, _BROKEN, _UNSUITABLE = 1, 2, 32


def suite(place: Place) -> Suite:
    """Our device is the only swap, and another one of ours has the file systems."""
    part = Part(
        "swap",
        lambda: place.swap(_SWAP_MIB, memory_mib=_MEMORY_MIB, second_mib=_SECOND_MIB, extras=["ltp"]),
        _tests,
    )
    return Suite("ltp", [part], missing(place, "ltp", "testcases/bin/swapon01"))


def _tests(bench: Bench) -> list[Test]:
    environment = (
        "export LTPROOT=/opt/ltp PATH=$PATH:/opt/ltp/testcases/bin TMPDIR=/var/tmp"
        f" LTP_TIMEOUT_MUL={_SLOWER} LTP_DEV={bench.devices[1]} LTP_SINGLE_FS_TYPE=ext4 LTP_COLORIZE_OUTPUT=n"
    )
    return [
        Test(name, f"{environment}; exec {command}", _TIMEOUT_S, judged, allow={"oom", "nomem"})
        for name, command in _COMMANDS.items()
    ]


def judged(result: Result) -> tuple[str, str]:
    """By the exit status, and the first line that says why."""
    said = _WORDS.findall(result.stdout + result.stderr)
    if result.status == 0:
        return "passed", ""
    wanted = "TCONF" if result.status == _UNSUITABLE else "TBROK" if result.status & _BROKEN else "TFAIL"
    why = next((text for word, text in said if word == wanted), last_words(result))
    return ("not run" if result.status == _UNSUITABLE else "failed"), why
