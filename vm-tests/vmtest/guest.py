# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest: QEMU, its kernel log, its command channel and its verdict port. No wait without a deadline."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import shlex
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType

from nbdnfs import proc_stat
from vmtest import host, initramfs, klog, verdict
from vmtest.channel import Channel, JobState
from vmtest.diskless import NetworkRoot
from vmtest.image import Image
from vmtest.journal import TRACEBACK
from vmtest.machine import Job, Result
from vmtest.outcome import GuestFailedError, HungBootError, HungBootWarning, LostGuestError

HOST_ADDRESS = "10.0.2.2"
"""Where a guest reaches the host's 127.0.0.1 (QEMU's user networking)."""


BOOT_TIMEOUT_S = 600.0
SILENCE_S = 120.0
_PING_EVERY_S = 5.0
_TICK_S = 0.1
_LOG_LINES = 25
_BOOT_LOOK_S = 5.0
# proc_pid_stat(5), fields 14 and 15
_USER_TICKS, _SYSTEM_TICKS = 14, 15

# Memory, blocked tasks, all tasks: Documentation/admin-guide/sysrq.rst.
_SYSRQ_TASKS = "mwt"
_SYSRQ_TIMEOUT_S = 60.0
_SYSRQ_QUIET_S = 5.0

# A panic ends QEMU (-no-reboot), a hung task is a line in the log after a minute. The watchdogs are given the
# time that an emulated CPU on a busy host needs. The stock mitigations cost an emulated CPU a third of its speed.
KERNEL_ARGUMENTS = (
    *("loglevel=7", "oops=panic", "panic=-1", "sysctl.kernel.hung_task_timeout_secs=60"),
    "sysctl.kernel.hung_task_all_cpu_backtrace=1",
    *("watchdog_thresh=30", "rcupdate.rcu_cpu_stall_timeout=90", "mitigations=off", "net.ifnames=0"),
    *("systemd.show_status=no", "systemd.log_level=notice", "audit=0"),
)


def seen_from_guest(url: str) -> str:
    """The URL of a server on the host's loopback, as seen from a guest."""
    return url.replace("//127.0.0.1/", f"//{HOST_ADDRESS}/", 1)


def accelerator(time_shift: int | None = None) -> list[str]:
    """QEMU's options for it: $NBDNFS_VM_ACCEL, or emulation; in virtual time always emulation (`Guest`)."""
    if time_shift is None:
        return ["-accel", os.environ.get("NBDNFS_VM_ACCEL", "tcg,thread=multi")]
    return ["-accel", "tcg,thread=single", "-icount", f"shift={time_shift},sleep=on"]


def machine_id(name: str) -> str:
    """The machine id of the guest of that name, in all its boots."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


class GuestJob:
    """A command that runs in a guest. Made by `Guest.start`; see machine.Job."""

    def __init__(self, guest: Guest, command: str, number: int, state: JobState) -> None:
        self._guest = guest
        self._number = number
        self._state = state
        self.command = command
        self.verdicts_before = guest.verdict_path.read_text(errors="replace")
        """What the verdict port had delivered when it was started: from earlier programs."""

    @property
    def running(self) -> bool:
        """Whether it has not ended yet, as far as is known. LostGuestError when the guest is lost."""
        self._guest.check_alive()
        return self._state.status is None

    @property
    def stdout(self) -> str:
        """What it printed so far."""
        return self._state.stdout.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """What it complained about so far."""
        return self._state.stderr.decode(errors="replace")

    def wait(self) -> Result:
        """Wait for its end, which comes by the time that `start` was given.

        LostGuestError when it cannot even be killed. GuestFailedError when the agent had to kill it.
        """
        state = self._state

        def ended() -> bool:
            if state.stuck and state.status is None:
                raise LostGuestError(f"a killed command did not end, it hangs in the kernel: {self.command}")
            return state.status is not None

        self._guest.wait_until(ended, timeout_s=None, what=self.command)
        assert state.status is not None
        if state.timed_out:
            raise GuestFailedError(f"timed out: {self.command}\n{self.stdout}{self.stderr}")
        return Result(self.command, state.status, self.stdout, self.stderr)

    def kill(self) -> None:
        """SIGKILL for its process group. `wait` returns when it has ended."""
        self._guest.channel.kill(self._number)


class Guest:
    """One virtual machine; `with Guest(...) as guest:` boots it, and at the end checks its kernel log and ends it.

    image, payload  what it boots: image.py, payload.py
    workdir         for its overlay disk and its logs
    root            where it has no disk: what it boots from instead, which holds the payload
    memory_mib      its memory
    time_shift      None: its time is the host's. Else it is *virtual* (QEMU's -icount): each instruction that it
                    executes is 2**time_shift ns of it, however long the host needs for that, and while it idles its
                    time goes on with the host's. One CPU then.
    plugin          a plugin of QEMU's TCG, with its arguments
    arguments       more kernel arguments
    disks           more raw disks, as /dev/vdc and on
    forwards        TCP ports of the guest by those of the host's loopback that lead there, also after another boot
    allow           kinds of kernel log lines (klog.KINDS) that this test expects
    silence_s       how long a living guest may be silent

    Everything that waits raises LostGuestError as soon as the guest is dead or has been silent for too long.
    Use it from the thread that made it: QEMU dies with that thread.
    """

    disposable = True
    verdict_target = "/run/guest/verdict"

    def __init__(
        self,
        image: Image,
        payload: Path,
        workdir: Path,
        *,
        name: str = "guest",
        root: NetworkRoot | None = None,
        memory_mib: int = 512,
        cpus: int = 2,
        time_shift: int | None = None,
        plugin: str | None = None,
        network: bool = True,
        arguments: Sequence[str] = (),
        disks: Sequence[Path] = (),
        forwards: Mapping[int, int] = MappingProxyType({}),
        allow: Collection[str] = (),
        silence_s: float = SILENCE_S,
    ) -> None:
        self.image = image
        self.name = name
        self.workdir = workdir
        self.allow = frozenset(allow)
        self.silence_s = silence_s
        self.boot_seconds = 0.0
        """From the start of QEMU to the agent's READY, in the last boot."""
        self._payload = payload
        self._root = root
        self._memory_mib = memory_mib
        self._cpus = cpus if time_shift is None else 1  # with -icount a second one was seen to hang as it came up
        self._time_shift = time_shift
        self._plugin = plugin
        self._network = network
        self._arguments = tuple(arguments)
        self._disks = tuple(disks)
        self._forwards = dict(forwards)
        self._overlay = workdir / f"{name}.qcow2"
        self._boots = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._last_ping = 0.0
        self._asked_since = 0.0

    # Life and death

    def __enter__(self) -> Guest:
        try:
            self.boot()
        except BaseException as error:
            self._close(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.check_kernel_log()
        except BaseException as finding:
            self._close(finding)
            raise
        self._close(error)

    def boot(self) -> None:
        """Start QEMU on the overlay disk (made when there is none) and wait for the agent.

        A new disk without kernel arguments of the test's boots nothing of the project's. Where the kernel hangs in
        that, as Debian's was seen to do once in some hundred boots, there is a HungBootWarning and one more try.
        """
        is_stock = self._root is None and not self._arguments and not self._overlay.exists()
        try:
            self._boot()
        except HungBootError as error:
            if not is_stock:
                raise
            warnings.warn("\n".join([f"one more try: {error}", *self._excerpts()]), HungBootWarning, stacklevel=2)
            self._end_process()
            self._overlay.unlink()
            self._boot()

    def _boot(self) -> None:
        assert self._process is None, "it runs"
        self.workdir.mkdir(parents=True, exist_ok=True)
        if self._root is None and not self._overlay.exists():
            host.run(
                [
                    *(host.find_program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2"),
                    *("-F", "raw", "-b", self.image.disk, self._overlay),
                ],
                what="making an overlay disk",
                timeout_s=30,
            )
        self._boots += 1
        for file in (self.kernel_log_path, self.verdict_path):
            file.touch()
        ours, theirs = socket.socketpair()
        started = looked = time.monotonic()
        with theirs:
            self._process = host.start(self._qemu(theirs.fileno()), output=subprocess.PIPE, pass_fds=[theirs.fileno()])
        self._channel = Channel(ours)

        def is_there() -> bool:
            nonlocal looked
            if self.channel.boot_id is None and time.monotonic() - looked > _BOOT_LOOK_S:
                looked = time.monotonic()
                hung = [finding for finding in klog.scan(self.kernel_log, self.allow) if finding.kind == "hung"]
                if hung:
                    raise HungBootError(f"{self.name} hangs as it boots: {hung[0].line}")
            return self.channel.boot_id is not None

        self.wait_until(is_there, BOOT_TIMEOUT_S, "the boot")
        self.boot_seconds = time.monotonic() - started

    def settle(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until systemd has started all it starts, the network among it. A failed unit does not matter here."""
        self.run("systemctl is-system-running --wait", timeout_s, check=False)

    def shutdown(self, timeout_s: float = 90) -> float:
        """Power off in order; returns the seconds that it took. LostGuestError when the guest does not get there."""
        return self._leave("poweroff", "reboot: Power down", timeout_s)

    def reboot(self, timeout_s: float = 90) -> None:
        """Go down in order and boot again from the same disk; `kernel_log` is that of the new boot then."""
        self._leave("reboot", "reboot: Restarting system", timeout_s)
        self.boot()

    def crash(self) -> None:
        """Pull the plug. The overlay disk keeps what had reached it; `boot` starts from there."""
        self._end_process()

    def _leave(self, verb: str, last_words: str, timeout_s: float) -> float:
        started = time.monotonic()
        self.start(f"systemctl --no-block {verb}", timeout_s=timeout_s)
        assert self._process is not None
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LostGuestError(f"{self.name} is still up {timeout_s:g} s after '{verb}'") from None
        if last_words not in self.kernel_log:
            raise LostGuestError(f"{self.name} died during '{verb}': {self._cause_of_death()}")
        self._end_process()
        self.check_kernel_log()
        return time.monotonic() - started

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _close(self, error: BaseException | None) -> None:
        """End it for good. An error gets a note of the kernel log. A lost guest logs what its tasks do."""
        excerpts = self._excerpts() if self._boots else []
        if isinstance(error, LostGuestError):
            self._log_tasks()
        self._end_process()
        if error is None:
            self._overlay.unlink(missing_ok=True)
        elif self._boots:
            error.add_note("\n".join(excerpts))

    def _excerpts(self) -> list[str]:
        """Of the kernel log: the first finding with what follows, and the end."""
        lines = self.kernel_log.splitlines()
        first = next((number for number, line in enumerate(lines) if klog.scan(line, self.allow)), len(lines))
        found = lines[first : first + _LOG_LINES]
        shown = first + len(found) if found else 0
        return [
            *([f"the first finding in {self.kernel_log_path}:", *found] if found else []),
            *(f"the end of {self.kernel_log_path}:", *lines[max(shown, len(lines) - _LOG_LINES) :]),
        ]

    def _log_tasks(self) -> None:
        """Have a guest that lives, though it is lost, log what each of its tasks waits for."""
        if self._channel is None or self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(OSError):
            self._channel.press_sysrq(_SYSRQ_TASKS)
        deadline = time.monotonic() + _SYSRQ_TIMEOUT_S
        size, changed_s = self.kernel_log_path.stat().st_size, time.monotonic()
        while time.monotonic() < min(deadline, changed_s + _SYSRQ_QUIET_S):
            time.sleep(_TICK_S)
            if (found := self.kernel_log_path.stat().st_size) != size:
                size, changed_s = found, time.monotonic()

    def _qemu(self, channel_fd: int) -> list[str | Path]:
        kind = self.image.architecture
        arguments = [
            f"console={kind.console}",
            *KERNEL_ARGUMENTS,
            *kind.kernel_arguments,
            *(f"systemd.hostname={self.name}", f"systemd.machine_id={machine_id(self.name)}"),
        ]
        disks = [f"format=raw,file={disk}" for disk in self._disks]
        if self._root is not None:
            initrd = initramfs.initrd(self.image, "network")
            arguments += self._root.arguments(HOST_ADDRESS)
        else:
            initrd = initramfs.initrd(self.image)
            disks[:0] = [f"format=qcow2,file={self._overlay}", f"format=raw,readonly=on,file={self._payload}"]
        network = ["-nic", "none"]
        if self._network:
            ports = "".join(f",hostfwd=tcp:127.0.0.1:{ours}-:{its}" for ours, its in self._forwards.items())
            network = ["-netdev", f"user,id=net{ports}", "-device", "virtio-net-pci,netdev=net,romfile="]
        return [
            host.find_program(*kind.qemu),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-machine", kind.machine, "-cpu", kind.cpu, "-smp", str(self._cpus), "-m", f"{self._memory_mib}M"),
            *accelerator(self._time_shift),
            *(() if self._plugin is None else ("-plugin", self._plugin)),
            *("-kernel", self.image.kernel, "-initrd", initrd),
            *("-append", " ".join([*arguments, *self._arguments])),
            *(word for disk in disks for word in ("-drive", f"if=virtio,cache=unsafe,{disk}")),
            *network,
            *("-device", "virtio-rng-pci"),
            *("-chardev", f"file,id=log,path={self.kernel_log_path}", "-serial", "chardev:log"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,fd={channel_fd}"),
            *("-device", "virtserialport,chardev=agent,name=nbdnfs.agent"),
            *("-chardev", f"file,id=verdict,path={self.verdict_path}"),
            *("-device", "virtserialport,chardev=verdict,name=nbdnfs.verdict"),
        ]

    # Its output

    @property
    def kernel_log_path(self) -> Path:
        """The serial console of the last boot."""
        return self.workdir / f"{self.name}.{self._boots}.kernel.log"

    @property
    def kernel_log(self) -> str:
        """The kernel log of the last boot so far."""
        return self.kernel_log_path.read_text(errors="replace")

    @property
    def verdict_path(self) -> Path:
        """What came over the verdict port in the last boot."""
        return self.workdir / f"{self.name}.{self._boots}.verdict.jsonl"

    @property
    def pid(self) -> int:
        """QEMU's, while it runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """The CPU time that this boot has taken of the host. Inside, a CPU that the host gives to others looks busy."""
        found = proc_stat.fields(Path(f"/proc/{self.pid}/stat").read_text())
        return (int(found[_USER_TICKS]) + int(found[_SYSTEM_TICKS])) / os.sysconf("SC_CLK_TCK")

    def check_kernel_log(self) -> None:
        """GuestFailedError when the kernel log holds what the test does not allow."""
        if findings := klog.scan(self.kernel_log, self.allow):
            listed = "\n".join(str(finding) for finding in findings[:20])
            raise GuestFailedError(f"{len(findings)} findings in the kernel log of {self.name}:\n{listed}")

    def wait_verdict(
        self, job: Job, timeout_s: float, on_progress: Callable[[verdict.Progress], None] | None = None
    ) -> verdict.Verdict:
        """The verdict of the stress program that runs as `job`. Check it: `wait_verdict(...).check()`.

        GuestFailedError when it ends without one, or cannot finish. LostGuestError as everywhere.
        """
        shown: verdict.Progress | None = None
        found: verdict.Verdict | None = None

        def over() -> bool:
            nonlocal shown, found
            ended = not job.running
            progress, found = verdict.parse(self._said_since(job))
            if progress != shown and progress is not None and on_progress is not None:
                on_progress(progress)
            shown = progress
            if ended and found is None:
                result = job.wait()
                raise GuestFailedError(f"no verdict: the stress program ended with {result.status}\n{result.stderr}")
            return found is not None

        self.wait_until(over, timeout_s, "the verdict")
        assert found is not None
        return found

    # Commands

    @property
    def channel(self) -> Channel:
        """The command channel of the last boot."""
        assert self._channel is not None, "it does not run"
        return self._channel

    def _said_since(self, job: Job) -> str:
        said = self.verdict_path.read_text(errors="replace")
        return said.removeprefix(job.verdicts_before) if isinstance(job, GuestJob) else said

    def start(self, command: str, timeout_s: float = 3600) -> GuestJob:
        """Start a shell command. The agent kills it, and its process group, after `timeout_s`."""
        try:
            number, state = self.channel.start(command, timeout_s)
        except OSError:
            raise self._lost() from None
        return GuestJob(self, command, number, state)

    def run(self, command: str, timeout_s: float = 60, *, check: bool = True) -> Result:
        """Run a shell command to its end. GuestFailedError when it takes longer, fails and `check` is set, or has a
        traceback."""
        result = self.start(command, timeout_s).wait()
        if TRACEBACK in result.stderr:
            raise GuestFailedError(f"a traceback of: {command}\n{result.stderr}")
        if check and result.status != 0:
            raise GuestFailedError(f"exit status {result.status}: {command}\n{result.stdout}{result.stderr}")
        return result

    def push(self, source: Path, target: str, mode: int = 0o644) -> None:
        """Copy a file into the guest."""
        data = base64.b64encode(source.read_bytes()).decode()
        name = shlex.quote(target)
        self.run(f": > {name} && chmod {mode:o} {name}")
        for offset in range(0, len(data), 64 * 1024):
            self.run(f"base64 -d >> {name} <<'.'\n{data[offset : offset + 64 * 1024]}\n.")

    def pull(self, source: str) -> bytes:
        """The bytes of a file of the guest."""
        return base64.b64decode(self.run(f"base64 {shlex.quote(source)}", timeout_s=120).stdout)

    # Waiting

    def wait_until(self, condition: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        """Wait until `condition()` holds; it is asked whenever something arrives, and ten times a second.

        LostGuestError when the guest is dead or silent, or at the end of `timeout_s`: a wait for a
        living guest gives the deadline to the agent, which keeps it.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if condition():
                return
            self.check_alive()
            if deadline is not None and time.monotonic() > deadline:
                raise LostGuestError(f"{self.name}: {what}: not within {timeout_s:g} s")
            with self.channel.changed:
                self.channel.changed.wait(_TICK_S)

    def check_alive(self) -> None:
        """LostGuestError unless the guest runs and has sent something lately."""
        channel = self.channel
        if channel.closed or self._process is None or self._process.poll() is not None:
            raise self._lost()
        if channel.boot_id is None:
            return
        now = time.monotonic()
        if now - self._last_ping > self.silence_s / 2:
            self._asked_since = now  # no ping was sent for a while; silence means that pings are not answered
        if now - self._last_ping > _PING_EVERY_S:
            self._last_ping = now
            with contextlib.suppress(OSError):
                channel.ping()
        if now - max(channel.last_received_s, self._asked_since) > self.silence_s:
            raise LostGuestError(f"{self.name} has been silent for {self.silence_s:g} s")

    def _lost(self) -> LostGuestError:
        return LostGuestError(f"{self.name} died: {self._cause_of_death()}")

    def _cause_of_death(self) -> str:
        """The line of the kernel log, or of QEMU, that best explains its death."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        findings = klog.scan(self.kernel_log)
        fatal = [finding for finding in findings if finding.kind in ("panic", "oops")]
        if fatal:
            return str(fatal[0])
        said = b""
        if self._process is not None and self._process.poll() is not None and self._process.stdout is not None:
            said = self._process.stdout.read()
        if said.strip():
            return said.decode(errors="replace").strip().splitlines()[-1]
        return (self.kernel_log.strip().splitlines() or ["its kernel logged nothing"])[-1]
