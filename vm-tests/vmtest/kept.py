# SPDX-License-Identifier: LGPL-2.1-or-later
"""A device as it is used: its configuration, and the unit whose keeper has a worker and a standby."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from nbdnfs.keeper import heir
from vmtest.guest import Guest

_START_TIMEOUT_S = 600


def configure(guest: Guest, name: str, lines: str) -> None:
    """Install the units, and write the device's configuration."""
    guest.run(
        "nbdnfs install-units && systemctl daemon-reload && mkdir -p /etc/nbdnfs"
        f" && printf %s {shlex.quote(lines)} > /etc/nbdnfs/{name}.toml",
        300,
    )


def start(guest: Guest, name: str) -> None:
    """Until it is active. On a busy host the job may be canceled (nbdnfs-start-timeout@.service), and the start goes
    on."""
    unit = f"nbdnfs@{name}"
    guest.run(
        f"systemctl start {unit} || until systemctl -q is-active {unit} || systemctl -q is-failed {unit};"
        f" do sleep 1; done; systemctl -q is-active {unit}",
        _START_TIMEOUT_S,
    )


def stop(guest: Guest, name: str) -> None:
    """swapoff, and everything else in its order."""
    guest.run(f"systemctl stop nbdnfs@{name}", _START_TIMEOUT_S)


def worker_pid(guest: Guest, name: str) -> int:
    """Of the worker that serves the kernel. Waits until there is a standby, too: from then on nothing is prepared."""
    records = f"/run/nbdnfs/{name}"
    text = guest.run(
        f"until [ -s {records}/standby ]; do sleep 0.2; done; cut -d ' ' -f 1 {records}/worker", _START_TIMEOUT_S
    ).stdout
    return int(text)


def memory_kib(guest: Guest, name: str) -> Mapping[str, int]:
    """Of all processes of the unit: Pss, which has a share of what several map, and what is locked and there. The heir
    does not count: it has the keeper's memory, and the kernel counts that for each of the two, undivided."""
    text = guest.run(
        f"group=$(systemctl show -P ControlGroup nbdnfs@{name});"
        f" for p in $(cat /sys/fs/cgroup$group/cgroup.procs); do [ $(cat /proc/$p/comm) = {heir.COMMAND} ] ||"
        " cat /proc/$p/smaps_rollup; done"
        ' | awk \'/^(Pss|Locked):/ { kib[$1] += $2 } END { print kib["Pss:"], kib["Locked:"] }\''
    ).stdout
    pss, locked = text.split()
    return {"all_resident_kib": int(pss), "all_locked_kib": int(locked)}
