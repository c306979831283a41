# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbers that memlock and the engine share. What the measures do is tested in a worker: tests/plugin."""

from __future__ import annotations

import re
from pathlib import Path

import nbdnfs
from nbdnfs import memlock


def test_libnfs_heap() -> None:
    """A worker that begins with libnfs and one that takes to it later have the same heap."""
    sources = [path.read_text() for path in (Path(nbdnfs.__file__).parent / "engine").rglob("*.[ch]")]
    (found,) = re.findall(r"^#define LIBNFS_HEAP_BYTES \((.*)\)$", "\n".join(sources), re.MULTILINE)
    assert eval(found.replace("/", "//")) == memlock.LIBNFS_HEAP_BYTES
