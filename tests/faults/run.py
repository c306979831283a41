# SPDX-License-Identifier: LGPL-2.1-or-later
"""A seeded fault-injection run: verified reads and writes through a real worker while faults strike at random.

    make faults ARGS="--seconds 600 [--seed N] [--version 4] [--encrypt] [--loop]"

The seed, which is printed, decides the faults with their times and each thread's requests; how they coincide is up
to the machine. Exit status 0: no wrong byte, no error, no request that hung. Needs root, for the server and a small
file system under its export.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from support.nbd_client import NbdClient, SharedClient
from support.nfs_server import Ganesha
from support.proxy import TcpProxy
from support.small_filesystem import small_filesystem
from support.strikes import Strikes
from support.worker_process import serving, serving_by_loop
from verified_load import PATIENCE_S, VerifiedLoad

MIB = 1 << 20
REGION_PAGES = 1024
# shorter than the default, so that silent connections are replaced several times in a run
SILENCE_MS = 3000
_PAUSES_S = (1.0, 10.0)
_LAST_REQUESTS_S = 60.0


def run(
    *,
    seconds: float,
    seed: int,
    version: int = 3,
    connections: int = 1,
    device_bytes: int = 512 * MIB,
    encrypt: bool = False,
    loop: bool = False,
    workdir: Path,
) -> tuple[list[str], list[str]]:
    """One run. Returns the failures, as texts, and the lines that the worker logged."""
    draw = random.Random(seed)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(small_filesystem(workdir, device_bytes * 5 // 4))
        server = stack.enter_context(Ganesha(workdir / "ganesha", export=folder))
        proxy = stack.enter_context(TcpProxy(server.nfs_port))
        path = server.export_path / "swap"
        with path.open("wb") as file:
            file.truncate(device_bytes)  # all holes, so that a full file system matters
        settings = [
            f"region_pages={REGION_PAGES}",
            f"connections={connections}",
            f"silence_ms={SILENCE_MS}",
            f"encrypt={int(encrypt)}",
        ]
        url = server.url(path.name, version, nfsport=proxy.port)
        connect: Callable[[], AbstractContextManager[NbdClient | SharedClient]]
        if loop:
            worker = stack.enter_context(serving_by_loop(url, workdir, *settings))
            shared = stack.enter_context(SharedClient(worker.socket, PATIENCE_S))
            connect = functools.partial(_lent, shared)
        else:
            worker = stack.enter_context(serving(url, workdir, *(f"--plugin-setting={one}" for one in settings)))
            connect = functools.partial(NbdClient, worker.socket, PATIENCE_S)
        load = VerifiedLoad(connect, device_bytes, seed=seed)
        strikes = Strikes(server, proxy, draw)
        load.start()
        _strike_until(time.monotonic() + seconds, strikes, load, draw)
        load.stop(_LAST_REQUESTS_S)
        failures = load.failures
        if not failures:
            if wrong := load.verify():
                failures.append(f"{wrong} pages of the device are wrong at the end")
            if not encrypt and (wrong := load.verify_file(path)):
                failures.append(f"{wrong} pages of the file are wrong at the end")
        print(f"{load.requests} requests, the longest took {max(load.longest_s):.1f} s", flush=True)
        said = worker.stderr.read_text(errors="replace").splitlines()
    return failures, said


def _lent(client: SharedClient) -> AbstractContextManager[SharedClient]:
    return contextlib.nullcontext(client)


def _strike_until(end_s: float, strikes: Strikes, load: VerifiedLoad, draw: random.Random) -> None:
    start_s = time.monotonic()
    before = load.requests
    while time.monotonic() < end_s and not load.failures:
        name, mend = strikes.strike()
        pause_s = draw.uniform(*_PAUSES_S)
        fault_s = draw.uniform(0.0, pause_s)
        print(f"[{time.monotonic() - start_s:6.1f} s] {name}, for {fault_s:.1f} s", end="", flush=True)
        time.sleep(fault_s)
        mend()
        time.sleep(pause_s - fault_s)
        print(f": {load.requests - before} requests", flush=True)
        before = load.requests


def main() -> int:
    parser = argparse.ArgumentParser(description="Verified reads and writes while faults strike at random.")
    parser.add_argument("--seconds", type=float, default=600, help="how long faults strike")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="replay the run with this seed")
    parser.add_argument(
        "--version", type=int, choices=(3, 4), default=3, help="version of NFS; 4 needs libnfs 5 or newer"
    )
    parser.add_argument(
        "--connections", type=int, choices=(1, 2), default=1, help="connections of the worker to the server"
    )
    parser.add_argument("--device-mib", type=int, default=512, help="size of the device")
    parser.add_argument("--encrypt", action="store_true", help="encrypt the pages on the server")
    parser.add_argument("--loop", action="store_true", help="one client, served by the engine's loop without nbdkit")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="nbdnfs-faults-") as folder:
        failures, said = run(
            seconds=args.seconds,
            seed=args.seed,
            version=args.version,
            connections=args.connections,
            device_bytes=args.device_mib * MIB,
            encrypt=args.encrypt,
            loop=args.loop,
            workdir=Path(folder),
        )
    if failures:
        print(*said[-40:], *failures, f'to replay: make faults ARGS="--seed {args.seed}"', sep="\n", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
