# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: its subcommands, each in a function of its own. The only caller of sys.exit."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from nbdnfs import __version__, defaults, quantities
from nbdnfs.errors import NbdnfsError, NoInputError, OwnedError, UsageError

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

_STEAL_HELP = "take the file from another machine that has it: what that one has swapped out is lost"


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints go the way of all others."""

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

    create = commands.add_parser("create", help="make a backing file, all of its blocks written")
    create.add_argument("url", metavar="URL")
    create.add_argument("--size", required=True, metavar="SIZE", help="for example 512M or 2G")
    create.add_argument("--force", action="store_true", help="overwrite an existing file; it is never made smaller")
    create.add_argument("--if-missing", action="store_true", help="leave a file that is there as it is")
    create.set_defaults(run=_create)

    serve = commands.add_parser("serve", help="serve a backing file over NBD, in the foreground")
    serve.add_argument("url", metavar="URL")
    serve.add_argument("--socket", required=True, type=Path, metavar="PATH", help="the Unix socket to listen on")
    serve.add_argument("--engine", default="c", metavar="NAME", help="c (the default), or libnfs-python for comparison")
    serve.add_argument(
        "--threads",
        type=int,
        default=defaults.THREADS,
        metavar="N",
        help="nbdkit's threads for each connection (%(default)s)",
    )
    serve.add_argument("--no-owner", action="store_true", help="whoever owns the file: two machines on one corrupt it")
    # for measurements, the plugin's own check applies: --plugin-setting "without=io flusher"
    serve.add_argument("--plugin-setting", action="append", default=[], metavar="KEY=VALUE", help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)

    name_help = "the NAME of /etc/nbdnfs/NAME.toml"
    up = commands.add_parser("up", help="swap to a configured device; returns when swap is on")
    up.add_argument("name", metavar="NAME", help=name_help)
    up.add_argument("--steal", action="store_true", help=_STEAL_HELP)
    up.set_defaults(run=_up)

    down = commands.add_parser("down", help="swap off, and take the device down")
    down.add_argument("name", metavar="NAME", help=name_help)
    down.add_argument("--service", action="store_true", help="as ExecStop= of the unit: not in a restart")
    down.set_defaults(run=_down)

    status = commands.add_parser("status", help="tell how the devices are; exit status 0 when all is well")
    status.add_argument("name", metavar="NAME", nargs="?", help=f"{name_help}; all of them without")
    status.add_argument("--json", action="store_true", help="for programs, with all counters")
    status.set_defaults(run=_status)

    doctor = commands.add_parser(
        "doctor", help="tell whether this machine can be relied on to swap; 0 when all is good"
    )
    doctor.add_argument("name", metavar="NAME", nargs="?", help=f"{name_help}; all workers without")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)

    top = commands.add_parser("top", help="show what the workers do just now")
    top.add_argument("name", metavar="NAME", nargs="?", help=f"{name_help}; all of them without")
    top.add_argument("--interval", default="1s", metavar="TIME", help="between two looks (1s)")
    top.add_argument("--count", type=int, metavar="N", help="end after N looks; without, at Ctrl-C")
    top.set_defaults(run=_top)

    bench = commands.add_parser("bench", help="measure a server with a file that is made for it, and removed")
    bench.add_argument("url", metavar="URL", help="of a file that does not exist")
    bench.add_argument("--size", default="64M", metavar="SIZE", help="of the file (64M)")
    bench.add_argument("--time", default="3s", metavar="TIME", help="for each kind of load, at most (3s)")
    bench.add_argument("--json", action="store_true", help="for programs")
    bench.set_defaults(run=_bench)

    keep = commands.add_parser("run", help="keep a device alive, in the foreground (what the unit starts)")
    keep.add_argument("name", metavar="NAME", help=name_help)
    keep.add_argument("--steal", action="store_true", help=_STEAL_HELP)
    keep.set_defaults(run=_keep)

    # no help: what a keeper starts
    claim = commands.add_parser("claim", description="make a backing file where it is missing, and take it")
    claim.add_argument("url", metavar="URL")
    claim.add_argument("--size", metavar="SIZE")
    claim.add_argument("--holder", metavar="HOLDER")
    claim.add_argument("--steal", action="store_true")
    claim.set_defaults(run=_claim)

    units_files = commands.add_parser("install-units", help="put the systemd units in place; again after an update")
    units_files.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="of an image, instead of /")
    units_files.add_argument("--program", metavar="PATH", help="the nbdnfs that they start there (this one)")
    units_files.add_argument("--force", action="store_true", help="overwrite files that somebody has changed")
    units_files.set_defaults(run=_install_units)

    attach = commands.add_parser("attach", help="give the kernel a served file as block device /dev/nbdN")
    attach.add_argument("socket", type=Path, metavar="SOCKET")
    attach.add_argument("--device", metavar="DEVICE", help="for example /dev/nbd0; the kernel chooses otherwise")
    attach.add_argument("--no-warm-up", action="store_true", help="for looking only: swap needs the warm-up")
    attach.set_defaults(run=_attach)

    detach = commands.add_parser("detach", help="take such a block device down")
    detach.add_argument("device", metavar="DEVICE")
    detach.set_defaults(run=_detach)
    return parser


def _progress_line() -> Callable[[int, int], None]:
    """A callback that shows progress on stderr: a bar on a terminal, every tenth part in a log."""
    started_s = time.monotonic()
    shown = -1

    def show(done_bytes: int, total_bytes: int) -> None:
        nonlocal shown
        on_terminal = sys.stderr.isatty()
        percent = done_bytes * 100 // total_bytes if total_bytes else 100
        step = percent if on_terminal else percent // 10 * 10
        if step == shown:
            return
        shown = step
        speed = done_bytes / max(time.monotonic() - started_s, 0.001)
        size = quantities.format_size
        text = f"{size(done_bytes)} of {size(total_bytes)}, {size(int(speed))}/s"
        if on_terminal:
            bar = "#" * (percent * 40 // 100)
            print(f"\r[{bar:<40}] {text}   ", end="\n" if percent == 100 else "", file=sys.stderr, flush=True)
        else:
            print(f"nbdnfs: {percent}% ({text})", file=sys.stderr, flush=True)

    return show


def _create(args: argparse.Namespace) -> int:
    from nbdnfs.nas import backing_file

    size_bytes = quantities.parse_size_bytes(args.size)
    if args.if_missing and _is_there(args.url):
        return 0
    backing_file.create(args.url, size_bytes, force=args.force, progress=_progress_line())
    return 0


def _is_there(url: str) -> bool:
    from nbdnfs.nas import backing_file

    try:
        backing_file.inspect(url)
    except NoInputError:
        return False
    return True


def _claim(args: argparse.Namespace) -> int:
    from nbdnfs.keeper.records import Records
    from nbdnfs.nas import backing_file, owner_record, ownership

    if args.size is not None and not _is_there(args.url):
        backing_file.create(args.url, quantities.parse_size_bytes(args.size), progress=_progress_line())
    if args.holder is not None:
        name = args.holder.rpartition(":")[2]
        try:
            ownership.claim(args.url, args.holder, owner_record.identity(), steal=args.steal)
        except OwnedError as error:
            Records.write_refusal(name, error.message)
            raise
        Records.write_refusal(name, None)
    return 0


def _serve(args: argparse.Namespace) -> int:
    from nbdnfs.commands import serve

    if not 1 <= args.threads <= 64:
        raise UsageError(f"--threads {args.threads} is not possible", "1 to 64; more than 16 hardly make it faster")
    settings = {}
    for setting in args.plugin_setting:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--plugin-setting {setting} has no value", "write it as KEY=VALUE")
        settings[key] = value
    return serve.serve(
        args.url,
        args.socket,
        engine=args.engine,
        threads=args.threads,
        settings=settings,
        owned=not args.no_owner,
    )


def _up(args: argparse.Namespace) -> int:
    from nbdnfs.commands import up_down

    up_down.up(args.name, steal=args.steal)
    return 0


def _down(args: argparse.Namespace) -> int:
    from nbdnfs.commands import up_down

    show = _progress_line()
    up_down.down(args.name, lambda left, total: show(total - left, total), service=args.service)
    return 0


def _status(args: argparse.Namespace) -> int:
    from nbdnfs.commands import status

    found = [status.read(name) for name in ([args.name] if args.name else status.names())]
    if args.json:
        _print_json([one.to_json() for one in found])
    else:
        print("\n".join(one.text() for one in found) or "nbdnfs: no device is configured")
    return 0 if all(one.is_green for one in found) else os.EX_UNAVAILABLE


def _print_json(found: list[dict[str, object]]) -> None:
    import json

    print(json.dumps(found, indent=2))


def _doctor(args: argparse.Namespace) -> int:
    from nbdnfs.commands import doctor

    findings = doctor.examine(args.name)
    if args.json:
        _print_json([finding.to_json() for finding in findings])
    else:
        print("\n".join(finding.text() for finding in findings))
    return doctor.exit_status(findings)


def _top(args: argparse.Namespace) -> int:
    from nbdnfs import config
    from nbdnfs.commands import top

    interval_s = quantities.parse_duration_s(args.interval)
    if interval_s <= 0 or (args.count is not None and args.count < 1):
        raise UsageError("--interval and --count must be more than nothing", "for example --interval 2s --count 5")
    if args.name is not None:
        config.check_name(args.name)
    top.show([args.name] if args.name else [], interval_s=interval_s, count=args.count)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from nbdnfs.commands import bench

    size_bytes, seconds = quantities.parse_size_bytes(args.size), quantities.parse_duration_s(args.time)
    rows = bench.run(
        args.url, size_bytes, seconds, (lambda row: None) if args.json else lambda row: print(row.text(), flush=True)
    )
    if args.json:
        _print_json([row.to_json() for row in rows])
    return 0


def _keep(args: argparse.Namespace) -> int:
    started_s = time.monotonic()
    try:
        from nbdnfs.keeper import main

        return main.run(args.name, steal=args.steal)
    except Exception as error:
        if "INVOCATION_ID" in os.environ and getattr(error, "exit_code", None) not in FINAL_STATUSES:
            time.sleep(max(0.0, started_s + _KEEPER_PACE_S - time.monotonic()))
        raise


def _install_units(args: argparse.Namespace) -> int:
    from nbdnfs.commands import install_units

    written = install_units.install(args.root, program=args.program, force=args.force)
    print(install_units.explain(written, args.root))
    return 0


def _attach(args: argparse.Namespace) -> int:
    from nbdnfs.commands import attach

    return attach.run_attach(args)


def _detach(args: argparse.Namespace) -> int:
    from nbdnfs.commands import attach

    return attach.run_detach(args)


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
