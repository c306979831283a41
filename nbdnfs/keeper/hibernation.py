# SPDX-License-Identifier: LGPL-2.1-or-later
"""While a device is up, systemd refuses to hibernate: docs/decisions/0026.

Hibernation freezes user space, the worker too, and then makes room by swapping out: to the frozen worker, for ever
(kernel/power/hibernate.c: hibernation_snapshot). systemd-logind and systemd-sleep read sleep.conf.d(5) each time they
are asked, so a file in /run is enough. memlock.py has what stops the kernel itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_FOLDER = "run/systemd/sleep.conf.d"


def drop_in(name: str, root: Path = Path("/")) -> Path:
    """The file for the keeper of the device `name`."""
    return root / _FOLDER / f"nbdnfs@{name}.conf"


def forbid(name: str, root: Path = Path("/")) -> None:
    """Before the device is attached. A failure is reported: it is a reason to warn, not to be without swap."""
    path = drop_in(name, root)
    new = path.with_name(f".{path.name}.new")  # not read: it does not end in .conf
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new.write_text(
            f"# nbdnfs wrote this because the swap device '{name}' is up, and removes it when the device goes down.\n"
            "# Hibernation would freeze the process that serves the device, and then the machine, for ever.\n"
            "[Sleep]\nAllowHibernation=no\nAllowHybridSleep=no\nAllowSuspendThenHibernate=no\n"
        )
        new.rename(path)
    except OSError as error:
        print(
            f"nbdnfs: {name}: cannot write {path}: {error.strerror}: do not hibernate while the device is up",
            file=sys.stderr,
        )


def permit(name: str, root: Path = Path("/")) -> None:
    """Once the device is down."""
    with contextlib.suppress(OSError):
        os.unlink(drop_in(name, root))
