# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs gc`: remove the backing files of machines that have been silent for a long time.

Only files with an owner record, which says whose they are; a machine that goes down properly removes its own.
"""

from __future__ import annotations

import argparse
import sys

from nbdnfs import quantities
from nbdnfs.commands import claiming, where
from nbdnfs.errors import NbdnfsError, UsageError
from nbdnfs.nas import folder, owner_record
from nbdnfs.nas.folder import Entry, Folder

_LEAST_S = 86400.0
# For each step, where the server does not answer
_LIMIT_S = 60.0


def run(args: argparse.Namespace) -> int:
    """The exit status: 0; 1 where the user says no, or a file stays. Errors as `folder.find`; UsageError."""
    silent_s = quantities.parse_duration_s(args.older_than)
    if silent_s < _LEAST_S:
        raise UsageError(f"--older-than {args.older_than} is too short: a machine may be off for a day", "at least 1d")
    place, found = claiming.run_until_signal(lambda stop: _find(args.where, silent_s), limit_s=_LIMIT_S)
    if not found:
        print(f"no owner has been silent for {_days(silent_s)}")
        return 0
    for entry in found:
        assert entry.owner.record is not None
        print(
            f"{entry.name:<40} {quantities.format_size(entry.size_bytes):>9}  {entry.owner.record.host},"
            f" silent for {_days(entry.owner.age_s or 0.0)}"
        )
    total = quantities.format_size(sum(entry.size_bytes for entry in found if entry.kind == "file"))
    if args.dry_run:
        print(f"would remove {len(found)} files, {total}")
        return 0
    if not where.confirm(f"Remove {len(found)} files ({total})?", yes=args.yes):
        return 1
    left = [entry for entry in found if not _remove(place, entry, silent_s)]
    return 1 if left else 0


def _find(name_or_url: str, silent_s: float) -> tuple[Folder, list[Entry]]:
    place = folder.find(where.url_of(name_or_url))
    return place, silent(place, silent_s)


def silent(place: Folder, silent_s: float) -> list[Entry]:
    """The files whose owner has been silent for so long, and the records of files that are missing."""
    return [
        entry
        for entry in place.entries()
        if entry.owner.record is not None and (entry.owner.age_s or 0.0) >= silent_s and entry.age_s >= silent_s
    ]


def _remove(place: Folder, entry: Entry, silent_s: float) -> bool:
    try:
        me = owner_record.identity()
        if claiming.run_until_signal(lambda stop: place.remove_silent(entry, me, silent_s), limit_s=_LIMIT_S):
            print(f"removed {entry.name}")
            return True
        message = "its owner has come back"
    except NbdnfsError as error:
        message = error.message
    print(f"nbdnfs: {entry.name} stays: {message}", file=sys.stderr)
    return False


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days"
