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

from nbdnfs import __version__
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

_NAME_HELP = "the NAME of /etc/nbdnfs/NAME.toml"
_STEAL_HELP = "take the file from another machine that has it: what that one has swapped out is lost"


class _Parser(argparse.ArgumentParser):
    """argparse, except that a usage error is raised like any other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nbdnfs",
        description="Swap onto a file on an NFS share.",
        # not a format string, unlike the help of an argument
        epilog="URLs are like nfs://nas/export/swap/%H.swap?version=3 with %H for the host name "
        "and %m for the machine id.",
    )
    parser.add_argument("--version", action="version", version=f"nbdnfs {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done and which programs are started")
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


def _add_files(commands: Subparsers) -> None:
    """Commands for a backing file, which need neither root nor a configuration."""
    create = commands.add_parser("create", help="make a backing file, all of its blocks written")
    create.add_argument("url", metavar="URL")
    create.add_argument("--size", required=True, metavar="SIZE", help="for example 512M or 2G")
    create.add_argument("--force", action="store_true", help="overwrite an existing file; it is never made smaller")
    create.add_argument("--if-missing", action="store_true", help="leave a file that is there as it is")
    create.set_defaults(run=_command("create"))

    serve = commands.add_parser("serve", help="serve a backing file over NBD, in the foreground")
    serve.add_argument("url", metavar="URL")
    serve.add_argument("--socket", required=True, type=Path, metavar="PATH", help="the Unix socket to listen on")
    serve.add_argument("--engine", default="c", metavar="NAME", help="c (the default), or libnfs-python for comparison")
    serve.add_argument("--threads", type=int, default=12, metavar="N", help="nbdkit's threads for each connection (12)")
    serve.add_argument("--no-owner", action="store_true", help="whoever owns the file: two machines on one corrupt it")
    # for measurements, the plugin's own check applies: --plugin-setting "without=io flusher"
    serve.add_argument("--plugin-setting", action="append", default=[], metavar="KEY=VALUE", help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)

    # no help: what a keeper starts
    claim = commands.add_parser("claim", description="make a backing file where it is missing, and take it")
    claim.add_argument("url", metavar="URL")
    claim.add_argument("--size", metavar="SIZE")
    claim.add_argument("--holder", metavar="HOLDER")
    claim.add_argument("--steal", action="store_true")
    claim.set_defaults(run=_command("claim"))


def _add_devices(commands: Subparsers) -> None:
    """Commands for a configured device."""
    up = commands.add_parser("up", help="swap to a configured device; returns when swap is on")
    up.add_argument("name", metavar="NAME", help=_NAME_HELP)
    up.add_argument("--steal", action="store_true", help=_STEAL_HELP)
    up.set_defaults(run=_command("up_down", "run_up"))

    down = commands.add_parser("down", help="swap off, and take the device down")
    down.add_argument("name", metavar="NAME", help=_NAME_HELP)
    down.add_argument("--service", action="store_true", help="as ExecStop= of the unit: not in a restart")
    down.set_defaults(run=_command("up_down", "run_down"))

    keep = commands.add_parser("run", help="keep a device alive, in the foreground (what the unit starts)")
    keep.add_argument("name", metavar="NAME", help=_NAME_HELP)
    keep.add_argument("--steal", action="store_true", help=_STEAL_HELP)
    keep.set_defaults(run=_keep)


def _add_reports(commands: Subparsers) -> None:
    """Commands that look and change nothing; bench makes and removes a file of its own."""
    status = commands.add_parser("status", help="tell how the devices are; exit status 0 when all is well")
    status.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP}; all of them without")
    status.add_argument("--json", action="store_true", help="for programs, with all counters")
    status.set_defaults(run=_command("status"))

    doctor = commands.add_parser(
        "doctor", help="tell whether this machine can be relied on to swap; 0 when all is good"
    )
    doctor.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP}; all workers without")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_command("doctor"))

    top = commands.add_parser("top", help="show what the workers do just now")
    top.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP}; all of them without")
    top.add_argument("--interval", default="1s", metavar="TIME", help="between two looks (1s)")
    top.add_argument("--count", type=int, metavar="N", help="end after N looks; without, at Ctrl-C")
    top.set_defaults(run=_command("top"))

    bench = commands.add_parser("bench", help="measure a server with a file that is made for it, and removed")
    bench.add_argument("url", metavar="URL", help="of a file that does not exist")
    bench.add_argument("--size", default="64M", metavar="SIZE", help="of the file (64M)")
    bench.add_argument("--time", default="3s", metavar="TIME", help="for each kind of load, at most (3s)")
    bench.add_argument("--json", action="store_true", help="for programs")
    bench.set_defaults(run=_command("bench"))


def _add_installation(commands: Subparsers) -> None:
    units = commands.add_parser("install-units", help="put the systemd units in place; again after an update")
    units.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="of an image, instead of /")
    units.add_argument("--program", metavar="PATH", help="the nbdnfs that they start there (this one)")
    units.add_argument("--force", action="store_true", help="overwrite files that somebody has changed")
    units.set_defaults(run=_command("install_units"))


def _add_kernel_devices(commands: Subparsers) -> None:
    """Commands for a block device without a keeper."""
    attach = commands.add_parser("attach", help="give the kernel a served file as block device /dev/nbdN")
    attach.add_argument("socket", type=Path, metavar="SOCKET")
    attach.add_argument("--device", metavar="DEVICE", help="for example /dev/nbd0; the kernel chooses otherwise")
    attach.add_argument("--no-warm-up", action="store_true", help="for looking only: swap needs the warm-up")
    attach.set_defaults(run=_command("attach", "run_attach"))

    detach = commands.add_parser("detach", help="take such a block device down")
    detach.add_argument("device", metavar="DEVICE")
    detach.set_defaults(run=_command("attach", "run_detach"))


def _serve(args: argparse.Namespace) -> int:
    from nbdnfs.worker import nbdkit

    if not 1 <= args.threads <= 64:
        raise UsageError(f"--threads {args.threads} is not possible", "1 to 64; more than 16 hardly make it faster")
    settings = {}
    for setting in args.plugin_setting:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--plugin-setting {setting} has no value", "write it as KEY=VALUE")
        settings[key] = value
    return nbdkit.serve(
        args.url,
        args.socket,
        engine=args.engine,
        threads=args.threads,
        settings=settings,
        owned=not args.no_owner,
    )


def _keep(args: argparse.Namespace) -> int:
    started_s = time.monotonic()
    try:
        from nbdnfs.keeper import real_work

        return real_work.run(args.name, steal=args.steal)
    except Exception as error:
        if "INVOCATION_ID" in os.environ and getattr(error, "exit_code", None) not in FINAL_STATUSES:
            time.sleep(max(0.0, started_s + _KEEPER_PACE_S - time.monotonic()))
        raise


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Exit statuses are those of sysexits(3); 130 after Ctrl-C, as shells have it."""
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, where a reader that went away can be told from a bug
    except NbdnfsError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush at exit
        status = os.EX_IOERR
    sys.exit(status)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # --help and --version have said what there is to say
        return int(end.code or 0)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING, format="nbdnfs: %(message)s", stream=sys.stderr
    )
    return int(args.run(args))
