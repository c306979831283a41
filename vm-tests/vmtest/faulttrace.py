# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which page faults some threads of a process take, and in which of its mappings.

From exceptions:page_fault_user and page_fault_kernel (arch/x86/include/asm/trace/exceptions.h), in a trace instance of
its own. Other architectures have no such tracepoints: there, nothing is kept.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection

from vmtest.machine import Machine

_INSTANCE = "/sys/kernel/tracing/instances/nbdnfs-faults"
_FAULT = re.compile(
    r"-(\d+) .*?\s([\d.]+): (page_fault_\w+): address=0x([0-9a-f]+)\S* ip=(\S+) error_code=0x([0-9a-f]+)"
)
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)$", re.MULTILINE)


def start(machine: Machine, tids: Collection[int]) -> None:
    """Keep the faults of these threads from now on."""
    condition = " || ".join(f"common_pid == {tid}" for tid in sorted(tids))
    machine.run(
        "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing;"
        f" mkdir -p {_INSTANCE} && cd {_INSTANCE}/events || exit 1; [ -d exceptions ] || exit 0;"
        f" cd exceptions && for event in page_fault_user page_fault_kernel; do"
        f" echo '{condition}' > $event/filter && echo 1 > $event/enable; done"
    )


def read(machine: Machine, pid: int) -> str:
    """What was kept: for each fault the thread, the address, what is mapped there."""
    trace = machine.run(f"grep -v '^#' {_INSTANCE}/trace | head -n 400", check=False).stdout
    maps = machine.run(f"cat /proc/{pid}/maps").stdout
    return "\n".join(described(trace, maps))


def described(trace: str, maps: str) -> list[str]:
    """A line for each fault in the trace."""
    mappings = sorted(
        (int(first, 16), int(end, 16), rights, name) for first, end, rights, name in _MAPPING.findall(maps)
    )
    lines = []
    for tid, at_s, event, address, instruction, code in _FAULT.findall(trace):
        number = int(address, 16)
        index = bisect_right(mappings, (number, 1 << 64, "", "")) - 1
        where = "nothing is mapped there any more"
        if index >= 0 and number < mappings[index][1]:
            first, _, rights, name = mappings[index]
            where = f"{rights} {name or 'anonymous'} + {number - first:#x}"
        lines.append(f"{at_s} thread {tid}: {event} at {number:#x} ({where}), ip {instruction}, error code 0x{code}")
    return lines
