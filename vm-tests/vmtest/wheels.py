# SPDX-License-Identifier: LGPL-2.1-or-later
"""The project as a wheel for an image: built with the image's Python and libnfs, without the network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from vmtest import cache, host
from vmtest.chroot import Workspace, workspace
from vmtest.image import Image

_TREE = Path(__file__).parents[2]
_CROSS = _TREE / "tools/cross.sh"

# What setup.py and pyproject.toml build from.
_SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "nbdnfs", "plugin", "systemd")
_NOT_SOURCES = frozenset({".so", ".pyc", ".o"})

# The network is not to be asked for anything.
_PIP_OPTIONS = ("--no-index", "--no-deps", "--no-build-isolation", "--quiet")

# Some ten seconds; an emulated pip takes 25 of a processor, and minutes where others want it as well.
_TIMEOUT_S = 900


def wheel(image: Image, version: str) -> Path:
    """The project as it is in the tree now under another version, as a wheel for `image`: what an upgrade installs."""
    key = cache.digest(image.key, version, *source_parts())

    def make(folder: Path) -> None:
        with workspace(image) as work:
            shutil.copy(build(work, version), folder)

    (found,) = cache.cached(f"wheel-{image.name}", key, make).glob("*.whl")
    return found


def source_parts() -> list[str | bytes]:
    """What a wheel is made from, for cache.digest: the sources, and how it is built."""
    paths = [*_source_files(), Path(__file__), _CROSS]
    return [part for path in paths for part in (str(path.relative_to(_TREE)), path.read_bytes())]


def build(work: Workspace, version: str = "") -> Path:
    """Build the project as it is in the tree now, under `version` where there is one."""
    source = work.path / "source"
    for file in _source_files():
        target = source / file.relative_to(_TREE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    if version:
        (source / "nbdnfs/__init__.py").write_text(f'__version__ = "{version}"\n')
    what = f"building nbdnfs for Debian {work.image.suite}"
    pip = ("-m", "pip", "wheel", *_PIP_OPTIONS, "--wheel-dir")
    if prefix := work.image.architecture.compiler_prefix:
        cross = (_CROSS, prefix, work.image.root)
        host.run([*cross, sys.executable, *pip, work.path, source], what=what, timeout_s=_TIMEOUT_S)
    else:
        work.run(["python3", *pip, ".", "./source"], what=what, timeout_s=_TIMEOUT_S)
    (built,) = work.path.glob("*.whl")
    return built


def install(work: Workspace, built: Path, tree: str) -> None:
    """Install a wheel below the folder `tree` of the workspace, as a user of the suite would."""
    # Without --prefix: Debian's pip then installs to /usr/local.
    work.run(
        ["python3", "-m", "pip", "install", *_PIP_OPTIONS, "--root", f"{work.inside}/{tree}", f"./{built.name}"],
        what=f"installing nbdnfs for Debian {work.image.suite}",
        timeout_s=_TIMEOUT_S,
    )


def _source_files() -> list[Path]:
    found: list[Path] = []
    for name in _SOURCES:
        path = _TREE / name
        found += sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.is_file() and file.suffix not in _NOT_SOURCES]
