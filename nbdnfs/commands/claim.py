# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs claim`: what a keeper starts to create a missing backing file and to make this machine its owner.
With neither to do, it only looks for the file, so that a keeper waits here until there is one.

In a process of its own, because the keeper loads neither the engine nor libnfs.
"""

from __future__ import annotations

import argparse

from nbdnfs import quantities
from nbdnfs.commands import claiming, progress
from nbdnfs.errors import OwnedError
from nbdnfs.keeper import failures
from nbdnfs.keeper.records import Records
from nbdnfs.nas import backing_file, owner_record, ownership


def run(args: argparse.Namespace) -> int:
    """The exit status. Errors as `backing_file.create` and `ownership.claim`; a refusal is left for `status`, too, and
    has an exit status of its own.

    SIGINT and SIGTERM end it within two seconds while it claims.
    """
    if args.size is not None and not backing_file.exists(args.url):
        backing_file.create(args.url, quantities.parse_size_bytes(args.size), progress=progress.reporter())
    if args.size is None and args.holder is None:
        backing_file.inspect(args.url)
    if args.holder is not None:
        name = args.holder.rpartition(":")[2]
        try:
            claiming.run_until_signal(
                lambda stop: ownership.claim(
                    args.url, args.holder, owner_record.identity(), steal=args.steal, stop=stop
                )
            )
        except OwnedError as error:
            Records.write_refusal(name, error.message)
            error.exit_code = failures.OWNED_STATUS
            raise
        Records.write_refusal(name, None)
    return 0
