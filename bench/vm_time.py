# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a second is in `make bench-vm`: the guest's, by the instructions that it executes, or this machine's.

In *virtual* time the guest's clock is part of a model (docs/performance.md): an instruction is one nanosecond, and a
server answers a fixed time after each request. To have both although an emulated processor is many times slower, the
guest runs in slow motion: an instruction is 2**SHIFT ns of its clock, the server's time is multiplied by that
(bench/service.c), and the seconds of the result are divided by it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from support.nfs_server import free_ports
from vm_peers import Files
from vmtest import host
from vmtest.guest import Guest
from vmtest.netem import delayed
from vmtest.outcome import HarnessError

_SOURCE = Path(__file__).parent / "service.c"
_DEADLINE_S = 10.0

# An emulated processor executes an instruction in 5 to 15 ns on today's machines. With about that much of the guest's
# clock for each, it goes as fast as the host's, whether the guest computes or waits: what the server does meanwhile
# takes as long for one that computes as for one that waits.
SHIFT = 3


@dataclass(frozen=True)
class RealTime:
    """The guest's clock is this machine's. netem, in the guest, adds to each round trip."""

    shift: int | None = None
    scale: int = 1

    @contextlib.contextmanager
    def line(self, guest: Guest, files: Files, delay_ms: float) -> Iterator[Files]:
        """The way to the servers; yields the files as the guest has to name them."""
        with delayed(guest, delay_ms):
            yield files


@dataclass(frozen=True)
class VirtualTime:
    """The guest's clock goes by its instructions. `program` is bench/service.c, compiled."""

    program: Path
    shift: int = SHIFT

    @property
    def scale(self) -> int:
        """So many seconds of the guest are one of the result."""
        return 1 << self.shift

    @contextlib.contextmanager
    def line(self, guest: Guest, files: Files, delay_ms: float) -> Iterator[Files]:
        """The same, with a proxy before each server: a reply comes `delay_ms` of the result after its request."""
        if not delay_ms:
            yield files
            return
        rpc_port, nbd_port = free_ports(2)
        with (
            self._proxy(rpc_port, files.nfs_port, delay_ms, "rpc"),
            self._proxy(nbd_port, files.nbd_port, delay_ms, "nbd"),
        ):
            yield replace(
                files,
                ours_url=_with_port(files.ours_url, files.nfs_port, rpc_port),
                kernel_url=_with_port(files.kernel_url, files.nfs_port, rpc_port),
                nbd_seen_port=nbd_port,
            )

    @contextlib.contextmanager
    def _proxy(self, port: int, server_port: int, delay_ms: float, protocol: str) -> Iterator[None]:
        service_us = round(delay_ms * 1000 * self.scale)
        argv: list[str | Path] = [self.program, str(port), str(server_port), str(service_us), protocol]
        process = host.start(argv, output=sys.stderr.fileno())
        host.raise_session_priority(process.pid)
        try:
            deadline = time.monotonic() + _DEADLINE_S
            while not host.listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise HarnessError(f"bench/service.c does not listen on port {port}")
                time.sleep(0.05)
            yield
        finally:
            process.kill()
            process.wait(_DEADLINE_S)


def virtual(directory: Path, shift: int) -> VirtualTime:
    """Compile the proxy into `directory`."""
    program = directory / "service"
    compile_program(_SOURCE, program, "-pthread")
    return VirtualTime(program, shift)


def compile_program(source: Path, target: Path, *flags: str) -> None:
    """Compile a source of bench/. HarnessError where that fails."""
    host.run(
        [host.find_program("gcc", "gcc"), "-O2", "-D_GNU_SOURCE", *flags, "-o", target, source],
        what=f"compiling bench/{source.name}",
        timeout_s=120,
    )


@contextlib.contextmanager
def busy(cpus: int) -> Iterator[None]:
    """Keep each CPU of this machine busy meanwhile, as other users of it might: with a priority as they have."""
    loop = f"renice --priority 0 --pid $$ > {os.devnull}; while :; do :; done"
    loops = [subprocess.Popen(["sh", "-c", loop], start_new_session=True) for _ in range(cpus)]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait(_DEADLINE_S)


def _with_port(url: str, server_port: int, port: int) -> str:
    """The URL of a server, by a proxy before its NFS port. Its MOUNT service is asked directly."""
    return url.replace(f"nfsport={server_port}", f"nfsport={port}")
