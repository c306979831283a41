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
from nbdnfs import proc_stat, region
pid = int(sys.argv[1])
fields = proc_stat.fields(open(f"/proc/{pid}/stat").read())
counters = region.read_counters(region.take_from(pid))
ticks = int(fields[proc_stat.USER_TICKS]) + int(fields[proc_stat.SYSTEM_TICKS])
counters["cpu_ms"] = ticks * 1000 // os.sysconf("SC_CLK_TCK")
print(json.dumps(counters))
"""

Counters = Mapping[str, int | list[int]]


def read(guest: Guest, nbdkit_pid: int) -> dict[str, int | list[int]]:
    """Up to now; with `cpu_ms`, the processor time of the process."""
    text = guest.run(f"python3 -c {shlex.quote(_READ)} {nbdkit_pid}").stdout
    found: dict[str, int | list[int]] = json.loads(text)
    return found
