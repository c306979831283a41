# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs top`: the activity of each device, from the counters in its region. Changes nothing and takes no lock."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nbdnfs import quantities
from nbdnfs.commands import counters, status
from nbdnfs.commands.counters import Counters
from nbdnfs.commands.frame import Frame
from nbdnfs.errors import NbdnfsError, NoInputError, UsageError
from nbdnfs.keeper.records import Records

# Of the JSON, as status.SCHEMA.
SCHEMA = 1


def run(args: argparse.Namespace) -> int:
    """Show the activity until Ctrl-C, or `--count` times. UsageError: an option is out of range; others as
    `status.require` and `watch`."""
    interval_s = quantities.parse_duration_s(args.interval)
    if interval_s <= 0 or (args.count is not None and args.count < 1):
        raise UsageError("--interval and --count must be greater than zero", "for example --interval 2s --count 5")
    if args.name is not None:
        status.require(args.name)
    show([args.name] if args.name else [], interval_s=interval_s, count=args.count, as_json=args.json)
    return 0


def watch(
    names: Sequence[str],
    *,
    interval_s: float = 1.0,
    root: Path = Path("/"),
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Frame]]:
    """Yield the activity of the devices `names` every `interval_s` seconds, without end.

    The counters belong to the region, so that they go on when a worker is replaced. NoInputError: none of the devices
    has a worker whose region can be read, at the start or later.
    """
    before, then = _read(names, root), clock()
    while True:
        sleep(interval_s)
        after, now = _read(names, root), clock()
        yield [
            Frame(name, max(now - then, 1e-6), before[name], counters)
            for name, counters in after.items()
            if name in before
        ]
        before, then = after, now


def show(
    names: Sequence[str], *, interval_s: float, count: int | None, root: Path = Path("/"), as_json: bool = False
) -> None:
    """Show the activity until Ctrl-C, or `count` times: as a screen on a terminal, as lines elsewhere.

    Without `names`, of all devices. `as_json`: an object on a line of its own each time. Errors as `watch`.
    """
    wanted = names or status.names(root)
    if not as_json and count != 1 and sys.stdout.isatty() and sys.stdin.isatty():
        import curses  # a terminal's only

        from nbdnfs.commands import top_screen

        with contextlib.suppress(curses.error):  # not one that has a screen: lines do
            top_screen.run(
                lambda wait: watch(wanted, interval_s=interval_s, root=root, sleep=wait),
                lambda name: _describe(name, root),
                count=count,
            )
            return
    for shown, frames in enumerate(watch(wanted, interval_s=interval_s, root=root), 1):
        if as_json:
            print(json.dumps({"schema": SCHEMA, "devices": [frame.to_json() for frame in frames]}), flush=True)
        else:
            print("\n".join(frame.text() for frame in frames), flush=True)
        if shown == count:
            return


def _describe(name: str, root: Path) -> tuple[status.Status | None, Sequence[float]]:
    """The state of a device that is up, and how long each connection has waited for answers. None: just went."""
    try:
        found = status.read(name, root, unit_state=lambda name: None)
    except (NbdnfsError, OSError, ValueError):
        return None, ()
    return found, counters.connection_waits_s(found.worker_pid, root) if found.worker_pid is not None else ()


def _read(names: Sequence[str], root: Path) -> dict[str, Counters]:
    found: dict[str, Counters] = {}
    for name in names:
        worker = Records(name, root).living(Records.WORKER)
        if worker is not None and (read := counters.of_worker(worker.pid, root)) is not None:
            found[name] = read.counters
    if not found:
        which = f" of {', '.join(names)}" if names else ""
        raise NoInputError(
            f"no worker{which} is running, or its region cannot be read",
            "see why: nbdnfs status; only root can read a region",
        )
    return found
