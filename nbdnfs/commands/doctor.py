# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `nbdnfs doctor` tells: whether this machine, and the workers on it, can be relied on to swap over the network.

Reads only, and works without root, though it sees less then. The folder that stands for "/" is an argument.
docs/memory-pressure.md has the reasons at length.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nbdnfs import config, quantities
from nbdnfs.errors import NbdnfsError
from nbdnfs.keeper.records import ProcessRecord, Records
from nbdnfs.kernel import processes
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.processes import Process
from nbdnfs.sizes import KERNEL_PAGE_BYTES

_KIB, _MIB = 1 << 10, 1 << 20

# MADV_POPULATE_READ, which memlock.py needs, came with 5.14.
_KERNEL_MIN = (5, 14)

# include/uapi/linux/capability.h
_CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_ADMIN": 21, "CAP_SYS_NICE": 23, "CAP_SYS_RESOURCE": 24}

# A worker with a region of 16 MiB has 36 MiB at most, and mappings that are not touched count too.
_MEMLOCK_BYTES = 128 * _MIB

# What may have to be taken from the reserve while kswapd gets a first round of pages to the NAS and back: the link's
# traffic for as long as that takes, twice, because a received frame takes about twice its length in memory
# (skb->truesize: a frame of 1500 bytes has a buffer of 2 KiB or more, and its own 0.75 KiB); and what each CPU keeps
# for itself and no other can have (mm/page_alloc.c: zone_batchsize, 63 pages).
_ROUND_S = 0.025
_PER_CPU_BYTES = 63 * KERNEL_PAGE_BYTES
# What systemd/reserve sees to at least, and no more than a sixteenth of memory: the reserve is lost to programs.
_RESERVE_MIN_BYTES = 8 * _MIB
_RESERVE_SHARE = 16
# Where no interface tells its speed (virtual ones do not)
_LINK_MBIT_S = 1000

# systemd/sysctl.conf; the kernel's own is 10.
_WATERMARK_SCALE = 100

# 2**5 pages are 128 KiB, the largest request of a device (nbd_settings.MAX_REQUEST_KIB).
_PAGE_CLUSTER_MAX = 5

_OOM_IMMUNE = -1000
_REALTIME = {1: "SCHED_FIFO", 2: "SCHED_RR"}  # include/uapi/linux/sched.h
_BUDGET_BYTES = 64 * _MIB


@dataclass(frozen=True)
class Finding:
    """One line: the subject, whether it is good, what was found, and what to do ("" where nothing is)."""

    subject: str
    good: bool
    found: str
    advice: str = ""

    def text(self) -> str:
        line = f"{'ok ' if self.good else 'BAD'}  {self.subject}: {self.found}"
        return f"{line}\n     {self.advice}" if self.advice else line

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def examine(name: str | None = None, root: Path = kernel_state.ROOT) -> list[Finding]:
    """The machine, and the workers of the device `name`, or without a name all workers that there are.

    UsageError when `name` can be no device's name.
    """
    findings = [*_machine(root)]
    if name is not None:
        config.check_name(name)
        findings += _device(name, root)
    else:
        for one in sorted({*config.names(root), *Records.names(root)}):
            findings += _device(one, root)
        known = {record.pid for one in Records.names(root) for record in _records(one, root).values()}
        for pid in _workers_by_hand(root):
            if pid not in known:
                findings += _process(f"worker {pid}", pid, root, realtime=True)
    return findings


def _machine(root: Path) -> Iterator[Finding]:
    yield _kernel(root)
    yield _nbd(root)
    yield _cgroup(root)
    yield _memlock(root)
    yield _capabilities(root)
    yield from _reserve(root)
    yield from _vm(root)
    yield from _compression_and_pages(root)


def _kernel(root: Path) -> Finding:
    release = _text(root / "proc/sys/kernel/osrelease") or "unknown"
    match = re.match(r"(\d+)\.(\d+)", release)
    good = match is not None and (int(match[1]), int(match[2])) >= _KERNEL_MIN
    return Finding("kernel", good, f"Linux {release}", "" if good else "nbdnfs needs Linux 5.14 or newer")


def _nbd(root: Path) -> Finding:
    module = kernel_state.nbd_module(root)
    if module.loaded:
        return Finding("nbd driver", True, "loaded")
    if module.available:
        return Finding(
            "nbd driver", False, "not loaded", "modprobe nbd, and at boot: nbdnfs install-units (modules-load.d)"
        )
    return Finding("nbd driver", False, "not there", "use a kernel that has CONFIG_BLK_DEV_NBD")


def _cgroup(root: Path) -> Finding:
    controllers = _text(root / "sys/fs/cgroup/cgroup.controllers")
    if controllers is not None and "memory" in controllers.split():
        return Finding("cgroup", True, "v2, with the memory controller")
    found = "v1, or none" if controllers is None else "v2, without the memory controller"
    return Finding(
        "cgroup",
        False,
        found,
        "boot with systemd.unified_cgroup_hierarchy=1 (and without cgroup_disable=memory): "
        "the unit's MemoryMin= and MemorySwapMax= have no effect without",
    )


def _memlock(root: Path) -> Finding:
    """Of this process. The unit has LimitMEMLOCK=infinity; who serves by hand hands on his own."""
    match = re.search(r"^Max locked memory +(\S+)", _text(root / "proc/self/limits") or "", re.MULTILINE)
    if match is None:
        return Finding("RLIMIT_MEMLOCK", False, "unknown", "is /proc mounted?")
    unlimited = match[1] == "unlimited"
    found = "unlimited" if unlimited else quantities.format_size(int(match[1]))
    if unlimited or int(match[1]) >= _MEMLOCK_BYTES:
        return Finding("RLIMIT_MEMLOCK", True, found)
    if _has_capability(root, "CapEff", "CAP_IPC_LOCK"):
        return Finding("RLIMIT_MEMLOCK", True, f"{found}, which CAP_IPC_LOCK overrides")
    return Finding("RLIMIT_MEMLOCK", False, found, "start workers as root, by the unit, or after: ulimit -l unlimited")


def _capabilities(root: Path) -> Finding:
    """Of the bounding set: a container may lack what root is supposed to have."""
    missing = [name for name in _CAPABILITIES if not _has_capability(root, "CapBnd", name)]
    if not missing:
        return Finding("capabilities", True, f"root has {', '.join(_CAPABILITIES)}")
    return Finding(
        "capabilities",
        False,
        f"even root lacks {', '.join(missing)}",
        "run nbdnfs outside of the container, or give it these capabilities",
    )


def _has_capability(root: Path, which: str, name: str) -> bool:
    match = re.search(rf"^{which}:\s+([0-9a-f]+)", _text(root / "proc/self/status") or "", re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> _CAPABILITIES[name] & 1)


def reserve_bytes(link_mbit_s: int, cpus: int, memory_bytes: int) -> int:
    """What vm.min_free_kbytes should be at least, in bytes, whole KiB; the reasoning stands at the constants."""
    link = 2 * _ROUND_S * link_mbit_s * 1_000_000 / 8
    wanted = max(link + cpus * _PER_CPU_BYTES, _RESERVE_MIN_BYTES)
    return math.ceil(min(wanted, memory_bytes / _RESERVE_SHARE) / _KIB) * _KIB


def _reserve(root: Path) -> Iterator[Finding]:
    speeds = _link_speeds_mbit_s(root)
    link, speed = max(speeds.items(), key=lambda item: item[1], default=("no link", _LINK_MBIT_S))
    cpus = len(list((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))) or 1
    wanted = reserve_bytes(speed, cpus, kernel_state.meminfo(root).total_bytes)
    now = (_number(root / "proc/sys/vm/min_free_kbytes") or 0) * _KIB
    basis = f"for {speed} Mbit/s ({link}) and {cpus} CPUs {quantities.format_size(wanted)}"
    yield Finding(
        "vm.min_free_kbytes",
        now >= wanted,
        f"{quantities.format_size(now)}; {basis}",
        "" if now >= wanted else f"replies are dropped when it is used up: sysctl vm.min_free_kbytes={wanted // _KIB}",
    )
    scale = _number(root / "proc/sys/vm/watermark_scale_factor") or 0
    yield Finding(
        "vm.watermark_scale_factor",
        scale >= _WATERMARK_SCALE,
        f"{scale / 100:g} % of memory",
        ""
        if scale >= _WATERMARK_SCALE
        else "kswapd starts too late for a swap that takes milliseconds: nbdnfs install-units (sysctl.d), or "
        f"sysctl vm.watermark_scale_factor={_WATERMARK_SCALE}",
    )
    dropped = _dropped_replies(root)
    if dropped is not None:
        yield Finding(
            "packets dropped for want of memory",
            dropped == 0,
            f"{dropped} since boot (TcpExt PFMemallocDrop)",
            "" if dropped == 0 else "each costs a retransmission: raise vm.min_free_kbytes",
        )


def _link_speeds_mbit_s(root: Path) -> dict[str, int]:
    """Of the interfaces that are up, less the loopback; Documentation/ABI/testing/sysfs-class-net."""
    speeds = {}
    for folder in sorted((root / "sys/class/net").glob("*")):
        if folder.name == "lo" or _text(folder / "operstate") not in ("up", "unknown"):
            continue
        speed = _number(folder / "speed")
        speeds[folder.name] = speed if speed is not None and speed > 0 else _LINK_MBIT_S
    return speeds


def _dropped_replies(root: Path) -> int | None:
    """net/core/filter.c: sk_filter_trim_cap counts what it drops, for all sockets of this network namespace."""
    lines = [line.split() for line in (_text(root / "proc/net/netstat") or "").splitlines()]
    for names, values in itertools.pairwise(lines):
        if names[0] == values[0] == "TcpExt:" and "PFMemallocDrop" in names:
            return int(values[names.index("PFMemallocDrop")])
    return None


def _vm(root: Path) -> Iterator[Finding]:
    vm = root / "proc/sys/vm"
    overcommit = _number(vm / "overcommit_memory")
    yield Finding(
        "vm.overcommit_memory",
        overcommit in (0, 1),
        {0: "0, by estimate", 1: "1, always", 2: "2, never"}.get(overcommit or 0, "unknown"),
        "" if overcommit in (0, 1) else "a new worker may be refused memory: sysctl vm.overcommit_memory=0",
    )
    swappiness = _number(vm / "swappiness")
    yield Finding(
        "vm.swappiness",
        swappiness != 0,
        str(swappiness),
        "" if swappiness else "at 0 nothing is swapped until the file cache is gone (mm/vmscan.c: get_scan_count): 60",
    )
    moves = _number(vm / "compact_unevictable_allowed")
    if moves is not None:
        yield Finding(
            "vm.compact_unevictable_allowed",
            moves == 0,
            str(moves),
            ""
            if moves == 0
            else "the worker's locked pages are moved about, and it waits for them meanwhile:"
            " nbdnfs install-units (sysctl.d), or sysctl vm.compact_unevictable_allowed=0",
        )
    cluster = _number(vm / "page-cluster") or 0
    good = cluster <= _PAGE_CLUSTER_MAX
    yield Finding(
        "vm.page-cluster",
        good,
        f"{cluster}: a fault reads {quantities.format_size(KERNEL_PAGE_BYTES << cluster)}",
        "" if good else f"more than one request for each fault: sysctl vm.page-cluster={_PAGE_CLUSTER_MAX}",
    )


def _compression_and_pages(root: Path) -> Iterator[Finding]:
    """Neither is good or bad for swap over the network in general; both change what the figures mean."""
    zswap = _text(root / "sys/module/zswap/parameters/enabled")
    pool = _number(root / "sys/module/zswap/parameters/max_pool_percent")
    on = zswap in ("Y", "1")
    yield Finding("zswap", True, f"on, with up to {pool} % of memory before pages go to the NAS" if on else "off")
    match = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/mm/transparent_hugepage/enabled") or "")
    yield Finding("transparent huge pages", True, match[1] if match else "not there")


def _device(name: str, root: Path) -> Iterator[Finding]:
    realtime = True
    try:
        realtime = config.load(name, root).realtime
        yield Finding(f"{name}: configuration", True, "valid")
    except NbdnfsError as error:
        yield Finding(f"{name}: configuration", False, error.message, error.hint)
    records = _records(name, root)
    if (refused := Records.refusal(name, root)) is not None:
        yield Finding(f"{name}: owner of the file", False, refused, "nbdnfs down there, or nbdnfs up --steal here")
    if not records:
        yield Finding(f"{name}: processes", True, "not up: nothing to examine")
    for role, record in records.items():
        yield from _process(f"{name}: {role}", record.pid, root, realtime=realtime)


def _records(name: str, root: Path) -> dict[str, ProcessRecord]:
    """The living processes of a device by their part in it."""
    records = Records(name, root)
    living = {role: records.living(role) for role in (Records.KEEPER, Records.WORKER)}
    return {role: record for role, record in living.items() if record is not None}


def _workers_by_hand(root: Path) -> list[int]:
    """nbdkit with our plugin, whoever started it."""
    found = []
    for folder in (root / "proc").glob("[0-9]*"):
        words = (_text(folder / "cmdline") or "").split("\0")
        if any(word.endswith("nbdnfs_plugin.py") for word in words) and _text(folder / "comm") == "nbdkit":
            found.append(int(folder.name))
    return sorted(found)


def _process(subject: str, pid: int, root: Path, *, realtime: bool) -> Iterator[Finding]:
    """A worker or keeper: is it locked, immune, preferred, and marked as one that serves I/O?"""
    process = processes.process(pid, root)
    if process is None:
        return
    again = "start it as root, without lock=off and without="
    yield _locked(subject, process, root, again)
    yield Finding(
        f"{subject}, faults",
        True,
        f"{process.major_faults} from disk and {process.minor_faults} others since it started"
        " (they should not grow while it swaps)",
    )
    immune = process.oom_score_adj == _OOM_IMMUNE
    yield Finding(
        f"{subject}, OOM score", immune, f"oom_score_adj {process.oom_score_adj}", "" if immune else f"{again} (oom)"
    )
    flushers = sum(task.io_flusher for task in process.tasks)
    yield Finding(
        f"{subject}, IO flusher",
        flushers == len(process.tasks),
        f"{flushers} of {len(process.tasks)} threads",
        "" if flushers == len(process.tasks) else f"their allocations may wait for swap: {again} (io flusher)",
    )
    policies = {_REALTIME.get(task.policy, "ordinary") for task in process.tasks}
    preferred = "ordinary" not in policies
    yield Finding(
        f"{subject}, scheduling",
        preferred or not realtime,
        ", ".join(sorted(policies)),
        "" if preferred or not realtime else f"it may wait for a CPU, and for the last free pages: {again} (realtime)",
    )


def _locked(subject: str, process: Process, root: Path, again: str) -> Finding:
    """VmLck is the size of the locked mappings, touched or not (mm/mlock.c). "Locked" counts pages that are there
    (fs/proc/task_mmu.c: smaps_account), and is for root's eyes.
    """
    rollup = dict(re.findall(r"^(Rss|Locked): +(\d+) kB", _text(_smaps(process.pid, root)) or "", re.MULTILINE))
    size = quantities.format_size
    if not process.locked_bytes:
        return Finding(f"{subject}, memory", False, f"not locked, {size(process.resident_bytes)} resident", again)
    if len(rollup) < 2:
        return Finding(f"{subject}, memory", True, f"VmLck {size(process.locked_bytes)} (root sees more)")
    locked, resident = (int(rollup[key]) * _KIB for key in ("Locked", "Rss"))
    found = f"{size(locked)} of {size(resident)} resident are locked (VmLck {size(process.locked_bytes)})"
    if resident > _BUDGET_BYTES:
        return Finding(f"{subject}, memory", False, found, "more than it should need; a smaller region, fewer threads")
    return Finding(f"{subject}, memory", True, found)


def _smaps(pid: int, root: Path) -> Path:
    return root / "proc" / str(pid) / "smaps_rollup"


def _text(path: Path) -> str | None:
    """Without the final line end; None where it is not there, or not for us."""
    try:
        return path.read_text(errors="replace").rstrip("\n")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def exit_status(findings: list[Finding]) -> int:
    """0 when all is good, else that of a machine that is not set up."""
    return os.EX_OK if all(finding.good for finding in findings) else os.EX_CONFIG
