# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rooms of the package: each imports rooms of a lower rank, and has no circle inside. docs/ARCHITECTURE.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nbdnfs"

# A folder is a room. "" is the foundation: the modules beside the folders, less the command line's.
RANKS = {
    "": 0,
    "kernel": 1,
    "engine": 1,
    "heir": 1,
    "nas": 2,
    "worker": 3,
    "keeper": 4,
    "commands": 5,
    "parser": 6,
    "cli": 7,
    "__main__": 8,
}


def modules() -> dict[str, Path]:
    """Dotted name below nbdnfs ▸ file, the extensions' stubs included."""
    files = [path for suffix in ("py", "pyi") for path in PACKAGE.rglob(f"*.{suffix}")]
    return {name_of(path): path for path in sorted(files) if path != PACKAGE / "__init__.py"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    head = module.split(".")[0]
    return head if head in RANKS else ""


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nbdnfs":
            base = (node.module or "").removeprefix("nbdnfs").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix(".")
                found.add(name if name in known else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("nbdnfs.") for alias in node.names if alias.name.startswith("nbdnfs.")}
    return found - {""}


MODULES = modules()
IMPORTS = {name: imported_modules(path, set(MODULES)) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    """Each import names a module of the same room, or of a room of a lower rank."""
    room = room_of(module)
    for imported in IMPORTS[module]:
        other = room_of(imported)
        assert other == room or RANKS[other] < RANKS[room], f"{module} imports {imported}"


def circle_from(module: str, imports: dict[str, set[str]]) -> list[str] | None:
    """A way from `module` back to it along imports, or None."""
    ways, seen = [[module]], {module}
    while ways:
        way = ways.pop()
        for following in sorted(imports.get(way[-1], ())):
            if following == module:
                return [*way, module]
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None


@pytest.mark.parametrize("module", MODULES)
def test_no_circle(module: str) -> None:
    """No module imports itself by way of others: with falling ranks, that can happen inside a room only."""
    package = module.rpartition(".")[0]
    imports = {name: found - {name} for name, found in IMPORTS.items()}
    if package in MODULES and MODULES[package].name == "__init__.py":  # a package's face imports what is behind it
        imports[module] = imports[module] - {package}
    assert circle_from(module, imports) is None


def test_circles_are_found() -> None:
    """The search itself, with one circle of three and a way that leads nowhere."""
    imports = {"a": {"b", "x"}, "b": {"c"}, "c": {"a"}, "x": set()}
    assert circle_from("a", imports) == ["a", "b", "c", "a"]
    assert circle_from("x", imports) is None


def test_every_folder_is_a_room() -> None:
    """A new folder needs a rank here, and a word in docs/ARCHITECTURE.md."""
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*/__init__.py")}
    assert folders == {room for room in RANKS if (PACKAGE / room).is_dir() and room}


def test_root_module_holds_the_version_only() -> None:
    """nbdnfs/__init__.py imports nothing, so that no circle can run through it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Assign]


def test_rooms_have_no_code_of_their_own() -> None:
    """Importing a room loads nothing: its __init__.py is empty. The engine's, its public face, is the exception."""
    for path in PACKAGE.rglob("*/__init__.py"):
        if path.parent.name != "engine":
            assert path.read_text() == "", path
