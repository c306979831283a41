# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: keepers in processes of their own, each of which is killed at one of its calls, or has one that fails.

A program that has loaded all that a keeper needs, with failing_calls.c before the C library. For each line that it
reads on its socket it forks a keeper, and answers with what became of it. keeper_steps.py is the other end.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from nbdnfs.errors import BusyError, NbdnfsError
from nbdnfs.keeper import failures
from nbdnfs.keeper import main as main_program
from nbdnfs.keeper.helper_process import HelperProcess
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from nbdnfs.keeper.worker_handle import WorkerHandle, recipe
from nbdnfs.kernel import device_in_use, nbd_device, swap_area
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.nbd_handshake import Export

# Of a keeper that ended with an error that it can explain, and with one that it cannot.
EXPLAINED, UNEXPLAINED = 10, 11
_MESSAGE_BYTES_MAX = 65536
_DESCRIPTORS_MAX = 16


class Steps(ctypes.Structure):
    """struct steps of failing_calls.c."""

    _fields_ = (
        ("counting", ctypes.c_int),
        ("points", ctypes.c_uint32),
        ("calls", ctypes.c_uint32),
        ("kill_at", ctypes.c_uint32),
        ("fail_at", ctypes.c_uint32),
        ("way", ctypes.c_uint32),
        ("ways", ctypes.c_uint32),
        ("failed", ctypes.c_int),
        ("name", ctypes.c_char * 32),
    )


class DistantKernel:
    """interfaces.Kernel. What it reads is a tree of files. All else is in the process that the socket leads to, and
    what is between the two is killed like all else, and does not fail."""

    def __init__(self, link: socket.socket, news: int, steps: Steps, root: Path) -> None:
        self._link, self._news, self._steps, self._root = link, news, steps, root

    def fileno(self) -> int:
        return self._news

    def _ask(self, *words: object, descriptor: int = -1) -> Any:
        fail_at, self._steps.fail_at = self._steps.fail_at, 0
        calls = self._steps.calls
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))] if descriptor >= 0 else []
        self._link.sendmsg([json.dumps(words).encode()], rights)
        error, answer = json.loads(self._link.recv(_MESSAGE_BYTES_MAX))
        self._steps.calls, self._steps.fail_at = calls, fail_at
        if error:
            raise BusyError(error) if "in use" in error else NbdnfsError(error)
        return answer

    def dead_links(self) -> list[int]:
        return list(self._ask("dead_links"))

    def find(self) -> Attached | None:
        return nbd_device.find(nbd_device.backend_of("t"), self._root)

    def attach(self, sock: socket.socket, export: Export) -> Attached:
        return Attached(*self._ask("attach", export.size_bytes, descriptor=sock.fileno()))

    def reconnect(self, attached: Attached, sock: socket.socket) -> None:
        self._ask("reconnect", descriptor=sock.fileno())

    def refuse_if_used(self, attached: Attached) -> None:
        state = kernel_state.nbd_device(attached.name, self._root)
        if state is not None:
            device_in_use.refuse_if_used(state, self._root)

    def disconnect(self, attached: Attached) -> None:
        self._ask("disconnect")

    def fail_requests(self, attached: Attached) -> None:
        self._ask("fail_requests")


class DistantWork:
    """interfaces.Work: fake workers, and a swap that is on once a helper has copied a file."""

    def __init__(self, folder: Path, worker: list[str]) -> None:
        self._folder = folder
        self._program, self._argv = worker[0], worker[1:]

    def start_worker(self, region_fd: int) -> WorkerHandle:
        return WorkerHandle.start(self._program, self._argv, {}, region_fd)

    def take_worker(self, parked: int) -> WorkerHandle | None:
        return WorkerHandle.take(parked, recipe(self._argv))

    def provision(self) -> HelperProcess:
        return HelperProcess(["/bin/true"], {})

    def progress(self) -> str:
        return ""

    def swap_on(self, attached: Attached) -> HelperProcess:
        swaps = self._folder / "root/proc/swaps"
        return HelperProcess(["/bin/cp", str(self._folder / "swaps"), str(swaps)], {})

    def is_swapped_on(self, attached: Attached) -> bool:
        return swap_area.find(attached.path, self._folder / "root") is not None

    def is_server_away(self, region: mmap.mmap) -> bool:
        return False

    def server_times(self, region: mmap.mmap) -> tuple[int, int]:
        return 0, 0

    def resolve(self) -> HelperProcess:
        return HelperProcess(["/bin/true"], {})

    def resolved(self) -> str:
        return ""


def _run_keeper(wanted: dict[str, Any], link: socket.socket, news: int, stored: dict[str, int], steps: Steps) -> int:
    folder = Path(wanted["folder"])
    records = Records("t", run=folder)
    reporter = Reporter(records, Notifier({"NOTIFY_SOCKET": wanted["notify"]}))
    steps.counting = int(wanted["at_once"])
    try:
        main_program._reserve_records(records, is_attached=wanted["is_attached"])
        kernel = DistantKernel(link, news, steps, folder / "root")
        work = DistantWork(folder, wanted["worker"])
        with failures.of_machine("t"):  # as main.py has it
            return Keeper(kernel, work, records, reporter, stored=stored, config_text="c").run()
    except NbdnfsError as error:
        print("ended:", *error.lines(), file=sys.stderr)
        return EXPLAINED
    except BaseException:
        traceback.print_exc()
        return UNEXPLAINED


def main() -> None:
    from nbdnfs import programs

    control = socket.socket(fileno=int(sys.argv[1]))
    library = ctypes.CDLL(sys.argv[2])
    library.steps_share.restype = ctypes.POINTER(Steps)
    steps = library.steps_share().contents
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES_MAX, _DESCRIPTORS_MAX)
        if not data:
            return
        wanted = json.loads(data)
        link, news, log, *store = descriptors
        ctypes.memset(ctypes.byref(steps), 0, ctypes.sizeof(steps))
        steps.kill_at, steps.fail_at, steps.way = wanted["kill_at"], wanted["fail_at"], wanted["way"]
        pid = os.fork()
        if pid == 0:
            status = UNEXPLAINED
            with contextlib.suppress(BaseException):
                control.close()
                os.dup2(log, 2)
                library.steps_begin_on(signal.SIGUSR2)
                programs.prepare_to_spawn()
                stored = dict(zip(wanted["stored"], store, strict=True))
                status = _run_keeper(wanted, socket.socket(fileno=link), news, stored, steps)
                sys.stderr.flush()
            os._exit(status)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps({"pid": pid}).encode())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = {
            "status": status,
            "points": steps.points,
            "calls": steps.calls,
            "failed": bool(steps.failed),
            "ways": steps.ways,
            "name": steps.name.decode(),
        }
        control.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
