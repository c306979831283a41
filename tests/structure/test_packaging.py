# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is packaged is what is on the disk: the list of packages, the source distribution, the wheel."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
# Installed for the files in them: the script that nbdkit loads, and the units.
DATA_PACKAGES = {"nbdnfs.plugin", "nbdnfs.systemd"}


def package_name(folder: Path) -> str:
    return ".".join(folder.relative_to(ROOT).parts)


def c_sources() -> set[str]:
    return {str(path.relative_to(ROOT)) for suffix in ("c", "h") for path in (ROOT / "nbdnfs").rglob(f"*.{suffix}")}


@pytest.fixture(scope="module")
def source_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What setuptools puts into a source distribution: its own list of that."""
    folder = tmp_path_factory.mktemp("sdist")
    run_setup("egg_info", "--egg-base", str(folder))
    return set((folder / "nbdnfs.egg-info/SOURCES.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """What a wheel has, less the extensions, which are not built for this."""
    folder = tmp_path_factory.mktemp("wheel")
    run_setup(
        *("egg_info", "--egg-base", str(folder)),
        *("build_py", "--build-lib", str(folder / "lib"), "bdist_wheel", "--skip-build"),
        *("--bdist-dir", str(folder / "bdist"), "--dist-dir", str(folder)),
        *("install_lib", "--build-dir", str(folder / "lib")),
    )
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        yield set(wheel.namelist())


def run_setup(*arguments: str) -> None:
    """setup.py in the checkout; all that it writes goes to the folders that it is given."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "-q", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_is_listed() -> None:
    """A folder of nbdnfs/ with Python in it is in pyproject.toml's list, and the list has nothing else."""
    on_disk = {package_name(path.parent) for path in (ROOT / "nbdnfs").rglob("*.py")}
    assert set(SETTINGS["packages"]) == on_disk | DATA_PACKAGES


def test_every_package_is_a_regular_one() -> None:
    """Each has an __init__.py: without one, an import finds a namespace package and an installation does not."""
    folders = {path.parent for path in (ROOT / "nbdnfs").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_data_packages_are_where_they_are_said_to_be() -> None:
    """Each of their folders exists."""
    assert set(SETTINGS["package-dir"]) == DATA_PACKAGES
    assert all((ROOT / folder).is_dir() for folder in SETTINGS["package-dir"].values())


def test_a_source_distribution_is_complete(source_files: set[str]) -> None:
    """Every C source and header, the Python modules, the plugin, the units and the licence."""
    modules = {
        str(path.relative_to(ROOT)) for path in (ROOT / "nbdnfs").rglob("*.py*") if path.suffix in (".py", ".pyi")
    }
    units = {str(path.relative_to(ROOT)) for path in (ROOT / "systemd").iterdir()}
    wanted = c_sources() | modules | units | {"plugin/nbdnfs_plugin.py", "LICENSE", "README.md", "setup.py"}
    assert wanted - source_files == set()


def test_a_wheel_has_no_sources(wheel_files: set[str]) -> None:
    """It has the Python modules, the extensions' stubs and the plugin, and no C."""
    assert {name for name in wheel_files if name.endswith((".c", ".h"))} == set()
    assert {"nbdnfs/py.typed", "nbdnfs/_memlock.pyi", "nbdnfs/plugin/nbdnfs_plugin.py"} <= wheel_files
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nbdnfs").rglob("*.py")}
    assert modules - wheel_files == set()
