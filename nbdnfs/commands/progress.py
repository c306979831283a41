# SPDX-License-Identifier: LGPL-2.1-or-later
"""Progress on stderr: a bar on a terminal, every tenth part in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from nbdnfs import quantities

_BAR_COLUMNS = 40


def status_lines(what: str, show: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`show`, which prints a line such as "what: 40%" on stdout as well for each percent: for the keeper's status."""
    shown = -1

    def show_both(done_bytes: int, total_bytes: int) -> None:
        nonlocal shown
        show(done_bytes, total_bytes)
        percent = done_bytes * 100 // total_bytes if total_bytes else 100
        if percent != shown:
            shown = percent
            print(f"{what}: {percent}%", flush=True)

    return show_both


def reporter() -> Callable[[int, int], None]:
    """A function of the bytes done and the bytes in total, to be called as often as the caller likes."""
    started_s = time.monotonic()
    shown = -1

    def show(done_bytes: int, total_bytes: int) -> None:
        nonlocal shown
        on_terminal = sys.stderr.isatty()
        percent = done_bytes * 100 // total_bytes if total_bytes else 100
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
