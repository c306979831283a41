# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the commands for files on a NAS share: NAME or URL, what this machine uses, and a question."""

from __future__ import annotations

import sys
from pathlib import Path

from nbdnfs import config, nfs_url
from nbdnfs.commands import claiming
from nbdnfs.errors import BusyError, NbdnfsError, UsageError
from nbdnfs.keeper import only_keeper
from nbdnfs.keeper.records import Records
from nbdnfs.nfs_url import NfsUrl


def is_url(text: str) -> bool:
    return text.startswith("nfs://")


def url_of(name_or_url: str) -> str:
    """The URL as it was given, or that of the configuration NAME. Errors as `config.load`."""
    return name_or_url if is_url(name_or_url) else config.load(name_or_url).url


def adopt_old_name(url: str, *, limit_s: float | None = None) -> None:
    """Rename a file that an earlier version named with the machine id, as `create` and a start do. Errors as
    `old_name.adopt`, and UnavailableError after `limit_s`."""
    from nbdnfs.nas import old_name, ownership  # here: `list` of this machine's devices needs no engine

    claiming.run_until_signal(lambda stop: old_name.adopt(url, ownership.serve_holder(), stop=stop), limit_s=limit_s)


def refuse_if_attached(url: str, then: str, root: Path = Path("/")) -> None:
    """BusyError: a device of this machine is on the file, or is being started on it. `then` is the command to run
    afterwards. NoHostError: the server is unknown, unless a device has the file by that very name."""
    target = nfs_url.parse(url)
    for name in Records.names(root):
        records = Records(name, root)
        if not only_keeper.is_up(records, root):
            continue
        if _is_named(records, target) or only_keeper.has_file(records, target.text, target.resolve()):
            raise BusyError(
                f"{target.path} on {target.host} is in use on this machine, by {name}",
                f"nbdnfs down {name}; {then}; nbdnfs up {name}",
            )


def _is_named(records: Records, target: NfsUrl) -> bool:
    """Whether the device's URL has the same host and path."""
    recorded = (records.read(Records.ADDRESS) or "").partition("\n")[0]
    try:
        used = nfs_url.parse_recorded(recorded)
    except NbdnfsError:
        return False
    return (used.host, used.path) == (target.host, target.path)


def printable(name: str) -> str:
    """A file's name for a terminal, which it may have escapes for."""
    return "".join(character if character.isprintable() else "?" for character in name)


def confirm(question: str, *, yes: bool) -> bool:
    """Ask on the terminal. UsageError where there is none: then `yes` has to say so."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"this is not a terminal, where to ask: {question}", "run it again with --yes")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
