# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing takes a device down on a guess: DISCONNECT is sent in kernel/device_in_use.py alone, which looks first."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "nbdnfs"


def calls(source: str, name: str) -> list[str]:
    """Calls of a function or method `name`, as they are written: "kernel.disconnect"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            written = ast.unparse(node.func)
            if written.rpartition(".")[2] == name:
                found.append(written)
    return sorted(found)


def callers(name: str) -> dict[str, list[str]]:
    """File ▸ calls, of all files of the package that have some."""
    files = {str(path.relative_to(PACKAGE)): calls(path.read_text(), name) for path in sorted(PACKAGE.rglob("*.py"))}
    return {file: found for file, found in files.items() if found}


def test_one_place_sends_disconnect() -> None:
    """All others go through it. The keeper's kernel (NbdKernel) is the one that it wraps."""
    assert callers("disconnect") == {
        "commands/attach.py": ["device_in_use.disconnect", "device_in_use.disconnect"],
        "commands/up_down.py": ["device_in_use.disconnect"],
        "keeper/keeper.py": ["self._kernel.disconnect"],
        "kernel/device_in_use.py": ["netlink.disconnect", "netlink.disconnect"],
        "kernel/nbd_device.py": ["device_in_use.disconnect", "device_in_use.disconnect"],
    }


def test_requests_are_made_to_fail_in_one_case() -> None:
    """For a file that another machine has taken, a device in use is taken down all the same."""
    assert callers("fail_requests") == {
        "keeper/serving.py": ["self._kernel.fail_requests"],
        "kernel/nbd_device.py": ["device_in_use.fail_requests"],
    }


def test_calls_are_found() -> None:
    """The check itself."""
    assert calls("a.b.disconnect(1); disconnect(2); c.disconnected()", "disconnect") == ["a.b.disconnect", "disconnect"]
