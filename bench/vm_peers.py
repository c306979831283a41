# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make bench-vm` compares: what a machine can swap to, set up and taken down in a guest.

zram        compressed memory, without a network: the floor
kernel-nbd  the kernel's nbd over TCP to `nbdkit file` on the server: what the 2012 patches compared with
kernel-nfs  the kernel's swap file on an NFSv3 mount
nbdnfs      ours, unencrypted: no peer encrypts
nbdnfs-encrypted  ours, as a device is by default
nbdnfs-loop, nbdnfs-threads  ours, served by the engine's loop (the default with one processor), by nbdkit's threads
kernel-nbd-4, kernel-nfs-4  the kernel's own two, over four connections
nbdnfs-zswap, kernel-nfs-zswap  behind zswap, which keeps compressed pages in memory; needs Debian's generic kernel
nbdnfs-folios, kernel-nbd-folios  with anonymous memory in folios of 64 KiB, which Linux 6.10 swaps out in one request

All but the first two use files on the same NFS server, and `nbdkit file` serves one beside them.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from vmtest import host, kept, swap
from vmtest.counters import Counters, read
from vmtest.guest import HOST_ADDRESS, Guest
from vmtest.outcome import GuestFailedError, HarnessError

OURS, ENCRYPTED = "nbdnfs", "nbdnfs-encrypted"
LOOP, THREADS = "nbdnfs-loop", "nbdnfs-threads"
KERNEL_NFS, KERNEL_NBD, FLOOR = "kernel-nfs", "kernel-nbd", "zram"
KERNEL_NFS_4, KERNEL_NBD_4 = "kernel-nfs-4", "kernel-nbd-4"
OURS_ZSWAP, KERNEL_NFS_ZSWAP = "nbdnfs-zswap", "kernel-nfs-zswap"
OURS_FOLIOS, KERNEL_NBD_FOLIOS = "nbdnfs-folios", "kernel-nbd-folios"
# Without its shrinker, which Linux 6.8 has, something in a cgroup is killed once the compressed pages fill it.
_ZSWAP: Mapping[str, str | int] = {
    "zpool": "zsmalloc",
    "compressor": "lz4",
    "max_pool_percent": 50,
    "shrinker_enabled": "Y",
    "enabled": "Y",
}
_ZSWAP_PARAMETERS = "/sys/module/zswap/parameters"
_FOLIOS_ENABLED = "/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled"

_ATTACH_TCP = Path(__file__).parent / "attach_tcp.py"
_MOUNT = "/mnt/bench"
_NAME = "bench"
_PRIORITY = 32767
_NBDKIT_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Swapping:
    """A peer that is swapped to: how to read its counters, which peers that are not ours do not have."""

    counters: Callable[[], Counters] = field(default=dict)


@dataclass(frozen=True)
class Files:
    """The server's side: URLs of two files as seen from a guest, and the file that `nbdkit file` serves.

    nfs_port, nbd_port  where the servers listen
    nbd_seen_port       where the guest finds nbdkit; the URLs say where it finds the NFS server
    """

    ours_url: str
    kernel_url: str
    nfs_port: int
    nbd_file: Path
    nbd_port: int
    nbd_seen_port: int


Peer = Callable[[Guest, Files, int], AbstractContextManager[Swapping]]


@contextlib.contextmanager
def zram(guest: Guest, files: Files, size_mib: int) -> Iterator[Swapping]:
    """Compressed memory. The stress program's pages do not compress: the guest needs memory for all of them."""
    guest.run(f"modprobe zram num_devices=1 && echo {size_mib}M > /sys/block/zram0/disksize")
    with _swap_on(guest, "/dev/zram0") as swapping:
        yield swapping
    guest.run("echo 1 > /sys/block/zram0/reset")


@contextlib.contextmanager
def _kernel_nbd(guest: Guest, files: Files, size_mib: int, connections: int = 1) -> Iterator[Swapping]:
    """`nbdkit file` on the host, TCP, the kernel's nbd in the guest. The server keeps it in its page cache."""
    with _nbdkit(files):
        guest.push(_ATTACH_TCP, "/root/attach_tcp.py")
        guest.run("modprobe nbd")
        server = f"{HOST_ADDRESS} {files.nbd_seen_port}"
        device = guest.run(f"python3 /root/attach_tcp.py {server} {connections}").stdout.strip()
        with _swap_on(guest, device) as swapping:
            yield swapping
        # udev may still have it open for a moment, which detach waits for
        guest.run(f"nbdnfs detach {device}", 60)


@contextlib.contextmanager
def _kernel_nfs(guest: Guest, files: Files, size_mib: int, connections: int = 1) -> Iterator[Swapping]:
    """A swap file on an NFSv3 mount, as the kernel does it by itself: Documentation/filesystems/nfs."""
    url = urlsplit(files.kernel_url)
    query = parse_qs(url.query)
    folder, _, name = url.path.rpartition("/")
    ports = f"port={query['nfsport'][0]},mountport={query['mountport'][0]}"
    options = f"vers=3,proto=tcp,mountproto=tcp,nolock,hard,nconnect={connections},{ports}"
    file = shlex.quote(f"{_MOUNT}/{name}")
    guest.run(f"mkdir -p {_MOUNT} && mount -t nfs -o {options} {url.hostname}:{shlex.quote(folder)} {_MOUNT}", 120)
    with _swap_on(guest, file) as swapping:
        yield swapping
    guest.run(f"umount {_MOUNT}", 90)


@contextlib.contextmanager
def _ours(guest: Guest, files: Files, settings: str) -> Iterator[Swapping]:
    kept.configure(guest, _NAME, f'url = "{files.ours_url}"\npriority = {_PRIORITY}\n{settings}')
    kept.start(guest, _NAME)
    pid = kept.worker_pid(guest, _NAME)

    def counters() -> Counters:
        found = read(guest, pid)
        found["locked_kib"], found["resident_kib"] = swap.memory_of(guest, pid)
        return {**found, **kept.memory_kib(guest, _NAME)}

    yield Swapping(counters)
    kept.stop(guest, _NAME)


def ours(guest: Guest, files: Files, size_mib: int) -> AbstractContextManager[Swapping]:
    """A device of a configuration, with its keeper and its standby. The others do not encrypt either."""
    return _ours(guest, files, "encrypt = false\n")


def encrypted(guest: Guest, files: Files, size_mib: int) -> AbstractContextManager[Swapping]:
    """The same, encrypted: beside `ours` it shows what that costs."""
    return _ours(guest, files, "encrypt = true\n")


def loop(guest: Guest, files: Files, size_mib: int) -> AbstractContextManager[Swapping]:
    """The same, unencrypted and without nbdkit's threads, however many processors there are."""
    return _ours(guest, files, "encrypt = false\nloop = true\n")


def threads(guest: Guest, files: Files, size_mib: int) -> AbstractContextManager[Swapping]:
    """The same, unencrypted and with nbdkit's threads."""
    return _ours(guest, files, "encrypt = false\nloop = false\n")


def _behind(peer: Peer, turn_on: str, turn_off: str) -> Peer:
    """The peer, with a setting of the kernel's memory management."""

    @contextlib.contextmanager
    def changed(guest: Guest, files: Files, size_mib: int) -> Iterator[Swapping]:
        guest.run(turn_on)
        with peer(guest, files, size_mib) as swapping:
            yield swapping
        guest.run(turn_off)

    return changed


def _behind_zswap(peer: Peer) -> Peer:
    settings = " && ".join(f"{{ [ ! -e {name} ] || echo {value} > {name}; }}" for name, value in _ZSWAP.items())
    return _behind(peer, f"cd {_ZSWAP_PARAMETERS} && {settings}", f"echo N > {_ZSWAP_PARAMETERS}/enabled")


def _with_folios(peer: Peer) -> Peer:
    return _behind(peer, f"echo always > {_FOLIOS_ENABLED}", f"echo never > {_FOLIOS_ENABLED}")


PEERS: Mapping[str, Peer] = {
    FLOOR: zram,
    KERNEL_NBD: _kernel_nbd,
    KERNEL_NFS: _kernel_nfs,
    OURS: ours,
    ENCRYPTED: encrypted,
    LOOP: loop,
    THREADS: threads,
    KERNEL_NBD_4: functools.partial(_kernel_nbd, connections=4),
    KERNEL_NFS_4: functools.partial(_kernel_nfs, connections=4),
    OURS_ZSWAP: _behind_zswap(ours),
    KERNEL_NFS_ZSWAP: _behind_zswap(_kernel_nfs),
    OURS_FOLIOS: _with_folios(ours),
    KERNEL_NBD_FOLIOS: _with_folios(_kernel_nbd),
}
# What is compared unless others are named.
DEFAULT = (FLOOR, KERNEL_NBD, KERNEL_NFS, OURS, ENCRYPTED, THREADS)
OURS_ALL = (OURS, ENCRYPTED, LOOP, THREADS, OURS_ZSWAP, OURS_FOLIOS)


@contextlib.contextmanager
def _swap_on(guest: Guest, target: str) -> Iterator[Swapping]:
    """A device or file that is not ours, from mkswap to swapoff."""
    guest.run(f"mkswap {target}", 90)
    guest.run(f"swapon --priority {_PRIORITY} {target}", 90)
    yield Swapping()
    guest.run(f"swapoff {target}", 300)


@contextlib.contextmanager
def _nbdkit(files: Files) -> Iterator[None]:
    """`nbdkit file` on loopback, where guests find it under the host's address."""
    nbdkit = host.find_program("nbdkit", "nbdkit")
    process = host.start(
        [nbdkit, "--foreground", "--ipaddr", "127.0.0.1", "--port", str(files.nbd_port), "file", files.nbd_file]
    )
    host.raise_session_priority(process.pid)
    try:
        deadline = time.monotonic() + _NBDKIT_DEADLINE_S
        while not host.listens(files.nbd_port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise HarnessError(f"nbdkit did not serve {files.nbd_file} on port {files.nbd_port}")
            time.sleep(0.05)
        yield
        if process.poll() is not None:
            raise GuestFailedError(f"nbdkit ended with {process.returncode} while it was swapped to")
    finally:
        process.terminate()
        try:
            process.wait(_NBDKIT_DEADLINE_S)
        except subprocess.TimeoutExpired:  # it waits for the guest's requests, where a run was interrupted
            process.kill()
            process.wait()
