# SPDX-License-Identifier: LGPL-2.1-or-later
"""No file edits sys.path: pyproject.toml names pytest's folders, the Makefile those of programs (PYTHONPATH)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("nbdnfs", "plugin", "tests", "vm-tests", "bench", "tools")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def uses_sys_path(source: str) -> bool:
    """Whether `sys.path` or `site.addsitedir` stands in the code; strings and comments do not count."""
    names = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return not names.isdisjoint({"sys.path", "site.addsitedir"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sys_path_is_left_alone(path: Path) -> None:
    """The folders that are searched stand in two places, not in every program."""
    assert not uses_sys_path(path.read_text())


def test_edits_are_found() -> None:
    """The check itself."""
    assert uses_sys_path("import sys\nsys.path.insert(0, 'x')")
    assert uses_sys_path("import sys\nsys.path[:0] = ['x']")
    assert not uses_sys_path("import sys\nsys.exit('sys.path')")
