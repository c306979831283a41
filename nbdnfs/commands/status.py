# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs status`: the state of each device, from /proc, /sys, the keeper's records in /run and the region's counters.

Changes nothing and takes no lock.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nbdnfs import config, quantities, region
from nbdnfs.commands import counters, json_output
from nbdnfs.commands.counters import Counters, number
from nbdnfs.errors import NoInputError
from nbdnfs.keeper.records import Records
from nbdnfs.kernel import nbd_device, swap_area
from nbdnfs.sizes import SLOT_BYTES

_FILE_PROBLEMS = {
    region.FILE_DELETED: "the backing file was deleted on the server",
    region.FILE_REPLACED: "the backing file was replaced on the server: nothing is written to the new file",
    region.FILE_TRUNCATED: "the backing file was truncated on the server: the pages behind its end are lost",
}
_STOLEN = "another machine has stolen the backing file: swap has ended here, reboot this machine"
_WRONG_CHECKSUM = (
    "pages had a wrong checksum: the server lost writes that it had confirmed (is the export 'async'?),"
    " or something else writes to the file"
)


@dataclass(frozen=True)
class Status:
    """One device. None stands for what does not exist or is not known.

    state           the keeper's state, "not running", or "unknown"
    server          the server's numeric address
    unstable_bytes  acknowledged to the kernel, and not on the NAS yet
    counters        the region's, by the engine's names; empty without a worker
    problems        a sentence each; empty when the device is healthy
    """

    name: str
    state: str
    device: str | None = None
    device_bytes: int | None = None
    swap_bytes: int | None = None
    swap_used_bytes: int | None = None
    keeper_pid: int | None = None
    worker_pid: int | None = None
    server: str | None = None
    unstable_bytes: int | None = None
    counters: Counters = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def is_green(self) -> bool:
        """Whether the device is healthy."""
        return not self.problems

    def to_json(self) -> dict[str, object]:
        """The fields, and "green"."""
        return {**asdict(self), "green": self.is_green}

    def text(self) -> str:
        """A few lines for a terminal."""
        size = quantities.format_size
        lines = [f"{self.name}: {'ok' if self.is_green else '; '.join(self.problems)}"]
        if self.device is not None and self.device_bytes is not None:
            lines.append(
                f"  device   {self.device}, {size(self.device_bytes)}, on {self.server or 'an unknown server'}"
            )
        if self.swap_used_bytes is not None and self.swap_bytes is not None:
            lines.append(f"  swap     {size(self.swap_used_bytes)} of {size(self.swap_bytes)} in use")
        lines.append(f"  keeper   {_process(self.keeper_pid)}, {self.state}")
        lines.append(f"  worker   {_process(self.worker_pid)}")
        if self.unstable_bytes is not None:
            generation = self.counters.get("generation", "?")
            lines.append(
                f"  region   {size(self.unstable_bytes)} not on the NAS yet, served by worker number {generation}"
            )
        return "\n".join(lines)


def _process(pid: int | None) -> str:
    return "none" if pid is None else f"process {pid}"


def run(args: argparse.Namespace) -> int:
    """Print the state of one device or of all. The exit status is 0 when all are healthy, else EX_UNAVAILABLE."""
    found = [read(name) for name in ([args.name] if args.name else names())]
    if args.json:
        json_output.print_list([one.to_json() for one in found])
    else:
        print("\n".join(one.text() for one in found) or "nbdnfs: no device is configured")
    return 0 if all(one.is_green for one in found) else os.EX_UNAVAILABLE


def names(root: Path = Path("/")) -> list[str]:
    """The devices that are configured or up, in order."""
    return sorted({*config.names(root), *Records.names(root)})


def read(name: str, root: Path = Path("/")) -> Status:
    """The state of the device `name` now.

    UsageError: no device can have this name. NoInputError: the device is neither configured nor up.
    """
    config.check_name(name)
    records = Records(name, root)
    attached = nbd_device.find(nbd_device.backend_of(name), root)
    if attached is None and name not in names(root):
        known = ", ".join(names(root))
        raise NoInputError(
            f"there is no device '{name}'", f"there are: {known}" if known else f"write /etc/nbdnfs/{name}.toml"
        )
    keeper, worker = records.living(Records.KEEPER), records.living(Records.WORKER)
    swap = swap_area.find(attached.path, root) if attached is not None else None
    found = counters.of_worker(worker.pid, root) if worker is not None else {}
    state = records.read(Records.STATE)
    refusal = Records.refusal(name, root)
    problems = []
    if number(found, "owner_state") == region.OWNER_STOLEN or state == Records.STOLEN:
        problems.append(_STOLEN)
    elif attached is None:
        problems.append("not up")
    if attached is None:
        problems += [refusal] if refusal is not None else []
    else:
        missing = {"not in use as swap": swap, "no keeper is running": keeper, "no worker is running": worker}
        problems += [problem for problem, part in missing.items() if part is None]
    return Status(
        name=name,
        state=(state or "unknown") if keeper is not None else "not running",
        device=attached.path if attached is not None else None,
        device_bytes=attached.size_bytes if attached is not None else None,
        swap_bytes=swap.size_bytes if swap is not None else None,
        swap_used_bytes=swap.used_bytes if swap is not None else None,
        keeper_pid=keeper.pid if keeper is not None else None,
        worker_pid=worker.pid if worker is not None else None,
        server=(records.read(Records.ADDRESS) or "").partition("\n")[2] or None,
        unstable_bytes=number(found, "unstable_pages") * SLOT_BYTES if found else None,
        counters=found,
        problems=(*problems, *_problems_of(found)),
    )


def _problems_of(found: Counters) -> list[str]:
    """The problems that a worker reports in its region: those of the server and of the file."""
    problems = []
    if number(found, "owner_state") == region.OWNER_UNSURE:
        problems.append("the owner record cannot be checked: writes wait until it can")
    if number(found, "disconnected"):
        problems.append("the server does not answer")
    if file_state := number(found, "file_state"):
        problems.append(_FILE_PROBLEMS.get(file_state, f"the backing file is in the unknown state {file_state}"))
    if write_back_error := number(found, "write_back_error"):
        problems.append(f"the server rejects writes ({os.strerror(write_back_error)})")
    if number(found, "checksum_failures"):
        problems.append(_WRONG_CHECKSUM)
    return problems
