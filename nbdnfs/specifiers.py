# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the specifiers of a URL stand for on this machine: %H, %m, %M and %u.

Each is the same at every boot, or it is refused: a name that changes makes another file each time, until the NAS is
full. docs/decisions/0025 compares them.

The keeper has this module in locked memory where its URL has a specifier: hence no regular expressions, which `re`
would keep.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from nbdnfs import machine_ids
from nbdnfs.errors import UnavailableError, UsageError

# machine-id(5) is confidential: names have a hash of it, as sd_id128_get_machine_app_specific(3) makes one. So
# systemd-id128 machine-id --app-specific=<this> prints what %m stands for.
APPLICATION_ID = "b003458b4cf3ea211505ff44463c8c6a"
_SHA256_BLOCK_BYTES = 64
_HEX = frozenset("0123456789abcdef")

# What a machine is called that has no name, in lower case (hostname(1), systemd's fallback, the kernel's UTS_NODENAME).
_NO_NAMES = ("", "(none)", "localhost", "localhost.localdomain", "localhost6", "localhost4")

_INSTEAD = "use %M (MAC address of the boot interface) or %u (product UUID) in the URL"

_LOCALLY_ADMINISTERED, _MULTICAST = 0x02, 0x01
# include/uapi/linux/netdevice.h
_NET_ADDR_RANDOM = "1"
# PID 1 makes it as soon as it has mounted /run, before it makes a machine id, and nothing writes to it afterwards
# (systemd: src/core/main.c, src/shared/mount-setup.c). So its time is by the clock that the id's is by.
_EARLY_FILE = "run/systemd/inaccessible/reg"
# How long after that an id of this boot is written at the latest, by a clock that has not been set yet
# (systemd-machine-id-commit.service, cloud-init).
_EARLY_S = 3600.0

# Where the first answer of a boot is kept: the default route may go elsewhere later.
_KEPT_MAC = "run/nbdnfs/.boot-mac"


def host_name(root: Path) -> str:
    """%H. UnavailableError: the machine has no name of its own; it may get one, by DHCP, after the unit has started."""
    name = socket.gethostname()
    if name.lower() in _NO_NAMES:
        raise UnavailableError(
            f"%H in the URL: this machine has no host name ('{name}') yet, and every such machine would use one file",
            "set it (hostnamectl hostname NAME), or " + _INSTEAD,
        )
    return name


def machine_id(root: Path) -> str:
    """%m: 32 digits, a hash of the machine id. UsageError: there is none, or the next boot has another."""
    return _for_the_application(raw_machine_id(root))


def raw_machine_id(root: Path) -> str:
    """What %m stood for in earlier versions. UsageError as `machine_id`."""
    text = machine_ids.read(root / "etc/machine-id")
    if len(text) != 32 or not _HEX.issuperset(text):
        raise UsageError(
            "%m in the URL: this machine has no id in /etc/machine-id", f"run systemd-machine-id-setup, or {_INSTEAD}"
        )
    if _is_new_at_each_boot(root):
        raise UsageError(
            "%m in the URL: this machine gets a new id at each boot (its /etc is not kept), and so a new file", _INSTEAD
        )
    return text


def _for_the_application(text: str) -> str:
    """HMAC-SHA256 with the id as the key, of the application's id; the first 16 bytes as a UUID of version 4.

    By hand: hmac and hashlib bring OpenSSL, which would stay in the keeper's locked memory.
    """
    key = bytes.fromhex(text).ljust(_SHA256_BLOCK_BYTES, b"\0")
    inner = _sha256(bytes(byte ^ 0x36 for byte in key) + bytes.fromhex(APPLICATION_ID))
    found = bytearray(_sha256(bytes(byte ^ 0x5C for byte in key) + inner)[:16])
    found[6] = found[6] & 0x0F | 0x40
    found[8] = found[8] & 0x3F | 0x80
    return found.hex()


def _sha256(data: bytes) -> bytes:
    try:
        from _sha2 import sha256  # type: ignore[import-not-found,unused-ignore]  # CPython 3.12
    except ImportError:
        try:
            from _sha256 import sha256  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            from hashlib import sha256
    digest: bytes = sha256(data).digest()
    return digest


def _is_new_at_each_boot(root: Path) -> bool:
    """Whether systemd keeps the id in /run only (machine-id(5)), or has written it where the next boot does not see it.

    One that the image brought along is older than the boot, or seems to come from the future while the clock of a
    machine that keeps no time still stands where systemd has put it (the time of systemd's own build).
    """
    if any(word.startswith("systemd.machine_id=") for word in machine_ids.read(root / "proc/cmdline").split()):
        return False
    mount_point, kind = machine_ids.machine_id_mount(root)
    if kind not in machine_ids.VOLATILE_FILE_SYSTEMS:
        return False
    if mount_point == "/etc/machine-id":
        return True
    written_s = os.stat(root / "etc/machine-id").st_mtime
    now_s = time.time()
    if now_s - time.clock_gettime(time.CLOCK_BOOTTIME) <= written_s <= now_s:
        return True
    try:
        early_s = os.stat(root / _EARLY_FILE).st_mtime
    except OSError:  # not systemd
        return False
    return early_s <= written_s <= early_s + _EARLY_S  # before the clock was set, by NTP perhaps


def product_uuid(root: Path) -> str:
    """%u: the product UUID of SMBIOS, or the serial number of a board, in lower case. UsageError: it has none."""
    text = machine_ids.hardware_id(root)
    if 4 <= len(text) <= 64 and frozenset("0123456789abcdefghijklmnopqrstuvwxyz.-").issuperset(text):
        return text
    path = root / machine_ids.PRODUCT_UUID
    if path.exists() and not os.access(path, os.R_OK):
        raise UsageError("%u in the URL: only root may read the product UUID", "run this as root, or write it out")
    raise UsageError(
        "%u in the URL: the firmware of this machine has no UUID of its own (every machine of its kind has the same)",
        "use %H with a host name of its own, %M (MAC address of the boot interface), or %m where /etc is kept",
    )


def boot_mac(root: Path = Path("/")) -> str:
    """%M: the MAC address of the interface that this machine booted from, as aa-bb-cc-dd-ee-ff.

    The kernel command line's BOOTIF= (pxelinux) or ip=; otherwise that of the default route, or the only one there is.
    The first answer of a boot holds until the next, where root has asked. UsageError: the address may be another
    machine's, too. UnavailableError: there is no default route, which may come.
    """
    kept = machine_ids.read(root / _KEPT_MAC)
    if _is_mac(kept):
        return kept
    address, interface = _boot_interface(root)
    first = int(address[:2], 16)
    kind = machine_ids.read(root / "sys/class/net" / interface / "addr_assign_type") if interface else ""
    if first & (_LOCALLY_ADMINISTERED | _MULTICAST) or kind == _NET_ADDR_RANDOM or address == "00-00-00-00-00-00":
        raise UsageError(
            f"%M in the URL: {address} ({interface or 'BOOTIF='}) is a random or locally administered address, which"
            " other machines may have, too",
            "use %H with a host name of its own, or %u (product UUID) where the firmware has one",
        )
    _keep(root / _KEPT_MAC, address)
    return address


def _is_mac(text: str) -> bool:
    return len(text) == 17 and text[2::3] in ("-----", ":::::") and _HEX.issuperset(text[0::3] + text[1::3])


def _boot_interface(root: Path) -> tuple[str, str]:
    """The MAC address, with hyphens, and the interface; "" where the command line has the address itself."""
    words = machine_ids.read(root / "proc/cmdline").split()
    for word in reversed(words):
        if word.startswith("BOOTIF="):
            address = word.removeprefix("BOOTIF=").lower().replace(":", "-")
            address = address[3:] if len(address) == 20 else address  # the hardware type comes first: 01-
            if _is_mac(address):
                return address, ""
    names = [name for word in reversed(words) if word.startswith("ip=") for name in word[3:].split(":")]
    for name in [*names, *_default_interfaces(root), *_only_interface(root)]:
        if not name or "/" in name:
            continue
        address = machine_ids.read(root / "sys/class/net" / name / "address").lower()
        if _is_mac(address):
            return address.replace(":", "-"), name
    raise UnavailableError(
        "%M in the URL: it is not known yet which interface this machine boots from: there is no default route",
        "boot with BOOTIF= (pxelinux: IPAPPEND 2) or ip=, or use %u (product UUID)",
    )


def _default_interfaces(root: Path) -> list[str]:
    """The interfaces with a default route, the preferred one first; IPv4 before IPv6."""
    found = []
    for line in machine_ids.read(root / "proc/net/route").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000":
            found.append((0, int(fields[6]), fields[0]))
    for line in machine_ids.read(root / "proc/net/ipv6_route").splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00" and fields[9] != "lo":
            found.append((1, int(fields[5], 16), fields[9]))
    return [name for _, _, name in sorted(found)]


def _only_interface(root: Path) -> list[str]:
    """The interface with hardware behind it, where there is one."""
    found = [path.parent.name for path in (root / "sys/class/net").glob("*/device")]
    return found if len(found) == 1 else []


def _keep(path: Path, text: str) -> None:
    """Exclusively: of two that ask at once, the first counts. Where it cannot be kept, the next call looks again."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            new.write_text(text + "\n")
            os.link(new, path)
        finally:
            new.unlink(missing_ok=True)
