# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation is true of the repository: each path that it names exists, each link leads somewhere."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdnfs import errors
from nbdnfs.keeper import failures
from nbdnfs.worker import protocol

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = ROOT / "docs" / "decisions"
# Where documentation lies, besides the top: what is built or fetched (build/, .venv/) has pages of its own.
WITH_PAGES = ("docs", "contrib", "tests", "vm-tests", "bench", "nbdnfs")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(path for folder in WITH_PAGES for path in (ROOT / folder).rglob("*.md"))]
# A decision says what was so when it was made: only what was added since must be true of today's files.
SINCE = re.compile(r"(?:\*\*Since then\.\*\*|^## Since then$)(.*)", re.DOTALL | re.MULTILINE)

# `code`, on one line; a fenced block is no prose
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# What looks like a path of this repository: one of its folders, then a file. The kernel's paths begin otherwise, and
# what is made later (build/, .venv/) is not in it.
FOLDERS = ("nbdnfs", "plugin", "systemd", "docs", "tests", "vm-tests", "bench", "tools", "debian", "contrib")
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./@-]*")
FUNCTION = re.compile(r"([a-z_][a-z0-9_]*)\(\)")


def ident(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its fenced blocks; of a numbered decision, what was added since."""
    text = page.read_text()
    if page.parent == DECISIONS and page.name[0].isdigit():
        found = SINCE.search(text)
        text = found[1] if found else ""
    return FENCE.sub("", text)


def named_paths(page: Path) -> Iterator[str]:
    """The paths of the repository that stand in backticks, also as a word of a command."""
    for code in CODE.findall(prose(page)):
        for word in code.split():
            path = word.strip("\"'(),;").partition(":")[0]
            if PATH.fullmatch(path):
                yield path


def exists(path: str) -> bool:
    return any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()


def slug(heading: str) -> str:
    """The anchor that a heading gets, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=ident)
def test_named_files_exist(page: Path) -> None:
    """Each path of the repository in backticks is a file or a folder that is there."""
    missing = sorted({path for path in named_paths(page) if not exists(path)})
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=ident)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link names a file, and its anchor a heading there."""
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_decisions_are_listed() -> None:
    """The index has a row for each decision, in order, and no other."""
    listed = re.findall(r"^\| \[\d{4}\]\((\d{4}-[\w-]+\.md)\)", (DECISIONS / "README.md").read_text(), re.MULTILINE)
    assert listed == sorted(path.name for path in DECISIONS.glob("[0-9]*.md"))


def test_decisions_are_numbered() -> None:
    """A decision's title begins with the number of its file, and no number is given twice or left out."""
    numbers = [path.name[:4] for path in sorted(DECISIONS.glob("[0-9]*.md"))]
    assert numbers == [f"{number:04}" for number in range(1, len(numbers) + 1)]
    for path in DECISIONS.glob("[0-9]*.md"):
        assert path.read_text().startswith(f"# {path.name[:4]}: ")


def test_named_functions_exist() -> None:
    """Each function that the map names, as `name()`, is one of the sources'."""
    suffixes = {".py", ".c", ".h"}
    files = [path for folder in ("nbdnfs", "plugin") for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    defined = {
        name
        for path in files
        for name in re.findall(r"^(?:\s*def |[a-z].*?[ *])([a-z_][a-z0-9_]*)\(", path.read_text(), re.MULTILINE)
    }
    named = {name for code in CODE.findall(prose(ROOT / "docs/ARCHITECTURE.md")) for name in FUNCTION.findall(code)}
    assert named - defined == set()


def test_paths_are_found() -> None:
    """The search itself: words of a command, folders, what belongs to the kernel."""
    assert PATH.fullmatch("tests/engine/test_wire.py")
    assert PATH.fullmatch("nbdnfs/engine/base/")
    assert not PATH.fullmatch("mm/vmscan.c")
    assert slug("Locks, in order") == "locks-in-order"
    assert not exists("nbdnfs/no_such_file.py")
    assert exists("nbdnfs/*.py")


def test_exit_statuses() -> None:
    """docs/troubleshooting.md has those of the exception tree, of the unit, and of workers and helpers."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rows = {int(row[1]): row[2] for row in re.finditer(r"^\| (\d+) \| *(\w*) *\|", text, re.MULTILINE)}
    for error in errors.NbdnfsError.__subclasses__():
        assert getattr(os, rows[error.exit_code]) == error.exit_code
    assert {protocol.STOLEN_STATUS, failures.OWNED_STATUS} <= rows.keys()
    (final,) = re.findall(r"not started again after ([0-9, and]+),", text)
    assert {int(word) for word in re.findall(r"\d+", final)} == failures.FINAL_STATUSES


def test_pages_are_listed() -> None:
    """The index of the documentation names each page, or the index of its folder."""
    index = (ROOT / "docs/README.md").read_text()
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/how-to").glob("*.md")]
    missing = [str(page.relative_to(ROOT / "docs")) for page in pages if page.name != "README.md"]
    assert [name for name in missing if f"({name})" not in index] == []
    recipes = (ROOT / "docs/recipes/README.md").read_text()
    names = {page.name for page in (ROOT / "docs/recipes").glob("*.md")}
    assert {name for name in names if f"({name})" not in recipes} == {"README.md"}
