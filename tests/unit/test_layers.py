# SPDX-License-Identifier: LGPL-2.1-or-later
"""The import ranks of the design: a module imports lower ranks only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nbdnfs"

RANKS = {
    "errors": 0,
    "units": 0,
    "_memlock": 0,
    "url": 0,
    "region_counters": 0,
    "nbd_settings": 0,
    "config": 1,
    "diagnose": 1,
    "run": 1,
    "kernel_state": 1,
    "warmup": 1,
    "memlock": 1,
    "handshake": 1,
    "netlink": 1,
    "engine": 1,
    "reference": 1,
    "owner_record": 1,
    "owner": 2,
    "provision": 3,
    "device": 2,
    "notify": 1,
    "run_dir": 1,
    "resolve": 2,
    "shared_region": 1,
    "swap_area": 2,
    "worker_config": 2,
    "worker": 3,
    "bench": 4,
    "link": 3,
    "worker_process": 4,
    "doctor": 4,
    "install_units": 4,
    "status": 4,
    "top": 5,
    "keeper": 5,
    "keeper_work": 6,
    "lifecycle": 6,
    "cli": 7,
    "__main__": 8,
}

# they may raise what errors declares; the tree itself stands alone
SAME_RANK_ALLOWED = {("units", "errors"), ("url", "errors")}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """The nbdnfs modules that a file imports, wherever in the file the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nbdnfs":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("nbdnfs.")}
    return names - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    """Each import names a module of a lower rank."""
    name = name_of(path)
    assert name in RANKS, f"{name} has no rank: give it one here and in the design"
    for imported in imported_names(path) - {name}:
        assert (name, imported) in SAME_RANK_ALLOWED or RANKS[imported] < RANKS[name], f"{name} imports {imported}"


def test_root_module_holds_the_version_only() -> None:
    """nbdnfs/__init__.py imports nothing, so that no circle can run through it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Assign]
