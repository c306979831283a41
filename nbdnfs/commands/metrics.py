# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs metrics`: what `nbdnfs status` knows, in Prometheus's text format, on stdout or for node_exporter.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4. docs/monitoring.md has the
names. Changes nothing on the machine but the file that it is told to write.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import __version__
from nbdnfs.commands import status
from nbdnfs.commands.counters import number
from nbdnfs.commands.status import Status
from nbdnfs.errors import CannotCreateError, UsageError
from nbdnfs.sizes import SLOT_BYTES

# How a file of ours begins: another one is not overwritten.
_FIRST_LINE = "# HELP nbdnfs_build_info The version of nbdnfs that wrote this.\n"
# Bounds of histograms, as exponents of two of microseconds: 16 us to 67 s. What the region counts more finely below
# and above is in the first bucket, and in the last.
_BUCKETS = range(4, 27)


@dataclass(frozen=True)
class _Metric:
    """One metric. `value` is None where a device has none."""

    name: str
    kind: str
    about: str
    value: Callable[[Status], float | None]


def _gauge(name: str, about: str, value: Callable[[Status], float | None]) -> _Metric:
    return _Metric(name, "gauge", about, value)


def _read_from(counter: str, unit: int = 1) -> Callable[[Status], float | None]:
    """A counter of the region, times `unit`."""
    return lambda one: number(one.counters, counter) * unit if one.counters else None


_GAUGES = (
    _gauge(
        "device_level", "The verdict of nbdnfs status: 0 ok, 1 warning, 2 critical, 3 unknown.", lambda one: one.level
    ),
    _gauge("device_problems", "How many problems nbdnfs status names.", lambda one: len(one.problems)),
    _gauge("device_up", "Whether the block device is attached.", lambda one: one.device is not None),
    _gauge("keeper_up", "Whether a keeper is running.", lambda one: one.keeper_pid is not None),
    _gauge("worker_up", "Whether a worker is running.", lambda one: one.worker_pid is not None),
    _gauge("device_size_bytes", "The size of the block device.", lambda one: one.device_bytes),
    _gauge("swap_size_bytes", "The size of the swap area.", lambda one: one.swap_bytes),
    _gauge("swap_used_bytes", "How much of the swap area is in use.", lambda one: one.swap_used_bytes),
    _gauge("pages_encrypted", "Whether pages are encrypted on the NAS.", lambda one: one.encrypted),
    _gauge(
        "server_unheard_seconds",
        "How long the server has owed an answer and sent nothing; 0 when it owes none.",
        lambda one: one.waits.unheard_s if one.waits is not None else None,
    ),
    _gauge(
        "server_last_heard_seconds",
        "How long ago the server last answered anything, or was connected to.",
        lambda one: one.waits.last_heard_s if one.waits is not None else None,
    ),
    _gauge(
        "oldest_request_seconds",
        "The age of the kernel's oldest request; 0 when there is none.",
        lambda one: one.waits.oldest_request_s if one.waits is not None else None,
    ),
    _gauge(
        "unstable_bytes",
        "Acknowledged to the kernel, and not on the NAS yet.",
        _read_from("unstable_pages", SLOT_BYTES),
    ),
    _gauge("region_slot_bytes", "How much the region can hold of pages.", _read_from("slots", SLOT_BYTES)),
    _gauge("region_size_bytes", "The size of the region, with its tables.", _read_from("region_bytes")),
    _gauge("nfs_in_flight", "Write-backs and read-aheads under way.", _read_from("nfs_in_flight")),
    _gauge("server_disconnected", "Whether a connection to the server is down.", _read_from("disconnected")),
    _gauge(
        "write_back_errno", "The errno of a write that the server rejects; 0: none.", _read_from("write_back_error")
    ),
    _gauge("backing_file_state", "0 there, 1 deleted, 2 replaced, 3 truncated.", _read_from("file_state")),
    _gauge("owner_state", "0 no owner record, 1 held, 2 unsure, 3 stolen.", _read_from("owner_state")),
)

# The region's counter ▸ what it counts. The metric has its name and "_total".
_COUNTED = {
    "reads": "Reads of the kernel.",
    "writes": "Writes of the kernel.",
    "failed_reads": "Reads of the kernel that ended with an I/O error.",
    "flushes": "Flushes of the kernel.",
    "trims": "Discards of the kernel.",
    "read_bytes": "What the kernel has read: swapped in.",
    "written_bytes": "What the kernel has written: swapped out.",
    "hit_pages": "Pages that a read found in the region.",
    "missed_pages": "Pages that a read had to fetch from the NAS.",
    "filled_pages_written": "Written pages that repeat one word, and do not travel.",
    "nfs_reads": "NFS READs.",
    "nfs_read_bytes": "What NFS READs have brought.",
    "nfs_writes": "NFS WRITEs.",
    "nfs_written_bytes": "What NFS WRITEs have taken.",
    "nfs_commits": "NFS COMMITs.",
    "read_ahead_pages": "Pages that were fetched ahead of a reader.",
    "read_ahead_hits": "Pages fetched ahead that were read.",
    "read_ahead_wasted": "Pages fetched ahead that were dropped without having been read.",
    "stalls": "Writes that had to wait for room in the region.",
    "write_errors": "Write-backs that the server rejected.",
    "lost_uncommitted_pages": "Pages that a restarted server had forgotten; they were written again.",
    "checksum_rereads": "Pages that were read again because they did not match their checksum or tag.",
    "checksum_failures": "Pages that never matched: the kernel got an I/O error.",
    "replayed_pages": "Pages that a new worker found in the region, and wrote.",
    "reconnects": "Connections to the server that were made again.",
}
_TOTALS = (
    *(_Metric(f"{key}_total", "counter", about, _read_from(key)) for key, about in _COUNTED.items()),
    _Metric(
        "workers_total", "counter", "Workers that have served the device, one after another.", _read_from("generation")
    ),
)
_DURATIONS = {
    "read_us": "Reads of the kernel, by their duration.",
    "write_us": "Writes of the kernel, by their duration.",
    "nfs_read_us": "NFS READs, by their duration.",
    "nfs_write_us": "NFS WRITEs, by their duration.",
}


def run(args: argparse.Namespace) -> int:
    """Print the metrics of one device or of all, or write them to a file. 0 whatever state the devices are in.

    UsageError, CannotCreateError: as `write`.
    """
    found = [status.read(args.name)] if args.name is not None else status.read_all()
    text = render(found)
    if args.textfile is None:
        print(text, end="")
    else:
        write(args.textfile, text)
    return 0


def render(devices: Sequence[Status]) -> str:
    """The text of all metrics, in an order that stays the same. A device without a value has no line."""
    lines = [*_head("build_info", "gauge", "The version of nbdnfs that wrote this.")]
    lines.append(_line("build_info", {"version": __version__}, 1))
    lines += _head("device_info", "gauge", "The device, its server and the keeper's step.")
    for one in devices:
        labels = {"device": one.device or "", "server": one.server or "", "state": one.state}
        lines.append(_line("device_info", {"name": one.name, **labels}, 1))
    for metric in (*_GAUGES, *_TOTALS):
        lines += _head(metric.name, metric.kind, metric.about)
        values = ((one.name, metric.value(one)) for one in devices)
        lines += [_line(metric.name, {"name": name}, value) for name, value in values if value is not None]
    for key, about in _DURATIONS.items():
        lines += _histogram(key, about, devices)
    return "".join(f"{line}\n" for line in lines)


def write(path: Path, text: str) -> None:
    """Put the text at `path` in one step, readable for all: a reader sees the old file or the new one.

    UsageError: node_exporter would not read a file of that name. CannotCreateError: the folder is missing or full, or
    there is a file that is not of metrics of ours.
    """
    if path.suffix != ".prom":
        raise UsageError(f"{path}: node_exporter reads files only whose names end in .prom", f"--textfile {path}.prom")
    _refuse_other_file(path)
    new = ""
    try:
        # in a folder of another user: a new name, never one that exists
        descriptor, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(descriptor, "w") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(new, path)
    except OSError as error:
        if new:
            with contextlib.suppress(OSError):
                os.unlink(new)
        raise CannotCreateError(
            f"cannot write {path}: {error.strerror}", "name a file in a folder that exists, and run this as root"
        ) from None


def _refuse_other_file(path: Path) -> None:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            is_ours = is_file and file.read(len(_FIRST_LINE)) in (b"", _FIRST_LINE.encode())
    except FileNotFoundError:
        return
    except OSError:
        is_ours = False
    if not is_ours:
        raise CannotCreateError(f"{path} exists, and nbdnfs metrics has not written it", "name another file")


def _histogram(key: str, about: str, devices: Iterable[Status]) -> Iterator[str]:
    """Buckets and their total. There is no sum: the region does not keep one, and quantiles need none."""
    name = f"{key.removesuffix('_us')}_duration_seconds"
    yield from _head(name, "histogram", about)
    for one in devices:
        counts = one.counters.get(key)
        if not isinstance(counts, list):
            continue
        for exponent in _BUCKETS:
            below = sum(counts[: exponent + 1])
            yield _line(f"{name}_bucket", {"name": one.name, "le": f"{2**exponent / 1e6:.10g}"}, below)
        yield _line(f"{name}_bucket", {"name": one.name, "le": "+Inf"}, sum(counts))
        yield _line(f"{name}_count", {"name": one.name}, sum(counts))


def _head(name: str, kind: str, about: str) -> Iterator[str]:
    yield f"# HELP nbdnfs_{name} {about}"
    yield f"# TYPE nbdnfs_{name} {kind}"


def _line(name: str, labels: dict[str, str], value: float) -> str:
    written = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"nbdnfs_{name}{{{written}}} {float(value):.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
