# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs status`: the state of each device, from /proc, /sys, the keeper's records in /run and the region's counters.

Changes nothing and takes no lock. docs/monitoring.md documents the JSON and the exit statuses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nbdnfs import config, quantities
from nbdnfs.commands import check, counters, health, json_output, systemd_unit
from nbdnfs.commands.counters import Counters, Reading, Waits, number
from nbdnfs.commands.health import Level, Problem
from nbdnfs.errors import ConfigError, NbdnfsError, NoInputError, PermissionDeniedError, UnreadableError, UsageError
from nbdnfs.keeper import last_good, only_keeper
from nbdnfs.keeper.records import ProcessRecord, Records
from nbdnfs.kernel import nbd_device, swap_area
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.state import Swap
from nbdnfs.sizes import SLOT_BYTES

# Of the JSON: it grows when a key changes its meaning or goes, not when one is added.
SCHEMA = 1
# The subjects of problems that doctor finds by itself, too.
CONFIGURATION, CONFIGURATION_IN_USE = "configuration", "configuration in use"


@dataclass(frozen=True)
class Status:
    """One device. None stands for what does not exist or is not known.

    state           the keeper's state, "not running", or "unknown"
    server          the server's numeric address
    unstable_bytes  acknowledged to the kernel, and not on the NAS yet
    encrypted       whether pages are encrypted on the NAS
    encrypt         the setting, as the keeper has read it: what they are from the next start on
    waits           how long the server and the oldest request have been waited for
    counters        the region's, by the engine's names; empty where they cannot be read
    problems        empty when the device is healthy
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
    encrypted: bool | None = None
    encrypt: bool | None = None
    waits: Waits | None = None
    counters: Counters = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def level(self) -> Level:
        """The worst of its problems."""
        return health.worst(problem.level for problem in self.problems)

    @property
    def is_green(self) -> bool:
        """Whether the device is healthy."""
        return not self.problems

    @property
    def texts(self) -> list[str]:
        """The problems, a sentence each."""
        return [problem.text for problem in self.problems]

    def to_json(self) -> dict[str, object]:
        """As docs/monitoring.md has it."""
        waits = self.waits
        return {
            "schema": SCHEMA,
            **{key: value for key, value in asdict(self).items() if key not in ("waits", "problems")},
            "unheard_s": waits.unheard_s if waits is not None else None,
            "oldest_request_s": waits.oldest_request_s if waits is not None else None,
            "last_heard_s": waits.last_heard_s if waits is not None else None,
            "problems": self.texts,
            "level": self.level.name.lower(),
            "green": self.is_green,
        }

    def text(self) -> str:
        """A few lines for a terminal."""
        size, duration = quantities.format_size, quantities.format_duration
        lines = [f"{self.name}: {'ok' if self.is_green else '; '.join(self.texts)}"]
        if self.device is not None and self.device_bytes is not None:
            lines.append(
                f"  device   {self.device}, {size(self.device_bytes)}, on {self.server or 'an unknown server'}"
            )
        if self.swap_used_bytes is not None and self.swap_bytes is not None:
            lines.append(f"  swap     {size(self.swap_used_bytes)} of {size(self.swap_bytes)} in use")
        lines.append(f"  keeper   {_process(self.keeper_pid)}, {self.state}")
        lines.append(f"  worker   {_process(self.worker_pid)}")
        if self.waits is not None:
            oldest_s = self.waits.oldest_request_s
            oldest = f", the oldest request waits for {duration(oldest_s)}" if oldest_s else ", no request waits"
            lines.append(f"  server   heard {duration(self.waits.last_heard_s)} ago{oldest}")
        if self.unstable_bytes is not None:
            generation = self.counters.get("generation", "?")
            lines.append(
                f"  region   {size(self.unstable_bytes)} not on the NAS yet, served by worker number {generation}"
            )
        if self.encrypted is not None:
            lines.append(f"  pages    {_pages(self.encrypted, self.encrypt)}")
        return "\n".join(lines)


def _pages(is_encrypted: bool, setting: bool | None) -> str:
    words = {True: "encrypted", False: "not encrypted"}
    now = f"{words[is_encrypted]} on the NAS"
    if setting is None or setting == is_encrypted:
        return now
    return f"{now}; {words[setting]} from the next start on (nbdnfs down and up, or a boot)"


def _process(pid: int | None) -> str:
    return "none" if pid is None else f"process {pid}"


def run(args: argparse.Namespace) -> int:
    """Print the state of one device or of all. The exit status is that of the worst one: health.Level."""
    found = [read(args.name)] if args.name is not None else read_all()
    if args.json:
        json_output.print_list([one.to_json() for one in found])
    else:
        print("\n".join(one.text() for one in found) or check.NO_DEVICE)
    return int(health.worst(one.level for one in found))


def names(root: Path = Path("/")) -> list[str]:
    """The devices that are configured or up, in order. What cannot be the name of a device is left out, and so is one
    of which nothing but records is left, or their empty folder: systemd keeps that (RuntimeDirectoryPreserve=).

    PermissionDeniedError: a folder cannot be read. UnavailableError: not now.
    """
    try:
        found = set(config.names(root))
        recorded = [name for name in Records.names(root) if _is_name(name) and name not in found]
        found.update(name for name in recorded if _is_left(Records(name, root)))
        found.update(_attached(root))
    except OSError as error:
        raise PermissionDeniedError(f"cannot read {error.filename}: {error.strerror}", "run this as root") from None
    return sorted(found)


def _attached(root: Path) -> list[str]:
    """The names of the devices that the kernel has, whatever is left of them elsewhere."""
    prefix = nbd_device.backend_of("")
    backends = [device.backend or "" for device in kernel_state.nbd_devices(root) if device.attached]
    return [name for backend in backends if _is_name(name := backend.removeprefix(prefix)) and name != backend]


def _is_left(records: Records) -> bool:
    """Whether there is anything of a device without a configuration: itself, a process; or a theft or a start that has
    failed to be told of.
    What cannot be looked at is there."""
    try:
        return (
            only_keeper.is_up(records, records.root)
            or any(records.living(role) for role in (Records.WORKER, Records.STANDBY))
            or records.read(Records.STATE) == Records.STOLEN
            or bool(records.read(Records.REFUSED))
        )
    except (UnreadableError, OSError):
        return True


def require(name: str, root: Path = Path("/")) -> None:
    """UsageError: no device can have this name. NoInputError: the device is neither configured nor up."""
    config.check_name(name)
    if nbd_device.find(nbd_device.backend_of(name), root) is None and name not in names(root):
        known = ", ".join(names(root))
        raise NoInputError(
            f"there is no device '{name}'", f"there are: {known}" if known else f"write /etc/nbdnfs/{name}.toml"
        )


def _is_name(name: str) -> bool:
    try:
        config.check_name(name)
    except UsageError:
        return False
    return True


def read_all(root: Path = Path("/")) -> list[Status]:
    """The state of all devices. One whose records cannot be read is "unknown", and takes none of the others along."""
    found = []
    for name in names(root):
        try:
            found.append(read(name, root))
        except (NbdnfsError, OSError, ValueError) as error:
            text = error.message if isinstance(error, NbdnfsError) else f"its state cannot be read: {error}"
            found.append(Status(name, "unknown", problems=(Problem(Level.UNKNOWN, text),)))
    return found


def read(
    name: str,
    root: Path = Path("/"),
    unit_state: Callable[[str], str | None] | None = None,
) -> Status:
    """The state of the device `name` now. `unit_state`: why systemd does not run its unit, in words; by default it is
    asked where `root` is this machine's own.

    UsageError: no device can have this name. NoInputError: the device is neither configured nor up. UnavailableError:
    /proc is not mounted.
    """
    config.check_name(name)
    kernel_state.require_proc(root)
    require(name, root)
    records = Records(name, root)
    attached = nbd_device.find(nbd_device.backend_of(name), root)
    keeper, worker = records.living(Records.KEEPER), records.living(Records.WORKER)
    swap = swap_area.find(attached.path, root) if attached is not None else None
    reading = counters.of_worker(worker.pid, root) if worker is not None else None
    state = records.read(Records.STATE)
    if attached is None:
        if unit_state is None:
            unit_state = systemd_unit.why_not_running if root == Path("/") else lambda name: None
        problems = _why_not_up(records, keeper, unit_state, is_stolen=state == Records.STOLEN)
    else:
        problems = _what_is_missing(name, attached, swap, keeper, worker, reading)
        problems += _wrong_configuration(records)
    problems += health.of_region(reading, name) if reading is not None else []
    if state == Records.STOLEN and all(problem.text != health.STOLEN for problem in problems):
        problems.insert(0, health.stolen())  # the region may say so, too
    found = reading.counters if reading is not None else {}
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
        encrypted=reading.is_encrypted if reading is not None else None,
        encrypt=_setting(records),
        waits=reading.waits if reading is not None else None,
        counters=found,
        problems=tuple(problems),
    )


def _setting(records: Records) -> bool | None:
    """None where no keeper has left what it runs with."""
    settings = last_good.from_text(records.read(Records.CONFIG) or "=")
    return settings.encrypt if settings is not None else None


def _what_is_missing(
    name: str,
    attached: Attached,
    swap: Swap | None,
    keeper: ProcessRecord | None,
    worker: ProcessRecord | None,
    reading: Reading | None,
) -> list[Problem]:
    """Of a device that is up. Without a keeper it works until its worker dies."""
    journal = f"see why: journalctl -u nbdnfs@{name}"
    up = f"nbdnfs up {name}"
    missing = {
        Problem(Level.CRITICAL, "not in use as swap", "device", f"{up} turns swap on again"): swap,
        Problem(Level.WARNING, "no keeper is running", "keeper", f"{up}, or {journal}"): keeper,
        Problem(Level.CRITICAL, "no worker is running", "worker", journal): worker,
    }
    problems = [problem for problem, part in missing.items() if part is None]
    if worker is not None and reading is None:
        text = f"unknown: the counters of process {worker.pid} cannot be read (run this as root)"
        problems.append(Problem(Level.UNKNOWN, text, "counters", "run this as root"))
    return problems


def _wrong_configuration(records: Records) -> list[Problem]:
    """Of a device that is up: the keeper has found it so at its start, and reads it again at its next."""
    wrong = records.read(Records.CONFIG_ERROR)
    if not wrong:
        return []
    advice = f"nbdnfs check {records.name} says what to do; then systemctl restart nbdnfs@{records.name}"
    text = f"it runs with its last good configuration: {wrong}"
    return [Problem(Level.WARNING, text, CONFIGURATION_IN_USE, advice)]


def _not_valid(records: Records) -> list[Problem]:
    """Of a device that is not up, where no start has left its reason."""
    try:
        wrong = check.find_problems(records.name, records.root).get(records.name)
    except (NoInputError, OSError):
        return []  # only its records are left, or nothing can be read now
    if not isinstance(wrong, ConfigError) or isinstance(wrong.__context__, PermissionError):
        return []  # it may be right: it is not known yet, or only root may read it
    return [Problem(Level.CRITICAL, wrong.message, CONFIGURATION, wrong.hint)]


def _why_not_up(
    records: Records,
    keeper: ProcessRecord | None,
    unit_state: Callable[[str], str | None],
    *,
    is_stolen: bool,
) -> list[Problem]:
    """The reason, as far as there is one: why the last start failed, what the keeper waits for, what systemd says."""
    name, reasons = records.name, []
    journal = f"see: journalctl -u nbdnfs@{name}"
    refused, _, advice = (records.read(Records.REFUSED) or "").partition("\n")
    if refused:
        reasons.append(Problem(Level.CRITICAL, refused, "last start", advice or journal))
    waits_for = records.read(Records.WAITING)
    if waits_for:
        advice = f"it tries again by itself; after a change of the configuration: systemctl restart nbdnfs@{name}"
        if keeper is None:
            advice = f"no keeper is running any more: nbdnfs up {name}"
        reasons.append(Problem(Level.CRITICAL, waits_for, "the keeper waits", advice))
    if keeper is None and not is_stolen and not reasons:
        reasons.extend(_not_valid(records))
    if keeper is None and not is_stolen and not reasons and (unit := unit_state(name)):
        _, _, command = unit.rpartition(": ")
        is_command = command.startswith(("systemctl ", "journalctl ", "nbdnfs "))
        reasons.append(Problem(Level.CRITICAL, unit, "unit", command if is_command else journal))
    if is_stolen:
        return reasons
    up = f"nbdnfs up {name}" if keeper is None else f"its keeper is starting it: wait, and {journal}"
    if reasons and reasons[0].subject == CONFIGURATION:
        up = f"correct its configuration: nbdnfs check {name}"
    elif reasons:
        up = "the next finding says why, and what to do"
    return [Problem(Level.CRITICAL, "not up", "device", up), *reasons]
