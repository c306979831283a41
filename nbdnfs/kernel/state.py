# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel says in /proc and /sys: swaps, nbd devices, mounts, memory. Processes are in processes.py.

Readers only: they need no root and cache nothing. Each takes the folder that stands for "/", so that tests run on
golden trees. Sizes are in bytes, in any unit that the file has. No reader touches a file outside /proc, /sys, /dev and
the list of kernel modules, because it may lie on the NFS share that does not answer.

Each raises UnreadableError if there is no memory or descriptor to read with, or if /sys is not mounted. That does not
mean that there is nothing: a device in use must never look as if it were not there.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from nbdnfs.errors import UnavailableError, UnreadableError, is_of_want
from nbdnfs.sizes import SECTOR_BYTES

ROOT = Path("/")


@dataclass(frozen=True)
class Swap:
    """One line of /proc/swaps; `kind` is "partition" or "file"."""

    path: str
    kind: str
    size_bytes: int
    used_bytes: int
    priority: int


@dataclass(frozen=True)
class NbdDevice:
    """/sys/block/nbdN.

    connector_pid   the thread that attached the device, which has often ended since; None while it is not attached
                    (drivers/block/nbd.c: nbd_start_device creates the file pid, nbd_config_put removes it)
    device_numbers  "43:0", of the disk and of its partitions ("nbd0p1")
    holders         the devices that are stacked on any of them (dm, md)

    A queue setting that this kernel does not have is None.
    """

    name: str
    index: int
    size_bytes: int
    connector_pid: int | None
    backend: str | None
    read_only: bool
    partitions: tuple[str, ...]
    device_numbers: frozenset[str]
    holders: tuple[str, ...]
    max_sectors_kb: int | None
    io_timeout_ms: int | None
    nr_requests: int | None
    scheduler: str | None

    @property
    def attached(self) -> bool:
        return self.connector_pid is not None


@dataclass(frozen=True)
class Mount:
    """One line of /proc/PID/mountinfo, proc_pid_mountinfo(5): what is mounted where."""

    device_number: str
    mount_point: str
    source: str


@dataclass(frozen=True)
class MemInfo:
    """/proc/meminfo, proc_meminfo(5)."""

    total_bytes: int
    free_bytes: int
    available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int


@dataclass(frozen=True)
class VmStat:
    """Counters of /proc/vmstat since boot, in pages and events; one that this kernel lacks is 0."""

    swapped_in_pages: int
    swapped_out_pages: int
    major_faults: int
    oom_kills: int


@dataclass(frozen=True)
class NbdModule:
    """The kernel's nbd driver: `loaded` now, or `available` to modprobe for the running kernel."""

    loaded: bool
    available: bool

    @property
    def hint(self) -> str:
        """What to do when it is not loaded."""
        return "load it as root: modprobe nbd" if self.available else "use a kernel that has it: CONFIG_BLK_DEV_NBD"


def swaps(root: Path = ROOT) -> list[Swap]:
    """The active swap areas, /proc/swaps (mm/swapfile.c: swap_show). Empty on a kernel without swap."""
    lines = (read_text(root / "proc/swaps") or "").splitlines()[1:]
    found = []
    for line in lines:
        path, kind, size_kib, used_kib, priority = line.split()
        found.append(Swap(_unescape(path), kind, int(size_kib) * 1024, int(used_kib) * 1024, int(priority)))
    return found


def nbd_devices(root: Path = ROOT) -> list[NbdDevice]:
    """All nbd disks of the kernel, by index."""
    names = (name for name in _disks(root) if name.startswith("nbd"))
    devices = (nbd_device(name, root) for name in names)
    return sorted((device for device in devices if device is not None), key=lambda device: device.index)


def nbd_device(name: str, root: Path = ROOT) -> NbdDevice | None:
    """The nbd disk `name` ("nbd0"), or None when the kernel does not have it."""
    folder = root / "sys/block" / name
    match = re.fullmatch(r"nbd(\d+)", name)
    size_sectors = read_int(folder / "size")
    if match is None or size_sectors is None:
        _disks(root)
        return None
    disk_and_partitions = [folder, *(folder / part for part in names_in(folder) if part.startswith(f"{name}p"))]
    numbers = (read_text(part / "dev") for part in disk_and_partitions)
    holders = (holder for part in disk_and_partitions for holder in names_in(part / "holders"))
    return NbdDevice(
        name=name,
        index=int(match[1]),
        size_bytes=size_sectors * SECTOR_BYTES,
        connector_pid=read_int(folder / "pid"),
        backend=(read_text(folder / "backend") or "").strip() or None,
        read_only=read_int(folder / "ro") == 1,
        partitions=tuple(part.name for part in disk_and_partitions[1:]),
        device_numbers=frozenset(number.strip() for number in numbers if number),
        holders=tuple(holders),
        max_sectors_kb=read_int(folder / "queue/max_sectors_kb"),
        io_timeout_ms=read_int(folder / "queue/io_timeout"),
        nr_requests=read_int(folder / "queue/nr_requests"),
        scheduler=_chosen(read_text(folder / "queue/scheduler")),
    )


def nbd_module(root: Path = ROOT) -> NbdModule:
    """Whether the nbd driver is loaded, and whether the running kernel has it as a module."""
    loaded = (root / "sys/module/nbd").is_dir()
    release = (read_text(root / "proc/sys/kernel/osrelease") or "").strip()
    lists = (root / "lib/modules" / release / name for name in ("modules.dep", "modules.builtin"))
    listed = any(re.search(r"(?m)^\S*/nbd\.ko\b", read_text(path) or "") for path in lists)
    return NbdModule(loaded, loaded or listed)


def mounts(root: Path = ROOT) -> list[Mount]:
    """What is mounted in this process's mount namespace, and in the first process's: a keeper has one of its own
    (own_root.py). Without root, the first process's cannot be seen."""
    found: dict[Mount, None] = {}
    for process in ("self", "1"):
        for line in (read_text(root / "proc" / process / "mountinfo") or "").splitlines():
            before, _, after = line.partition(" - ")
            fields, (_, source, *_) = before.split(), after.split()
            found[Mount(fields[2], _unescape(fields[4]), _unescape(source))] = None
    return list(found)


def loops(root: Path = ROOT) -> dict[str, str]:
    """Loop devices in use ("loop0") and the path of the file or device behind each (drivers/block/loop.c)."""
    names = (name for name in _disks(root) if name.startswith("loop"))
    files = {name: read_text(root / "sys/block" / name / "loop/backing_file") for name in names}
    return {name: text.strip() for name, text in files.items() if text}


def require_proc(root: Path = ROOT) -> None:
    """UnavailableError unless /proc is mounted: without it, what is in use looks as if it were not."""
    if not _has_proc(root):
        raise UnavailableError("/proc is not mounted", "mount -t proc proc /proc")


def require_sys(root: Path = ROOT) -> None:
    """UnreadableError unless /sys is mounted: without it, what is attached looks as if it were not."""
    _disks(root)


def _has_proc(root: Path) -> bool:
    try:
        return bool(os.listdir(root / "proc"))
    except OSError as error:
        if is_of_want(error):
            raise _unreadable(root / "proc", error) from None
        return False


def _disks(root: Path) -> list[str]:
    """All names in /sys/block. Errors as `require_sys`.

    None below another root that has no /proc either: that is the root of an image, in which no kernel runs.
    """
    folder = root / "sys/block"
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _unreadable(folder, error) from None
    if root == ROOT or _has_proc(root):
        raise UnreadableError("/sys is not mounted", "mount -t sysfs sysfs /sys")
    return []


def meminfo(root: Path = ROOT) -> MemInfo:
    """Memory and swap of the machine now. KeyError on a kernel without MemAvailable (before 3.14).

    UnavailableError: /proc is not mounted.
    """
    require_proc(root)
    pairs = (line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    value = {key: int(rest.split()[0]) * 1024 for key, rest in pairs if rest.endswith(" kB")}
    return MemInfo(value["MemTotal"], value["MemFree"], value["MemAvailable"], value["SwapTotal"], value["SwapFree"])


def vmstat(root: Path = ROOT) -> VmStat:
    """The machine's paging counters now. UnavailableError: /proc is not mounted."""
    require_proc(root)
    pairs = map(str.split, (root / "proc/vmstat").read_text().splitlines())
    value = {key: int(count) for key, count in pairs}
    return VmStat(*(value.get(key, 0) for key in ("pswpin", "pswpout", "pgmajfault", "oom_kill")))


def device_number(path: Path) -> str | None:
    """The number ("43:0") of a block device node, symbolic links followed; None for anything else."""
    try:
        info = os.stat(path)
    except OSError as error:
        if is_of_want(error):
            raise _unreadable(path, error) from None
        return None
    if not stat.S_ISBLK(info.st_mode):
        return None
    return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"


def block_name(number: str, root: Path = ROOT) -> str | None:
    """The kernel's name ("nbd0p1") of the block device with that number ("43:1"), by /sys/dev/block."""
    link = root / "sys/dev/block" / number
    try:
        return os.path.basename(os.readlink(link))
    except OSError as error:
        if is_of_want(error):
            raise _unreadable(link, error) from None
        return None


def _chosen(schedulers: str | None) -> str | None:
    """The one in brackets, as in "mq-deadline [none]"; a lone name is its own choice (block/elevator.c)."""
    match = re.search(r"\[(\S+)\]", schedulers or "")
    return match[1] if match else (schedulers or "").strip() or None


def _unescape(text: str) -> str:
    r"""Undo the kernel's escapes for blanks and backslashes, such as \040 (fs/seq_file.c: mangle_path)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def read_text(path: Path) -> str | None:
    """The text of a small kernel file; None when it, or the process or device behind it, no longer exists."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        if is_of_want(error):
            raise _unreadable(path, error) from None
        return None


def names_in(folder: Path) -> list[str]:
    """The names in a folder of /proc or /sys, sorted; none when it, or what it is about, no longer exists."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        if is_of_want(error):
            raise _unreadable(folder, error) from None
        return []


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(f"cannot read {path}: {error.strerror}", "free memory, and try again")


def read_int(path: Path) -> int | None:
    """The whole number that a small kernel file has; None when it has none, or does not exist."""
    text = (read_text(path) or "").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None
