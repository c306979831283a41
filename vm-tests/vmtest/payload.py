# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest is given besides a stock Debian: the harness's programs and, installed in /usr/local, the project.

It is a small disk whose files the initramfs copies over the root at the first boot of an overlay, and the same as a
folder, `tree` beside it, for guests without a disk (diskless.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vmtest import cache, host
from vmtest.chroot import INSIDE, Workspace, workspace
from vmtest.image import Image

_TREE = Path(__file__).parents[2]

# What setup.py and pyproject.toml build from.
_SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "nbdnfs", "plugin", "systemd")
_NOT_SOURCES = frozenset({".so", ".pyc", ".o"})

# The network is not to be asked for anything.
_PIP_OPTIONS = ("--no-index", "--no-deps", "--no-build-isolation", "--quiet")


def payload(image: Image, *, project: bool) -> Path:
    """The payload disk for `image`, with the project as it is in the tree now or with the tools alone."""
    tools = [path for path in sorted(INSIDE.iterdir()) if path.name != "init.c"]
    sources = _source_files() if project else []
    key = cache.digest(
        image.key,
        Path(__file__).read_bytes(),
        *(part for path in [*tools, *sources] for part in (str(path.relative_to(_TREE)), path.read_bytes())),
    )
    name = f"payload-{image.name}" if project else f"tools-{image.name}"
    return cache.cached(name, key, lambda folder: _build(image, project, folder)) / "payload.raw"


def wheel(image: Image, version: str) -> Path:
    """The project as it is in the tree now under another version, as a wheel for `image`: what an upgrade installs."""
    sources = _source_files()
    parts = (part for path in sources for part in (str(path.relative_to(_TREE)), path.read_bytes()))
    key = cache.digest(image.key, Path(__file__).read_bytes(), version, *parts)

    def build(folder: Path) -> None:
        with workspace(image) as work:
            _copy_sources(work)
            (work.path / "source/nbdnfs/__init__.py").write_text(f'__version__ = "{version}"\n')
            work.run(
                ["python3", "-m", "pip", "wheel", *_PIP_OPTIONS, "--wheel-dir", ".", "./source"],
                what=f"building nbdnfs {version} for Debian {image.suite}",
                timeout_s=600,
            )
            (built,) = work.path.glob("*.whl")
            shutil.copy(built, folder)

    (found,) = cache.cached(f"wheel-{image.name}", key, build).glob("*.whl")
    return found


def _source_files() -> list[Path]:
    found: list[Path] = []
    for name in _SOURCES:
        path = _TREE / name
        found += sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.is_file() and file.suffix not in _NOT_SOURCES]


def _build(image: Image, project: bool, folder: Path) -> None:
    with workspace(image) as work:
        tree = work.path / "payload"
        _install_tools(work, tree)
        if project:
            _install_project(work, tree)
        host.run(
            [
                *(host.find_program("mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-L", "payload"),
                *("-O", "^has_journal", "-d", tree, folder / "payload.raw", "32M"),
            ],
            what="making the payload disk",
            timeout_s=120,
        )
        shutil.copytree(tree, folder / "tree", symlinks=True)


# For a root on NFS: networkd takes the card over from the initramfs, and leaves it at its end.
_KEEP_NETWORK = "[Network]\nKeepConfiguration=yes\n"


def _install_tools(work: Workspace, tree: Path) -> None:
    for folder in ("usr/local/lib/guest", "usr/local/bin", "etc/systemd/system/sysinit.target.wants"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(work.compile("agent.c"), tree / "usr/local/lib/guest/agent")
    shutil.copy(work.compile("hog.c"), tree / "usr/local/bin/hog")
    unit = tree / "etc/systemd/system/guest-agent.service"
    shutil.copy(INSIDE / unit.name, unit)
    (unit.parent / "sysinit.target.wants" / unit.name).symlink_to(f"/etc/systemd/system/{unit.name}")
    network = tree / "etc/systemd/network/10-guest.network.d"
    network.mkdir(parents=True)
    (network / "keep.conf").write_text(_KEEP_NETWORK)


def _copy_sources(work: Workspace) -> None:
    for source in _source_files():
        target = work.path / "source" / source.relative_to(_TREE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _install_project(work: Workspace, tree: Path) -> None:
    """Build and install as a user of the suite would, without the network: Debian's Python, pip and libnfs."""
    _copy_sources(work)
    # Without --prefix: Debian's pip then installs to /usr/local.
    work.run(
        ["python3", "-m", "pip", "install", *_PIP_OPTIONS, "--root", f"{work.inside}/payload", "./source"],
        what=f"building nbdnfs for Debian {work.image.suite}",
        timeout_s=600,
    )
