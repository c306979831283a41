# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds in the image's root folder, with the guest's own compiler and libraries."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmtest import host
from vmtest.image import Image

INSIDE = Path(__file__).parent.parent / "inside"
"""The programs that run in a guest."""

COMPILER_FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-static")


@dataclass(frozen=True)
class Workspace:
    """A folder of one's own in a root folder: `path` is its name on the host, `inside` its name in the chroot."""

    image: Image
    path: Path

    @property
    def inside(self) -> str:
        return f"/{self.path.relative_to(self.image.root)}"

    def run(self, argv: Sequence[str], *, what: str, timeout_s: float = 300) -> str:
        """Run a command of the image in this folder, with an environment that owes nothing to the host's."""
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": self.inside,
            "LANG": "C.UTF-8",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        chroot = host.find_program("chroot", "coreutils")
        script = 'cd "$1" && shift && exec "$@"'
        return host.run(
            [chroot, self.image.root, "/bin/sh", "-c", script, "sh", self.inside, *argv],
            what=what,
            timeout_s=timeout_s,
            env=environment,
        )

    def compile(self, source: str) -> Path:
        """Compile inside/`source` into a static program; returns it."""
        shutil.copy(INSIDE / source, self.path)
        program = Path(source).stem
        self.run(["gcc", *COMPILER_FLAGS, "-o", program, source], what=f"compiling {source}")
        return self.path / program


@contextlib.contextmanager
def workspace(image: Image) -> Iterator[Workspace]:
    """A fresh workspace, removed at the end: the image stays as it was."""
    host.need_root("building for a guest")
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=image.root / "tmp"))
    try:
        yield Workspace(image, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
