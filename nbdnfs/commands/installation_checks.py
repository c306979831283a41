# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks of `nbdnfs doctor` that concern what is installed: nbdkit, libnfs, the systemd units."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nbdnfs import programs
from nbdnfs.commands import install_units
from nbdnfs.commands.findings import Finding, judge
from nbdnfs.errors import NbdnfsError

_ANSWER_TIMEOUT_S = 10.0


def installation(root: Path) -> Iterator[Finding]:
    """All of them for this machine; the units alone for another `root`."""
    if root == Path("/"):
        yield _nbdkit()
        yield _libnfs()
    yield _units(root)


def _nbdkit() -> Finding:
    from nbdnfs.worker import nbdkit

    try:
        nbdkit.check_nbdkit()
    except NbdnfsError as error:
        return Finding("nbdkit", False, error.message, error.hint)
    version = "of unknown version"
    with contextlib.suppress(NbdnfsError):
        text = programs.run(
            [programs.find_program("nbdkit", "nbdkit"), "--version"],
            what="asking nbdkit for its version",
            timeout_s=_ANSWER_TIMEOUT_S,
        )
        version = text.split("\n")[0].removeprefix("nbdkit ")
    return Finding("nbdkit", True, f"{version}, with its Python plugin")


def _libnfs() -> Finding:
    try:
        from nbdnfs.engine import libnfs_version
    except NbdnfsError as error:
        return Finding("libnfs", False, error.message, error.hint)
    return Finding("libnfs", True, libnfs_version)


def _units(root: Path) -> Finding:
    """Installed by an earlier version, or changed since."""
    try:
        differing = install_units.differing(root)
    except NbdnfsError as error:
        return Finding("systemd units", False, error.message, error.hint)
    if differing is None:
        return Finding("systemd units", True, "not installed (nbdnfs install-units)")
    if install_units.is_shadowing_package(root):
        return Finding("systemd units", False, "in /usr/local/lib, before the package's", "nbdnfs uninstall-units")
    return judge(
        "systemd units",
        not differing,
        f"not those of this version: {', '.join(differing)}" if differing else "those of this version",
        "nbdnfs install-units" if install_units.packaged_unit(root) is None else "apt install --reinstall nbdnfs",
    )
