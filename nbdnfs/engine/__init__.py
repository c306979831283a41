# SPDX-License-Identifier: LGPL-2.1-or-later
"""A block device over a file on an NFS server: a C core over libnfs, without the kernel's NFS client.

    from nbdnfs.engine import Engine

    device = Engine("nfs://nas/export/swap/box.swap?version=3", "192.0.2.7")
    page = bytearray(4096)
    device.pread(page, 8192)        # fills the buffer from offset 8192
    device.pwrite(page, 0)          # on the NAS, stably, when it returns
    device.close()

`Engine(url, address)` mounts the directory of the URL on `address` (a numeric address: names are resolved once
and by the caller, `nbdnfs.url.NfsUrl.resolve`), opens the file, and keeps one connection with any number of
requests in flight. Version, ports, uid and gid come from the URL, as libnfs reads it.

- `size_bytes`: the device's size, a multiple of 4096.
- `pread(buffer, offset)`, `pwrite(buffer, offset)`: whole pages, 4096 bytes at multiples of 4096, inside the
  device; `buffer` is anything with the buffer protocol. A write is stable (RFC 1813: FILE_SYNC) when it returns.
- `flush()`: all that was written is on the NAS. `trim(length, offset)`: the bytes may be forgotten; the file
  keeps its blocks.
- `close()`: leaves the server. RuntimeError while requests run.

All of them may be called from any number of threads; none holds the GIL while it waits, and requests of
several threads are in flight together. A connection that breaks is made again for as long as that takes, and
what was under way is sent again: callers wait, they see no error. `soft_limit_ms` makes EIO of waits that are
longer (0: none does); a file that the server has lost or exchanged is waited for `gone_limit_ms`, and then EIO too.
What was written is kept in any case. docs/decisions/0010 has the whole table, 0011 what `silence_ms` is.

With `owner_path` and `owner_identity` the engine writes only while the record of that name, beside the file, has that
line; see nbdnfs.owner. Once it has another, all requests raise EIO, or, with `exit_status_when_lost`, the process ends.

`NfsFile` is the same for a file of any size, with byte offsets and with operations on names, for making and
inspecting backing files. Where the file has been gone for `gone_limit_ms`, its requests raise ESTALE.

Errors: opening raises `NfsError`, an OSError with `phase` ("connect": no answer; "mount": no such export, or
not for us; "open": the file). Requests raise OSError: EINVAL for what is not whole pages inside the device,
EIO where the file ends before the device, and what the server answered (ENOSPC, EDQUOT, EROFS, ESTALE, ...).
"""

from nbdnfs.engine._engine import (
    Engine,
    NfsError,
    NfsFile,
    disconnected_offset,
    forget_services,
    keep_thread_states,
    libnfs_version,
    region_counters,
    region_version,
)

__all__ = [
    "Engine",
    "NfsError",
    "NfsFile",
    "disconnected_offset",
    "forget_services",
    "keep_thread_states",
    "libnfs_version",
    "region_counters",
    "region_version",
]
