# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a worker in a guest has counted: nbdnfs/region.py."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from vmtest.guest import Guest

# The region's counters of a worker, and the processor time that it has used.
_READ = """\
import json, os, sys
from nbdnfs import region
pid = int(sys.argv[1])
fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
counters = region.read_counters(region.take_from(pid))
counters["cpu_ms"] = (int(fields[11]) + int(fields[12])) * 1000 // os.sysconf("SC_CLK_TCK")
print(json.dumps(counters))
"""

Counters = Mapping[str, int | list[int]]


def read(guest: Guest, nbdkit_pid: int) -> dict[str, int | list[int]]:
    """Up to now; with `cpu_ms`, the processor time of the process."""
    text = guest.run(f"python3 -c {shlex.quote(_READ)} {nbdkit_pid}").stdout
    found: dict[str, int | list[int]] = json.loads(text)
    return found
