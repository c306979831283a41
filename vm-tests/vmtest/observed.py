# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest is really in, and what nbdnfs and systemd state: swap, device, processes, the unit."""

from __future__ import annotations

import json
from dataclasses import dataclass

from nbdnfs.keeper.heir import COMMAND
from vmtest.journal import COUNT_TRACEBACKS
from vmtest.machine import Machine

NAME = "swap0"
UNIT = f"nbdnfs@{NAME}"
BACKEND = f"nbdnfs:{NAME}"
TOP = "top"
"""The device-mapper device on top of ours, where there is one."""

# One command for all of it: each costs an emulated CPU a second. No program of Python among them.
_LOOK = f"""\
cat /proc/swaps; echo ---
for d in /sys/block/nbd*; do if [ -e $d/pid ]; then read -r b < $d/backend && echo ${{d##*/}} $b; fi; done; echo ---
pgrep -af 'nbdnfs [r]un {NAME}|nbdnfs_[p]lugin.py'; echo ---
pgrep -x {COMMAND}; echo ---
systemctl show -p ActiveState,MainPID {UNIT}; echo ---
ls /dev/mapper; echo ---
{COUNT_TRACEBACKS}
"""


@dataclass(frozen=True)
class Observed:
    """Of the kernel, the process table and systemd.

    swaps    the block devices that are swap, by the kernel's names
    devices  the nbd devices that are attached as ours
    keepers  pids
    serving  pids: the worker and the standby
    """

    swaps: tuple[str, ...]
    devices: tuple[str, ...]
    keepers: tuple[int, ...]
    serving: tuple[int, ...]
    unit: str
    unit_pid: int
    has_top: bool
    tracebacks: int

    @property
    def is_swap_on(self) -> bool:
        """On the device itself."""
        return any(name in self.swaps for name in self.devices)

    @property
    def is_top_on(self) -> bool:
        """On what lies on top of it."""
        return any(name.startswith("dm-") for name in self.swaps)


def look(machine: Machine) -> Observed:
    """GuestFailedError when the machine does not answer."""
    swaps, devices, processes, heirs, unit, mapper, tracebacks = machine.run(_LOOK, 120, check=False).stdout.split(
        "---\n"
    )
    swap_names = [line.split()[0].rpartition("/")[2].removesuffix("\\040(deleted)") for line in swaps.splitlines()[1:]]
    running = [line.split(maxsplit=1) for line in processes.splitlines()]
    running = [words for words in running if words[0] not in heirs.split()]  # they have their keeper's command line
    state = dict(line.split("=", 1) for line in unit.splitlines())
    return Observed(
        swaps=tuple(swap_names),
        devices=tuple(words[0] for words in map(str.split, devices.splitlines()) if words[1] == BACKEND),
        keepers=tuple(int(pid) for pid, command in running if "nbdnfs_plugin" not in command),
        serving=tuple(int(pid) for pid, command in running if "nbdnfs_plugin" in command),
        unit=state.get("ActiveState", ""),
        unit_pid=int(state.get("MainPID", "0")),
        has_top=TOP in mapper.split(),
        tracebacks=int(tracebacks or 0),
    )


def contradictions(machine: Machine, real: Observed, *, is_config_good: bool) -> list[str]:
    """Where `nbdnfs status` says something else than `real`. A device whose configuration is not good may be green or
    not: it goes on, and there is something to mend."""
    result = machine.run(f"nbdnfs status --json {NAME}", 120, check=False)
    if "Traceback" in result.stderr:
        return [f"nbdnfs status: {result.stderr}"]
    if result.status != 0 and not result.stdout.strip():  # neither configured nor up
        return [f"status: {result.stderr.strip()}"] if real.devices else []
    found = json.loads(result.stdout)
    # a list, or an object with a version of the schema
    (stated,) = found if isinstance(found, list) else found["devices"]
    device = stated["device"]
    is_healthy = real.is_swap_on and bool(real.keepers)
    pairs = {
        "device": (None if device is None else device.removeprefix("/dev/"), (*real.devices, None)[0]),
        "swap": (stated["swap_bytes"] is not None, real.is_swap_on),
        "keeper": (stated["keeper_pid"], (*real.keepers, None)[0]),
        "worker": (stated["worker_pid"] in (None, *real.serving), True),
        "exit status": (result.status == 0, bool(stated["green"])),
        "green": (bool(stated["green"]), is_healthy and (is_config_good or bool(stated["green"]))),
    }
    return [
        f"status says of {key}: {said}, and it is {real_one}"
        for key, (said, real_one) in pairs.items()
        if said != real_one
    ]
