# SPDX-License-Identifier: LGPL-2.1-or-later
"""Things that are slow to make, kept outside the tree under the hash of what went into them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_KEEP_UNUSED_S = 7 * 24 * 3600.0


def cache_root() -> Path:
    """$NBDNFS_CACHE, or nbdnfs below $XDG_CACHE_HOME (~/.cache)."""
    if chosen := os.environ.get("NBDNFS_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "nbdnfs"


def digest(*parts: str | bytes) -> str:
    """Twelve hex digits that stand for `parts`, in their order."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:12]


def cached(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `name-key`, made by `build(folder)` when it is not there yet.

    Two processes that ask at once: one builds, the other waits. The folder appears under its name only when it
    is complete, so an interrupted build leaves nothing that could be taken for a result. Entries of the same
    name that were not used for a week are removed.
    """
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    entry = root / f"{name}-{key}"
    with _locked(root / f".{name}.lock"):
        if not entry.exists():
            building = root / f".{name}-{key}.building"
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            started = time.monotonic()
            log.info("building %s", entry.name)
            try:
                build(building)
                building.rename(entry)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
            log.info("built %s in %.0f s", entry.name, time.monotonic() - started)
        os.utime(entry)
        for other in root.glob(f"{name}-*"):
            if time.time() - other.stat().st_mtime > _KEEP_UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)
    return entry


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
