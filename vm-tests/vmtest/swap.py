# SPDX-License-Identifier: LGPL-2.1-or-later
"""The basic scenario, which the other tests vary: serve, attach, swapon, stress, swapoff, detach."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmtest import more_settings
from vmtest.machine import Machine
from vmtest.outcome import GuestFailedError
from vmtest.verdict import Pass, Progress, Verdict

_RUN = "/run/nbdnfs"
_CGROUP = "/sys/fs/cgroup/nbdnfs-hog"
# Longer than any use of a guest: what ends before its time takes the device away from its file system.
_SERVING_MAX_S = 7 * 24 * 3600.0
_SERVE_TIMEOUT_S = 90
# Of the end. What is not encrypted is written then, however slow the NAS is: pages that repeat one word, all of them.
_END_TIMEOUT_S = 60
_WRITE_OUT_TIMEOUT_S = 900
_LOOP_SERVER = Path(__file__).parents[2] / "bench/loop_server.py"


@dataclass(frozen=True)
class Worker:
    """A worker that serves a backing file: the `nbdnfs serve` process and its nbdkit."""

    socket: str
    serve_pid: int
    nbdkit_pid: int


@dataclass(frozen=True)
class Measured:
    """What a run came to, as the kernel and the stress program counted."""

    pages_out: int
    pages_in: int
    wrong_pages: int
    oom_kills: int
    seconds: float
    locked_kib: int
    resident_kib: int
    pages: int
    passes: tuple[Pass, ...]

    def check(self) -> Measured:
        """Itself when swap was really used and nothing was lost. GuestFailedError otherwise."""
        if self.wrong_pages or self.oom_kills:
            raise GuestFailedError(f"{self.wrong_pages} wrong pages, {self.oom_kills} OOM kills")
        if not self.pages_out or not self.pages_in:
            raise GuestFailedError(f"nothing was swapped: {self.pages_out} pages out, {self.pages_in} pages in")
        return self

    def table(self) -> str:
        """For people."""
        locked_mib, resident_mib = self.locked_kib / 1024, self.resident_kib / 1024
        passes = ", ".join(f"{one.order} {one.seconds:.1f}" for one in self.passes)
        rows = [
            ("pages out", f"{self.pages_out:,}"),
            ("pages in", f"{self.pages_in:,}"),
            ("wrong pages", f"{self.wrong_pages:,} of {self.pages:,}"),
            ("OOM kills", f"{self.oom_kills:,}"),
            ("seconds", f"{self.seconds:.1f} ({passes})"),
            (
                "locked memory of the worker",
                f"{locked_mib:.1f} MiB of {resident_mib:.1f} resident",
            ),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


@contextlib.contextmanager
def serving(
    machine: Machine, url: str, name: str = "swap", settings: Sequence[str] = (), *, encrypt: bool = True
) -> Iterator[Worker]:
    """`nbdnfs serve` in the background, ended in order afterwards; encrypted, as a device is by default. `settings`:
    more of the plugin's, "key=value".

    With `loop = true` in $NBDNFS_TEST_SETTINGS it is the engine's loop that serves, without nbdkit.
    """
    if more_settings.has_loop():
        with _serving_by_loop(machine, url, name, [*settings, f"encrypt={int(encrypt)}"]) as worker:
            yield worker
        return
    socket, pid_file = f"{_RUN}/{name}.sock", f"{_RUN}/{name}.pid"
    machine.run(f"mkdir -p {_RUN}; rm -f {pid_file}")  # not to take the last one's for this one's
    options = "".join(f" --plugin-setting {shlex.quote(setting)}" for setting in settings)
    options += " --encrypt" if encrypt else ""
    serve = machine.start(
        f"echo $$ > {pid_file}; exec nbdnfs serve {shlex.quote(url)} --socket {socket}{options}", _SERVING_MAX_S
    )
    end = f"pid=$(cat {pid_file}); kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done"
    with _tidy(machine, end, _END_TIMEOUT_S if encrypt else _WRITE_OUT_TIMEOUT_S):
        # The socket alone proves little: it is bound before nbdkit runs. Its plugin connects to the NAS first.
        waiting = (
            f"until [ -s {pid_file} ]; do sleep 0.1; done; pid=$(cat {pid_file});"
            f" until [ -S {socket} ] && pgrep -P $pid -x nbdkit;"
            " do kill -0 $pid || exit 1; sleep 0.2; done"
        )
        found = machine.run(waiting, _SERVE_TIMEOUT_S, check=False)
        if found.status != 0:
            raise GuestFailedError(f"nbdnfs serve did not start:\n{serve.stderr}")
        serve_pid = int(machine.run(f"cat {pid_file}").stdout)
        yield Worker(socket, serve_pid, int(found.stdout))
    result = serve.wait()
    if result.status != 0:
        raise GuestFailedError(f"nbdnfs serve ended with {result.status}:\n{result.stderr}")


@contextlib.contextmanager
def _serving_by_loop(machine: Machine, url: str, name: str, settings: Sequence[str]) -> Iterator[Worker]:
    socket, pid_file = f"{_RUN}/{name}.sock", f"{_RUN}/{name}.pid"
    machine.run(f"mkdir -p {_RUN}; rm -f {socket} {pid_file}")
    argv = ["python3", "-c", _LOOP_SERVER.read_text(), socket, url, *settings]
    server = machine.start(f"echo $$ > {pid_file}; exec {shlex.join(argv)}")
    with _tidy(machine, f"pid=$(cat {pid_file}); kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done", 60):
        waiting = (
            f"until [ -s {pid_file} ]; do sleep 0.1; done; pid=$(cat {pid_file});"
            f" until [ -S {socket} ]; do kill -0 $pid || exit 1; sleep 0.2; done"
        )
        if machine.run(waiting, _SERVE_TIMEOUT_S, check=False).status != 0:
            raise GuestFailedError(f"loop_server.py did not start:\n{server.stderr}")
        pid = int(machine.run(f"cat {pid_file}").stdout)
        yield Worker(socket, pid, pid)
    server.wait()


@contextlib.contextmanager
def attached(machine: Machine, worker: Worker) -> Iterator[str]:
    """Attach the worker's export as a plain block device, and detach it; yields the device."""
    machine.run("modprobe nbd")
    device = machine.run(f"nbdnfs attach {worker.socket}", 90).stdout.strip()
    with _tidy(machine, f"nbdnfs detach {device}"):
        yield device


@contextlib.contextmanager
def swapping(machine: Machine, worker: Worker) -> Iterator[str]:
    """Attach the worker's export, make it swap with the highest priority, and undo both; yields the device."""
    with attached(machine, worker) as device:
        machine.run(f"mkswap {device} && swapon --priority 32767 {device}", 90)
        with _tidy(machine, f"swapoff {device}"):
            yield device


@contextlib.contextmanager
def limited(machine: Machine, limit_mib: int) -> Iterator[str]:
    """A memory cgroup of that size, swap not counted; yields its folder."""
    machine.run(
        "grep -qw memory /sys/fs/cgroup/cgroup.subtree_control || echo +memory > /sys/fs/cgroup/cgroup.subtree_control;"
        f" mkdir -p {_CGROUP} && echo {limit_mib}M > {_CGROUP}/memory.max"
    )
    with _tidy(machine, f"rmdir {_CGROUP}"):
        yield _CGROUP


def stress(
    machine: Machine,
    *,
    size_mib: int,
    timeout_s: float,
    cgroup: str | None = None,
    processes: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> Verdict:
    """The stress program, in a memory cgroup or with the whole machine's memory; its verdict, unchecked."""
    command = f"exec hog --size {size_mib} --processes {processes} --report {machine.verdict_target}"
    hog = machine.start(command + (f" --cgroup {cgroup}" if cgroup else ""), timeout_s)
    try:
        verdict = machine.wait_verdict(hog, timeout_s + 30, on_progress)
    except BaseException:
        hog.kill()
        raise
    hog.wait()
    return verdict


def run(
    machine: Machine,
    url: str,
    *,
    size_mib: int,
    limit_mib: int,
    timeout_s: float,
    tell: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Measured:
    """The whole scenario on a backing file that exists. GuestFailedError or LostGuestError when it breaks off."""
    tell("starting a worker: nbdnfs serve")
    with serving(machine, url) as worker:
        tell("attaching the kernel's device and swapping on: nbdnfs attach, mkswap, swapon")
        with swapping(machine, worker) as device:
            measured = measure(
                machine,
                device,
                worker.nbdkit_pid,
                size_mib=size_mib,
                limit_mib=limit_mib,
                timeout_s=timeout_s,
                tell=tell,
                on_progress=on_progress,
            )
            tell("swapping off and detaching: swapoff, nbdnfs detach")
    return measured


def measure(
    machine: Machine,
    device: str,
    worker_pid: int,
    *,
    size_mib: int,
    limit_mib: int,
    timeout_s: float,
    tell: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Measured:
    """The stress program in a cgroup on a machine that swaps. Errors as `run`."""
    tell(f"swapping to {device}: {size_mib} MiB of pages in a cgroup of {limit_mib} MiB")
    before = counters(machine)
    with limited(machine, limit_mib) as cgroup:
        verdict = stress(machine, size_mib=size_mib, cgroup=cgroup, timeout_s=timeout_s, on_progress=on_progress)
    after = counters(machine)
    locked_kib, resident_kib = memory_of(machine, worker_pid)
    return Measured(
        pages_out=after["pswpout"] - before["pswpout"],
        pages_in=after["pswpin"] - before["pswpin"],
        wrong_pages=verdict.wrong,
        oom_kills=after["oom_kill"] - before["oom_kill"],
        seconds=verdict.seconds,
        locked_kib=locked_kib,
        resident_kib=resident_kib,
        pages=verdict.pages,
        passes=verdict.passes,
    )


def counters(machine: Machine) -> dict[str, int]:
    """pswpin, pswpout and oom_kill (global and in cgroups) since boot: mm/vmstat.c."""
    lines = machine.run("grep -E '^(pswpin|pswpout|oom_kill) ' /proc/vmstat").stdout.splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def memory_events(machine: Machine, cgroup: str) -> dict[str, int]:
    """What a memory cgroup's limit has led to, `max` and `oom_kill` among it: mm/memcontrol.c."""
    lines = machine.run(f"cat {cgroup}/memory.events").stdout.splitlines()
    return {name: int(count) for name, count in map(str.split, lines)}


def memory_of(machine: Machine, pid: int) -> tuple[int, int]:
    """Memory of a process that is locked and there, and all that is there, in KiB.

    Not VmLck: that is the size of the locked mappings, faulted or not, and a worker locks on fault. "Locked" in
    smaps_rollup counts the pages that are there: fs/proc/task_mmu.c.
    """
    lines = machine.run(f"grep -E '^(Locked|Rss):' /proc/{pid}/smaps_rollup").stdout.splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) for line in lines}
    return sizes["Locked:"], sizes["Rss:"]


@contextlib.contextmanager
def _tidy(machine: Machine, undo: str, timeout_s: float = 600) -> Iterator[None]:
    """Run `undo` at the end; after an error only where the machine lives on, and then without a complaint."""
    try:
        yield
    except BaseException:
        if not machine.disposable:
            machine.run(undo, timeout_s, check=False)
        raise
    machine.run(undo, timeout_s)
