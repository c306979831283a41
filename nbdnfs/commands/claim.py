# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs claim`: what a keeper starts to create a missing backing file and to make this machine its owner.
With neither to do, it only looks for the file, so that a keeper waits here until there is one.

In a process of its own, because the keeper loads neither the engine nor libnfs. With --wait it tries again by itself:
starting an interpreter for each try takes longer than the try, on a slow machine longer than the pause before it.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
import time
from pathlib import Path

from nbdnfs import backing_size, quantities
from nbdnfs.commands import claiming, create
from nbdnfs.errors import NbdnfsError, NoInputError, OwnedError
from nbdnfs.keeper import failures
from nbdnfs.nas import backing_file, old_name, owner_record, ownership

log = logging.getLogger(__name__)


# How long it goes on with --wait, so that what a library leaks in each try does not add up for days. The keeper then
# starts another one. Longer than --new-file-after.
_LIFE_S = 600.0


def run(args: argparse.Namespace) -> int:
    """The exit status. Errors as `backing_file.create` and `ownership.claim`; that another machine owns the file has an
    exit status of its own.

    With args.wait, an error that another try may mend is shown, and ends this only after _LIFE_S. So does the end of
    whoever reads stdout.

    SIGINT and SIGTERM end it within two seconds while it claims, and within five while it creates.
    """
    size_bytes = None if args.size is None else quantities.parse_size_bytes(args.size)
    if not args.wait:
        _provide(args, size_bytes)
        return 0
    new_file_after_s = quantities.parse_duration_s(args.new_file_after)
    return _provide_patiently(args, size_bytes, new_file_after_s)


def _provide_patiently(args: argparse.Namespace, size_bytes: int | None, new_file_after_s: float) -> int:
    """`_provide` until it succeeds. A missing file is created once it has been missing for so long.

    What is waited for goes to stdout, as failures.WAITING and a sentence, and the error to stderr, both when they
    change.
    """
    ends_s = time.monotonic() + _LIFE_S
    missing_since_s, said, tries = None, "", 0
    while True:
        began_s = time.monotonic()
        may_create = began_s - (missing_since_s or began_s) >= new_file_after_s
        try:
            _provide(args, size_bytes if may_create else None)
        except NbdnfsError as error:
            tries += 1
            if failures.is_final(error.exit_code, on_server=True) or time.monotonic() >= ends_s:
                raise
            is_missing = error.exit_code == failures.MISSING_STATUS
            missing_since_s = (missing_since_s or began_s) if is_missing else None
            if error.message != said:
                said = error.message
                print(f"{failures.WAITING}{failures.waiting_for(error.exit_code, said)}", flush=True)
                print(*error.lines(), sep="\n", file=sys.stderr, flush=True)
        else:
            return 0
        if _has_reader_gone(failures.pause_s(tries)):
            return os.EX_UNAVAILABLE


def _has_reader_gone(within_s: float) -> bool:
    """Sleep for so long, or until nobody reads stdout any more: then there is no keeper to claim the file for."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # an error is reported in any case: poll(2)
    return bool(poll.poll(within_s * 1000))


def _provide(args: argparse.Namespace, size_bytes: int | None) -> None:
    """One try. `size_bytes`: what a missing file is created with; None: it is not."""
    holder = args.holder or ownership.serve_holder()
    try:
        claiming.run_until_signal(lambda stop: old_name.adopt(args.url, holder, stop=stop))
        if size_bytes is not None:
            _create_if_missing(args.url, size_bytes)
        if args.holder is None:
            if size_bytes is None:
                backing_file.inspect(args.url)
            return
        me = owner_record.identity()
        claiming.run_until_signal(lambda stop: ownership.claim(args.url, holder, me, steal=args.steal, stop=stop))
    except OwnedError as error:
        if args.holder is not None:
            error.exit_code = failures.OWNED_STATUS
        raise


def _create_if_missing(url: str, size_bytes: int) -> None:
    """Create the file where there is none. One that exists is used as it is; the log says where it differs."""
    try:
        found_bytes = backing_file.inspect(url).size_bytes
    except NoInputError:
        backing_size.refuse_unless_lockable(size_bytes, Path("/"))
        create.create(url, size_bytes)
        return
    if not backing_size.is_near(found_bytes, size_bytes):
        log.warning(
            "the file has %s, and the configuration asks for %s: it is used as it is%s",
            quantities.format_size(found_bytes),
            quantities.format_size(size_bytes),
            " (larger: nbdnfs grow NAME SIZE)" if found_bytes < size_bytes else "",
        )
