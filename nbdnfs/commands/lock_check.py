# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a process that this one starts could lock its memory, and take the other measures against deadlock.

    python -m nbdnfs.commands.lock_check [MEASURE ...]

Takes them itself, except those that are named, and ends. A line on stderr for each that is not in force; the exit
status is that of ConfigError then.
"""

from __future__ import annotations

import sys

from nbdnfs import memlock
from nbdnfs.errors import NbdnfsError


def main(skip: list[str]) -> int:
    every_file = ("",)  # none of its pages are dropped: other processes use them
    measures = memlock.prepare() + memlock.lock(every_file, skip=skip)
    try:
        memlock.require(measure for measure in measures if measure.name not in skip)
    except NbdnfsError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
