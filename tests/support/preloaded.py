# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs with a fault tool in C before all other libraries (LD_PRELOAD)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def compiled(source: Path, directory: Path) -> Path:
    """The shared library of one source, in `directory`."""
    library = directory / f"{source.stem}.so"
    subprocess.run(["cc", "-std=c11", "-Wall", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


def run_with(library: Path, *arguments: str | Path, **environment: str) -> None:
    """Python with these arguments; AssertionError with what it printed where it fails."""
    before = os.environ.get("LD_PRELOAD", "")  # a sanitizer's, which must be the first
    path = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, **environment, "LD_PRELOAD": f"{before} {library}".strip(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
