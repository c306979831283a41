# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prints what calls of the cache and the cipher cost: with `-s`. No figure is checked."""

from __future__ import annotations

import subprocess
from pathlib import Path

from core_library import BASE, REFERENCE, SOURCES


def test_cost(tmp_path: Path) -> None:
    """4,096 slots for a device of 1 GiB, 262,144 for one of 64 GiB. The program ends, and finds what it looks for."""
    program = tmp_path / "cache_cost"
    region = sorted(set((SOURCES / "region").glob("*.c")) - {SOURCES / "region/region.c"})
    sources = [REFERENCE, REFERENCE.with_name("cache_cost.c"), *region, *BASE]
    options = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    options += [f"-I{SOURCES}", "-o", str(program)]
    subprocess.run(["gcc", *options, *map(str, sources), "-lsodium", "-lnettle"], check=True)
    result = subprocess.run([program, "4096:1", "262144:64"], check=True, capture_output=True, text=True)
    assert result.stdout.count("slots") == 2
    print(result.stdout)
