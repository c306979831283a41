# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs check`: reads configuration files, and says what is wrong with them. Looks at nothing else."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nbdnfs import config
from nbdnfs.errors import ConfigError, NbdnfsError, NoInputError

_DROP_INS = ".toml.d"
# What a configuration may be called by mistake.
_OTHER_ENDINGS = (".conf", ".cfg", ".ini", ".tml")

NO_DEVICE = (
    "nbdnfs: no device is configured\n"
    'nbdnfs: write /etc/nbdnfs/NAME.toml, with a line like url = "nfs://nas/export/swap/%H.swap": man nbdnfs.toml'
)


def run(args: argparse.Namespace) -> int:
    """Print a line for each device, and another one where something is to be done. The exit status is 0 when all is
    valid, else EX_CONFIG. NoInputError: there is no file for NAME. UsageError: no device can have this name."""
    if args.name is not None:
        config.check_name(args.name)
    problems = find_problems(args.name)
    names = [args.name] if args.name is not None else config.names()
    for name in names:
        if name not in problems:
            print(f"{name}: valid")
    for name, error in problems.items():
        print(f"{name}: {error.message}", *([f"     {error.hint}"] if error.hint else []), sep="\n")
    if not names and not problems:
        print(NO_DEVICE)
    return os.EX_CONFIG if problems else os.EX_OK


def find_problems(name: str | None = None, root: Path = Path("/")) -> dict[str, NbdnfsError]:
    """The first thing that is wrong with each device, or with the device `name` alone, by name; and files that no
    device reads. NoInputError: there is no file for `name`."""
    problems: dict[str, NbdnfsError] = {}
    for one in [name] if name is not None else config.names(root):
        try:
            config.load(one, root)
        except NoInputError:
            raise
        except NbdnfsError as error:
            problems[one] = error
    return problems if name is not None else {**problems, **_unused(root)}


def _unused(root: Path) -> dict[str, NbdnfsError]:
    """Files of the folders that look like a configuration, and are not read."""
    names = set(config.names(root))
    found: dict[str, NbdnfsError] = {}
    for folder in (root / folder for folder in config.FOLDERS):
        for path in sorted(folder.glob("[!.]*.toml")):
            if os.path.isfile(path) and path.stem not in names:
                found[path.stem] = ConfigError(
                    f"{path} is not read: '{path.stem}' cannot be the name of a device",
                    "use at most 64 letters, digits, '_', '-' and '.'",
                )
        for path in sorted([*folder.glob("[!.]*"), *folder.glob(f"*{_DROP_INS}/[!.]*")]):
            if path.suffix in _OTHER_ENDINGS and os.path.isfile(path) and path.name not in names:
                found[path.name] = ConfigError(
                    f"{path} is not read: its name does not end in .toml", "rename it, or move it to another folder"
                )
        for path in sorted(folder.glob(f"*{_DROP_INS}")):
            stem = path.name.removesuffix(_DROP_INS)
            if stem not in names and any(path.glob("[!.]*.toml")):
                found[stem] = ConfigError(f"{path} is not read: there is no {stem}.toml", f"write {folder}/{stem}.toml")
    return found
