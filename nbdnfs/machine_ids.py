# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ids of this machine: the firmware's, where it is a machine's own, and where the machine id lies.

The keeper has this module in its locked memory.
"""

from __future__ import annotations

import os
import re

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from pathlib import Path

# What firmware says where its maker has not set an id: whole product lines have the same one. In lower case. The first
# two are AMI's, as SMBIOS before and after 2.6 orders the bytes.
_SHARED_IDS = (
    "03000200-0400-0500-0006-000700080009",
    "00020003-0004-0005-0006-000700080009",
    "12345678-1234-5678-90ab-cddeefaabbcc",
    "12345678-1234-1234-1234-123456789abc",
    "01234567-89ab-cdef-0123-456789abcdef",
    "01020304-0506-0708-090a-0b0c0d0e0f10",
    "0123456789",
    "0123456789abcdef",
    "123456789",
    "1234567890",
)
_NO_IDS = re.compile(
    r"not (settable|present|specified|available|applicable)|to be filled.*|default.*|system serial.*"
    r"|none|unknown|uninitialized|n/a|oem.*|invalid.*|chassis.*|serial.*"
)
# A random id of 32 digits has fewer different ones once in 10^15 machines.
_DIFFERENT_DIGITS_MIN = 4

# File systems that are new at each boot, or may be
VOLATILE_FILE_SYSTEMS = ("tmpfs", "ramfs", "rootfs", "overlay", "aufs")

PRODUCT_UUID = "sys/class/dmi/id/product_uuid"
BOARD_SERIAL = "proc/device-tree/serial-number"


def is_own(text: str) -> bool:
    """Whether an id, in lower case, names one machine: it is not a placeholder, and not known to be shared."""
    digits = text.replace("-", "")
    return len(set(digits)) >= _DIFFERENT_DIGITS_MIN and text not in _SHARED_IDS and not _NO_IDS.fullmatch(text)


def read(path: str | os.PathLike[str]) -> str:
    """The text of a small file of the kernel's, without what pads it; "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0 \n")
    except OSError:
        return ""


def hardware_id(root: Path) -> str:
    """The machine's own id, in lower case; "" where it has none, or where only root may read it."""
    ids = (read(root / name).lower() for name in (PRODUCT_UUID, BOARD_SERIAL))
    return next((text for text in ids if is_own(text)), "")


def machine_id_mount(root: Path) -> tuple[str, str]:
    """Where the file system of /etc/machine-id is mounted, and its kind: proc_pid_mountinfo(5)."""
    kinds = {"": ""}
    for line in read(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        fields = mount.split(" ")
        if len(fields) > 4 and "/etc/machine-id/".startswith(fields[4].rstrip("/") + "/"):
            kinds[fields[4]] = source.partition(" ")[0]  # of two on one directory, the last counts
    place = max(kinds, key=len)
    return place, kinds[place]
