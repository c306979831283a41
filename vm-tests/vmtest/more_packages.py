# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image with more of Debian's packages, for a program that needs them: the usual one stays small."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from vmtest import cache, host
from vmtest.image import Image

_DISK_SIZE = "5G"


def with_packages(base: Image, name: str, packages: Sequence[str]) -> Image:
    """`base` with `packages`, built when it is not in the cache yet. `name` tells it from other such images.

    Needs root, and takes some two minutes.
    """
    key = cache.digest(base.key, *packages, Path(__file__).read_bytes())
    found = cache.cached(f"{name}-{base.name}", key, lambda folder: _build(base, packages, folder))
    return dataclasses.replace(base, folder=found)


def _build(base: Image, packages: Sequence[str], folder: Path) -> None:
    host.need_root("building a guest image")
    root = folder / "root"
    shutil.copy(base.kernel, folder)
    host.run(["cp", "-a", base.root, root], what="copying the image's root", timeout_s=900)
    script = 'apt-get -q update && exec apt-get -q install -y --no-install-recommends "$@"'
    # A service that it would start finds no systemd there, and is left alone.
    host.run(
        [
            *(host.find_program("unshare", "util-linux"), "--mount", host.find_program("chroot", "coreutils"), root),
            *("env", "DEBIAN_FRONTEND=noninteractive", "sh", "-c", script, "sh", *packages),
        ],
        what=f"installing {', '.join(packages)}",
        timeout_s=1800,
    )
    shutil.rmtree(root / "var/cache/apt")
    mke2fs = host.find_program("mke2fs", "e2fsprogs")
    host.run(
        [mke2fs, "-q", "-t", "ext4", "-L", "root", "-d", root, folder / "root.raw", _DISK_SIZE],
        what="making the root disk",
        timeout_s=900,
    )
