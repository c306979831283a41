# SPDX-License-Identifier: LGPL-2.1-or-later
"""nbdkit plugin: a block device over a file on an NFS server. Each callback hands over to nbdnfs.worker or the engine.

    nbdkit python nbdnfs_plugin.py url=nfs://nas/export/swap/box.swap [lock=required]

nbdkit runs this module as __main__, where tests cannot reach it: all logic is in the package nbdnfs, which must be
importable (`nbdnfs serve` and the keeper set PYTHONPATH; by hand, set it yourself).
"""

from __future__ import annotations

import os
import sys

import nbdkit

from nbdnfs.errors import NbdnfsError
from nbdnfs.sizes import SLOT_BYTES

try:
    from nbdnfs.worker import life, protocol, settings
except NbdnfsError as error:  # without libnfs
    print(*error.lines(), sep="\n", file=sys.stderr, flush=True)
    os._exit(error.exit_code)

# For type checkers only: the worker does not import typing, whose memory it would have to lock.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from nbdnfs.engine import Engine
    from nbdnfs.worker.reference_engine import Engine as ReferenceEngine

    T = TypeVar("T")

API_VERSION = 2

# The kernel's requests are far smaller; nbdkit itself allows 64 MiB (docs/nbdkit-protocol.pod).
MAX_REQUEST_BYTES = 32 * 1024 * 1024

_values: dict[str, str] = {}
_worker: life.Worker = None  # type: ignore[assignment]  # until config_complete
_engine: Engine | ReferenceEngine = None  # type: ignore[assignment]  # until after_fork


def _or_exit(step: Callable[[], T]) -> T:
    """Run `step`; a user's error becomes its lines on stderr and its exit status, without a traceback."""
    try:
        return step()
    except NbdnfsError as error:
        print(*error.lines(), sep="\n", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key: str, value: str) -> None:
    _values[key] = value


def config_complete() -> None:
    global _worker
    _worker = _or_exit(lambda: life.Worker(settings.parse(_values)))
    _or_exit(_worker.prepare)


def after_fork() -> None:
    global _engine
    _or_exit(_worker.lock_memory)
    _or_exit(_worker.wait_until_activated)
    _engine = _or_exit(_worker.open_engine)
    _or_exit(_worker.settle_memory)
    _worker.serve(_engine)


def cleanup() -> None:
    if _engine is not None:
        _engine.close()


def open(readonly: bool) -> int:
    _worker.note_client(protocol.CLIENT_CAME)
    return 1


def close(h: int) -> None:
    _worker.note_client(protocol.CLIENT_WENT)


def get_size(h: int) -> int:
    return _engine.size_bytes


def block_size(h: int) -> tuple[int, int, int]:
    return (SLOT_BYTES, SLOT_BYTES, MAX_REQUEST_BYTES)


def is_rotational(h: int) -> bool:
    return False


def can_write(h: int) -> bool:
    return True


def can_flush(h: int) -> bool:
    return True


def can_fua(h: int) -> int:
    return nbdkit.FUA_NATIVE


def can_trim(h: int) -> bool:
    return True


def can_multi_conn(h: int) -> bool:
    return True


def pread(h: int, buf: bytearray, offset: int, flags: int) -> None:
    try:
        _engine.pread(buf, offset)
    except OSError as error:
        nbdkit.set_error(error.errno)
        raise


def pwrite(h: int, buf: bytearray, offset: int, flags: int) -> None:
    try:
        _engine.pwrite(buf, offset, flags & nbdkit.FLAG_FUA != 0)
    except OSError as error:
        nbdkit.set_error(error.errno)
        raise


def flush(h: int, flags: int) -> None:
    _engine.flush()


def trim(h: int, count: int, offset: int, flags: int) -> None:
    try:
        _engine.trim(count, offset)
    except OSError as error:
        nbdkit.set_error(error.errno)
        raise
