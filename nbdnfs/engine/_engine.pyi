# SPDX-License-Identifier: LGPL-2.1-or-later
from typing import Literal, TypedDict

from typing_extensions import Buffer

libnfs_version: str

def keep_thread_states() -> None: ...
def forget_services() -> None: ...
def warm_cipher(region_version: int, /) -> None: ...

class NfsError(OSError):
    phase: str

class FileStat(TypedDict):
    size: int
    mode: int
    uid: int
    gid: int
    ino: int
    nlink: int
    used: int
    mtime_us: int
    is_regular: bool

class Space(TypedDict):
    total: int
    available: int

class Engine:
    def __init__(
        self,
        url: str,
        address: str,
        *,
        region_fd: int = -1,
        region_pages: int = 4096,
        connections: int = 1,
        stable_writes: bool = False,
        read_ahead_pages: int = 64,
        connect_timeout_s: int = 15,
        soft_limit_ms: int = 0,
        gone_limit_ms: int = 300_000,
        silence_ms: int = 15_000,
        owner_path: str | None = None,
        owner_identity: str | None = None,
        owner_refresh_ms: int = 10000,
        exit_status_when_stolen: int = 0,
        transport: Literal["wire", "libnfs"] = "wire",
        encrypt: bool = False,
        clear_bytes: int = 4096,
        cipher: Literal["", "aes", "xchacha20"] = "",
    ) -> None: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def is_encrypted(self) -> bool: ...
    def pread(self, buffer: Buffer, offset: int, /) -> None: ...
    def pwrite(self, buffer: Buffer, offset: int, fua: bool = False, /) -> None: ...
    def serve(self, fd: int, tick_ms: int = 2000, /) -> None: ...
    def counters(self) -> dict[str, int | list[int]]: ...
    def flush(self) -> None: ...
    def trim(self, length: int, offset: int, /) -> None: ...
    def close(self) -> None: ...

class NfsFile:
    def __init__(
        self,
        url: str,
        address: str,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o600,
        read_only: bool = False,
        connect_timeout_s: int = 15,
        gone_limit_ms: int = 300_000,
        silence_ms: int = 15_000,
        names_only: bool = False,
    ) -> None: ...
    @property
    def size_bytes(self) -> int: ...
    def pread(self, buffer: Buffer, offset: int, /) -> int: ...
    def pwrite(self, buffer: Buffer, offset: int, /) -> int: ...
    def stat(self) -> FileStat: ...
    def lookup(self, path: str, follow: bool = True, /) -> FileStat: ...
    def link(self, old_path: str, new_path: str, /) -> None: ...
    def rename(self, old_path: str, new_path: str, /) -> None: ...
    def unlink(self, path: str, /) -> None: ...
    def chmod(self, path: str, mode: int, /) -> None: ...
    def space(self) -> Space: ...
    def names(self) -> list[str]: ...
    def read_beside(self, path: str, most: int, /) -> bytes: ...
    def close(self) -> None: ...
