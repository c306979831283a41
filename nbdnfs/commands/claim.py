# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs claim`: what a keeper starts to create a missing backing file and to make this machine its owner.
With neither to do, it only looks for the file, so that a keeper waits here until there is one.

In a process of its own, because the keeper loads neither the engine nor libnfs.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nbdnfs import backing_size, quantities
from nbdnfs.commands import claiming, create
from nbdnfs.errors import NoInputError, OwnedError
from nbdnfs.keeper import failures
from nbdnfs.keeper.records import Records
from nbdnfs.nas import backing_file, old_name, owner_record, ownership

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """The exit status. Errors as `backing_file.create` and `ownership.claim`; a refusal is left for `status`, too, and
    has an exit status of its own.

    SIGINT and SIGTERM end it within two seconds while it claims, and within five while it creates.
    """
    me, holder = owner_record.identity(), args.holder or ownership.serve_holder()
    try:
        claiming.run_until_signal(lambda stop: old_name.adopt(args.url, holder, stop=stop))
        if args.size is not None:
            _provide(args.url, quantities.parse_size_bytes(args.size))
        if args.holder is None:
            if args.size is None:
                backing_file.inspect(args.url)
            return 0
        claiming.run_until_signal(lambda stop: ownership.claim(args.url, holder, me, steal=args.steal, stop=stop))
    except OwnedError as error:
        if args.holder is not None:
            Records.write_refusal(_name_of(holder), error.message)
            error.exit_code = failures.OWNED_STATUS
        raise
    Records.write_refusal(_name_of(holder), None)
    return 0


def _name_of(holder: str) -> str:
    """The device's."""
    return holder.rpartition(":")[2]


def _provide(url: str, size_bytes: int) -> None:
    """Create the file where there is none. One that exists is used as it is; the log says where it differs."""
    try:
        found_bytes = backing_file.inspect(url).size_bytes
    except NoInputError:
        backing_size.refuse_unless_lockable(size_bytes, Path("/"))
        create.create(url, size_bytes, status="creating the backing file")
        return
    # a size relative to the memory may change a little from one kernel to the next
    if abs(found_bytes - size_bytes) > size_bytes // 8:
        log.warning(
            "the file has %s, and the configuration asks for %s: it is used as it is%s",
            quantities.format_size(found_bytes),
            quantities.format_size(size_bytes),
            " (larger: nbdnfs grow NAME SIZE)" if found_bytes < size_bytes else "",
        )
