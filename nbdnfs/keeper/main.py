# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs run NAME`: from the configuration to the keeper's loop.

Whatever this process imports stays in locked memory. It maps neither the engine nor libnfs (tests/keeper/test_maps.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import time

from nbdnfs import config, memlock, nfs_url, proc_stat, programs
from nbdnfs.errors import (
    NbdnfsError,
    NoHostError,
    OwnedError,
    PermissionDeniedError,
    UnavailableError,
    UnreadableError,
    UsageError,
)
from nbdnfs.keeper import failures, hibernation, journal, last_good, only_keeper, sd_notify
from nbdnfs.keeper.heir import Heir
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.real_work import RealWork, has_loop
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.kernel import nbd_device, nbd_driver
from nbdnfs.kernel import state as kernel_state
from nbdnfs.nas import owner_record
from nbdnfs.own_root import OwnRoot
from nbdnfs.worker import nbdkit

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from typing import NoReturn

    from nbdnfs.config import Config
    from nbdnfs.kernel.nbd_device import Attached
    from nbdnfs.nfs_url import NfsUrl

# How the names of the files begin whose code the keeper runs.
# LC_CTYPE is the table of characters of another locale than C, which a unit of an earlier release sets.
CODE = (
    *("python3", "libpython3", "libc.so", "ld-linux"),
    *("_memlock.", "_own_root.", "_spawner.", "_heir.", "_socket.", "_struct.", "select.", "mmap.", "LC_CTYPE"),
)

# At boot: a server that has lost its power as well may answer before its disks are mounted, and a new file would land
# below the disk that has the old one. Long enough for file systems to be checked; the boot waits three minutes at most.
_NEW_FILE_AFTER_S = 150.0

# Free in the heap when the work begins: netlink messages, texts of /proc and /sys, sockets' objects.
_HEAP_BYTES = 1024 * 1024


def run(name: str, *, steal: bool = False) -> int:
    """`nbdnfs run NAME`, to its end; the exit status. Raises NbdnfsError for what no further try can mend.

    `steal` takes the file from another machine that has it. Under systemd, where another try may mend it, this returns
    the exit status late, so that the unit does not start the next keeper too soon.
    """
    started_s = time.monotonic()
    config.check_name(name)
    if os.geteuid() != 0:
        raise PermissionDeniedError("only root can make a swap device", f"sudo nbdnfs run {name}")
    if os.environ.get("PYTHONMALLOC") != "malloc":
        _start_again(name, ["--steal"] if steal else [])
    records = Records(name)
    reporter = Reporter(records, sd_notify.Notifier(), journal.Journal())
    try:
        _require_kernel_files()
        only_keeper.become(records)  # before anything that another keeper of the device could notice
        return _run(records, reporter, steal=steal)
    except only_keeper.OtherKeeperError as error:
        if not _is_unit():
            raise
        # Not final: that keeper may end, and then the unit's is wanted. The records are the other's to write.
        print(*error.lines(), sep="\n", file=sys.stderr)
        _keep_pace(started_s, failures.KEEPER_PACE_AGAIN_S)
        return os.EX_UNAVAILABLE
    except NbdnfsError as error:
        is_unit = _is_unit()
        if is_unit and not isinstance(error, OwnedError) and not _is_surely_detached(name):
            error.exit_code = os.EX_UNAVAILABLE  # nothing that is attached is given up
        if error.exit_code in failures.FINAL_STATUSES or not is_unit:
            reporter.all_is_well()  # the next one is started by a person, who wants to read why it ends
            records.put(Records.REFUSED, "\n".join(text for text in (error.message, error.hint) if text))
            raise
        reporter.wait_for(error.message)
        is_new = reporter.complain(error.message, error.message)
        if is_new and error.hint:
            reporter.say(error.hint)
        _keep_pace(started_s, failures.KEEPER_PACE_S if is_new else failures.KEEPER_PACE_AGAIN_S)
        return error.exit_code
    except Exception:
        if _is_unit():
            _keep_pace(started_s, failures.KEEPER_PACE_S)
        raise


def _run(records: Records, reporter: Reporter, *, steal: bool) -> int:
    name = records.name
    backend = nbd_device.backend_of(name)
    attached = _attached(name)
    is_attached = attached is not None
    settings, problem = last_good.load(records, is_attached=is_attached)
    _lock_memory(settings)
    programs.prepare_to_spawn()  # after that: the thread inherits some of it
    _survive_shutdown()
    if not os.isatty(2):
        os.set_blocking(2, False)  # a journal that waits for swap is not waited for
    _reserve_records(records, is_attached=is_attached)
    if problem:
        reporter.complain(problem, problem)
    records.put(Records.CONFIG_ERROR, problem)
    records.put(Records.REFUSED, "")
    stored = sd_notify.listen_fds()
    if is_attached and failures.read_patiently(records, Records.STATE) == Records.STOLEN:
        raise failures.stolen(name)
    text, address = _server(settings, records, reporter, is_attached=is_attached)
    if not is_attached:  # while swap stands still, only what is needed is started
        nbdkit.check_nbdkit()
    nbd_driver.load()
    owner = _has_owner_record(settings, records, is_attached=is_attached)
    settings = dataclasses.replace(settings, url=text, owner=owner)
    kernel = nbd_device.NbdKernel(
        backend,
        io_timeout_ms=settings.io_timeout_ms,
        max_sectors_kb=settings.max_sectors_kb,
        device=settings.device or None,
    )
    new_file_after_s = _NEW_FILE_AFTER_S if not is_attached and settings.size_bytes and _is_booting() else 0.0
    work = RealWork(
        dataclasses.replace(settings, loop=_has_loop(settings, attached, reporter)),
        text,
        address,
        steal=steal,
        new_file_after_s=new_file_after_s,
    )

    own_root = OwnRoot(reporter.say)

    def warm_up() -> None:
        if settings.lock != "off":
            _apply(settings, memlock.settle(CODE, heap_bytes=_HEAP_BYTES))
        own_root.enter()

    config_text = last_good.to_text(settings)
    hibernation.forbid(name)
    try:
        with failures.of_machine(name):
            heir = Heir(records, reporter, lambda attached: nbd_device.Reconnection(attached, backend))
            keeper = Keeper(
                kernel, work, records, reporter, stored=stored, config_text=config_text, warm_up=warm_up, heir=heir
            )
            try:
                return keeper.run()
            finally:
                own_root.leave()
    except NbdnfsError:
        if _is_surely_detached(name):
            hibernation.permit(name)
        if settings.owner:
            _release_unless_attached(name, text, address)
        raise


def _is_unit() -> bool:
    """Whether systemd has started this process, rather than one that inherits a unit's environment: a shell in a
    terminal has an INVOCATION_ID, too. systemd.exec(5)."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def _keep_pace(started_s: float, pace_s: float) -> None:
    time.sleep(max(0.0, started_s + pace_s - time.monotonic()))


def _require_kernel_files() -> None:
    """UnavailableError without /proc and /sys: what is attached, and what is in use as swap, could not be seen."""
    for path in ("/proc/self/stat", "/sys/block"):
        if not os.path.exists(path):
            folder = "/".join(path.split("/")[:2])
            kind = "proc" if folder == "/proc" else "sysfs"
            raise UnavailableError(f"{folder} is not mounted", f"mount -t {kind} {kind} {folder}")


def _attached(name: str) -> Attached | None:
    return failures.patiently(lambda: nbd_device.find(nbd_device.backend_of(name)))


def _has_loop(settings: Config, attached: Attached | None, reporter: Reporter) -> bool:
    state = None if attached is None else failures.patiently(lambda: kernel_state.nbd_device(attached.name))
    largest_kib = None if state is None else state.max_sectors_kb
    found = has_loop(settings, processors=len(os.sched_getaffinity(0)), attached_kib=largest_kib)
    if settings.loop and not found:
        reporter.say(
            f"the device sends requests of up to {largest_kib} KiB, too large for loop = true: nbdkit's threads serve"
            f" it until nbdnfs down {settings.name} and the next start"
        )
    return found


def _is_surely_detached(name: str) -> bool:
    """For what follows an error, which stays the one that is raised: a device of which nothing is known is attached."""
    try:
        return _attached(name) is None
    except UnreadableError:
        return False


def _reserve_records(records: Records, *, is_attached: bool) -> None:
    """Room for all records, before there is swap. With swap, what cannot be written stays in the keeper's memory."""
    try:
        records.reserve()
    except OSError as error:
        if not is_attached:
            raise UnavailableError(
                f"no room for records in {records.path}: {error.strerror}", "make /run writable, and free space there"
            ) from None


def _is_booting() -> bool:
    """Whether systemd starts this as a part of the boot. False without systemd."""
    if not os.path.isdir("/run/systemd/system"):  # sd_booted(3)
        return False
    command = ["/bin/sh", "-c", "systemctl is-system-running || :"]
    try:
        return programs.run(command, what="asking systemd", timeout_s=10.0).strip() in ("initializing", "starting")
    except NbdnfsError:
        return False


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
    """With what only a new process can have: CPython's own allocator maps and unmaps memory all the time, the
    dynamic linker looks a function up at its first call, and another locale has a table of characters in a file. The
    unit sets all of these."""
    command = programs.python("nbdnfs", "run", name, *options)
    added = {"PYTHONMALLOC": "malloc", "LD_BIND_NOW": "1", "LC_ALL": "C", "PYTHONUTF8": "1"}
    os.execve(command[0], command, {**programs.python_environment(), **added})


def _server(settings: Config, records: Records, reporter: Reporter, *, is_attached: bool) -> tuple[str, str]:
    """The URL in its canonical form, and the server's address; with the device attached, those of the last keeper: the
    resolver may need what is swapped out, or use a network service that does not answer."""
    known = (failures.read_patiently(records, Records.ADDRESS) or "").split("\n")
    if is_attached and len(known) == 2:
        with contextlib.suppress(UsageError):  # a damaged record ends no keeper that has something to keep
            return nfs_url.parse_recorded(known[0]).text, known[1]
        return settings.url, known[1]
    url = nfs_url.parse(settings.url)
    address = _resolve(url, reporter)
    try:
        only_keeper.record_address(records, url.text, address, is_attached=is_attached)
    except OSError as error:
        raise UnavailableError(
            f"cannot record the server's address in {records.path}: {error.strerror}", failures.room_in_run(error)
        ) from None
    return url.text, address


def _resolve(url: NfsUrl, reporter: Reporter) -> str:
    """The server's address, however long that takes: at boot the name service may come up later than this."""
    for tries in itertools.count():
        try:
            address = url.resolve()
        except NoHostError as error:
            reporter.complain(error.message, f"{error.message}; trying again until it is known")
            reporter.wait_for(error.message)
            time.sleep(failures.pause_s(tries + 1))
        else:
            reporter.wait_for("")
            return address
    raise AssertionError


def _has_owner_record(settings: Config, records: Records, *, is_attached: bool) -> bool:
    """Whether the workers look after the owner record. A device that is attached goes on as it was started: a file that
    was not claimed has no record, which a worker would take for a theft."""
    if is_attached and (recorded := failures.read_patiently(records, Records.OWNER)) is not None:
        return recorded == "yes"
    records.put(Records.OWNER, "yes" if settings.owner else "no")
    return settings.owner


def _release_unless_attached(name: str, text: str, address: str) -> None:
    """After a failure: give the file up where this machine does not use it. Another machine's stays that machine's."""
    if not _is_surely_detached(name):
        return
    try:
        from nbdnfs.nas import ownership  # loads the engine: there is no swap that this process is needed for any more

        ownership.release(text, owner_record.keeper_holder(name), owner_record.identity(), address=address)
    except NbdnfsError as error:
        print(f"nbdnfs: {name}: the owner record stays: {error.message}", file=sys.stderr)
