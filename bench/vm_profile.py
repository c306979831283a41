# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a swapped page costs in a guest, by part: instructions and context switches for each peer of `make bench-vm`.

A plugin of QEMU's TCG counts the instructions (instructions.c). The stress program runs twice on each peer: it fills
its pages in a cgroup of a quarter of them, and fills and visits them at random. The first is what a page that goes out
costs; the difference of the two, divided by the pages that came in, what a page that is read again costs, with what
goes out for it. In virtual time, so that time-outs are those of the model. All of the guest counts, the stress program
and the kernel's memory management among it, which do the same for each peer.

    sudo env PYTHONPATH=tests:vm-tests:bench .venv/bin/python bench/vm_profile.py --peers kernel-nfs,nbdnfs
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import vm
import vm_time
from support.nfs_server import Ganesha, ServerError
from vm_peers import DEFAULT, FLOOR, PEERS
from vmtest import host, image, swap
from vmtest.guest import Guest
from vmtest.outcome import GuestFailedError, HarnessError, LostGuestError
from vmtest.payload import payload

_SOURCE = Path(__file__).parent / "instructions.c"
_ALL = 100  # rows: more than there are parts
_ASK_TIMEOUT_S = 30.0
_HOG_TIMEOUT_S = 1800.0
# The kernel's functions by name; the first that fits counts. Modules and user space are told by what they are of.
_PARTS: tuple[tuple[str, str], ...] = (
    ("copies of pages", r"copy_user|copyin|copyout|copy_page|_copy_(from|to)_iter|clear_page|memcpy|memset|csum"),
    (
        "system calls",
        r"entry_|syscall|do_syscall|x64_sys|ksys|vfs|fget|fput|fdget|exit_to_user|ret_from|do_sys_poll|do_ppoll|poll_"
        r"|select_estimate|import_|check_object|check_stack|aa_",
    ),
    (
        "network",
        r"tcp|inet|ip_|sk_|skb|sock|net_|netif|dev_|napi|gro_|qdisc|fib_|neigh|unix_|ipv4|nf_|eth_|mptcp|sys_send"
        r"|sys_recv|_sys_|process_backlog|validate_xmit|sch_direct|pfifo|zerocopy|lock_sock|release_sock|move_addr",
    ),
    (
        "scheduler, timers, interrupts",
        r"sched|pick_next|put_prev|set_next|enqueue|dequeue|update_(?!page)|try_to_wake|ttwu|wake|hrtimer|tick"
        r"|timer|clockevents|lapic|apic|irq|softirq|do_softirq|switch_|finish_task|rcu|read_tsc|ktime|futex"
        r"|ep_|eventfd|psi|record_times|reweight|place_entity|cpu|check_preempt|resched|idle|do_idle|default_idle|menu"
        r"|teo|worker|process_one_work|queue_work|insert_work|kthread|select_task|account_(?!page)|sysvec|asm_sysvec"
        r"|handle_(irq|edge|fasteoi)|ack_|note_|common_interrupt|rt_|rto_|pull_|push_|available_idle|prepare_to_wait"
        r"|finish_wait|nohz|run_|get_next_timer|calc_|yield|native_sched_clock",
    ),
    ("block layer", r"blk|bio|submit_bio|dd_|sbitmap|elv|end_swap|swap_writepage|swap_readpage|part_"),
    ("virtio, PCI", r"virt|vring|vp_|detach_buf|iowrite|ioread|dma"),
)
_MEMORY = "memory management, others of the kernel"
_PATTERNS = tuple((part, re.compile(rf"_{{0,3}}(?:{pattern})")) for part, pattern in _PARTS)
_MODULES: Mapping[str, str] = {
    **dict.fromkeys(("sunrpc", "nfs", "nfsv3", "lockd"), "NFS and RPC of the kernel"),
    "nbd": "nbd of the kernel",
    **dict.fromkeys(("virtio_net", "virtio_pci", "virtio", "virtio_ring"), "virtio, PCI"),
}
_HOG = "the stress program"
_OTHERS = "other programs"
_SEVERAL = "several programs"
# Static programs of the harness, which lie at the same addresses; the second does nothing meanwhile.
_HOGS = ("hog", "agent")
# Rows below this share of all are not shown; they count in the sum.
_LEAST = 0.002


@dataclass(frozen=True)
class Symbols:
    """Whose an address is: sorted starts, and what is there: the function, and the part that it belongs to."""

    starts: list[int]
    names: list[tuple[str, str]]

    def at(self, address: int) -> tuple[str, str]:
        place = bisect.bisect_right(self.starts, address) - 1
        return self.names[place] if place >= 0 else ("?", _OTHERS)


def kernel_symbols(kallsyms: str) -> Symbols:
    """Of /proc/kallsyms: text only."""
    found = []
    for line in kallsyms.splitlines():
        address, kind, name, *module = line.split()
        if kind in "tTwW":
            found.append((int(address, 16), (name, _kernel_part(name, module[0].strip("[]") if module else ""))))
    found.sort()
    return Symbols([start for start, _ in found], [name for _, name in found])


def _kernel_part(name: str, module: str) -> str:
    if module in _MODULES:
        return _MODULES[module]
    return next((part for part, pattern in _PATTERNS if pattern.match(name)), _MEMORY)


def user_symbols(maps: Mapping[str, str]) -> Symbols:
    """Of /proc/PID/maps of all processes, by name and PID: executable mappings, by process and file.

    Programs that are not position-independent lie at the same addresses: what two of them share is of several.
    """
    ranges = []
    for head, text in maps.items():
        process = head.rpartition(" ")[0]
        for line in text.splitlines():
            words = line.split(maxsplit=5)
            start, end = (int(word, 16) for word in words[0].split("-"))
            if "x" in words[1]:
                file = words[5].rpartition("/")[2] if len(words) > 5 else "memory"
                ranges.append((start, end, (file, _HOG if file in _HOGS else f"{process}: {file}")))
    starts = sorted({edge for start, end, _ in ranges for edge in (start, end)})
    names = []
    for edge in starts:
        there = {name for start, end, name in ranges if start <= edge < end}
        names.append(there.pop() if len(there) == 1 else ("?", _SEVERAL if there else _OTHERS))
    return Symbols(starts, names)


def ask(path: Path) -> Counter[int]:
    """The instructions at each address so far."""
    question = Path(f"{path}.ask")
    question.touch()
    deadline = time.monotonic() + _ASK_TIMEOUT_S
    while question.exists():
        if time.monotonic() > deadline:
            raise HarnessError("the plugin that counts instructions does not answer", "see whether QEMU still runs")
        time.sleep(0.01)
    lines = path.read_text().splitlines()
    return Counter({int(address, 16): int(count) for address, count in map(str.split, lines)})


@dataclass(frozen=True)
class Taken:
    """What a run of the stress program took."""

    by_part: Counter[str]
    by_function: Counter[str]
    switches: int
    pages_out: int
    pages_in: int


def _maps(guest: Guest) -> dict[str, str]:
    # hog is not there yet, and need not be: it lies where the agent does
    text = guest.run(
        'for p in /proc/[0-9]*; do [ -r $p/maps ] && echo "= $(cat $p/comm) ${p#/proc/}" && cat $p/maps; done; true',
        120,
    ).stdout
    found: dict[str, str] = {}
    for block in f"\n{text}".split("\n= ")[1:]:
        head, _, rest = block.partition("\n")
        found[head] = rest
    return found


def _run(guest: Guest, counts: Path, size_mib: int, passes: str, kernel: Symbols) -> Taken:
    def switches() -> int:
        return int(guest.run("grep ctxt /proc/stat").stdout.split()[1])

    guest.run("sync; echo 3 > /proc/sys/vm/drop_caches", 120)
    user = user_symbols(_maps(guest))
    swapped, switched, counted = swap.counters(guest), switches(), ask(counts)
    with swap.limited(guest, size_mib // 4) as cgroup:
        guest.run(f"exec hog --size {size_mib} --processes 1 --passes {passes} --cgroup {cgroup}", _HOG_TIMEOUT_S)
    taken, switched, after = ask(counts), switches() - switched, swap.counters(guest)
    taken.subtract(counted)
    by_part: Counter[str] = Counter()
    by_function: Counter[str] = Counter()
    for address, count in taken.items():
        symbols = kernel if address >> 63 else user
        name, part = symbols.at(address)
        by_part[part] += count
        by_function[f"{name} ({part})"] += count
    return Taken(
        by_part, by_function, switched, after["pswpout"] - swapped["pswpout"], after["pswpin"] - swapped["pswpin"]
    )


def table(title: str, columns: Mapping[str, tuple[Counter[str], int, int]], top: int) -> str:
    """Instructions for each page, by row. A column: counts, pages, context switches. HarnessError without pages."""
    if short := [peer for peer, (_, pages, _) in columns.items() if pages < 1]:
        raise HarnessError(f"nothing was swapped to {', '.join(short)}", "take more --size")
    rows: Counter[str] = Counter()
    for counts, pages, _ in columns.values():
        for name, count in counts.items():
            rows[name] = max(rows[name], count // pages)
    lines = [title, f"  {'':44}" + "".join(f"{peer:>18}" for peer in columns)]

    def line(name: str, values: Iterable[float], form: str = ",.0f") -> str:
        return f"  {name[:44]:44}" + "".join(f"{format(value, form):>18}" for value in values)

    cells = list(columns.values())
    least = _LEAST * max(counts.total() / pages for counts, pages, _ in cells)
    for name, most in rows.most_common(top):
        if most >= least:
            lines.append(line(name, [counts[name] / pages for counts, pages, _ in cells]))
    lines.append(line("all instructions", [counts.total() / pages for counts, pages, _ in cells]))
    lines.append(line("context switches", [switches / pages for _, pages, switches in cells], ".2f"))
    return "\n".join(lines)


def _measure(peers: Sequence[str], size_mib: int) -> dict[str, tuple[Taken, Taken]]:
    """What filling took, and filling and visiting at random, by peer."""
    host.need_root("the throwaway NFS server")
    built = image.default_image()
    disk = payload(built, project=True)
    host.raise_priority()
    found: dict[str, tuple[Taken, Taken]] = {}
    with contextlib.ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdnfs-profile-")))
        plugin, counts = workdir / "instructions.so", workdir / "counts"
        vm_time.compile_program(_SOURCE, plugin, "-shared", "-fPIC")
        server = stack.enter_context(Ganesha(workdir / "nas"))
        files = vm.files_on(server, size_mib * 4)
        guest = stack.enter_context(
            Guest(
                built,
                disk,
                workdir / "guest",
                time_shift=vm_time.SHIFT,
                plugin=f"{plugin},counts={counts}",
                allow={"slow", "oom"},
                name="profile",
            )
        )
        host.raise_session_priority(server.pid)
        host.raise_session_priority(guest.pid)
        guest.settle()
        clock = vm_time.virtual(workdir, vm_time.SHIFT)
        for peer in peers:
            with clock.line(guest, files, 0.2) as seen, PEERS[peer](guest, seen, size_mib * 4):
                kernel = kernel_symbols(guest.run("cat /proc/kallsyms", 120).stdout)
                fill = _run(guest, counts, size_mib, "fill", kernel)
                both = _run(guest, counts, size_mib, "fill,random", kernel)
            found[peer] = fill, both
            print(f"{peer}: {fill.pages_out} pages out; then {both.pages_in} in", file=sys.stderr)
        guest.shutdown()
    return found


def _print(found: Mapping[str, tuple[Taken, Taken]], counts_of: Callable[[Taken], Counter[str]], top: int) -> None:
    """Two tables: for a page that goes out, and for one that comes in."""
    filled, visited = {}, {}
    for peer, (fill, both) in found.items():
        filled[peer] = (counts_of(fill), fill.pages_out, fill.switches)
        more = Counter(counts_of(both))
        more.subtract(counts_of(fill))
        visited[peer] = (more, both.pages_in - fill.pages_in, both.switches - fill.switches)
    print(table("fill: for each page that goes out", filled, top))
    print(table("\nrandom: for each page that comes in, with what goes out for it", visited, top))


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    peers = [name for name in DEFAULT if name != FLOOR]
    parser.add_argument("--peers", type=vm.peer_names, default=peers, metavar="A,B", help=f"default {','.join(peers)}")
    parser.add_argument("--size", type=int, default=64, metavar="MIB", help="of the pages (default 64)")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="show the N functions that take most, too")
    options = parser.parse_args()
    try:
        found = _measure(options.peers, options.size)
        _print(found, lambda taken: taken.by_part, _ALL)
        if options.top:
            _print(found, lambda taken: taken.by_function, options.top)
    except (HarnessError, ServerError, GuestFailedError, LostGuestError) as error:
        print(f"vm_profile: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
