# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks up the server's name again, for a keeper that has not reached its server for a minute.

    python -m nbdnfs.keeper.helpers.resolve_server NAME URL KNOWN-ADDRESS

A process of its own: name resolution reads files, opens sockets and allocates memory, none of which a keeper or a
worker may do while swap stands still. It may itself hang until the server is back, and is the first process that the
kernel kills when memory runs out. Where the name now resolves to another address, and that accepts connections, it is
recorded for the next keeper and printed for this one, and the exit status is 0.
"""

from __future__ import annotations

import contextlib
import sys

from nbdnfs import nfs_url
from nbdnfs.errors import NbdnfsError
from nbdnfs.keeper.records import Records

# proc_pid_oom_score_adj(5): the keeper's own -1000 is inherited
_FIRST_TO_BE_KILLED = "1000"


def main(argv: list[str]) -> int:
    name, text, known = argv
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_FIRST_TO_BE_KILLED)
    parsed = nfs_url.parse_recorded(text)  # the keeper before may have been of an earlier version
    try:
        address = parsed.resolve()
    except NbdnfsError as error:
        return error.exit_code
    if address == known or not parsed.answers(address):
        return 1
    Records(name).put(Records.ADDRESS, f"{text}\n{address}")
    print(address, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
