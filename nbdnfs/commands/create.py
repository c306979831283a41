# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs create`: create a backing file."""

from __future__ import annotations

import argparse
import logging
import threading
from pathlib import Path

from nbdnfs import backing_size
from nbdnfs.commands import claiming, progress, where
from nbdnfs.errors import ConfigError
from nbdnfs.nas import backing_file, existing_file, old_name, ownership, patience

log = logging.getLogger(__name__)

# How long an interrupted call may take to remove what it has written.
_GRACE_S = 5.0


def run(args: argparse.Namespace) -> int:
    """The exit status. Errors as `backing_file.create`; with --if-missing as `existing_file.check`, with --force as
    `where.refuse_if_attached`."""
    size_bytes = backing_size.parse(args.size, Path("/"))
    again = f"nbdnfs create {args.url} --size {args.size} --force"
    if args.force:
        where.refuse_if_attached(args.url, again)
    claiming.run_until_signal(
        lambda stop: old_name.adopt(args.url, ownership.serve_holder(), stop=stop), grace_s=_GRACE_S
    )
    is_relative = backing_size.is_relative(args.size)
    if args.if_missing and existing_file.check(args.url, size_bytes, about=is_relative, fix_mode=args.fix_mode):
        return 0
    try:
        backing_size.refuse_unless_lockable(size_bytes, Path("/"))
    except ConfigError as error:  # the file may be for another machine
        log.warning("this machine could not use the file: %s", error.message)
    if args.force:
        where.refuse_if_attached(args.url, again)  # the server may have taken its time
    create(args.url, size_bytes, force=args.force)
    return 0


def create(url: str, size_bytes: int, *, force: bool = False) -> None:
    """`backing_file.create`, with `progress.reporter`. SIGINT and SIGTERM end it, and remove what was written."""
    show = progress.reporter()

    def work(stop: threading.Event) -> None:
        with patience.interruptible(stop):
            backing_file.create(url, size_bytes, force=force, progress=show)

    claiming.run_until_signal(work, grace_s=_GRACE_S)
