# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs create`: create a backing file."""

from __future__ import annotations

import argparse

from nbdnfs import quantities
from nbdnfs.commands import progress
from nbdnfs.nas import backing_file


def run(args: argparse.Namespace) -> int:
    """The exit status. Errors as `backing_file.create`."""
    size_bytes = quantities.parse_size_bytes(args.size)
    if not (args.if_missing and backing_file.exists(args.url)):
        backing_file.create(args.url, size_bytes, force=args.force, progress=progress.reporter())
    return 0
