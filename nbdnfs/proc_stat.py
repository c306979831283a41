# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/stat and /proc/PID/task/TID/stat, proc_pid_stat(5). Imports nothing: the locked worker has this module."""

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from pathlib import Path

# The fields that are read here and there, by their numbers in the manual page.
PID, NAME, STATE, PARENT = 1, 2, 3, 4
FLAGS = 9
MINOR_FAULTS, MAJOR_FAULTS = 10, 12
USER_TICKS, SYSTEM_TICKS = 14, 15
START_TICKS = 22
REALTIME_PRIORITY, POLICY = 40, 41
HEAP_ADDRESS, ARGUMENTS_ADDRESS = 47, 48

# Of FLAGS, include/linux/sched.h. prctl(PR_SET_IO_FLUSHER) sets both (Linux 5.6 and later); the first alone also comes
# and goes with memalloc_noio_save().
_PF_MEMALLOC_NOIO = 0x0008_0000
_PF_LOCAL_THROTTLE = 0x0010_0000
PF_IO_FLUSHER = _PF_MEMALLOC_NOIO | _PF_LOCAL_THROTTLE

_ENDED = ("Z", "X")
# include/linux/threads.h: PID_MAX_LIMIT
_PID_MAX = 4 << 20


def fields(text: str) -> dict[int, str]:
    """The fields of a stat file by their numbers, which begin with 1; NAME without its parentheses.

    An empty text, which a process that ends between open and read has, gives no field after NAME.
    """
    head, _, tail = text.rpartition(")")  # the name itself may have blanks and parentheses
    pid, _, name = head.partition(" (")
    return dict(enumerate([pid, name, *tail.split()], start=PID))


def is_io_flusher(flags: int) -> bool:
    """Whether PR_SET_IO_FLUSHER is in force, by the field FLAGS: the task's allocations do not enter I/O."""
    return flags & PF_IO_FLUSHER == PF_IO_FLUSHER


def start_time_ticks(pid: int, root: "Path | str" = "") -> int | None:
    """When a process began, in clock ticks since boot; None when it has ended, a zombie included. OSError: it is not
    known, for want of memory or descriptors.

    `root` is the folder that stands for "/".
    """
    if pid > _PID_MAX:  # of a damaged record: not even a file's name
        return None
    try:
        with open(f"{root}/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            found = fields(file.read())
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError, PermissionError):
        return None
    return None if found.get(STATE, "X") in _ENDED else int(found[START_TICKS])
