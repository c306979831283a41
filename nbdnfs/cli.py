# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: the parser, and the one place where an error becomes lines on stderr and an exit status.

Each command is a module of nbdnfs/commands, imported when it is called: `nbdnfs status` does not load what only
`nbdnfs bench` needs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nbdnfs import __version__, defaults
from nbdnfs.errors import NbdnfsError, UsageError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction["_Parser"]

# What a keeper ends with when no other try can mend it: RestartPreventExitStatus= of systemd/nbdnfs@.service.
FINAL_STATUSES = frozenset(
    {
        os.EX_USAGE,
        os.EX_NOINPUT,
        os.EX_OSFILE,
        os.EX_CANTCREAT,
        os.EX_TEMPFAIL,
        os.EX_NOPERM,
        os.EX_CONFIG,
    }
)
# A keeper that was killed is started again at once, by the unit. One that fails by itself sees to it that the next one
# is not started earlier than so long after it was.
_KEEPER_PACE_S = 1.0

_URL_HELP = "the backing file, for example nfs://nas/export/swap/%%H.swap"
_NAME_HELP = "the NAME of /etc/nbdnfs/NAME.toml"
_STEAL_HELP = "take the file from the machine that owns it; what that machine has swapped out is lost"


class _Parser(argparse.ArgumentParser):
    """argparse, except that a usage error is raised like any other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nbdnfs",
        description="Swap onto a file on an NFS share.",
        # not a format string, unlike the help of an argument
        epilog="A URL looks like nfs://nas/export/swap/%H.swap?version=3, with %H for the host name "
        "and %m for the machine id.",
    )
    parser.add_argument("--version", action="version", version=f"nbdnfs {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log each step, and each program that is started")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_files(commands)
    _add_devices(commands)
    _add_reports(commands)
    _add_installation(commands)
    _add_kernel_devices(commands)
    return parser


def _command(module: str, function: str = "run") -> Callable[[argparse.Namespace], int]:
    """The command's function in nbdnfs/commands, imported when it is called. It returns the exit status."""

    def run(args: argparse.Namespace) -> int:
        return int(getattr(importlib.import_module(f"nbdnfs.commands.{module}"), function)(args))

    return run


def _add(commands: Subparsers, name: str, summary: str) -> argparse.ArgumentParser:
    """A command, with `summary` in the list of commands and above its own help."""
    return commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")


def _add_files(commands: Subparsers) -> None:
    """Commands for a backing file, which need neither root nor a configuration."""
    create = _add(commands, "create", "create a backing file, with every block written")
    create.add_argument("url", metavar="URL", help=_URL_HELP)
    create.add_argument("--size", required=True, metavar="SIZE", help="size of the file, for example 512M or 2G")
    create.add_argument("--force", action="store_true", help="overwrite an existing file with zeros; never shrink it")
    create.add_argument("--if-missing", action="store_true", help="do nothing if the file exists")
    create.set_defaults(run=_command("create"))

    serve = _add(commands, "serve", "serve a backing file over NBD, in the foreground, without root")
    serve.add_argument("url", metavar="URL", help=_URL_HELP)
    serve.add_argument(
        "--socket", required=True, type=Path, metavar="PATH", help="path of the Unix socket to listen on"
    )
    serve.add_argument("--engine", default="c", metavar="NAME", help="c, or libnfs-python for comparison (default: c)")
    serve.add_argument(
        "--threads",
        type=int,
        default=defaults.THREADS,
        metavar="N",
        help="nbdkit threads for each connection (default: %(default)s)",
    )
    serve.add_argument(
        "--no-owner",
        action="store_true",
        help="ignore the owner of the file; two machines that use one file corrupt it",
    )
    # for measurements, the plugin's own check applies: --plugin-setting "without=io flusher"
    serve.add_argument("--plugin-setting", action="append", default=[], metavar="KEY=VALUE", help=argparse.SUPPRESS)
    serve.set_defaults(run=_command("serve"))

    # without help, so that the manual does not list it: keepers start it
    claim = commands.add_parser("claim", description="create a missing backing file, and make this machine its owner")
    claim.add_argument("url", metavar="URL")
    claim.add_argument("--size", metavar="SIZE")
    claim.add_argument("--holder", metavar="HOLDER")
    claim.add_argument("--steal", action="store_true")
    claim.set_defaults(run=_command("claim"))


def _add_devices(commands: Subparsers) -> None:
    """Commands for a configured device."""
    up = _add(commands, "up", "start swapping to a configured device; returns when swap is on")
    up.add_argument("name", metavar="NAME", help=_NAME_HELP)
    up.add_argument("--steal", action="store_true", help=_STEAL_HELP)
    up.set_defaults(run=_command("up_down", "run_up"))

    down = _add(commands, "down", "stop swapping to a device, and take it down")
    down.add_argument("name", metavar="NAME", help=_NAME_HELP)
    down.add_argument(
        "--service", action="store_true", help="for ExecStop= of the unit: leave swap on while the unit restarts"
    )
    down.set_defaults(run=_command("up_down", "run_down"))

    keep = _add(commands, "run", "keep a device running, in the foreground (the unit starts this)")
    keep.add_argument("name", metavar="NAME", help=_NAME_HELP)
    keep.add_argument("--steal", action="store_true", help=_STEAL_HELP)
    keep.set_defaults(run=_keep)


def _add_reports(commands: Subparsers) -> None:
    """Commands that report, and change nothing; bench creates and removes a file of its own."""
    status = _add(commands, "status", "show the state of each device; exit status 0 if all are healthy")
    status.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP} (default: all devices)")
    status.add_argument("--json", action="store_true", help="print JSON, with all counters")
    status.set_defaults(run=_command("status"))

    doctor = _add(
        commands, "doctor", "check whether this machine is set up to swap over the network; exit status 0 if it is"
    )
    doctor.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP} (default: all devices and workers)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_command("doctor"))

    top = _add(commands, "top", "show the traffic of each device, with an update every second")
    top.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP} (default: all devices)")
    top.add_argument("--interval", default="1s", metavar="TIME", help="time between updates (default: 1s)")
    top.add_argument("--count", type=int, metavar="N", help="end after N updates (default: at Ctrl-C)")
    top.set_defaults(run=_command("top"))

    bench = _add(commands, "bench", "measure a server, with a temporary file on it")
    bench.add_argument("url", metavar="URL", help="a file that does not exist; it is created, and removed at the end")
    bench.add_argument("--size", default="64M", metavar="SIZE", help="size of the file (default: 64M)")
    bench.add_argument(
        "--time", default="3s", metavar="TIME", help="longest duration of each kind of load (default: 3s)"
    )
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(run=_command("bench"))


def _add_installation(commands: Subparsers) -> None:
    units = _add(commands, "install-units", "install the systemd units; run it again after an update")
    units.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="root directory of an image (default: /)"
    )
    units.add_argument("--program", metavar="PATH", help="path of the nbdnfs that the units start (default: this one)")
    units.add_argument(
        "--force", action="store_true", help="overwrite files that were changed since their installation"
    )
    units.set_defaults(run=_command("install_units"))

    remove = _add(commands, "uninstall-units", "remove what install-units installed; refused while a device is up")
    remove.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="root directory of an image (default: /)"
    )
    remove.add_argument("--force", action="store_true", help="remove files that were changed since their installation")
    remove.set_defaults(run=_command("install_units", "run_uninstall"))


def _add_kernel_devices(commands: Subparsers) -> None:
    """Commands for a block device without a keeper."""
    attach = _add(commands, "attach", "attach a served file as a block device, /dev/nbdN")
    attach.add_argument("socket", type=Path, metavar="SOCKET", help="the socket of nbdnfs serve")
    attach.add_argument("--device", metavar="DEVICE", help="for example /dev/nbd0 (default: a free one)")
    attach.add_argument(
        "--no-warm-up", action="store_true", help="skip the warm-up that swap needs, to inspect the file only"
    )
    attach.set_defaults(run=_command("attach", "run_attach"))

    detach = _add(commands, "detach", "detach a block device; refused while it is in use")
    detach.add_argument("device", metavar="DEVICE", help="for example /dev/nbd0")
    detach.set_defaults(run=_command("attach", "run_detach"))


def _keep(args: argparse.Namespace) -> int:
    started_s = time.monotonic()
    try:
        from nbdnfs.keeper import main

        return main.run(args.name, steal=args.steal)
    except Exception as error:
        if "INVOCATION_ID" in os.environ and getattr(error, "exit_code", None) not in FINAL_STATUSES:
            time.sleep(max(0.0, started_s + _KEEPER_PACE_S - time.monotonic()))
        raise


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Ends with a status of sysexits(3), or 130 after Ctrl-C, as a shell would."""
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, so that a closed pipe is not reported as a bug at exit
    except NbdnfsError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        status = os.EX_IOERR
    sys.exit(status)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # --help and --version, which have printed their text
        return int(end.code or 0)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING, format="nbdnfs: %(message)s", stream=sys.stderr
    )
    return int(args.run(args))
