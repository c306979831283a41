# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest asks its swap device for, as a trace that read_ahead.py can play: `vm.py --trace FOLDER`.

A line for each request, in order: the time in seconds of the guest's clock, R or W, the first page and the number of
pages.
"""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from vmtest.guest import Guest

_TRACING = "/sys/kernel/tracing"
# Room for some 900,000 requests, in the guest's memory and outside of the pages' cgroup.
_BUFFER_KIB = 60_000
_NBD_MAJOR = 43
_SECTORS_A_PAGE = 8
_RAW, _PACKED = "/root/trace", "/root/trace.gz"
# include/trace/events/block.h, block_rq_issue
_REQUEST = re.compile(rb" (\d+\.\d+): block_rq_issue: (\d+),\d+ ([RW])\S* \d+ \(.*?\) (\d+) \+ (\d+) ")


@contextlib.contextmanager
def recorded(guest: Guest, path: Path) -> Iterator[None]:
    """Record into `path`, gzipped, while the context is open; no file where nothing was asked of an nbd device. It
    costs the guest some 3% of its time. After an error the guest is of no use."""
    guest.run(
        f"mountpoint -q {_TRACING} || mount -t tracefs tracefs {_TRACING}; cd {_TRACING} && echo {_BUFFER_KIB} >"
        " buffer_size_kb && echo > trace && echo 1 > events/block/block_rq_issue/enable && echo 1 > tracing_on"
    )
    yield
    guest.run(
        f"cd {_TRACING} && echo 0 > tracing_on && grep block_rq_issue trace > {_RAW}; gzip -f {_RAW} && echo > trace",
        timeout_s=600,
    )
    lines = list(requests(gzip.decompress(guest.pull(_PACKED))))
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(lines)


def requests(trace: bytes) -> Iterator[str]:
    """The lines of our format for those of the kernel's that are about nbd devices."""
    for found in _REQUEST.finditer(trace):
        seconds, major, kind, sector, sectors = (word.decode() for word in found.groups())
        if int(major) == _NBD_MAJOR:
            yield f"{seconds} {kind} {int(sector) // _SECTORS_A_PAGE} {int(sectors) // _SECTORS_A_PAGE}\n"
