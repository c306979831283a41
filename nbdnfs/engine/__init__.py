# SPDX-License-Identifier: LGPL-2.1-or-later
"""A block device over a file on an NFS server, without the kernel's NFS client: C, with a map in its README.md.

    from nbdnfs.engine import Engine

    device = Engine("nfs://nas/export/swap/box.swap?version=3", "192.0.2.7")
    page = bytearray(4096)
    device.pread(page, 8192)        # fills the buffer from offset 8192
    device.pwrite(page, 0)          # in the region when it returns
    device.flush()                  # on the NAS, stably, when it returns
    device.close()

`Engine(url, address)` mounts the directory of the URL on `address`, opens the file, and keeps `connections`
connections with any number of requests in flight. `address` is numeric: the caller resolves names, once. Version,
ports, uid and gid come from the URL; bytes of its path may be escaped (%20).

- `size_bytes`: the device's size, the file's size when it was opened; a multiple of 4096.
- `pread(buffer, offset)`: fills the buffer, with what the last pwrite() that returned put there. Pages are compared
  with the checksum of what was written.
- `pwrite(buffer, offset, fua=False)`: acknowledged when the pages lie in the region, a memfd that outlives this process
  if the caller made it (`region_fd`) and dies with it otherwise. The engine sends them to the NAS within ten seconds,
  except pages that repeat one 32-bit word: those go with the next flush(). With `fua`, returns when these pages are
  on the NAS, stably.
- `flush()`: returns when everything that was written before it is on the NAS, stably: written with FILE_SYNC, or
  covered by a COMMIT under the same write verifier (RFC 1813, 3.3.7 and 3.3.21).
- `trim(length, offset)`: the bytes may be forgotten. The file keeps its blocks.
- `counters()`: the region's counters and histograms, by name (engine/region/region.h).
- `close()`: disconnects. With a region of its own, the engine first waits until the NAS has everything. RuntimeError
  while requests run.

pread(), pwrite() and trim() take whole pages: 4096 bytes at multiples of 4096, inside the device. `buffer` is anything
with the buffer protocol. All methods but close() may be called from any number of threads; none holds the GIL while it
waits. `transport` says how pages travel over NFSv3: "wire" (without libnfs) or "libnfs". NFSv4 always uses libnfs.

A broken connection is replaced, for as long as that takes, and what was in flight is sent again: callers wait and see
no error. Waiting ends in EIO

- after `soft_limit_ms`, if that is not 0;
- once the server has answered for `gone_limit_ms` that the file was deleted or replaced, if that is not 0;
- at once when another machine owns the file, see below.

What was acknowledged stays in the region all the same, and is written when that is possible again. docs/decisions/0010
has the whole table, 0011 what `silence_ms` is.

With `owner_path` and `owner_identity` the engine writes only while the record of that name, beside the file, contains
that text. Once it does not, the file is stolen: all requests but trim() raise EIO, or, with `exit_status_when_stolen`,
the process ends with that status.

With `encrypt`, pages are encrypted on the server, under keys that lie in the region alone: from `clear_bytes` on (the
kernel's first page has the swap header, and no secret). A page that another engine with the same region has not written
reads as zeros, and one that was changed, exchanged with another or replayed on the server is EIO, as a wrong checksum
is. `cipher` is "aes" or "xchacha20", and without it what is faster on this processor. A region that was made before
keeps what it was made with: `is_encrypted`. docs/decisions/0028 has the constructions.

`NfsFile` is a file of any size, with byte offsets and operations on names, for making and inspecting backing files. Its
pwrite() returns when the data is on the NAS, stably. Once the file has been gone for `gone_limit_ms`, its transfers
raise ESTALE. With `names_only` no file is opened: there are the names of the URL's directory, whatever file the URL
names.

Errors. Opening raises `NfsError`, an OSError with `phase`: "connect" (no answer), "mount" (the server does not export
that, or not to this client), "open" (the file) or "name" (a name operation). Requests raise OSError: EINVAL for what is
not whole pages inside the device; EIO where the file is shorter than the device, where a page does not match its
checksum, and for the waits above; and what the server answered to a READ (EACCES, ...). A write that the server refuses
(ENOSPC, EDQUOT, EROFS, ...) is not an error to the caller: the page stays in the region, the counter `write_back_error`
has the errno, and the engine tries again.

Importing this raises `nbdnfs.errors.UnavailableError` where libnfs, libsodium or nettle is missing.
"""

from nbdnfs.errors import UnavailableError

try:
    from nbdnfs.engine._engine import (
        Engine,
        NfsError,
        NfsFile,
        forget_services,
        keep_thread_states,
        libnfs_version,
        warm_cipher,
    )
except ImportError as _error:  # a library was removed, or this installation is of another Python
    raise UnavailableError(
        f"the engine cannot be loaded: {_error}",
        "install the shared libraries of libnfs, libsodium and nettle again (Debian: apt install libnfs-dev"
        " libsodium-dev nettle-dev), or nbdnfs itself",
    ) from None

__all__ = [
    "Engine",
    "NfsError",
    "NfsFile",
    "forget_services",
    "keep_thread_states",
    "libnfs_version",
    "warm_cipher",
]
