# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reference engine: PyPI's libnfs package, one request after the other.

The baseline in benchmarks and the second opinion in tests, not for use: it holds the GIL while it waits, cannot
reconnect, and calls the package's SWIG layer directly, because `libnfs.NFSFH.write` does not take bytes
(libnfs-python 1.0.post4) and because only O_SYNC writes survive a crash of the server. Python 3.11 only: the
package imports `imp`, which 3.12 dropped.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

from nbdnfs import nfs_url
from nbdnfs.errors import ConfigError
from nbdnfs.sizes import SLOT_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIECE_BYTES = 64 * 1024


def _import_libnfs() -> Any:
    if sys.version_info >= (3, 12):
        raise ConfigError(
            f"the reference engine needs Python 3.11, this is {sys.version_info[0]}.{sys.version_info[1]}",
            "use the standard engine: engine=c",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it imports `imp`
            from libnfs import libnfs
    except ImportError:
        raise ConfigError(
            "the reference engine needs PyPI's package libnfs", "install it: pip install 'nbdnfs[reference]'"
        ) from None
    return libnfs


class Engine:
    """The interface of `nbdnfs.engine.Engine`. Serial: `_lock` guards the context and every call on it."""

    def __init__(self, url: str, address: str) -> None:
        self._lib = lib = _import_libnfs()
        self._lock = threading.Lock()
        self._nfs = lib.nfs_init_context()
        parsed = nfs_url.parse(url)
        lib.nfs_parse_url_full(self._nfs, f"nfs://server/directory/file?{url.partition('?')[2]}")  # only the options
        self._check(lib.nfs_mount(self._nfs, address, parsed.directory))
        opened = lib.new_NFSFileHandle()
        self._check(lib.nfs_open(self._nfs, f"/{parsed.name}", os.O_RDWR | os.O_SYNC, opened))
        self._file = lib.NFSFileHandle_value(opened)
        stat = lib.nfs_stat_64()
        self._check(lib.nfs_fstat64(self._nfs, self._file, stat))
        self.size_bytes: int = stat.nfs_size

    def _check(self, status: int) -> int:
        if status < 0:
            raise OSError(-status, self._lib.nfs_get_error(self._nfs) or os.strerror(-status))
        return status

    def _check_range(self, offset: int, length: int) -> None:
        inside = 0 <= offset <= self.size_bytes - length and length > 0
        if offset % SLOT_BYTES or length % SLOT_BYTES or not inside:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def pread(self, buffer: Buffer, offset: int) -> None:
        target = memoryview(buffer).cast("B")
        self._check_range(offset, len(target))
        done = 0
        while done < len(target):
            piece = bytearray(min(_PIECE_BYTES, len(target) - done))
            with self._lock:
                moved = self._check(self._lib.nfs_pread(self._nfs, self._file, offset + done, len(piece), piece))
            if moved == 0:
                raise OSError(errno.EIO, "the file ends before the device")
            target[done : done + moved] = piece[:moved]
            done += moved

    def pwrite(self, buffer: Buffer, offset: int, fua: bool = False) -> None:
        """On the NAS, stably, when it returns, with `fua` or without."""
        source = memoryview(buffer).cast("B")
        self._check_range(offset, len(source))
        done = 0
        while done < len(source):
            piece = bytearray(source[done : done + _PIECE_BYTES])
            with self._lock:
                done += self._check(self._lib.nfs_pwrite(self._nfs, self._file, offset + done, len(piece), piece))

    def flush(self) -> None:
        """Nothing to do: the file was opened with O_SYNC."""

    def trim(self, length: int, offset: int) -> None:
        self._check_range(offset, length)

    def close(self) -> None:
        with self._lock:
            self._lib.nfs_close(self._nfs, self._file)
            self._lib.nfs_destroy_context(self._nfs)
