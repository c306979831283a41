# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs grow`: make a backing file larger. Swap on it is off meanwhile: a swap area cannot grow while it is on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nbdnfs import backing_size, quantities
from nbdnfs.commands import claiming, progress, up_down, where
from nbdnfs.errors import BusyError, UsageError
from nbdnfs.nas import existing_file


def run(args: argparse.Namespace) -> int:
    """The exit status. With --restart the device is taken down first and brought up again, whatever happened:
    also after Ctrl-C and SIGTERM.

    Errors as `existing_file.grow`, `where.refuse_if_attached`, `up_down.down` and `up_down.up`.
    """
    size_bytes = backing_size.parse(args.size, Path("/"))
    url = where.url_of(args.where)
    if not args.restart:
        where.refuse_if_attached(url, f"nbdnfs grow {args.where} {args.size}")
        _grow(url, size_bytes)
        return 0
    if where.is_url(args.where):
        raise UsageError("--restart needs the NAME of a device, not a URL", f"nbdnfs grow NAME {args.size} --restart")
    show = progress.reporter()
    with claiming.unwinding():
        try:
            up_down.down(args.where, lambda left_bytes, total_bytes: show(total_bytes - left_bytes, total_bytes))
        except KeyboardInterrupt:
            try:
                up_down.up(args.where)
            except BusyError:  # nothing has been taken down yet, or systemd is about to
                print(f"nbdnfs: {args.where} may be going down: nbdnfs status {args.where}", file=sys.stderr)
            raise
        try:
            _grow(url, size_bytes)
        finally:
            up_down.up(args.where)
    return 0


def _grow(url: str, size_bytes: int) -> None:
    where.adopt_old_name(url)
    show = progress.reporter()
    before_bytes = claiming.run_until_signal(lambda stop: existing_file.grow(url, size_bytes, progress=show, stop=stop))
    size = quantities.format_size
    print(f"{url.partition('?')[0]} had {size(before_bytes)}, and has {size(size_bytes)} now")
