# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs run NAME`: from the configuration to the keeper's loop.

Whatever this process imports stays in locked memory. It maps neither the engine nor libnfs (tests/keeper/test_maps.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys

import nbdnfs
from nbdnfs import config, memlock, nfs_url, proc_stat
from nbdnfs.errors import CannotCreateError, NbdnfsError, PermissionDeniedError, UsageError
from nbdnfs.keeper import failures, hibernation, sd_notify
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.real_work import RealWork
from nbdnfs.keeper.records import Records
from nbdnfs.kernel import nbd_device, nbd_driver
from nbdnfs.nas import owner_record
from nbdnfs.worker import nbdkit

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from typing import NoReturn

    from nbdnfs.config import Config

# How the names of the files begin whose code the keeper runs.
CODE = ("python3", "libpython3", "libc.so", "ld-linux", "_memlock.", "_socket.", "_struct.", "select.", "mmap.")

# Free in the heap when the work begins: netlink messages, texts of /proc and /sys, sockets' objects.
_HEAP_BYTES = 1024 * 1024


def run(name: str, *, steal: bool = False) -> int:
    """`nbdnfs run NAME`, to its end; the exit status. Raises NbdnfsError for what no further try can mend.

    `steal` takes the file from another machine that has it.
    """
    settings = config.load(name)
    if os.geteuid() != 0:
        raise PermissionDeniedError("only root can make a swap device", f"sudo nbdnfs run {name}")
    if os.environ.get("PYTHONMALLOC") != "malloc":
        _start_again(name, ["--steal"] if steal else [])
    _lock_memory(settings)
    _survive_shutdown()
    if not os.isatty(2):
        os.set_blocking(2, False)  # a journal that waits for swap is not waited for
    records = Records(name)
    try:
        records.make()
    except OSError as error:
        raise CannotCreateError(f"cannot make {records.path}: {error.strerror}") from None
    notifier = sd_notify.Notifier()
    stored = sd_notify.listen_fds()
    backend = nbd_device.backend_of(name)
    is_attached = nbd_device.find(backend) is not None
    if is_attached and records.read(Records.STATE) == Records.STOLEN:
        raise failures.stolen(name)
    text, address = _server(settings, records, is_attached=is_attached)
    if not is_attached:  # while swap stands still, only what is needed is started
        nbdkit.check_nbdkit()
    nbd_driver.load()
    owner = _has_owner_record(settings, records, is_attached=is_attached)
    settings = dataclasses.replace(settings, owner=owner)
    kernel = nbd_device.NbdKernel(
        backend,
        io_timeout_ms=settings.io_timeout_ms,
        max_sectors_kb=settings.max_sectors_kb,
        device=settings.device or None,
    )
    work = RealWork(settings, text, address, steal=steal)

    def warm_up() -> None:
        if settings.lock != "off":
            _apply(settings, memlock.settle(CODE, heap_bytes=_HEAP_BYTES))

    hibernation.forbid(name)
    try:
        return Keeper(kernel, work, records, notifier, stored=stored, warm_up=warm_up).run()
    except NbdnfsError:
        if nbd_device.find(backend) is None:
            hibernation.permit(name)
        if settings.owner:
            _release_unless_attached(name, text, address)
        raise


def _lock_memory(settings: Config) -> None:
    if settings.lock == "off":
        return
    skip = () if settings.realtime else ("realtime",)
    measures = memlock.prepare() + memlock.lock(CODE, skip=skip)
    _apply(settings, [measure for measure in measures if measure.name not in skip])


def _apply(settings: Config, measures: list[memlock.Measure]) -> None:
    """Raise or report what does not hold, as the configuration's `lock` says."""
    if settings.lock == "required":
        memlock.require(measures)
    else:
        memlock.report(measures)


def _survive_shutdown() -> None:
    """Have argv[0] begin with "@": systemd spares such a process when it kills what is left at shutdown.

    https://systemd.io/ROOT_STORAGE_DAEMONS. A worker's begins so from its start (worker/protocol.py). This one's
    cannot: the kernel gives a script its interpreter's path, and CPython finds its library by it. So it is overwritten
    in place: proc_pid_stat(5), field 48.
    """
    try:
        with open("/proc/self/stat") as stat:
            start = int(proc_stat.fields(stat.read())[proc_stat.ARGUMENTS_ADDRESS])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(b"@")
    except OSError as error:  # a kernel that forbids it: then only the worker is spared
        print(f"nbdnfs: cannot change argv[0], systemd kills the keeper early: {error.strerror}", file=sys.stderr)


def _start_again(name: str, options: list[str]) -> NoReturn:
    """With what only a new process can have: CPython's own allocator maps and unmaps memory all the time."""
    package_folder = os.path.dirname(os.path.dirname(nbdnfs.__file__))
    paths = [package_folder, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execve(sys.executable, [sys.executable, "-m", "nbdnfs", "run", name, *options], environment)


def _server(settings: Config, records: Records, *, is_attached: bool) -> tuple[str, str]:
    """The URL in its canonical form, and the server's address; with the device attached, those of the last keeper: the
    resolver may need what is swapped out, or use a network service that does not answer."""
    known = (records.read(Records.ADDRESS) or "").split("\n")
    if is_attached and len(known) == 2:
        with contextlib.suppress(UsageError):  # a damaged record ends no keeper that has something to keep
            return nfs_url.parse_recorded(known[0]).text, known[1]
        return settings.url, known[1]
    url = nfs_url.parse(settings.url)
    text, address = url.text, url.resolve()
    records.write(Records.ADDRESS, f"{text}\n{address}")
    return text, address


def _has_owner_record(settings: Config, records: Records, *, is_attached: bool) -> bool:
    """Whether the workers look after the owner record. A device that is attached goes on as it was started: a file that
    was not claimed has no record, which a worker would take for a theft."""
    if is_attached:
        return records.read(Records.OWNER) == "yes"
    records.write(Records.OWNER, "yes" if settings.owner else "no")
    return settings.owner


def _release_unless_attached(name: str, text: str, address: str) -> None:
    """After a failure: give the file up where this machine does not use it. Another machine's stays that machine's."""
    if nbd_device.find(nbd_device.backend_of(name)) is not None:
        return
    from nbdnfs.nas import ownership  # loads the engine: there is no swap that this process is needed for any more

    try:
        ownership.release(text, owner_record.keeper_holder(name), owner_record.identity(), address=address)
    except NbdnfsError as error:
        print(f"nbdnfs: {name}: the owner record stays: {error.message}", file=sys.stderr)
