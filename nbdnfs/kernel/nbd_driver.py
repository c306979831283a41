# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loading the kernel's nbd driver."""

from __future__ import annotations

import os
from pathlib import Path

from nbdnfs import programs
from nbdnfs.errors import NbdnfsError, UnavailableError
from nbdnfs.kernel import state as kernel_state


def load(root: Path = kernel_state.ROOT) -> None:
    """Load the driver unless it is loaded.

    UnavailableError where that fails, with the exit status EX_OSFILE, after which the unit does not try again:
    RestartPreventExitStatus= of systemd/nbdnfs@.service.
    """
    if kernel_state.nbd_module(root).loaded:
        return
    try:
        programs.run([programs.find_program("modprobe", "kmod"), "nbd"], what="loading the kernel's nbd driver")
    except NbdnfsError as error:
        missing = UnavailableError(
            f"the kernel's nbd driver is not there: {error.message}",
            "is /lib/modules complete for this kernel, or was it upgraded without a reboot? else use one that has"
            " CONFIG_BLK_DEV_NBD",
        )
        missing.exit_code = os.EX_OSFILE
        raise missing from None
