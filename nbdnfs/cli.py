# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line's beginning and end: the one place where an error becomes lines on stderr and an exit status."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys

from nbdnfs.errors import EndedBySignal, NbdnfsError, NoMemoryError, is_of_want

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

# Set: what is not foreseen ends with a traceback.
_DEBUG = "NBDNFS_DEBUG"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Ends with a status of sysexits(3), or 130 after Ctrl-C, as a shell would."""
    # The caller may ignore it (`trap '' CHLD`), which exec keeps: then no child has an exit status, wait(2)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prepare_output()
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, so that a closed pipe is not reported as a bug at exit
    except NbdnfsError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        status = error.exit_code
    except KeyboardInterrupt as end:
        status = _interrupted(end)
    except BrokenPipeError:
        status = os.EX_IOERR
    except Exception as error:
        is_of_stdout = isinstance(error, OSError) and _flushed(0) != 0
        if os.environ.get(_DEBUG) and not is_of_stdout:
            raise
        what = _unforeseen(error)
        if not is_of_stdout:
            print(*what.lines(), sep="\n", file=sys.stderr)
        status = os.EX_IOERR if is_of_stdout else what.exit_code
    sys.exit(_flushed(status))


def _prepare_output() -> None:
    """Have all output be possible: a host name or a file's may have any byte, and a caller may have closed stdout
    (`>&-`) or stderr, which Python has as None then. With PYTHONUNBUFFERED, stdout forgets what it could not write, and
    `_flushed` would find nothing: it gets a buffer again."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process lives
        elif name == "stdout" and isinstance(getattr(stream, "buffer", None), io.RawIOBase):
            sys.stdout = open(  # noqa: SIM115  # for as long as the process lives
                stream.fileno(), "w", buffering=1, encoding=stream.encoding, errors="backslashreplace", closefd=False
            )
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flushed(status: int) -> int:
    """`status` once stdout has taken everything; EX_IOERR when it cannot: a closed pipe, a full disk."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        if not isinstance(error, BrokenPipeError):
            print(f"nbdnfs: stdout: {error.strerror}", file=sys.stderr)
            print("nbdnfs: the output is not complete: make room where it goes, and try again", file=sys.stderr)
        return os.EX_IOERR
    return status


def _interrupted(end: KeyboardInterrupt) -> int:
    """The status after Ctrl-C. What a signal ended that was waited for ends by that signal."""
    if isinstance(end, EndedBySignal):
        _flushed(0)
        signal.signal(end.number, signal.SIG_DFL)
        os.kill(os.getpid(), end.number)
    return 130


def _unforeseen(error: Exception) -> NbdnfsError:
    """What no command has foreseen, on one line. Want of memory or descriptors can meet any call; the rest is a bug:
    what, and where."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and is_of_want(error)):
        reason = os.strerror(errno.ENOMEM) if isinstance(error, MemoryError) else error.strerror
        return NoMemoryError(
            f"the command needs more than the kernel gives it now: {reason}",
            "free memory, or raise the limit of open files (ulimit -n), and try again",
        )
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = f" ({os.path.basename(last.tb_frame.f_code.co_filename)}:{last.tb_lineno})" if last is not None else ""
    return NbdnfsError(
        f"internal error: {type(error).__name__}: {error}{place}",
        f"please report it, with what this prints with {_DEBUG}=1 in its environment",
    )


def _run(argv: Sequence[str] | None) -> int:
    match sys.argv[1:] if argv is None else list(argv):
        # as the unit starts a keeper: what the parser takes would stay in its locked memory
        case ["run", name] if not name.startswith("-"):
            from nbdnfs.keeper import main as keeper

            _log(logging.WARNING)
            return keeper.run(name)
    from nbdnfs import parser

    try:
        args = parser.make().parse_args(argv)
    except SystemExit as end:  # --help and --version, which have printed their text
        return int(end.code or 0)
    _log(logging.DEBUG if args.verbose else logging.WARNING)
    return int(args.run(args))


def _log(level: int) -> None:
    logging.basicConfig(level=level, format="nbdnfs: %(message)s", stream=sys.stderr)
