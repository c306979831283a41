# SPDX-License-Identifier: LGPL-2.1-or-later
"""The systemd unit of a device: asked about, started and stopped through systemctl(1)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from nbdnfs import programs
from nbdnfs.errors import NbdnfsError, UnavailableError

# Of systemd, for reports: they do not wait for a machine that is stuck.
_ANSWER_TIMEOUT_S = 5.0


def name_of(device: str) -> str:
    """The unit of a device; "-" and "." stand for themselves in an instance name, systemd.unit(5)."""
    return f"nbdnfs@{device}.service"


def is_loaded(device: str) -> bool:
    """Whether systemd runs and has the unit."""
    return _is_booted() and _property(device, "LoadState") == "loaded"


def is_active(device: str) -> bool:
    """Whether systemd runs the unit, or is about to."""
    return _is_booted() and _property(device, "ActiveState") in ("active", "activating", "reloading")


def why_not_running(device: str) -> str | None:
    """Why systemd does not run the unit of a device that is not up, and what to do; None where nothing is known."""
    if not _is_booted():
        return None
    keys = ("LoadState", "ActiveState", "Result", "UnitFileState")
    try:
        texts = programs.run(
            [_systemctl(), "show", *(f"--property={key}" for key in keys), name_of(device)],
            what="asking systemd for the state of a unit",
            timeout_s=_ANSWER_TIMEOUT_S,
        )
    except NbdnfsError as error:
        return error.message
    found = dict(line.partition("=")[::2] for line in texts.splitlines())
    unit = name_of(device)
    if found.get("LoadState") != "loaded":
        return f"systemd does not have {unit}: nbdnfs install-units"
    match found.get("ActiveState"):
        case "failed":
            return f"{unit} has failed ({found.get('Result')}): journalctl -u {unit}"
        case "inactive":
            if found.get("UnitFileState") in ("enabled", "enabled-runtime"):  # the generator's, at each boot
                return f"{unit} is not started: systemctl start {unit}"
            return f"{unit} is not started, and does not start at boot: systemctl enable --now {unit}"
        case state:
            return f"{unit} is {state}: journalctl -u {unit}"


def job(device: str) -> str:
    """What systemd is about to do with the unit: "stop", "restart", "start"; "" for nothing, or without systemd."""
    if not _is_booted():
        return ""
    jobs = programs.run([_systemctl(), "list-jobs", "--no-legend", "--plain"], what="asking systemd for its jobs")
    for line in jobs.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[1] == name_of(device):
            return fields[2]
    return ""


def is_shutting_down() -> bool:
    """Whether systemd is on its way to power-off, reboot or the like."""
    return programs.output([_systemctl(), "is-system-running"]).strip() == "stopping"


def start(device: str, progress: Callable[[], None], every_s: float) -> tuple[int, str]:
    """Start the unit, and wait until it has started, or systemd waits no longer; `progress` is called meanwhile.
    systemctl's exit status, and what it printed on stderr."""
    return programs.watch([_systemctl(), "start", name_of(device)], progress, every_s=every_s)


def status_text(device: str) -> str:
    """What the unit's process has last sent as STATUS=, sd_notify(3)."""
    return _property(device, "StatusText")


def stop(device: str) -> None:
    """Stop the unit, and wait until it has stopped. UnavailableError when it fails."""
    if programs.status([_systemctl(), "stop", name_of(device)]) != 0:
        raise UnavailableError(f"{name_of(device)} did not stop", f"see why: journalctl -u {name_of(device)}")


def start_after_stop(device: str) -> None:
    """Have systemd start the keeper again once it has stopped it. During a shutdown systemd rejects that, rightly."""
    print(f"nbdnfs: {device}: swap stays on, and the keeper is started again for it", file=sys.stderr)
    with contextlib.suppress(NbdnfsError):
        programs.run([_systemctl(), "--no-block", "start", name_of(device)], what="asking systemd for a start")


def _is_booted(root: Path = Path("/")) -> bool:
    """sd_booted(3)."""
    return (root / "run/systemd/system").is_dir()


def _systemctl() -> str:
    return programs.find_program("systemctl", "systemd")


def _property(device: str, key: str) -> str:
    what = "asking systemd for the state of a unit"
    return programs.run([_systemctl(), "show", "--value", f"--property={key}", name_of(device)], what=what).strip()
