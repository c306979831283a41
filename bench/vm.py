# SPDX-License-Identifier: LGPL-2.1-or-later
"""make bench-vm: one guest swaps to zram, to the kernel's nbd, to the kernel's NFS and to nbdnfs, in turn.

The same stress program each time, in a cgroup of a quarter of its pages, by one process and then by several: it fills
them, and visits them in sequence, at random, by Zipf's law (some often, most hardly ever), and with a stride of 16.
`--own-memory`: without a cgroup, in a guest of 256 MiB, where what a peer needs itself is missing for the pages. Every
page is checked, and a wrong one fails the benchmark. In virtual time (vm_time.py),
with servers that answer after 0.2 and after 1 ms; `--time real`: by this machine's clock, with no added round trip and
with 1 ms. Each round begins with another peer; the table has medians, the JSON all samples. `--continue` adds rounds to
those of an earlier run with the same sizes. `--repeat` does the rounds on an idle host, then on a busy one, and prints
how far the figures are from each other.

Ratios count, seconds do not travel.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import vm_time
from support.nfs_server import Ganesha, ServerError, free_ports
from svg import Group, bars
from vm_peers import DEFAULT, ENCRYPTED, FLOOR, KERNEL_NBD, KERNEL_NFS, OURS, PEERS, Files
from vm_rounds import Load, Results, one_round
from vmtest import host, image, initramfs
from vmtest.guest import Guest, seen_from_guest
from vmtest.outcome import GuestFailedError, HarnessError, LostGuestError
from vmtest.payload import payload

_SMALL_GUEST_MIB = 256
_NAME = max(len(name) for name in PEERS)


def main() -> int:
    """Run it; returns the exit status."""
    options = _options()
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    shift = options.time_shift if options.time == "virtual" else None
    load = Load(
        size_mib=options.size,
        limit_mib=None if options.own_memory else options.limit or options.size // 4,
        processes=tuple(options.processes),
        timeout_s=options.timeout,
        time_shift=shift,
        memory_mib=_SMALL_GUEST_MIB if options.own_memory else Load.memory_mib,
        passes=tuple(options.passes),
        is_compressible=options.compressible,
    )
    try:
        if options.continued and options.json is None:
            raise HarnessError("--continue needs --json, the file of the earlier run")
        earlier = Results(load, ())
        if options.continued and options.json.exists():
            earlier = Results.load_from(options.json, load)
        results = _measure(options, load, earlier)
    except (HarnessError, ServerError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except (GuestFailedError, LostGuestError) as error:
        print(f"bench: failed: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; nothing is left running", file=sys.stderr)
        return 130
    print(tables(results))
    if options.repeat:
        print(repeatability(results))
    if options.svg:
        options.svg.parent.mkdir(parents=True, exist_ok=True)
        options.svg.write_text(picture(results))
    return 0


def _add_what_is_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--time",
        choices=("virtual", "real"),
        default=os.environ.get("TIME") or "virtual",
        help="what a second is (default virtual, or what TIME in the environment says)",
    )
    parser.add_argument(
        "--time-shift",
        type=int,
        default=vm_time.SHIFT,
        metavar="N",
        help=f"in virtual time, 2**N ns of the guest's clock for each instruction (default {vm_time.SHIFT})",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="MIB",
        help="size of the pages (default 128, eight times the region; 256 with --own-memory)",
    )
    parser.add_argument("--limit", type=int, metavar="MIB", help="size of the cgroup (default a quarter of --size)")
    parser.add_argument(
        "--own-memory",
        action="store_true",
        help=f"no cgroup, in a guest of {_SMALL_GUEST_MIB} MiB: what a peer needs itself is missing for the pages",
    )
    parser.add_argument(
        "--passes",
        type=_passes,
        default=list(Load.passes),
        metavar="A,B",
        help=f"after filling (default {','.join(Load.passes)})",
    )
    parser.add_argument("--compressible", action="store_true", help="pages that compress to a third (zswap)")
    parser.add_argument(
        "--processes",
        type=_counts,
        default=list(Load.processes),
        metavar="N,N",
        help="a run on each peer with so many (default 1,4)",
    )
    parser.add_argument(
        "--delays-ms",
        type=_numbers,
        metavar="N,N",
        help="in virtual time, when a server answers (default 0.2,1); in real time, round trips to add (default 0,1)",
    )
    parser.add_argument(
        "--peers",
        type=peer_names,
        default=list(DEFAULT),
        metavar="A,B",
        help=f"{','.join(PEERS)} (default: all but {','.join(sorted(PEERS.keys() - set(DEFAULT)))})",
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    _add_what_is_run(parser)
    parser.add_argument(
        "--repeat", action="store_true", help="do the rounds again on a busy host, and print how much differs"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="default 5, for medians; one takes many minutes"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800, metavar="S", help="time limit of one run of the stress program"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to FILE, after each round")
    parser.add_argument(
        "--trace", type=Path, metavar="FOLDER", help="keep there what each run asks nbd for (vm_trace.py)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture to FILE")
    parser.add_argument(
        "--continue", dest="continued", action="store_true", help="add rounds to those in the JSON file"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the programs that are started")
    options = parser.parse_args()
    if options.own_memory and options.limit:
        parser.error("--own-memory has no cgroup, and --limit is the size of one")
    if options.size is None:
        options.size = 256 if options.own_memory else 128
    if options.delays_ms is None:
        options.delays_ms = [0.2, 1.0] if options.time == "virtual" else [0.0, 1.0]
    return options


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _counts(text: str) -> list[int]:
    found = sorted({int(word) for word in text.split(",")})
    if found[0] < 1:
        raise argparse.ArgumentTypeError("at least one process")
    return found


def peer_names(text: str) -> list[str]:
    """Some of PEERS, with commas between; for argparse."""
    names = text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"not known: {', '.join(sorted(unknown))}")
    return names


def _passes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(Load.passes):
        raise argparse.ArgumentTypeError(
            f"not known: {', '.join(sorted(unknown))}; choose from {','.join(dict.fromkeys(Load.passes))}"
        )
    return names


def _measure(options: argparse.Namespace, load: Load, earlier: Results) -> Results:
    """All rounds, in one guest."""
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    host.need_root("the throwaway NFS server")
    built = image.default_image()
    initramfs.initrd(built)
    disk = payload(built, project=True)
    host.raise_priority()
    results = earlier
    # rounds that were there count: the next one begins with the next peer
    first = max(
        (len(earlier.of(peer, options.delays_ms[0], options.processes[0])) for peer in options.peers), default=0
    )
    with contextlib.ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdnfs-bench-")))
        server = stack.enter_context(Ganesha(workdir / "nas"))
        files = files_on(server, load.device_mib)
        # a request is "stuck" after two seconds, which a busy machine may take; what is killed is counted elsewhere
        guest = stack.enter_context(
            Guest(
                built,
                disk,
                workdir / "guest",
                memory_mib=load.memory_mib,
                time_shift=load.time_shift,
                allow={"slow", "oom"},
                name="bench",
            )
        )
        host.raise_session_priority(server.pid)
        host.raise_session_priority(guest.pid)
        guest.settle()
        clock = vm_time.RealTime() if load.time_shift is None else vm_time.virtual(workdir, load.time_shift)
        tell(f"a guest with Linux {guest.run('uname -r').stdout.strip()}")
        for number in range(first, first + options.rounds * (2 if options.repeat else 1)):
            turn = number % len(options.peers)
            order = options.peers[turn:] + options.peers[:turn]
            is_busy = number >= first + options.rounds
            tell(f"round {number + 1}{', on a busy host' if is_busy else ''}: {', '.join(order)}")
            with vm_time.busy(os.cpu_count() or 1) if is_busy else contextlib.nullcontext():
                samples = one_round(
                    guest,
                    files,
                    load,
                    peers=order,
                    delays_ms=options.delays_ms,
                    clock=clock,
                    tell=tell,
                    traces=options.trace and options.trace / f"round-{number + 1}",
                )
            samples = [replace(sample, host_was_busy=is_busy) for sample in samples]
            results = Results(load, (*results.samples, *samples))
            if options.json:
                results.save(options.json)
        guest.shutdown()
    return results


def files_on(server: Ganesha, size_mib: int) -> Files:
    """Three files of the same size, all of their blocks written: one for each peer that is not memory."""
    for name in ("ours.swap", "kernel.swap", "nbd.swap"):
        host.run(
            ["dd", "if=/dev/zero", f"of={server.export_path / name}", "bs=1M", f"count={size_mib}", "conv=fsync"],
            what=f"writing {name}",
            timeout_s=300,
        )
    # with a signature there the guest need not read all of it to see that it holds nothing
    host.run(["/sbin/mkswap", server.export_path / "ours.swap"], what="mkswap", timeout_s=30)
    (nbd_port,) = free_ports(1)
    return Files(
        ours_url=seen_from_guest(server.url("ours.swap")),
        kernel_url=seen_from_guest(server.url("kernel.swap")),
        nfs_port=server.nfs_port,
        nbd_file=server.export_path / "nbd.swap",
        nbd_port=nbd_port,
        nbd_seen_port=nbd_port,
    )


def tables(results: Results) -> str:
    """Medians: seconds of each pass and in all, and ours as a multiple of each other peer's."""
    load = results.load
    clock = "real" if load.time_shift is None else "virtual"
    lines = [f"{title_of(load)}; seconds of {clock} time, medians; no page wrong"]
    names = ("fill", *load.passes)
    for delay_ms, processes in _cells(results):
        rounds = max(len(results.of(peer, delay_ms, processes)) for peer in PEERS)
        lines += ["", f"{delay_ms:g} ms added, {_by(processes)}, {rounds} rounds"]
        lines.append(f"  {'':{_NAME}}" + "".join(f"{name:>12}" for name in (*names, "all")))
        ours = _medians(results, OURS, delay_ms, processes)
        for peer in PEERS:
            if found := _medians(results, peer, delay_ms, processes):
                lines.append(f"  {peer:{_NAME}}" + "".join(f"{value:>12.2f}" for value in found))
                if ours and peer not in (OURS, FLOOR):
                    ratios = "".join(f"{mine / its:>12.2f}" for mine, its in zip(ours, found, strict=True))
                    lines.append(f"  {'  ours / this':{_NAME}}" + ratios)
        if text := our_figures(results, delay_ms, processes):
            lines.append("  " + text)
        if text := _encryption(results, delay_ms, processes):
            lines.append("  " + text)
    return "\n".join(lines)


def title_of(load: Load) -> str:
    """What was swapped, and in how much memory."""
    where = f"a guest of {load.memory_mib} MiB" if load.limit_mib is None else f"a cgroup of {load.limit_mib} MiB"
    kind = "compressible pages" if load.is_compressible else "pages"
    return f"{load.size_mib} MiB of {kind} in {where}"


def _by(processes: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''}"


def _medians(results: Results, peer: str, delay_ms: float, processes: int) -> list[float]:
    """Median seconds of each pass, and of the whole run; empty if the peer has no samples."""
    samples = results.of(peer, delay_ms, processes)
    columns = [*zip(*(sample.passes for sample in samples), strict=True), [sample.seconds for sample in samples]]
    return [statistics.median(column) for column in columns] if samples else []


def _encryption(results: Results, delay_ms: float, processes: int) -> str:
    without, encrypted = (
        results.median(peer, delay_ms, processes, lambda sample: sample.seconds) for peer in (OURS, ENCRYPTED)
    )
    return f"encrypted: {encrypted / without:.2f} of the unencrypted time" if encrypted and without else ""


def repeatability(results: Results) -> str:
    """How far the seconds in all of each cell are from their median on an idle host, in per cent."""
    lines = ["", "the median of the rounds on an idle host; how far its rounds are from that, and those on a busy host"]
    for delay_ms, processes in _cells(results):
        for peer in PEERS:
            middle = results.median(peer, delay_ms, processes, lambda sample: sample.seconds)
            if middle is None:
                continue
            furthest = [
                max((abs(sample.seconds / middle - 1) for sample in found), default=0.0)
                for found in (results.of(peer, delay_ms, processes, host_was_busy=is_busy) for is_busy in (False, True))
            ]
            name = f"{peer}, {delay_ms:g} ms, {_by(processes)}"
            lines.append(f"{name:38}{middle:>12.2f}" + "".join(f"{100 * value:>11.1f}%" for value in furthest))
    return "\n".join(lines)


def _cells(results: Results) -> list[tuple[float, int]]:
    return sorted({(sample.delay_ms, sample.processes) for sample in results.samples})


def our_figures(results: Results, delay_ms: float, processes: int) -> str:
    """What our region counted in these runs: above all, how much an NFS write carries."""
    samples = results.of(OURS, delay_ms, processes)
    if not samples:
        return ""

    def total(name: str) -> int:
        return sum(sample.counters.get(name, 0) for sample in samples)

    filled = [sum(sample.swap_out.get(name, 0) for sample in samples) for name in ("nfs_written_bytes", "nfs_writes")]

    def each(name: str, count: str) -> float:
        return total(name) / max(total(count), 1)

    return (
        f"nbdnfs: {filled[0] / max(filled[1], 1) / 1024:.0f} KiB for each NFS write of swap-out alone;"
        f" in the whole run {each('nfs_written_bytes', 'nfs_writes') / 1024:.0f} KiB for each write"
        f" and {each('nfs_read_bytes', 'nfs_reads') / 1024:.0f} for each read;"
        f" {total('writes') // len(samples):,} NBD writes of {each('written_bytes', 'writes') / 1024:.1f} KiB,"
        f" {total('reads') // len(samples):,} reads of {each('read_bytes', 'reads') / 1024:.1f};"
        f" read-ahead: {total('read_ahead_hits')} of {total('read_ahead_pages')} pages used;"
        f" {100 * total('hit_pages') / max(total('hit_pages') + total('missed_pages'), 1):.0f}% of pages read were in"
        f" the region; {total('cpu_ms') / 1000 / len(samples):.1f} CPU seconds;"
        f" {max(sample.counters.get('resident_kib', 0) for sample in samples):,} KiB resident,"
        f" {max(sample.counters.get('all_resident_kib', 0) for sample in samples):,} in all processes of the device"
    )


def picture(results: Results) -> str:
    """Seconds of each pass and in all, of the peers that ran; each group has a scale of its own."""
    load = results.load
    ran = {sample.peer for sample in results.samples}
    peers = [peer for peer in (OURS, KERNEL_NBD, KERNEL_NFS, FLOOR) if peer in ran]
    groups = []
    for delay_ms, processes in _cells(results):
        medians = {peer: _medians(results, peer, delay_ms, processes) for peer in peers}
        cell = f"{delay_ms:g} ms, {_by(processes)}"
        for number, name in enumerate(("fill", *load.passes, "all")):
            values = {peer: found[number] if found else None for peer, found in medians.items()}
            groups.append(Group(f"{cell}: {name}", values))
    return bars(f"Swapping {title_of(load)}, every page checked", "seconds (less is better)", groups)


if __name__ == "__main__":
    sys.exit(main())
