# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory discipline: a process that serves swap must not allocate memory, wait for memory, or be killed for memory.

`prepare` is for the start of the process, before it has threads; `lock` for the final process (a fork drops locks,
mlock(2)); `settle` for when everything is loaded. Each measure checks that it took effect and is reported as a
`Measure`. docs/memory-pressure.md says what each prevents, and which kernel function makes it necessary.

What this module imports stays in the locked worker: only what CPython has loaded at its start, `resource`, and
modules that import nothing more. (`dataclasses` alone is 2.5 MiB of heap, `pathlib` 1.7, `re` 1.)
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import sys

from nbdnfs import _memlock, defaults, proc_stat
from nbdnfs.errors import ConfigError

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

THREAD_STACK_BYTES = 256 * 1024

# Free and touched in the heap before the first request. nbdkit allocates a buffer of the largest request for each
# thread (128 KiB).
HEAP_BYTES = defaults.THREADS * 128 * 1024 + 512 * 1024
# On top of that, where transfers go through libnfs (NFSv4): it allocates each call and each answer, all of which a slow
# server has under way at once. That is 128 KiB for each of twelve large write-backs and of four connections' answers,
# and what lies between.
LIBNFS_HEAP_BYTES = 5 * 1024 * 1024 // 2
_TOP_PAD_BYTES = 1024 * 1024

# The lowest real-time priority: enough to run before all ordinary tasks, and to allocate below the min watermark
# (mm/page_alloc.c: gfp_to_alloc_flags gives real-time tasks more of the reserve), without starving kernel threads.
REALTIME_PRIORITY = 1
OOM_IMMUNE = -1000  # include/uapi/linux/oom.h: OOM_SCORE_ADJ_MIN

# Start and length of what is read only to load a library or to unwind, in order; known from `lock` on.
_linker_tables: list[tuple[int, int]] = []

# include/uapi/linux/capability.h
_CAP_DAC_READ_SEARCH, _CAP_NET_BIND_SERVICE, _CAP_IPC_LOCK = 2, 10, 14

NAMES = ("malloc", "stacks", "core dump", "gc", "code", "heap", "lock", "io flusher", "oom", "realtime", "awake")


class Measure:
    """One measure: whether it is in force, what was found, and what to do where it is not ("" where it is)."""

    __slots__ = ("found", "hint", "name", "ok")

    def __init__(self, name: str, ok: bool, found: str, hint: str = "") -> None:
        self.name = name
        self.ok = ok
        self.found = found
        self.hint = hint

    def line(self) -> str:
        """As a warning."""
        return f"'{self.name}' is not in force: {self.found}" + (f" ({self.hint})" if self.hint else "")


def prepare(skip: Iterable[str] = ()) -> list[Measure]:
    """What must be done before there are threads: malloc and their stacks. `skip`: NAMES to leave out."""
    return list(_run({"malloc": _malloc, "stacks": _stacks}, skip))


def lock(code: Iterable[str], *, skip: Iterable[str] = (), one_cpu: bool = False) -> list[Measure]:
    """In the final process, before it starts its threads: they inherit some of the measures.

    code     prefixes of the names of the files whose code it will run; pages of all other files are dropped first
    one_cpu  real-time threads stay on one CPU, see _realtime(); processes that this one starts inherit that
    """
    return list(
        _run(
            {
                "core dump": _core_dump,
                "lock": lambda: _lock(code),
                "io flusher": _io_flusher,
                "oom": _oom,
                "realtime": lambda: _realtime(one_cpu),
                "awake": _awake,
            },
            skip,
        )
    )


def settle(
    code: Iterable[str], *, heap_bytes: int = HEAP_BYTES, touched: Iterable[str] = (), skip: Iterable[str] = ()
) -> list[Measure]:
    """Once everything that stays is loaded and allocated: touch the memory that will be needed on top.

    touched  names like those of `code`, of files that keep the pages that are there, and get no more
    """
    return list(_run({"gc": _gc, "code": lambda: _code(code, touched), "heap": lambda: _heap(heap_bytes)}, skip))


def drop_privileges() -> None:
    """Give up, for good, what a worker does not need any more. It parses what a server answers.

    What stays: CAP_NET_BIND_SERVICE, for connections from a reserved port; CAP_IPC_LOCK, where there is a limit on
    locked memory; CAP_DAC_READ_SEARCH, where root cannot read this program without it (a checkout in a home directory),
    because what explains an error is loaded then. Of this thread and those that it starts, so before there are others.
    OSError: the kernel refuses.
    """
    keep = 1 << _CAP_NET_BIND_SERVICE
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        keep |= 1 << _CAP_IPC_LOCK
    readable = 1 << _CAP_DAC_READ_SEARCH
    _memlock.keep_capabilities(keep | readable, keep)
    if os.access(__file__, os.R_OK, effective_ids=True):
        readable = 0
    _memlock.keep_capabilities(keep | readable, keep | readable)


def use_locale_c() -> None:
    """Have libc use the table of characters that it has itself, for good, instead of a file's, which would have to be
    locked: 350 KiB for C.UTF-8. What Python has taken from the locale stays, such as UTF-8 for names of files; but the
    encoding of a text file must be given from here on. Before there are threads, which keep what they began with.
    """
    _memlock.use_locale_c()


def outlive_parent() -> None:
    """Undo prctl(PR_SET_PDEATHSIG) of the main thread, which must be the caller."""
    _memlock.outlive_parent()


def hold_end_signals() -> None:
    """Keep SIGHUP, SIGINT, SIGQUIT and SIGTERM waiting until `end_at_once`. Before there are threads."""
    _memlock.hold_end_signals()


def end_at_once() -> None:
    """Have these signals end this process as SIGKILL does, also one that has come since `hold_end_signals`.

    nbdkit's handler has it fail each request from then on (ESHUTDOWN), and end once there was one for each thread. To
    the kernel that is an I/O error of its swap.
    """
    _memlock.end_at_once()


def require(measures: Iterable[Measure]) -> None:
    """Raise ConfigError when one of the measures is not in force."""
    missing = [measure for measure in measures if not measure.ok]
    if missing:
        raise ConfigError(
            "swap would not be safe here: " + "; ".join(f"{measure.name}: {measure.found}" for measure in missing),
            missing[0].hint,
        )


def _run(steps: dict[str, Callable[[], Measure]], skip: Iterable[str]) -> Iterator[Measure]:
    skip = set(skip)
    for name, step in steps.items():
        if name in skip:
            yield Measure(name, False, "switched off")
            continue
        try:
            yield step()
        except OSError as error:
            yield Measure(name, False, error.strerror or str(error), _hint(name, error))


def _hint(name: str, error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        needs = {"lock": "CAP_IPC_LOCK", "realtime": "CAP_SYS_NICE"}.get(name, "CAP_SYS_RESOURCE")
        return f"run it as root, with {needs}"
    if name == "lock" and error.errno == errno.ENOMEM:
        return "raise RLIMIT_MEMLOCK, or run it with CAP_IPC_LOCK"
    if error.errno == errno.EINVAL:
        return "the kernel is too old: nbdnfs needs Linux 5.14"
    return ""


def _malloc() -> Measure:
    _memlock.tune_malloc(_TOP_PAD_BYTES)
    if os.environ.get("PYTHONMALLOC") != "malloc":
        return Measure(
            "malloc", False, "CPython uses an allocator of its own", "set PYTHONMALLOC=malloc before it starts"
        )
    return Measure("malloc", True, "one arena, never mapped or trimmed; CPython uses it too")


def _stacks() -> Measure:
    _memlock.set_default_stack(THREAD_STACK_BYTES)
    found = _memlock.get_default_stack()
    return Measure("stacks", found == THREAD_STACK_BYTES, f"{found // 1024} KiB for each thread")


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:  # of a worker's locale, see use_locale_c()
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _core_dump() -> Measure:
    """The pages that pass through are the memory of other processes: no dump may contain them, not even a piped one."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _write("/proc/self/coredump_filter", "0")
    found = int(_read("/proc/self/coredump_filter"), 16)
    return Measure("core dump", found == 0, "holds no memory" if found == 0 else f"filter is {found:#x}")


def _gc() -> Measure:
    gc.collect()
    gc.freeze()
    gc.disable()
    return Measure("gc", not gc.isenabled(), "off" if not gc.isenabled() else "on")


def _lock(code: Iterable[str]) -> Measure:
    """mlockall(2), for what is touched."""
    _linker_tables.extend(sorted(_memlock.linker_tables()))  # first: it touches each library
    _drop_all_but(code)
    _memlock.lock_on_fault()
    locked = _read("/proc/self/status").partition("\nVmLck:")[2].split(maxsplit=1)[0]
    return Measure("lock", locked != "0", f"{locked} KiB mapped, locked once touched")


def _drop_all_but(code: Iterable[str]) -> None:
    """Drop the pages of files that nothing needs any more: the dynamic linker alone has touched them, to load a library
    or to look a function up. Of the files that `code` names, that is the linker's tables."""
    names = tuple(code)
    for mapping in list(_file_mappings()):
        if not mapping.is_clean or mapping.permissions not in ("r-xp", "r--p", "r--s"):
            continue
        kept = _without(mapping.start, mapping.length, _linker_tables) if mapping.name.startswith(names) else ()
        for start, length in _without(mapping.start, mapping.length, list(kept)):
            _memlock.drop(start, length)


class _Mapping:
    """A mapping of a file, from /proc/self/smaps (proc_pid_smaps(5)). `is_clean`: it is as the file has it."""

    __slots__ = ("is_clean", "length", "name", "permissions", "start")

    def __init__(self, header: list[str]) -> None:
        start, _, end = header[0].partition("-")
        self.start = int(start, 16)
        self.length = int(end, 16) - self.start
        self.permissions = header[1]
        self.name = header[5].rpartition("/")[2]
        self.is_clean = True


def _file_mappings() -> Iterator[_Mapping]:
    mapping = None
    for line in _read("/proc/self/smaps").splitlines():
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):
            mapping = _Mapping(fields) if len(fields) == 6 and fields[5].startswith("/") else None
        elif mapping is not None and fields[0] in ("Anonymous:", "Swap:"):  # in memory, or swapped out
            mapping.is_clean = mapping.is_clean and fields[1] == "0"
        elif mapping is not None and fields[0] == "VmFlags:":
            yield mapping


def _code(names: Iterable[str], touched: Iterable[str]) -> Measure:
    """Read in the code and the constants of every mapped file whose name begins with one of `names`, and drop what has
    been read of others since they were locked: the linker has looked into all of them for each library that came later.

    Under MCL_ONFAULT code that never ran is still on the disk, and on an NFS root that is a deadlock. Not the tables of
    relocations and symbols, which the dynamic linker has read to load a library and to bind its functions
    (LD_BIND_NOW), and not those of how functions are unwound, which C++ needs: together 1.3 MiB of libpython.
    """
    names = tuple(names)
    _drop_all_but((*names, *touched))
    total_bytes = 0
    for mapping in list(_file_mappings()):
        if mapping.name.startswith(names) and mapping.permissions[0] == "r":
            for start, length in _without(mapping.start, mapping.length, _linker_tables):
                _memlock.populate(start, length)
                total_bytes += length
    return Measure("code", total_bytes > 0, f"{total_bytes // 1024} KiB of code and constants read in")


def _without(start: int, length: int, holes: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts (start, length) of a range that are in none of the `holes`, which are in order and do not overlap."""
    end = start + length
    for hole_start, hole_length in holes:
        if start < hole_start + hole_length and hole_start < end:
            if start < hole_start:
                yield start, hole_start - start
            start = hole_start + hole_length
    if start < end:
        yield start, end - start


def _heap(heap_bytes: int) -> Measure:
    _memlock.extend_heap(heap_bytes)
    return Measure("heap", True, f"{heap_bytes // 1024} KiB touched and free")


def _io_flusher() -> Measure:
    _memlock.set_io_flusher()
    ok = proc_stat.is_io_flusher(int(proc_stat.fields(_read("/proc/self/stat"))[proc_stat.FLAGS]))
    return Measure("io flusher", ok, "set" if ok else "not set")


def _oom() -> Measure:
    _write("/proc/self/oom_score_adj", str(OOM_IMMUNE))
    found = int(_read("/proc/self/oom_score_adj"))
    return Measure("oom", found == OOM_IMMUNE, f"oom_score_adj {found}")


def _realtime(one_cpu: bool) -> Measure:
    """SCHED_RR, and on request all threads on one CPU. docs/decisions/0015 has the figures.

    The kernel moves a real-time thread that wakes up to a CPU that runs none (kernel/sched/rt.c: select_task_rq_rt,
    push and pull): threads that hand requests to each other would migrate all the time, and contend for locks.
    """
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))
    if os.sched_getscheduler(0) != os.SCHED_RR:
        return Measure("realtime", False, "not set")
    found = f"SCHED_RR, priority {REALTIME_PRIORITY}"
    if one_cpu:
        allowed = sorted(os.sched_getaffinity(0))
        chosen = allowed[os.getpid() % len(allowed)]  # spread several workers over the CPUs
        try:
            os.sched_setaffinity(0, {chosen})
            found += f", on CPU {chosen}"
        except OSError:  # costs time only
            found += ", on any CPU"
    return Measure("realtime", True, found)


def _awake() -> Measure:
    """No hibernation while this process lives: the kernel refuses it while there is secret memory (memfd_secret(2)),
    which must not reach a disk (kernel/power/hibernate.c: hibernation_available). The descriptor is never closed.

    Kernels before 6.5 have secret memory only with secretmem.enable=1. Then systemd's refusal has to do
    (keeper/hibernation.py), and this is not a reason to be without swap.
    """
    try:
        _memlock.forbid_hibernation()
    except OSError as error:
        return Measure("awake", True, f"this kernel cannot forbid hibernation ({error.strerror})")
    return Measure("awake", True, "the kernel does not hibernate")


def report(measures: Iterable[Measure]) -> None:
    """Print one warning on stderr for each measure that is not in force."""
    for measure in measures:
        if not measure.ok:
            print(f"nbdnfs: {measure.line()}", file=sys.stderr, flush=True)
