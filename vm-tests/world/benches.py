# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that are ready for tests: with our device as it is, with a file system on it, or with it as swap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.nfs_server import Ganesha
from vmtest import host, klog, swap
from vmtest.guest import Guest, seen_from_guest
from vmtest.image import Image
from vmtest.payload import payload

from world.suite import Bench, limit

WHERE = "/mnt/test"
# A task whose page or block is on a NAS waits for as long as that takes.
_ARGUMENTS = ("sysctl.kernel.hung_task_timeout_secs=300",)
_CHECKED = {"ext4": "e2fsck -f -n", "xfs": "xfs_repair -n"}


@dataclass
class Place:
    """Where guests are made.

    extras  folders with installed suites; they are the guest's /opt/NAME
    """

    image: Image
    server: Ganesha
    workdir: Path
    extras: dict[str, Path] = field(default_factory=dict)

    @contextlib.contextmanager
    def boot(self, *, memory_mib: int, extras: Sequence[str] = ()) -> Iterator[Guest]:
        """A guest with the project. Each test looks at the kernel's log, so the guest's end does not."""
        disks = [self._disk(name) for name in extras]
        with Guest(
            self.image,
            payload(self.image, project=True),
            self.workdir,
            memory_mib=memory_mib,
            arguments=_ARGUMENTS,
            disks=disks,
            allow=klog.KINDS,
        ) as guest:
            guest.settle()
            for letter, name in zip("cdefgh", extras, strict=False):
                guest.run(f"mkdir -p /opt/{name} && mount /dev/vd{letter} /opt/{name}")
            yield guest
            guest.crash()

    def _disk(self, name: str) -> Path:
        """A folder as a disk; each guest writes to its own copy."""
        disk = self.workdir / f"{name}.raw"
        disk.unlink(missing_ok=True)
        mke2fs = host.find_program("mke2fs", "e2fsprogs")
        host.run(
            [mke2fs, "-q", "-t", "ext4", "-d", self.extras[name], disk, "3G"],
            what=f"making a disk of {self.extras[name]}",
            timeout_s=600,
        )
        return disk

    def create(self, name: str, size_mib: int) -> str:
        """A fresh backing file; its URL, as seen from a guest."""
        (self.server.export_path / name).unlink(missing_ok=True)
        host.nbdnfs_create(self.server.url(name), size_mib, timeout_s=600)
        return seen_from_guest(self.server.url(name))

    @contextlib.contextmanager
    def plain(
        self,
        sizes: Sequence[int],
        *,
        memory_mib: int,
        extras: Sequence[str] = (),
        encrypt: bool = True,
        fresh: bool = True,
    ) -> Iterator[Bench]:
        """A device of each size, in MiB. `fresh` or not: those of the last guest are on the NAS, not encrypted."""
        with self.boot(memory_mib=memory_mib, extras=extras) as guest, contextlib.ExitStack() as stack:
            devices = []
            for number, size in enumerate(sizes):
                name = f"plain{number}"
                url = self.create(name, size) if fresh else seen_from_guest(self.server.url(name))
                worker = stack.enter_context(swap.serving(guest, url, name, encrypt=encrypt))
                devices.append(stack.enter_context(swap.attached(guest, worker)))
            yield Bench(guest, tuple(devices))
            guest.run("sync", 600)

    @contextlib.contextmanager
    def file_system(
        self, kind: str, size_mib: int, *, memory_mib: int, limit_mib: int, extras: Sequence[str] = ()
    ) -> Iterator[Bench]:
        """A file system over our device, at WHERE, and a memory cgroup for what uses it. TRIM is sent too."""
        with self.plain([size_mib], memory_mib=memory_mib, extras=extras) as bench:
            (device,) = bench.devices
            bench.guest.run(f"modprobe {kind}; mkfs.{kind} -q {device}", 600)
            bench.guest.run(f"mkdir -p {WHERE} && mount -o discard {device} {WHERE}", 120)
            limit(bench.guest, limit_mib)
            yield bench
            bench.guest.run(f"if mountpoint -q {WHERE}; then umount {WHERE}; fi", 300)

    @contextlib.contextmanager
    def swap(
        self,
        size_mib: int,
        *,
        memory_mib: int,
        limit_mib: int | None = None,
        second_mib: int = 0,
        extras: Sequence[str] = (),
    ) -> Iterator[Bench]:
        """Our device as the only swap, and a second plain one where a size is given. `limit_mib`: of a memory cgroup
        that is to swap."""
        with self.boot(memory_mib=memory_mib, extras=extras) as guest, contextlib.ExitStack() as stack:
            worker = stack.enter_context(swap.serving(guest, self.create("swap", size_mib)))
            devices = [stack.enter_context(swap.swapping(guest, worker))]
            if second_mib:
                worker = stack.enter_context(swap.serving(guest, self.create("second", second_mib), "second"))
                devices.append(stack.enter_context(swap.attached(guest, worker)))
            if limit_mib is not None:
                limit(guest, limit_mib)
            yield Bench(guest, tuple(devices))


def checked(kind: str, device: str) -> str:
    """A command that takes the file system down, and checks that it is whole."""
    return f"cd / && umount {WHERE} && {_CHECKED[kind]} {device}"
