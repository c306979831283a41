# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is packaged is what is on the disk: the list of packages, the source distribution, the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import package_files
import pytest

from nbdnfs import __version__

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


def test_a_source_distribution_has_what_tests_it(source_files: set[str]) -> None:
    """The tests, the tools, the documentation and the package's description."""
    wanted = {"Makefile", "tools/bootstrap.sh", "tools/manual.py", "debian/control", "docs/man/nbdnfs.8.in"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert wanted - source_files == set()
    assert {name for name in source_files if name.endswith((".so", ".pyc"))} == set()


# debian/


def test_the_package_has_the_version() -> None:
    """Of nbdnfs itself; debian/rules adds the release that it is for."""
    head = (ROOT / "debian/changelog").read_text().splitlines()[0]
    assert head.startswith(f"nbdnfs ({__version__}) ")


@pytest.mark.parametrize(("systemd_folder", "units"), [("/lib/systemd", "lib"), ("/usr/lib/systemd", "usr/lib")])
def test_a_package_has_everything_in_its_place(tmp_path: Path, systemd_folder: str, units: str) -> None:
    """Units and rules where this release has them; manual, completions and example; nothing in /usr/local."""
    package_files.install(tmp_path, systemd_folder, 252)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    wanted = {
        f"{units}/systemd/system/nbdnfs@.service",
        f"{units}/systemd/system-generators/nbdnfs-generator",
        f"{units}/udev/rules.d/59-nbdnfs.rules",
        "usr/lib/sysctl.d/60-nbdnfs.conf",
        "usr/share/man/man5/nbdnfs.toml.5",
        "usr/share/man/man8/nbdnfs.8",
        "usr/share/bash-completion/completions/nbdnfs",
        "usr/share/doc/nbdnfs/examples/swap0.toml",
    }
    assert wanted - found == set()
    assert [path for path in found if b"/usr/local" in (tmp_path / path).read_bytes()] == []
    assert (tmp_path / "etc/nbdnfs").is_dir()


def run_script(name: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A maintainer script, less what debhelper adds, on the tree of files that is `root`."""
    return subprocess.run(
        ["/bin/sh", ROOT / "debian" / f"nbdnfs.{name}", *arguments],
        env={**os.environ, "DPKG_ROOT": str(root)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.fixture
def swapping(tmp_path: Path) -> Path:
    """A machine with nbd0 for the device swap0, nbd1 for another program and nbd2 attached by hand; swap on nbd0."""
    for device, backend in (("nbd0", "nbdnfs:swap0"), ("nbd1", "other"), ("nbd2", "nbdnfs-socket:/tmp/s")):
        (tmp_path / "sys/block" / device).mkdir(parents=True)
        (tmp_path / "sys/block" / device / "backend").write_text(f"{backend}\n")
    (tmp_path / "proc").mkdir()
    swaps(tmp_path, "/dev/nbd0")
    return tmp_path


def swaps(root: Path, *devices: str) -> None:
    lines = [f"{device}                               partition\t65532\t\t0\t\t-2" for device in devices]
    (root / "proc/swaps").write_text("\n".join(["Filename\t\t\t\tType\t\tSize", *lines, ""]))


def test_removal_is_refused_while_swap_is_on(swapping: Path) -> None:
    """It names the device, and what to do. An upgrade is not a removal."""
    done = run_script("prerm", swapping, "remove")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "nbdnfs: swap is on: /dev/nbd0, the device swap0",
        "nbdnfs: turn it off, then remove the package: nbdnfs down swap0",
    ]
    assert run_script("prerm", swapping, "upgrade", "1.0").returncode == 0


@pytest.mark.parametrize("devices", [[], ["/dev/nbd1"], ["/dev/sda2"], ["/dev/nbd00"]])
def test_removal_is_not_refused_for_other_swap(swapping: Path, devices: list[str]) -> None:
    """Swap on other devices, and our devices without swap, are in nobody's way."""
    swaps(swapping, *devices)
    done = run_script("prerm", swapping, "remove")
    assert (done.returncode, done.stderr) == (0, "")


def test_removal_is_refused_while_something_lies_on_the_device(swapping: Path) -> None:
    """dm-crypt, and LVM on that: /proc/swaps has the uppermost one's name. Those of other devices are in nobody's
    way."""
    swaps(swapping, "/dev/dm-1")
    for below, above in (("nbd0", "dm-0"), ("dm-0", "dm-1"), ("nbd1", "dm-2")):
        (swapping / "sys/block" / below / "holders").mkdir(parents=True)
        (swapping / "sys/block" / below / "holders" / above).symlink_to(f"../../{above}")
    done = run_script("prerm", swapping, "remove")
    assert done.returncode == 1
    assert done.stderr.splitlines()[::2] == [
        f"nbdnfs: in use: /dev/nbd0, the device swap0, is under /dev/{holder}" for holder in ("dm-0", "dm-1")
    ]
    assert "dmsetup remove" in done.stderr
    assert run_script("prerm", swapping, "upgrade", "1.0").returncode == 0


def test_purge_leaves_nothing(tmp_path: Path) -> None:
    """Configurations, enabled devices and changes to the units go; a removal keeps them."""
    paths = [
        "etc/nbdnfs/swap0.toml",
        "etc/nbdnfs/swap0.toml.d/50.toml",
        "etc/systemd/system/multi-user.target.wants/nbdnfs@swap0.service",
        "etc/systemd/system/nbdnfs@.service.d/override.conf",
        "etc/systemd/system/nbdnfs@swap0.service.d/override.conf",
        "etc/systemd/system/other.service",
    ]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert run_script("postrm", tmp_path, "remove").returncode == 0
    assert all((tmp_path / path).exists() for path in paths)
    assert run_script("postrm", tmp_path, "purge").returncode == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == paths[-1:]


def test_units_of_an_earlier_installation_are_named(tmp_path: Path) -> None:
    """They take precedence over the package's."""
    assert run_script("postinst", tmp_path, "configure", "").stderr == ""
    (tmp_path / "usr/local/lib/nbdnfs").mkdir(parents=True)
    (tmp_path / "usr/local/lib/nbdnfs/installed.sha256").touch()
    assert "nbdnfs uninstall-units" in run_script("postinst", tmp_path, "configure", "").stderr


def test_lists_of_dependencies_agree() -> None:
    """debian/control asks for the pyroute2 that pyproject.toml asks for, and for its Python."""
    control = (ROOT / "debian/control").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        assert f" python3-{name} (>= {version})," in control
    assert f"X-Python3-Version: {project['requires-python'].replace('>=', '>= ')}\n" in control
