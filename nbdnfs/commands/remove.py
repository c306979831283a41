# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs remove`: remove a backing file of this machine, with its owner record and what creators left behind."""

from __future__ import annotations

import argparse

from nbdnfs import nfs_url, quantities
from nbdnfs.commands import claiming, where
from nbdnfs.nas import existing_file
from nbdnfs.nas.content import Kind

# A claim may have to wait for 50 s, until another machine has certainly stopped.
_LIMIT_S = 180.0


def run(args: argparse.Namespace) -> int:
    """The exit status; 1 where the user says no. Errors as `existing_file.remove` and `where.refuse_if_attached`."""
    url = where.url_of(args.where)
    target = nfs_url.parse(url)
    again = f"nbdnfs remove {args.where}"
    where.refuse_if_attached(url, again)
    where.adopt_old_name(url, limit_s=_LIMIT_S)
    found = claiming.run_until_signal(
        lambda stop: existing_file.refuse_unless_swap(target, target.resolve()), limit_s=_LIMIT_S
    )
    what = f"{target.path} on {target.host} ({quantities.format_size(found.size_bytes)})"
    doubt = " It begins with a LUKS header, and is not certain to be swap." if found.kind is Kind.LUKS else ""
    if not where.confirm(f"Remove {what}?{doubt}", yes=args.yes):
        return 1
    where.refuse_if_attached(url, again)
    claiming.run_until_signal(lambda stop: existing_file.remove(url, stop=stop), limit_s=_LIMIT_S)
    print(f"removed {what}")
    return 0
