# SPDX-License-Identifier: LGPL-2.1-or-later
"""make bench: our worker beside its peers, on one NFS-Ganesha, one file, one machine, in turn.

Peers: the same with the engine's loop in place of nbdkit's threads, qemu-nbd with its libnfs driver, nbdkit with its
own NFS plugin where there is one (1.44 and later, built with libnfs 6: --nbdkit, --nfs-plugin), the reference engine
(PyPI's libnfs under the same plugin), and the limit: libnfs's asynchronous API in a loop and nothing else.
Rounds rotate the order; the table has medians, the JSON has everything. Then once more with a round trip that is longer
by 1 ms (bench/delay.c).

Everything runs in a network and a mount namespace of its own, with its own rpcbind: qemu-nbd finds servers through
that only. Root, quiet machine, some ten minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from native_report import (
    LIMIT,
    LOOP,
    NBDKIT_NFS,
    OURS,
    QEMU,
    Result,
    Row,
    Sample,
    as_json,
    missed_goals,
    picture,
    table,
)
from portmap import register
from support.nfs_server import Ganesha, free_ports, program, rpc_null_answers

from nbdnfs import proc_stat

HERE = Path(__file__).resolve().parent
DEVICE_BYTES = 256 << 20
PEERS = (OURS, LOOP, QEMU, NBDKIT_NFS, "libnfs-python", LIMIT)
# Left out where it has no such plugin. One that is named must have it.
DEBIANS_NBDKIT = ("nbdkit", "nfs")
DEADLINE_S = 30.0


ROWS = (
    Row("read", "random", 4096, 1),
    Row("read", "random", 4096, 16),
    Row("write", "random", 4096, 1),
    Row("write", "random", 4096, 16),
    Row("read", "sequential", 4096, 1),
    Row("write", "sequential", 4096, 1),
    Row("read", "sequential", 131072, 16),
    Row("write", "sequential", 131072, 16),
)


def compile_tools(directory: Path) -> None:
    """load and delay, from the sources beside this file."""
    flags = subprocess.check_output(["pkg-config", "--cflags", "--libs", "libnfs"], text=True).split()
    for name in ("load", "delay"):
        command = ["gcc", "-O2", "-o", str(directory / name), str(HERE / f"{name}.c"), "-pthread", *flags]
        subprocess.run(command, check=True)


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and its threads."""
    fields = proc_stat.fields(Path(f"/proc/{pid}/stat").read_text())
    return (int(fields[proc_stat.USER_TICKS]) + int(fields[proc_stat.SYSTEM_TICKS])) / os.sysconf("SC_CLK_TCK")


def memory_kib(pid: int, key: str) -> int:
    """Rss or Locked of smaps_rollup. VmLck counts what is locked and not there, too: mm/mlock.c."""
    found = re.search(rf"^{key}:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def serving(
    peer: str, server: Ganesha, nfs_port: int, directory: Path, nbdkit: tuple[str, str]
) -> Iterator[tuple[list[str], int | None]]:
    """A peer's server; what load is to be pointed at, and the pid to account for.

    `nbdkit` is the program and the NFS plugin of `--nbdkit` and `--nfs-plugin`.
    """
    url = server.url("device", nfsport=nfs_port)
    path = directory / "peer.sock"
    if peer == "limit":
        yield ["nfs", url], None
        return
    if peer == "qemu-nbd":
        image = "driver=raw,file.driver=nfs,file.server.type=inet,file.server.host=127.0.0.1"
        argv = ["qemu-nbd", "--image-opts", "-t", "-k", str(path), "--cache=none", "--shared=2"]
        argv.append(f"{image},file.path={server.export_path}/device")
    elif peer == NBDKIT_NFS:
        argv = [nbdkit[0], "--foreground", "--unix", str(path), nbdkit[1], f"uri={url}"]
    elif peer == LOOP:
        argv = [sys.executable, "-P", str(HERE / "loop_server.py"), str(path), url]
    else:
        engine = "c" if peer == OURS else peer
        argv = [sys.executable, "-P", "-m", "nbdnfs", "serve", url, "--socket", str(path), "--engine", engine]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: {peer} did not start: {' '.join(argv)}")
            time.sleep(0.05)
        _wait_for_answer(peer, path, process, deadline)
        time.sleep(1)  # what it still does for itself is not the load's
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield ["nbd", str(path)], int(children[0]) if children else process.pid
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
        path.unlink(missing_ok=True)


def _wait_for_answer(peer: str, path: Path, process: subprocess.Popen[bytes], deadline: float) -> None:
    """Until it takes connections: qemu-nbd binds its socket before it knows whether it has a driver for the file."""
    while True:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            return
        if process.poll() is not None or time.monotonic() > deadline:
            hint = "\nbench: its NFS driver is in Debian's qemu-block-extra" if peer == "qemu-nbd" else ""
            raise SystemExit(f"bench: {peer} does not serve the file{hint}")
        time.sleep(0.05)


def run_once(tools: Path, target: list[str], pid: int | None, row: Row, seconds: float) -> Sample:
    """One load on one peer."""
    before = cpu_s(pid) if pid is not None else 0.0
    text = subprocess.check_output([str(tools / "load"), *target, *row.argv(seconds)], text=True)
    load = json.loads(text)
    gigabytes = load["operations"] * row.block_bytes / 1e9
    if pid is None:
        return Sample(load, None, None, None)
    used_s = cpu_s(pid) - before
    return Sample(load, used_s / gigabytes, memory_kib(pid, "Rss"), memory_kib(pid, "Locked"))


def measure(
    peers: list[str], server: Ganesha, nfs_port: int, directory: Path, options: argparse.Namespace
) -> dict[Row, dict[str, Result]]:
    """All rows by all peers; each round begins with another peer. A peer has the file to itself while it runs."""
    results = {row: {peer: Result() for peer in peers} for row in ROWS}
    for number in range(options.rounds):
        order = peers[number % len(peers) :] + peers[: number % len(peers)]
        for peer in order:
            print(f"bench: round {number + 1} of {options.rounds}: {peer}", file=sys.stderr, flush=True)
            with serving(peer, server, nfs_port, directory, (options.nbdkit, options.nfs_plugin)) as (target, pid):
                for row in ROWS:
                    results[row][peer].samples.append(run_once(directory, target, pid, row, options.seconds))
    return results


def _absent_peers(options: argparse.Namespace) -> set[str]:
    """Those that this machine does not have."""
    absent = set()
    if not shutil.which("qemu-nbd"):
        absent.add(QEMU)
    if sys.version_info >= (3, 12):
        absent.add("libnfs-python")
    given = (options.nbdkit, options.nfs_plugin)
    with contextlib.suppress(OSError):
        if subprocess.run([given[0], "--dump-plugin", given[1]], capture_output=True, check=False).returncode == 0:
            return absent
    if given != DEBIANS_NBDKIT:
        raise SystemExit(
            f"bench: {given[0]} cannot load {given[1]}\nbench: it needs nbdkit 1.44 and libnfs 6; try it by hand"
        )
    return absent | {NBDKIT_NFS}


def enter_namespaces() -> None:
    """Run again in a network and a mount namespace of our own."""
    if os.environ.get("NBDNFS_BENCH_INSIDE"):
        return
    if os.geteuid() != 0:
        raise SystemExit("bench: namespaces and the NFS server need root\nbench: run it with sudo")
    unshare = program("unshare", "util-linux")
    ip = program("ip", "iproute2")
    # an address beside loopback's: getaddrinfo(3) finds none otherwise, with AI_ADDRCONFIG
    setup = (
        f"{ip} link set lo up && {ip} link add bench0 type veth peer name bench1 && {ip} link set bench0 up"
        f' && {ip} address add 192.0.2.1/30 dev bench0 && mount -t tmpfs tmpfs /run && exec "$@"'
    )
    os.environ["NBDNFS_BENCH_INSIDE"] = "1"
    os.execv(unshare, [unshare, "--net", "--mount", "sh", "-c", setup, "sh", sys.executable, *sys.argv])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="each begins with another peer")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of each run")
    parser.add_argument(
        "--delay-ms", type=float, default=1.0, help="round trip to add in the second part; 0 leaves it out"
    )
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--svg", type=Path, help="write the picture to this file")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated, some of the default")
    parser.add_argument("--nbdkit", default=DEBIANS_NBDKIT[0], help="an nbdkit that has the NFS plugin")
    parser.add_argument("--nfs-plugin", default=DEBIANS_NBDKIT[1], help="its name or file")
    options = parser.parse_args()
    absent = _absent_peers(options)
    peers = [peer for peer in options.peers.split(",") if peer not in absent]
    enter_namespaces()
    with tempfile.TemporaryDirectory(prefix="nbdnfs-bench-") as name, Ganesha(Path(name)) as server:
        directory = Path(name)
        compile_tools(directory)
        (server.export_path / "device").write_bytes(os.urandom(DEVICE_BYTES))
        results = {"no added delay": measure(peers, server, server.nfs_port, directory, options)}
        print(table("no added delay", results["no added delay"]), flush=True)
        if options.delay_ms:
            port = free_ports(1)[0]
            delay = subprocess.Popen(
                [str(directory / "delay"), str(port), str(server.nfs_port), str(round(options.delay_ms * 500))]
            )
            try:
                while not rpc_null_answers(port, 100003, 3):
                    time.sleep(0.05)
                register(100003, 3, port)
                title = f"{options.delay_ms:g} ms more for each round trip"
                results[title] = measure(peers, server, port, directory, options)
                print("\n" + table(title, results[title]), flush=True)
            finally:
                delay.kill()
                delay.wait()
    for path, text in (
        (options.json, json.dumps({title: as_json(part) for title, part in results.items()}, indent=1)),
        (options.svg, picture(results)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print("\n" + "\n".join(missed_goals(results)))


if __name__ == "__main__":
    main()
