# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much of each file that a process has mapped is in its memory, to see what it reads for the first time."""

from __future__ import annotations

from pathlib import Path


def resident_kib(pid: int) -> dict[str, int]:
    """Of each mapping of a file on a disk, by its addresses and path: proc_pid_smaps(5). Neither memfds nor devices."""
    found, name = {}, ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            name = f"{words[0]} {words[5]}" if len(words) == 6 and words[5].startswith("/") else ""
            if name and words[5].startswith(("/memfd:", "/dev/")):
                name = ""
        elif name and words[0] == "Rss:":
            found[name] = int(words[1])
    return found


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """The mappings that have come, or of which more is in memory, with how many KiB more."""
    return {name: kib - before.get(name, 0) for name, kib in after.items() if kib > before.get(name, -1)}
