# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a swap area of the device where it has none, warms its worker up, and turns swap on, for the keeper.

    python -m nbdnfs.keeper.helpers.swap_on DEVICE PRIORITY LABEL URL [--discard] [--owned]

PRIORITY is "-" for the kernel's choice; URL is the file, which is looked at before a swap area is made; --owned says
that this machine has the file's owner record. A process of its own: reading a device whose worker has died waits for
the next worker, which the keeper starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nbdnfs.errors import NbdnfsError
from nbdnfs.kernel import swap_area


def main(argv: list[str]) -> int:
    path, priority, label, url, *flags = argv

    def look() -> int | None:
        from nbdnfs.nas import existing_file  # loads libnfs, which a start seldom needs

        return existing_file.swap_page_bytes(url)

    try:
        swap_area.enable(
            Path(path),
            priority=int(priority) if priority != "-" else None,
            label=label,
            discard="--discard" in flags,
            is_owned="--owned" in flags,
            look=look,
        )
    except NbdnfsError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
