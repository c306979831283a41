# SPDX-License-Identifier: LGPL-2.1-or-later
"""Progress on stderr: a bar on a terminal, every tenth part in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from nbdnfs import programs, quantities

_BAR_COLUMNS = 40


def reporter() -> Callable[[int, int], None]:
    """A function of the bytes done and the bytes in total, to be called as often as the caller likes.

    In a keeper's helper it prints a line such as "creating the backing file: 40%" for each percent on stdout as well,
    which becomes the keeper's status.
    """
    started_s = time.monotonic()
    shown = status_shown = -1
    what = os.environ.get(programs.STATUS_VARIABLE)

    def show(done_bytes: int, total_bytes: int) -> None:
        nonlocal shown, status_shown
        on_terminal = sys.stderr.isatty()
        percent = done_bytes * 100 // total_bytes if total_bytes else 100
        if what is not None and percent != status_shown:
            status_shown = percent
            print(f"{what}: {percent}%", flush=True)
        if not total_bytes:  # for example, nothing was swapped out: there is no progress to show
            return
        step = percent if on_terminal else percent // 10 * 10
        if step == shown:
            return
        shown = step
        bytes_per_s = int(done_bytes / max(time.monotonic() - started_s, 0.001))
        size = quantities.format_size
        text = f"{size(done_bytes)} of {size(total_bytes)}, {size(bytes_per_s)}/s"
        if on_terminal:
            bar = "#" * (percent * _BAR_COLUMNS // 100)
            end = "\n" if percent == 100 else ""
            print(f"\r[{bar:<{_BAR_COLUMNS}}] {text}   ", end=end, file=sys.stderr, flush=True)
        else:
            print(f"nbdnfs: {percent}% ({text})", file=sys.stderr, flush=True)

    return show
