# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks of `nbdnfs doctor` that concern the machine: kernel, limits, memory reserve, vm settings.

docs/memory-pressure.md gives the reasons for each value.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

from nbdnfs import quantities
from nbdnfs.commands import install_units
from nbdnfs.commands.findings import Finding, judge, read_number, read_text
from nbdnfs.kernel import state as kernel_state
from nbdnfs.sizes import KERNEL_PAGE_BYTES

_KIB, _MIB = 1 << 10, 1 << 20

# MADV_POPULATE_READ, which memlock.py needs, came with 5.14.
_KERNEL_MIN = (5, 14)

# include/uapi/linux/capability.h
_CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_ADMIN": 21, "CAP_SYS_NICE": 23, "CAP_SYS_RESOURCE": 24}

# A worker with a region of 16 MiB needs 36 MiB at most, but mappings that are not touched count against the limit too.
_MEMLOCK_BYTES = 128 * _MIB

# What may have to come from the reserve while kswapd gets a first round of pages to the NAS and back: the network's
# traffic for that time, twice, because a received frame takes about twice its length in memory (skb->truesize: a
# frame of 1500 bytes has a buffer of 2 KiB or more, and its own 0.75 KiB); and what each CPU keeps for itself and no
# other CPU can use (mm/page_alloc.c: zone_batchsize, 63 pages).
_ROUND_S = 0.025
_PER_CPU_BYTES = 63 * KERNEL_PAGE_BYTES
# systemd/reserve sets at least this much; and the reserve never exceeds a sixteenth of memory, because programs cannot
# use it.
_RESERVE_MIN_BYTES = 8 * _MIB
_RESERVE_SHARE = 16
# Assumed where no interface reports its speed. Virtual ones do not.
_NETWORK_MBIT_S = 1000

# systemd/sysctl.conf; the kernel's default is 10.
_WATERMARK_SCALE = 100

# 2**5 pages are 128 KiB, the largest request of a device (nbd_settings.MAX_REQUEST_KIB).
_PAGE_CLUSTER_MAX = 5


def machine(root: Path) -> Iterator[Finding]:
    """All checks of the machine whose files are below `root`."""
    yield _kernel(root)
    yield _nbd(root)
    yield _cgroup(root)
    yield _memlock(root)
    yield _capabilities(root)
    yield from _reserve(root)
    yield from _vm(root)
    yield from _compression_and_pages(root)
    if has_sys(root) and any(device.backend is not None for device in kernel_state.nbd_devices(root)):
        yield _hibernation(root)


def _kernel(root: Path) -> Finding:
    release = read_text(root / "proc/sys/kernel/osrelease") or "unknown"
    match = re.match(r"(\d+)\.(\d+)", release)
    good = match is not None and (int(match[1]), int(match[2])) >= _KERNEL_MIN
    return judge("kernel", good, f"Linux {release}", "nbdnfs needs Linux 5.14 or newer")


def _nbd(root: Path) -> Finding:
    if not has_sys(root):
        return _unknown("nbd driver")
    module = kernel_state.nbd_module(root)
    if not module.loaded and not module.available:
        return Finding("nbd driver", False, "missing", "use a kernel with CONFIG_BLK_DEV_NBD")
    always = "" if install_units.is_installed("modules-load.conf", root) else "; at each boot: nbdnfs install-units"
    return judge("nbd driver", module.loaded, "loaded" if module.loaded else "not loaded", f"now: modprobe nbd{always}")


def has_sys(root: Path) -> bool:
    """Whether /sys is mounted: its folder of modules is there on any kernel."""
    return (root / "sys/module").is_dir()


def _unknown(subject: str) -> Finding:
    return Finding(subject, False, "unknown: /sys is not mounted", "mount -t sysfs sysfs /sys")


def _set(root: Path, setting: str, value: int) -> str:
    """What gives a kernel setting that is in our sysctl.d its value."""
    is_there = install_units.is_installed("sysctl.conf", root)
    all_of_ours = "systemctl restart systemd-sysctl" if is_there else "nbdnfs install-units (sysctl.d)"
    return f"{all_of_ours}, or sysctl {setting}={value}"


def _cgroup(root: Path) -> Finding:
    if not has_sys(root):
        return _unknown("cgroup")
    controllers = read_text(root / "sys/fs/cgroup/cgroup.controllers")
    if controllers is not None and "memory" in controllers.split():
        return Finding("cgroup", True, "v2, with the memory controller")
    return Finding(
        "cgroup",
        False,
        "v1, or none" if controllers is None else "v2, without the memory controller",
        "boot with systemd.unified_cgroup_hierarchy=1 and without cgroup_disable=memory: "
        "otherwise the unit's MemoryMin= and MemorySwapMax= have no effect",
    )


def _memlock(root: Path) -> Finding:
    """The limit of this process. The unit sets LimitMEMLOCK=infinity; a worker started by hand inherits the shell's."""
    match = re.search(r"^Max locked memory +(\S+)", read_text(root / "proc/self/limits") or "", re.MULTILINE)
    if match is None:
        return Finding("RLIMIT_MEMLOCK", False, "unknown", "mount /proc")
    unlimited = match[1] == "unlimited"
    found = "unlimited" if unlimited else quantities.format_size(int(match[1]))
    if unlimited or int(match[1]) >= _MEMLOCK_BYTES:
        return Finding("RLIMIT_MEMLOCK", True, found)
    if _has_capability(root, "CapEff", "CAP_IPC_LOCK"):
        return Finding("RLIMIT_MEMLOCK", True, f"{found}, which CAP_IPC_LOCK overrides")
    return Finding(
        "RLIMIT_MEMLOCK", False, found, "start workers through the unit, or as root, or after: ulimit -l unlimited"
    )


def _capabilities(root: Path) -> Finding:
    """The bounding set, because root in a container may lack some capabilities."""
    missing = [name for name in _CAPABILITIES if not _has_capability(root, "CapBnd", name)]
    if not missing:
        return Finding("capabilities", True, f"root has {', '.join(_CAPABILITIES)}")
    return Finding(
        "capabilities",
        False,
        f"even root lacks {', '.join(missing)}",
        "run nbdnfs outside the container, or give the container these capabilities",
    )


def _has_capability(root: Path, which: str, name: str) -> bool:
    match = re.search(rf"^{which}:\s+([0-9a-f]+)", read_text(root / "proc/self/status") or "", re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> _CAPABILITIES[name] & 1)


def reserve_bytes(network_mbit_s: int, cpus: int, memory_bytes: int) -> int:
    """The lower bound for vm.min_free_kbytes, in bytes, a multiple of 1024. The constants above explain it."""
    network_bytes = 2 * _ROUND_S * network_mbit_s * 1_000_000 / 8
    wanted_bytes = max(network_bytes + cpus * _PER_CPU_BYTES, _RESERVE_MIN_BYTES)
    return math.ceil(min(wanted_bytes, memory_bytes / _RESERVE_SHARE) / _KIB) * _KIB


def _reserve(root: Path) -> Iterator[Finding]:
    speeds = _network_speeds_mbit_s(root)
    interface, speed = max(speeds.items(), key=lambda item: item[1], default=("no interface", _NETWORK_MBIT_S))
    cpus = len(list((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))) or 1
    wanted = reserve_bytes(speed, cpus, kernel_state.meminfo(root).total_bytes)
    now = (read_number(root / "proc/sys/vm/min_free_kbytes") or 0) * _KIB
    size = quantities.format_size
    yield judge(
        "vm.min_free_kbytes",
        now >= wanted,
        f"{size(now)}; {speed} Mbit/s ({interface}) and {cpus} CPUs need {size(wanted)}",
        f"replies from the NAS are dropped when the reserve is used up: sysctl vm.min_free_kbytes={wanted // _KIB}",
    )
    scale = read_number(root / "proc/sys/vm/watermark_scale_factor") or 0
    yield judge(
        "vm.watermark_scale_factor",
        scale >= _WATERMARK_SCALE,
        f"{scale / 100:g} % of memory",
        "kswapd starts too late for swap that takes milliseconds: "
        + _set(root, "vm.watermark_scale_factor", _WATERMARK_SCALE),
    )
    boost = read_number(root / "proc/sys/vm/watermark_boost_factor")
    if boost is not None:
        yield judge(
            "vm.watermark_boost_factor",
            boost == 0,
            f"{boost / 100:g} % of the high watermark",
            "with its memory in small pieces the kernel keeps the reserve from the worker, and swap may stop for ever: "
            + _set(root, "vm.watermark_boost_factor", 0),
        )
    dropped = _dropped_packets(root)
    if dropped is not None:
        yield judge(
            "packets dropped for lack of memory",
            dropped == 0,
            f"{dropped} since boot (TcpExt PFMemallocDrop)",
            "each costs a retransmission: raise vm.min_free_kbytes",
        )


def _network_speeds_mbit_s(root: Path) -> dict[str, int]:
    """Interface ▸ speed, of those that are up, without the loopback: Documentation/ABI/testing/sysfs-class-net."""
    speeds = {}
    for folder in sorted((root / "sys/class/net").glob("*")):
        if folder.name == "lo" or read_text(folder / "operstate") not in ("up", "unknown"):
            continue
        speed = read_number(folder / "speed")
        speeds[folder.name] = speed if speed is not None and speed > 0 else _NETWORK_MBIT_S
    return speeds


def _dropped_packets(root: Path) -> int | None:
    """The packets that net/core/filter.c: sk_filter_trim_cap dropped, for all sockets of this network namespace.

    None where the kernel does not count them.
    """
    lines = [line.split() for line in (read_text(root / "proc/net/netstat") or "").splitlines()]
    for names, values in itertools.pairwise(lines):
        if names[0] == values[0] == "TcpExt:" and "PFMemallocDrop" in names:
            return int(values[names.index("PFMemallocDrop")])
    return None


def _vm(root: Path) -> Iterator[Finding]:
    vm = root / "proc/sys/vm"
    overcommit = read_number(vm / "overcommit_memory")
    yield judge(
        "vm.overcommit_memory",
        overcommit in (0, 1),
        {0: "0, by estimate", 1: "1, always", 2: "2, never"}.get(-1 if overcommit is None else overcommit, "unknown"),
        "the kernel may refuse memory to a new worker: sysctl vm.overcommit_memory=0",
    )
    swappiness = read_number(vm / "swappiness")
    yield judge(
        "vm.swappiness",
        swappiness != 0,
        "unknown" if swappiness is None else str(swappiness),
        "at 0, nothing is swapped out until the file cache is empty (mm/vmscan.c: get_scan_count):"
        " sysctl vm.swappiness=60",
    )
    moves = read_number(vm / "compact_unevictable_allowed")
    if moves is not None:
        yield judge(
            "vm.compact_unevictable_allowed",
            moves == 0,
            str(moves),
            "the kernel moves the worker's locked pages, and the worker waits for that: "
            + _set(root, "vm.compact_unevictable_allowed", 0),
        )
    cluster = read_number(vm / "page-cluster") or 0
    yield judge(
        "vm.page-cluster",
        cluster <= _PAGE_CLUSTER_MAX,
        f"{cluster}: a fault reads {quantities.format_size(KERNEL_PAGE_BYTES << cluster)}",
        f"a fault takes more than one request: sysctl vm.page-cluster={_PAGE_CLUSTER_MAX}",
    )


def _compression_and_pages(root: Path) -> Iterator[Finding]:
    """Settings that are neither good nor bad for swap over the network, but change what its figures mean:
    docs/performance.md, "zswap and large folios"."""
    yield Finding("zswap", True, _zswap(root / "sys/module/zswap/parameters"))
    match = re.search(r"\[(\w+)\]", read_text(root / "sys/kernel/mm/transparent_hugepage/enabled") or "")
    yield Finding("transparent huge pages", True, match[1] if match else "not supported")


def _zswap(parameters: Path) -> str:
    enabled = read_text(parameters / "enabled")
    if enabled not in ("Y", "1"):
        return "not supported" if enabled is None else "off"
    found = f"on, with up to {read_number(parameters / 'max_pool_percent')} % of memory before pages go to the NAS"
    if read_text(parameters / "shrinker_enabled") == "Y":
        return found
    return f"{found}; without its shrinker, a cgroup with a limit that compressed pages fill has programs killed"


def _hibernation(root: Path) -> Finding:
    """While a device is up: docs/decisions/0026. /sys/power/state has "disk" where the kernel would hibernate now
    (kernel/power/main.c: state_show)."""
    if "disk" not in (read_text(root / "sys/power/state") or "").split():
        return Finding("hibernation", True, "the kernel refuses it")
    folder = root / "run/systemd/sleep.conf.d"
    return judge(
        "hibernation",
        any(folder.glob("nbdnfs@*.conf")),
        "systemd refuses it; the kernel would do it",
        "it freezes this machine for ever while a device is up: nbdnfs down and up again, or boot with nohibernate",
    )
