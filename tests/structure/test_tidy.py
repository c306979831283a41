# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every source file keeps to: a licence line, functions of at most 70 lines, lines of at most 120 columns."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]

MOST_FUNCTION_LINES = 70
MOST_COLUMNS = 120
MOST_FILE_LINES = 400
TAB_COLUMNS = 8


def sources(*suffixes: str) -> list[Path]:
    """Files of the project that are, or are about to be, under version control; in a source distribution, all."""
    if (PROJECT / ".git").exists():
        listed = subprocess.check_output(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, text=True
        ).splitlines()
    else:
        listed = [name_of(path) for path in PROJECT.rglob("*")]
    return sorted(PROJECT / name for name in listed if name.endswith(suffixes) and (PROJECT / name).is_file())


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """The functions of a C file with the number of lines of each body: from the brace in column 0, or at the end of a
    head that begins there, to a brace in column 0."""
    lines = text.splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if line == "{" or re.fullmatch(r"\w.*\) *\{", line):
            start = number
        elif line == "}" and start is not None:
            head = " ".join(lines[max(0, start - 3) : start + 1])
            yield re.findall(r"(\w+)\(", head)[-1] if "(" in head else "?", number - start + 1
            start = None


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """The functions of a Python file with the number of lines of each, from `def` to the end."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_every_file_names_its_licence() -> None:
    """In its first three lines, by SPDX. A file without a line has nothing to license."""
    wrong = [
        name_of(path)
        for path in sources(".py", ".pyi", ".c", ".h", ".sh")
        if path.stat().st_size > 0
        and "SPDX-License-Identifier: LGPL-2.1-or-later" not in "".join(path.read_text().splitlines(True)[:3])
    ]
    assert wrong == []


def test_functions_are_short() -> None:
    """In C and Python; what is longer does two things."""
    found = {
        f"{name_of(path)}:{name}": lines
        for path in sources(".py", ".c", ".h")
        for name, lines in (python_functions if path.suffix == ".py" else c_functions)(path.read_text())
        if lines > MOST_FUNCTION_LINES
    }
    assert found == {}


def test_lines_are_short() -> None:
    """A tab counts as eight columns."""
    found = [
        f"{name_of(path)}:{number}"
        for path in sources(".py", ".pyi", ".c", ".h", ".sh", ".toml")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line.expandtabs(TAB_COLUMNS)) > MOST_COLUMNS
    ]
    assert found == []


def test_files_of_the_engine_are_short() -> None:
    """One job each."""
    found = {
        name_of(path): count
        for path in sources(".c", ".h")
        if path.is_relative_to(PROJECT / "nbdnfs") and (count := len(path.read_text().splitlines())) > MOST_FILE_LINES
    }
    assert found == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int f(int a)\n{\n\treturn a;\n}\n", [("f", 3)]),
        ("static int\nlong_name(int a,\n\t  int b)\n{\n}\n", [("long_name", 2)]),
        ("void f(void) {\n\tg();\n}\n", [("f", 3)]),
        ("struct s {\n\tint a;\n};\n", []),
    ],
)
def test_c_functions_are_found(text: str, expected: list[tuple[str, int]]) -> None:
    """The test's own eyes."""
    assert list(c_functions(text)) == expected
