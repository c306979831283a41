# SPDX-License-Identifier: LGPL-2.1-or-later
"""fsx, from xfstests: random operations on one file, each read compared with what must be there."""

from __future__ import annotations

from world.benches import WHERE, Place, checked
from world.suite import Bench, Part, Suite, Test, limited
from world.supplied import missing

_DEVICE_MIB = 384
_MEMORY_MIB = 512
# Its own copies of the file take three times the file's size.
_LIMIT_MIB = 160
_TIMEOUT_S = 600.0
# More than the worker's region has room for.
_FILE_BYTES = 32 << 20
# -f: what was written leaves the page cache, so that each read comes from the device
_WAYS = {
    "buffered and mapped": "-f -N 1500 -S 1",
    "buffered and mapped, up to 256 KiB": "-f -N 1500 -S 2 -o 262144",
    "direct": "-Z -R -W -r 4096 -w 4096 -N 2000 -S 3",
    "asynchronous and direct": "-A -Z -R -W -r 4096 -w 4096 -N 2000 -S 4",
}


def suite(place: Place) -> Suite:
    """On each file system."""
    return Suite("fsx", [_on(place, kind) for kind in ("ext4", "xfs")], missing(place, "xfstests", "ltp/fsx"))


def _on(place: Place, kind: str) -> Part:
    def tests(bench: Bench) -> list[Test]:
        fsx = f"cd {WHERE} && exec /opt/xfstests/ltp/fsx -q -l {_FILE_BYTES}"
        ways = [Test(name, limited(f"{fsx} {options} file"), _TIMEOUT_S) for name, options in _WAYS.items()]
        return [*ways, Test("the file system is whole", checked(kind, bench.devices[0]), 900)]

    return Part(
        kind,
        lambda: place.file_system(kind, _DEVICE_MIB, memory_mib=_MEMORY_MIB, limit_mib=_LIMIT_MIB, extras=["xfstests"]),
        tests,
    )
