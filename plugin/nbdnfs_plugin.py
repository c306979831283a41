# SPDX-License-Identifier: LGPL-2.1-or-later
"""nbdkit plugin: a block device over a file on an NFS server. Each callback hands over to nbdnfs.worker or the engine.

    nbdkit python nbdnfs_plugin.py url=nfs://nas/export/swap/box.swap [lock=required]

nbdkit runs this module as __main__, where tests cannot reach it: all logic is in the package nbdnfs, which must be
importable (`nbdnfs serve` and the keeper set PYTHONPATH; by hand, set it yourself).
"""

import os
import sys

import nbdkit

from nbdnfs.errors import NbdnfsError
from nbdnfs.worker import life, settings

API_VERSION = 2

# The kernel's requests are far smaller; nbdkit itself allows 64 MiB (docs/nbdkit-protocol.pod).
MAX_REQUEST_BYTES = 32 * 1024 * 1024

_values = {}
_worker = None
_engine = None


def _or_exit(step):
    """Run `step`; a user's error becomes its lines on stderr and its exit status, without a traceback."""
    try:
        return step()
    except NbdnfsError as error:
        print(*error.lines(), sep="\n", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key, value):
    _values[key] = value


def config_complete():
    global _worker
    _worker = _or_exit(lambda: life.Worker(settings.parse(_values)))
    _or_exit(_worker.prepare)


def after_fork():
    global _engine
    _or_exit(_worker.lock_memory)
    _or_exit(_worker.wait_until_activated)
    _engine = _or_exit(_worker.open_engine)
    _or_exit(_worker.settle_memory)


def cleanup():
    if _engine is not None:
        _engine.close()


def open(readonly):
    return 1


def get_size(h):
    return _engine.size_bytes


def block_size(h):
    return (4096, 4096, MAX_REQUEST_BYTES)


def is_rotational(h):
    return False


def can_write(h):
    return True


def can_flush(h):
    return True


def can_fua(h):
    return nbdkit.FUA_NATIVE


def can_trim(h):
    return True


def can_multi_conn(h):
    return True


def pread(h, buf, offset, flags):
    try:
        _engine.pread(buf, offset)
    except OSError as error:
        nbdkit.set_error(error.errno)
        raise


def pwrite(h, buf, offset, flags):
    try:
        _engine.pwrite(buf, offset, flags & nbdkit.FLAG_FUA)
    except OSError as error:
        nbdkit.set_error(error.errno)
        raise


def flush(h, flags):
    _engine.flush()


def trim(h, count, offset, flags):
    try:
        _engine.trim(count, offset)
    except OSError as error:
        nbdkit.set_error(error.errno)
        raise
