# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd says of a device's unit, in a sentence with a command."""

from __future__ import annotations

import pytest

from nbdnfs.commands import systemd_unit

UNIT = "nbdnfs@swap0.service"


@pytest.mark.parametrize(
    ("load", "active", "enabled", "said"),
    [
        ("not-found", "inactive", "", f"systemd does not have {UNIT}: nbdnfs install-units"),
        ("loaded", "failed", "enabled", f"{UNIT} has failed (exit-code): journalctl -u {UNIT}"),
        ("loaded", "inactive", "enabled", f"{UNIT} is not started: systemctl start {UNIT}"),
        # the generator enables it for this boot, and does so at each
        ("loaded", "inactive", "enabled-runtime", f"{UNIT} is not started: systemctl start {UNIT}"),
        (
            *("loaded", "inactive", "disabled"),
            f"{UNIT} is not started, and does not start at boot: systemctl enable --now {UNIT}",
        ),
        ("loaded", "activating", "enabled", f"{UNIT} is activating: journalctl -u {UNIT}"),
    ],
)
def test_state(monkeypatch: pytest.MonkeyPatch, load: str, active: str, enabled: str, said: str) -> None:
    """Whether it starts at boot decides what there is to do."""
    text = f"LoadState={load}\nActiveState={active}\nResult=exit-code\nUnitFileState={enabled}\n"
    monkeypatch.setattr(systemd_unit, "_is_booted", lambda: True)
    monkeypatch.setattr(systemd_unit, "_systemctl", lambda: "systemctl")
    monkeypatch.setattr(systemd_unit.programs, "run", lambda *arguments, **options: text)
    assert systemd_unit.why_not_running("swap0") == said
