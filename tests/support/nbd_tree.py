# SPDX-License-Identifier: LGPL-2.1-or-later
"""A golden tree of /sys, /proc and /dev with nbd devices, and a netlink socket that changes it as the kernel would."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nbdnfs.errors import NbdnfsError

SIZE_BYTES = 64 << 20


class FakeNetlink:
    """Stands for NbdNetlink: CONNECT and DISCONNECT change the tree as drivers/block/nbd.c changes sysfs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.connects: list[dict[str, Any]] = []
        self.disconnects: list[int] = []
        self.error: NbdnfsError | None = None
        self.forgets_size = False
        self.keeps_device = False

    def connect(self, sockets: list[int], **settings: Any) -> int:
        if self.error is not None:
            raise self.error
        assert all(os.fstat(descriptor) for descriptor in sockets)
        self.connects.append(settings)
        index = settings["index"] if settings["index"] is not None else 2
        if not self.forgets_size:
            add_device(
                self.root, index, size_bytes=settings["size_bytes"], pid=os.getpid(), backend=settings["backend"]
            )
        return index

    def disconnect(self, index: int) -> None:
        if self.error is not None:
            raise self.error
        self.disconnects.append(index)
        if not self.keeps_device:
            (self.root / f"sys/block/nbd{index}/pid").unlink(missing_ok=True)
            (self.root / f"sys/block/nbd{index}/size").write_text("0\n")


def add_device(root: Path, index: int, *, size_bytes: int = 0, pid: int | None = None, backend: str = "") -> Path:
    """A device as sysfs shows it, attached when it has a pid, with its node (a plain file) in dev."""
    folder = root / f"sys/block/nbd{index}"
    (folder / "queue").mkdir(parents=True, exist_ok=True)
    (folder / "size").write_text(f"{size_bytes // 512}\n")
    (folder / "dev").write_text(f"43:{index * 32}\n")
    (folder / "ro").write_text("0\n")
    (folder / "queue/io_timeout").write_text("30000\n")
    (folder / "queue/nr_requests").write_text("128\n")
    (folder / "queue/scheduler").write_text("[mq-deadline] none\n")
    (folder / "queue/read_ahead_kb").write_text("128\n")
    (folder / "queue/max_sectors_kb").write_text("1280\n")
    if pid is not None:
        (folder / "pid").write_text(f"{pid}\n")
        (folder / "backend").write_text(f"{backend}\n")
    (root / "dev").mkdir(exist_ok=True)
    (root / f"dev/nbd{index}").touch()
    return folder


def add_partition(root: Path, index: int) -> Path:
    """nbdNp1."""
    folder = root / f"sys/block/nbd{index}/nbd{index}p1"
    folder.mkdir()
    (folder / "dev").write_text(f"43:{index * 32 + 1}\n")
    return folder


def make_machine(root: Path) -> Path:
    """A machine with the driver loaded, nbd0 idle, and nbd1 attached by process 4711, which has ended."""
    (root / "sys/module/nbd").mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    add_device(root, 0)
    add_device(root, 1, size_bytes=SIZE_BYTES, pid=4711, backend="nbdnfs:/run/x.sock")
    return root


def opened_by(root: Path, pid: int, name: str, path: str) -> Path:
    """Have a process hold `path` open; its descriptor under /proc."""
    folder = root / f"proc/{pid}/fd"
    folder.mkdir(parents=True)
    (root / f"proc/{pid}/comm").write_text(f"{name}\n")
    (folder / "5").symlink_to(path)
    return folder / "5"
