# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `nbdnfs status` tells: of each device, what the kernel, the records and the region say; green or not.

Reads only, from /proc, /sys, /run and the region's counters, which need no lock.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nbdnfs import config, quantities, region
from nbdnfs.errors import NoInputError
from nbdnfs.keeper.records import Records
from nbdnfs.kernel import nbd_device, swap_area
from nbdnfs.sizes import SLOT_BYTES

_FILE_STATES = {
    region.FILE_REMOVED: "the backing file has been removed on the server",
    region.FILE_REPLACED: "the backing file has been replaced by another: nothing is written to that",
    region.FILE_TRUNCATED: "the backing file was cut short: what lay behind that is lost",
}
_WRONG_CHECKSUM = (
    "pages had a wrong checksum: the server has lost writes that it said were on disk (is the export 'async'?),"
    " or somebody else writes to the file"
)


@dataclass(frozen=True)
class Status:
    """One device. `problems` is empty when all is well; what is None could not be known, or is not there."""

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
    counters: dict[str, int | list[int]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def is_green(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "green": self.is_green}

    def text(self) -> str:
        """A few lines for people."""
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
            waits = size(self.unstable_bytes)
            lines.append(f"  region   {waits} not on the NAS yet, worker number {self.counters.get('generation', '?')}")
        return "\n".join(lines)


def _process(pid: int | None) -> str:
    return "none" if pid is None else f"process {pid}"


def names(root: Path = Path("/")) -> list[str]:
    """Everything that is configured or up."""
    return sorted({*config.names(root), *Records.names(root)})


def read(name: str, root: Path = Path("/")) -> Status:
    """What is known of `name` now. UsageError: that can be no device's name. NoInputError: there is none of it."""
    config.check_name(name)
    records = Records(name, root)
    attached = nbd_device.find(nbd_device.backend_of(name), root)
    if attached is None and name not in names(root):
        known = ", ".join(names(root))
        raise NoInputError(
            f"there is no device '{name}'", f"there are: {known}" if known else f"write /etc/nbdnfs/{name}.toml"
        )
    keeper = records.living(Records.KEEPER)
    worker = records.living(Records.WORKER)
    swap = swap_area.find(attached.path, root) if attached is not None else None
    counters = _counters(worker.pid, root) if worker is not None else {}
    address = (records.read(Records.ADDRESS) or "").partition("\n")[2]
    ownership = _number(counters, "owner_state")
    is_stolen = ownership == region.OWNER_STOLEN or records.read(Records.STATE) == Records.STOLEN
    refused = Records.refusal(name, root)
    return Status(
        name=name,
        state=(records.read(Records.STATE) or "unknown") if keeper is not None else "not running",
        device=attached.path if attached is not None else None,
        device_bytes=attached.size_bytes if attached is not None else None,
        swap_bytes=swap.size_bytes if swap is not None else None,
        swap_used_bytes=swap.used_bytes if swap is not None else None,
        keeper_pid=keeper.pid if keeper is not None else None,
        worker_pid=worker.pid if worker is not None else None,
        server=address or None,
        unstable_bytes=_number(counters, "unstable_pages") * SLOT_BYTES if counters else None,
        counters=counters,
        problems=tuple(
            problem
            for problem, holds in (
                ("another machine has taken its file: swap has ended here, reboot this machine", is_stolen),
                ("it is not up", attached is None and not is_stolen),
                (refused or "", refused is not None and attached is None),
                ("nobody swaps to it", attached is not None and swap is None),
                ("no keeper watches it", attached is not None and keeper is None),
                ("no worker serves it", attached is not None and worker is None),
                ("it cannot see whether the file is still its own: writes wait", ownership == region.OWNER_UNSURE),
                ("the server does not answer", _number(counters, "disconnected") != 0),
                (_FILE_STATES.get(_number(counters, "file_state"), ""), _number(counters, "file_state") != 0),
                (_refusal(_number(counters, "write_back_error")), _number(counters, "write_back_error") != 0),
                (_WRONG_CHECKSUM, _number(counters, "checksum_failures") != 0),
            )
            if holds
        ),
    )


def _counters(worker_pid: int, root: Path) -> dict[str, int | list[int]]:
    """The region's, through its worker's descriptor; empty where that is not to be had."""
    descriptor = region.take_from(worker_pid, root)
    if descriptor is None:
        return {}
    try:
        return region.read_counters(descriptor) if region.is_made(descriptor) else {}
    finally:
        os.close(descriptor)


def _number(counters: dict[str, int | list[int]], key: str) -> int:
    value = counters.get(key, 0)
    return value if isinstance(value, int) else 0


def _refusal(code: int) -> str:
    return f"the server refuses to write ({os.strerror(code)})"
