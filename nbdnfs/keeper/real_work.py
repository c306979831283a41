# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `nbdnfs run NAME` is made of on a real machine: configuration, memory, workers and helpers for the keeper."""

from __future__ import annotations

import dataclasses
import mmap
import os
import sys
from pathlib import Path
from typing import NoReturn

import nbdnfs
from nbdnfs import config, memlock, nfs_url
from nbdnfs import region as shared_region
from nbdnfs.config import Config
from nbdnfs.errors import CannotCreateError, NbdnfsError, PermissionDeniedError
from nbdnfs.keeper import keeper, sd_notify, worker_handle
from nbdnfs.keeper import records as run_dir
from nbdnfs.keeper.keeper import Helper, Keeper
from nbdnfs.keeper.records import RunDir
from nbdnfs.keeper.worker_handle import WorkerProcess
from nbdnfs.kernel import link, swap_area
from nbdnfs.kernel.link import Attached
from nbdnfs.nas import owner_record
from nbdnfs.worker import nbdkit

# How the names of the files begin whose code the keeper runs.
CODE = ("python3", "libpython3", "libc.so", "ld-linux", "_memlock.", "_socket.", "_struct.", "select.", "mmap.")

_ADDRESS_BYTES = 128

# Free in the heap when the work begins: netlink messages, texts of /proc and /sys, sockets' objects.
_HEAP_BYTES = 1024 * 1024


def plugin_settings(settings: Config, text: str, address: str) -> dict[str, str]:
    """The plugin's key=value settings. `text` is the URL as libnfs is to get it, `address` the server's."""
    return {
        "url": text,
        "address": address,
        "engine": "c",
        "lock": settings.lock,
        "realtime": "yes" if settings.realtime else "no",
        "region_pages": str(settings.region_pages),
        "connections": str(settings.connections),
        "stable_writes": str(int(settings.stable_writes)),
        "read_ahead_pages": str(settings.read_ahead_pages),
        "soft_limit_ms": str(settings.soft_limit_ms if settings.recovery == "soft" else 0),
        "gone_limit_ms": str(settings.gone_limit_ms),
        **(nbdkit.owner_settings(text) if settings.owner else {}),
    }


class RealWork:
    """keeper.Work: nbdkit, `nbdnfs create` and swap_area as processes of their own. Read-only once initialized."""

    def __init__(self, settings: Config, text: str, address: str, *, steal: bool = False) -> None:
        """Find the program and make its arguments now. ConfigError or UnavailableError when something is missing.

        steal  take the file from another machine that has it
        """
        self._settings = settings
        self._text, self._address = text, address
        self._answer = -1
        self._steal = steal
        self._program, self._argv = nbdkit.standby_command(
            plugin_settings(settings, text, address), threads=settings.threads
        )
        # less $NOTIFY_SOCKET and the like: nobody else is to speak for the keeper
        self._environment = {
            key: value
            for key, value in nbdkit.worker_environment().items()
            if not key.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))
        }

    def start_worker(self, region_fd: int) -> WorkerProcess:
        return WorkerProcess.start(self._program, self._argv, self._environment, region_fd)

    def take_worker(self, parked: int) -> WorkerProcess | None:
        return WorkerProcess.take(parked, worker_handle.making(self._argv))

    def provision(self) -> Helper | None:
        """The file made where it is missing and the configuration says how large it is to be, and claimed."""
        settings = self._settings
        if not settings.size_bytes and not settings.owner:
            return None
        options = [f"--size={settings.size_bytes}"] if settings.size_bytes else []
        if settings.owner:
            options += [f"--holder={owner_record.keeper_holder(settings.name)}", *(["--steal"] if self._steal else [])]
        return self._python("nbdnfs", "claim", settings.url, *options)

    def swap_on(self, attached: Attached) -> Helper:
        """swap_area."""
        priority = "-" if self._settings.priority is None else str(self._settings.priority)
        flags = ["--discard"] if self._settings.discard else []
        return self._python("nbdnfs.kernel.swap_area", attached.path, priority, self._settings.name, *flags)

    def is_swapped_on(self, attached: Attached) -> bool:
        return swap_area.find(attached.path) is not None

    def is_server_away(self, region: mmap.mmap) -> bool:
        """What the region's counter `disconnected` says."""
        return shared_region.is_disconnected(region)

    def resolve(self) -> Helper:
        """Look the server's name up again. It answers on a pipe: a file in /run may have been swapped out."""
        self._forget_answer()
        self._answer, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return self._python(
                "nbdnfs.keeper.helpers.resolve_server", self._settings.name, self._text, self._address, stdout=theirs
            )
        finally:
            os.close(theirs)

    def resolved(self) -> str:
        """The server's new address, when the helper has ended; "" when it has none, or none that answers."""
        try:
            address = os.read(self._answer, _ADDRESS_BYTES).decode(errors="replace").strip()
        except OSError:
            address = ""
        self._forget_answer()
        self._address = address or self._address
        return address

    def _forget_answer(self) -> None:
        if self._answer >= 0:
            os.close(self._answer)
        self._answer = -1

    def _python(self, module: str, *arguments: str, stdout: int = 2) -> Helper:
        return Helper([sys.executable, "-m", module, *arguments], self._environment, stdout=stdout)


def run(name: str, *, steal: bool = False) -> int:
    """`nbdnfs run NAME`, to its end; the exit status. Raises NbdnfsError for what no further try can mend.

    `steal` takes the file from another machine that has it.
    """
    settings = config.load(name)
    if os.geteuid() != 0:
        raise PermissionDeniedError("only root can make a swap device", f"sudo nbdnfs run {name}")
    if os.environ.get("PYTHONMALLOC") != "malloc":
        _start_anew(name, ["--steal"] if steal else [])
    measures = []
    if settings.lock != "off":
        skip = () if settings.realtime else ("realtime",)
        measures = memlock.prepare() + memlock.lock(CODE, skip=skip)
        _heed(settings, [measure for measure in measures if measure.name not in skip])
    _outlive_shutdown()
    if not os.isatty(2):
        os.set_blocking(2, False)  # a journal that waits for swap is not waited for
    records = RunDir(name)
    try:
        records.make()
    except OSError as error:
        raise CannotCreateError(f"cannot make {records.path}: {error.strerror}") from None
    notifier = sd_notify.Notifier()
    stored = sd_notify.stored()
    backend = link.backend_of(name)
    adopting = link.find(backend) is not None
    if adopting and records.read(run_dir.STATE) == run_dir.LOST:
        raise keeper.lost(name)
    text, address = _server(settings, records, adopting=adopting)
    if not adopting:  # with swap standing still, nothing is started that need not be
        nbdkit.check_nbdkit()
    link.load_driver()
    settings = dataclasses.replace(settings, owner=_owns(settings, records, adopting=adopting))
    kernel = link.Link(
        backend,
        io_timeout_ms=settings.io_timeout_ms,
        max_sectors_bytes=settings.max_sectors_kb * 1024,
        wanted=settings.device or None,
    )
    work = RealWork(settings, text, address, steal=steal)

    def warm_up() -> None:
        if settings.lock != "off":
            _heed(settings, memlock.settle(CODE, heap_bytes=_HEAP_BYTES))

    try:
        return Keeper(kernel, work, records, notifier, stored=stored, warm_up=warm_up).run()
    except NbdnfsError:
        if settings.owner:
            _give_up_unless_attached(name, text, address)
        raise


def _outlive_shutdown() -> None:
    """Have argv[0] begin with "@": systemd spares such a process when it kills what is left at shutdown.

    https://systemd.io/ROOT_STORAGE_DAEMONS; the worker's does from the start (worker_process.NAME). Ours cannot: the
    kernel gives a script its interpreter's path, and CPython finds its library by it. So it is overwritten, in
    place: proc_pid_stat(5), field 48.
    """
    try:
        with open("/proc/self/stat") as stat:
            start = int(stat.read().rpartition(")")[2].split()[48 - 3])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(b"@")
    except OSError as error:  # a kernel that forbids it: then the worker alone is spared
        print(f"nbdnfs: argv[0] stays as it is: {error.strerror}", file=sys.stderr)


def _start_anew(name: str, options: list[str]) -> NoReturn:
    """With the memory settings that only a new process can have: CPython's own allocator maps and unmaps."""
    paths = [str(Path(nbdnfs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execve(sys.executable, [sys.executable, "-m", "nbdnfs", "run", name, *options], environment)


def _server(settings: Config, records: RunDir, *, adopting: bool) -> tuple[str, str]:
    """The URL as libnfs is to get it, and the server's address: with swap in use, the one that the last keeper had.

    The resolver may need what is swapped out, or be reached over what no longer answers.
    """
    known = (records.read(run_dir.ADDRESS) or "").split("\n")
    if adopting and len(known) == 2:
        return known[0], known[1]
    parsed = nfs_url.parse(settings.url)
    text, address = parsed.text, parsed.resolve()
    records.write(run_dir.ADDRESS, f"{text}\n{address}")
    return text, address


def _owns(settings: Config, records: RunDir, *, adopting: bool) -> bool:
    """Whether the workers are to see to the owner record. A device that is there goes on as it was begun: a file that
    nobody has claimed has no record, which a worker would take for a theft."""
    if adopting:
        return records.read(run_dir.OWNER) == "yes"
    records.write(run_dir.OWNER, "yes" if settings.owner else "no")
    return settings.owner


def _give_up_unless_attached(name: str, text: str, address: str) -> None:
    """After a failure: a file that nothing here uses is anybody's. Where it was another machine's, it stays so."""
    if link.find(link.backend_of(name)) is not None:
        return
    from nbdnfs.nas import ownership  # nothing is locked for the sake of swap any more

    try:
        ownership.release(
            text.replace("%", "%%"), owner_record.keeper_holder(name), owner_record.identity(), address=address
        )
    except NbdnfsError as error:
        print(f"nbdnfs: {name}: the owner record stays: {error.message}", file=sys.stderr)


def _heed(settings: Config, measures: list[memlock.Measure]) -> None:
    if settings.lock == "required":
        memlock.require(measures)
    else:
        memlock.report(measures)
