# SPDX-License-Identifier: LGPL-2.1-or-later
"""A keeper in the test's own thread, a scenario in another; and a keeper's work with real workers and no swap."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable

from nbdnfs.keeper.helper_process import HelperProcess
from nbdnfs.keeper.keeper import Keeper
from nbdnfs.keeper.real_work import RealWork
from nbdnfs.keeper.worker_handle import WorkerHandle
from nbdnfs.kernel.nbd_device import Attached
from support.waiting import wait_until

until = functools.partial(wait_until, what="it is so", timeout_s=20.0)


def run_keeper(keeper: Keeper, scenario: Callable[[Keeper], None], over: threading.Event, *, join_s: float) -> int:
    """Run it until `scenario` ends, which stops it with SIGTERM; its exit status, or the scenario's exception.

    `over` is set once the keeper has ended, for whatever reason.
    """
    failure: list[BaseException] = []

    def play() -> None:
        try:
            scenario(keeper)
        except BaseException as error:
            failure.append(error)
        finally:
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    over.clear()
    thread = threading.Thread(target=play)
    thread.start()
    try:
        status = keeper.run()
    finally:
        over.set()
        thread.join(join_s)
    if failure:
        raise failure[0]
    return status


class FakeSwap(RealWork):
    """Starts real workers, and counts them; swapping on is only noted."""

    on = False
    starts = 0

    def start_worker(self, region_fd: int) -> WorkerHandle:
        self.starts += 1
        return super().start_worker(region_fd)

    def provision(self) -> HelperProcess:
        return HelperProcess(["/bin/true"], {})

    def swap_on(self, attached: Attached) -> HelperProcess:
        self.on = True
        return HelperProcess(["/bin/true"], {})

    def is_swapped_on(self, attached: Attached) -> bool:
        return self.on
