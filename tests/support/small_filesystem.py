# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a small ext4 on an image file, or a small tmpfs, for as long as a test needs one that fills up."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.nfs_server import environment, program

_DEADLINE_S = 30.0


@contextlib.contextmanager
def small_filesystem(workdir: Path, size_bytes: int) -> Iterator[Path]:
    """The folder `workdir/small`, on which an ext4 of `size_bytes` (2 MiB at least) is mounted; needs root.

    Whatever has files open there (an NFS server) must end before the context does.
    """
    image, folder = workdir / "small.img", workdir / "small"
    folder.mkdir(parents=True)
    with image.open("wb") as file:
        os.truncate(file.fileno(), size_bytes)
    # -m 0: no blocks reserved for root, so that the file system fills up for root too
    _run(program("mkfs.ext4", "e2fsprogs"), "-q", "-m", "0", str(image))
    _run(program("mount", "mount"), "-o", "loop", str(image), str(folder))
    try:
        yield folder
    finally:
        _run(program("umount", "mount"), str(folder))
        image.unlink()


@contextlib.contextmanager
def small_tmpfs(folder: Path, size_bytes: int) -> Iterator[Path]:
    """`folder`, on which a tmpfs of `size_bytes` is mounted; needs root."""
    _run(program("mount", "mount"), "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _run(program("umount", "mount"), "-l", str(folder))


def fill(folder: Path) -> Path:
    """Fill the file system up with one file, and return that."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=_DEADLINE_S, env=environment())
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
