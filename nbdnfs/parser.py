# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parser of the command line, with the text of every `--help`. What a command does is imported when it is called:
`nbdnfs status` does not load what only `nbdnfs bench` needs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nbdnfs import __version__, defaults
from nbdnfs.errors import UsageError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction["Parser"]

_URL_HELP = "the backing file, for example nfs://nas/export/swap/%%H.swap"
_NAME_HELP = "the NAME of /etc/nbdnfs/NAME.toml"
_WHERE_HELP = "the NAME of /etc/nbdnfs/NAME.toml, or the URL of the file"
_STEAL_HELP = "take the file from the machine that owns it; what that machine has swapped out is lost"


class Parser(argparse.ArgumentParser):
    """argparse, except that a usage error is raised like any other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see: {self.prog} --help")


def make() -> Parser:
    """The parser of `nbdnfs`."""
    parser = Parser(
        prog="nbdnfs",
        description="Swap onto a file on an NFS share.",
        # not a format string, unlike the help of an argument
        epilog="A URL looks like nfs://nas/export/swap/%H.swap?version=3, with %H for the host name, "
        "%m for a hash of the machine id, %M for the MAC address of the boot interface and %u for the product UUID.",
    )
    parser.add_argument("--version", action="version", version=f"nbdnfs {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log each step, and each program that is started")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_files(commands)
    _add_serve(commands)
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
    """Commands for backing files, which need neither root nor a configuration."""
    create = _add(commands, "create", "create a backing file, with every block written")
    create.add_argument("url", metavar="URL", help=_URL_HELP)
    create.add_argument(
        "--size",
        required=True,
        metavar="SIZE",
        help="size of the file, for example 512M or 2G, or relative to this machine's memory: 'ram / 2, at most 8G'",
    )
    create.add_argument("--force", action="store_true", help="overwrite an existing file with zeros; never shrink it")
    create.add_argument(
        "--if-missing", action="store_true", help="do nothing if the file exists as this call would create it"
    )
    create.add_argument(
        "--fix-mode", action="store_true", help="with --if-missing: set the mode of an existing file to 0600"
    )
    create.set_defaults(run=_command("create"))

    grow = _add(commands, "grow", "make a backing file larger, while swap on it is off")
    grow.add_argument("where", metavar="NAME|URL", help=_WHERE_HELP)
    grow.add_argument("size", metavar="SIZE", help="the new size, as for create")
    grow.add_argument("--restart", action="store_true", help="take the device NAME down first, and bring it up again")
    grow.set_defaults(run=_command("grow"))

    remove = _add(commands, "remove", "remove a backing file of this machine, while nothing uses it")
    remove.add_argument("where", metavar="NAME|URL", help=_WHERE_HELP)
    remove.add_argument("--yes", action="store_true", help="do not ask")
    remove.set_defaults(run=_command("remove"))

    gc = _add(commands, "gc", "remove the backing files of machines that have been silent for a long time")
    gc.add_argument("where", metavar="NAME|URL", help="a folder, or a file in it")
    gc.add_argument(
        "--older-than", default="90d", metavar="TIME", help="how long an owner was silent (default: 90d, at least 1d)"
    )
    gc.add_argument("--dry-run", action="store_true", help="show what would be removed")
    gc.add_argument("--yes", action="store_true", help="do not ask")
    gc.set_defaults(run=_command("gc"))

    # without help, so that the manual does not list it: keepers start it
    claim = commands.add_parser("claim", description="create a missing backing file, and make this machine its owner")
    claim.add_argument("url", metavar="URL")
    claim.add_argument("--size", metavar="SIZE")
    claim.add_argument("--holder", metavar="HOLDER")
    claim.add_argument("--steal", action="store_true")
    claim.add_argument("--wait", action="store_true")
    claim.add_argument("--new-file-after", default="0s", metavar="TIME")
    claim.set_defaults(run=_command("claim"))


def _add_serve(commands: Subparsers) -> None:
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
    serve.add_argument(
        "--encrypt",
        action="store_true",
        help="encrypt the pages with keys that end with this command, as swap needs them; what the file holds from"
        " before, but for its first page, reads as zeros",
    )
    # for measurements, the plugin's own check applies: --plugin-setting "without=io flusher"
    serve.add_argument("--plugin-setting", action="append", default=[], metavar="KEY=VALUE", help=argparse.SUPPRESS)
    serve.set_defaults(run=_command("serve"))


def _add_devices(commands: Subparsers) -> None:
    """Commands for a configured device."""
    up = _add(
        commands,
        "up",
        "start swapping to a configured device; returns when swap is on, or with exit status 75 where the start goes on"
        " in the background",
    )
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
    listing = _add(commands, "list", "list network block devices, or the backing files of a folder on a NAS")
    listing.add_argument(
        "where", metavar="NAME|URL", nargs="?", help="a folder, or a file in it (default: this machine's devices)"
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_command("list"))

    status = _add(commands, "status", "show the state of each device; ends with 0 ok, 1 warning, 2 critical, 3 unknown")
    status.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP} (default: all devices)")
    status.add_argument("--json", action="store_true", help="print JSON, with all counters")
    status.set_defaults(run=_command("status"))

    metrics = _add(commands, "metrics", "print what status knows as Prometheus has it, or write it for node_exporter")
    metrics.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP} (default: all devices)")
    metrics.add_argument(
        "--textfile",
        type=Path,
        metavar="PATH",
        help="write this file of node_exporter's folder, NAME.prom, in one step",
    )
    metrics.set_defaults(run=_command("metrics"))

    check = _add(commands, "check", "check configuration files, and nothing else; exit status 0 if they are valid")
    check.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP} (default: all files)")
    check.set_defaults(run=_command("check"))

    doctor = _add(
        commands, "doctor", "check whether this machine is set up to swap over the network; exit status 0 if it is"
    )
    doctor.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP} (default: all devices and workers)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_command("doctor"))

    top = _add(commands, "top", "show the traffic of each device, on a terminal as a screen that q ends")
    top.add_argument("name", metavar="NAME", nargs="?", help=f"{_NAME_HELP} (default: all devices)")
    top.add_argument("--interval", default="1s", metavar="TIME", help="time between updates (default: 1s)")
    top.add_argument("--count", type=int, metavar="N", help="end after N updates (default: at Ctrl-C)")
    top.add_argument("--json", action="store_true", help="print JSON, an object on a line for each update")
    top.set_defaults(run=_command("top"))

    bench = _add(commands, "bench", "measure a server, with a temporary file on it")
    bench.add_argument("url", metavar="URL", help="a file that does not exist; it is created, and removed at the end")
    bench.add_argument("--size", default="64M", metavar="SIZE", help="size of the file (default: 64M)")
    bench.add_argument(
        "--time", default="3s", metavar="TIME", help="longest duration of each kind of load (default: 3s)"
    )
    bench.add_argument(
        "--no-encrypt", action="store_true", help="measure pages as a device has them with encrypt = false"
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
    from nbdnfs.keeper import main

    return main.run(args.name, steal=args.steal)
