# SPDX-License-Identifier: LGPL-2.1-or-later
"""No interpreter is started that searches the current directory of the caller, who may be root: python -P."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON_FILES = [path for folder in ("nbdnfs", "plugin", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
OTHER_FILES = [path for path in sorted((ROOT / "systemd").rglob("*")) if path.is_file()]
_MODULE_OR_CODE = ("-m", "-c")


def unsafe_starts(source: str) -> list[int]:
    """The lines with a list that begins an interpreter's arguments with -m or -c, as in [sys.executable, "-m", …]."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.List | ast.Tuple):
            continue
        for program, option in zip(node.elts, node.elts[1:], strict=False):
            is_python = "executable" in ast.unparse(program) or "python" in ast.unparse(program).lower()
            if is_python and isinstance(option, ast.Constant) and option.value in _MODULE_OR_CODE:
                found.append(node.lineno)
    return found


def unsafe_commands(text: str) -> list[str]:
    """The commands of a shell or a unit that do the same."""
    return re.findall(r"python3?[\d.]*\s+(?:-[A-OQ-Za-z]\s+)*-[mc]\b", text)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_is_started_with_safe_path(path: Path) -> None:
    assert unsafe_starts(path.read_text()) == []


@pytest.mark.parametrize("path", OTHER_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_units_start_python_with_safe_path(path: Path) -> None:
    assert unsafe_commands(path.read_text(errors="replace")) == []


def test_only_programs_py_knows_the_interpreter() -> None:
    """All of the package's starts go through programs.python; install_units.py looks for nbdnfs beside it."""
    users = {
        str(path.relative_to(ROOT / "nbdnfs"))
        for path in PYTHON_FILES
        if path.is_relative_to(ROOT / "nbdnfs") and "sys.executable" in path.read_text()
    }
    assert users == {"programs.py", "commands/install_units.py"}


def test_unsafe_starts_are_found() -> None:
    """The check itself."""
    assert unsafe_starts('run([sys.executable, "-m", "nbdnfs"])') == [1]
    assert unsafe_starts('run(["nice", "/usr/bin/python3", "-c", code])') == [1]
    assert unsafe_starts('run([sys.executable, "-P", "-m", "nbdnfs"])') == []
    assert unsafe_commands("ExecStart=/usr/bin/python3 -m nbdnfs run %i")
    assert unsafe_commands("python3.11 -u -c 'x'")
    assert not unsafe_commands("python3 -P -m nbdnfs")
