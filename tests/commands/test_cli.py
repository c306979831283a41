# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: usage errors, help, and how errors become lines on stderr and exit statuses."""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import DEADLINE_S

from nbdnfs import __version__, cli, errors, parser
from nbdnfs.commands import serve
from nbdnfs.errors import NbdnfsError
from nbdnfs.keeper.records import Records

URL = "nfs://nas/export/swap"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """main() configures logging for the process, which here is that of all tests."""
    root = logging.getLogger()
    handlers, level = root.handlers.copy(), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def run(*argv: str) -> int:
    """The exit status of `nbdnfs ARGV`."""
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("argv", "message", "command"),
    [
        ([], "the following arguments are required: COMMAND", ""),
        (["frobnicate"], "argument COMMAND: invalid choice: 'frobnicate'", ""),
        (["--frobnicate", "serve"], "the following arguments are required", " serve"),
        (["serve"], "the following arguments are required: URL, --socket", " serve"),
        (["serve", URL], "the following arguments are required: --socket", " serve"),
        (["serve", URL, "--socket"], "argument --socket: expected one argument", " serve"),
        (
            ["serve", URL, "--socket", "s", "--threads", "four"],
            "argument --threads: invalid int value: 'four'",
            " serve",
        ),
        (["serve", URL, "--socket", "s", "extra"], "unrecognized arguments: extra", ""),
        (["serve", URL, "--socket", "s", "--frobnicate"], "unrecognized arguments: --frobnicate", ""),
        (["create", URL], "the following arguments are required: --size", " create"),
        (["attach"], "the following arguments are required: SOCKET", " attach"),
        (["detach"], "the following arguments are required: DEVICE", " detach"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], argv: list[str], message: str, command: str) -> None:
    """Two lines, of which the second names the help of that command; EX_USAGE; nothing on stdout."""
    assert run(*argv) == os.EX_USAGE
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith(f"nbdnfs: {message}")
    assert second == f"nbdnfs: see: nbdnfs{command} --help"


def test_a_caller_that_ignores_the_end_of_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `trap '' CHLD`: what the commands start has its own exit status all the same."""

    def start(argv: object) -> int:
        return subprocess.run(["/bin/sh", "-c", "exit 7"], check=False, timeout=DEADLINE_S).returncode

    monkeypatch.setattr(cli, "_run", start)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run("up", "swap0") == 7
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("threads", ["0", "-3", "65"])
def test_threads_out_of_range(capsys: pytest.CaptureFixture[str], threads: str) -> None:
    """An impossible number of threads is refused before anything is started."""
    assert run("serve", URL, "--socket", "s", f"--threads={threads}") == os.EX_USAGE
    assert capsys.readouterr().err.splitlines()[0] == f"nbdnfs: --threads {threads} is out of range"


def subparsers() -> dict[str, argparse.ArgumentParser]:
    """Command ▸ its parser."""
    (action,) = (action for action in parser.make()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("command", subparsers())
def test_every_command_has_its_function(command: str) -> None:
    """The module and the function that the parser names by strings exist."""
    function = subparsers()[command].get_default("run")
    names = inspect.getclosurevars(function).nonlocals
    if names:  # what serve and run have is a function of parser.py
        assert callable(getattr(importlib.import_module(f"nbdnfs.commands.{names['module']}"), names["function"]))


@pytest.mark.parametrize("command", sorted({*subparsers()} - {"claim"}))
def test_every_option_is_explained(command: str) -> None:
    """Each argument and option has a help text; `claim`, which only keepers start, is not for users."""
    assert [action.dest for action in subparsers()[command]._actions if not action.help] == []


def test_help_loads_no_command() -> None:
    """The help comes without the commands' modules, the engine among them: each is imported when it is called."""
    code = "import sys; from nbdnfs import cli, parser; parser.make().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("nbdnfs")}
    assert loaded == {"nbdnfs", "nbdnfs.cli", "nbdnfs.defaults", "nbdnfs.errors", "nbdnfs.parser"}


@pytest.mark.parametrize("module", ["attach", "doctor", "install_units", "status", "top", "up_down"])
def test_engine_is_loaded_only_where_needed(module: str) -> None:
    """A command that does not speak to the server starts without the engine and libnfs."""
    code = f"import sys, nbdnfs.commands.{module}; print(*(name for name in sys.modules if 'engine' in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("command", [[], ["create"], ["serve"], ["attach"], ["detach"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """The help goes to stdout, with status 0."""
    assert run(*command, "--help") == 0
    out, err = capsys.readouterr()
    assert out.startswith(" ".join(["usage: nbdnfs", *command]))
    assert err == ""


def test_the_help_shows_specifiers_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """%H and %m appear with one percent sign, as a user types them."""
    assert run("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "/%H.swap?version=3, with %H for the host name, %m for a hash of the machine id" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints to stdout, with status 0."""
    assert run("--version") == 0
    assert capsys.readouterr() == (f"nbdnfs {__version__}\n", "")


def test_arguments_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """URL, socket and options reach the worker; its exit status is that of `nbdnfs serve`."""
    seen: list[object] = []
    monkeypatch.setattr(serve, "serve", lambda *arguments, **options: seen.append((arguments, options)) or 7)
    assert run("serve", URL, "--socket", "/run/s", "--engine=libnfs-python", "--threads", "2") == 7
    ((arguments, options),) = seen
    assert (arguments[0], str(arguments[1])) == (URL, "/run/s")
    assert options == {"engine": "libnfs-python", "threads": 2, "settings": {}, "owned": True}


ERRORS = {
    NbdnfsError: os.EX_SOFTWARE,
    errors.UsageError: os.EX_USAGE,
    errors.ConfigError: os.EX_CONFIG,
    errors.NoInputError: os.EX_NOINPUT,
    errors.NoHostError: os.EX_NOHOST,
    errors.UnavailableError: os.EX_UNAVAILABLE,
    errors.CannotCreateError: os.EX_CANTCREAT,
    errors.IOFailureError: os.EX_IOERR,
    errors.PermissionDeniedError: os.EX_NOPERM,
    errors.BusyError: os.EX_TEMPFAIL,
}


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have `nbdnfs serve` raise `error`."""

    def fail(*_arguments: object, **_options: object) -> int:
        raise error

    monkeypatch.setattr(serve, "serve", fail)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_become_lines_and_statuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: type[NbdnfsError]
) -> None:
    """Message and hint go to stderr, without a hint the message alone; the status is one of sysexits(3)."""
    fail_with(monkeypatch, kind("it is broken", "mend it"))
    assert run("serve", URL, "--socket", "s") == ERRORS[kind]
    assert capsys.readouterr() == ("", "nbdnfs: it is broken\nnbdnfs: mend it\n")
    fail_with(monkeypatch, kind("it is broken"))
    assert run("serve", URL, "--socket", "s") == ERRORS[kind]
    assert capsys.readouterr() == ("", "nbdnfs: it is broken\n")


def test_every_error_has_its_own_status() -> None:
    """The table above has every error, each with another status."""
    assert set(ERRORS) == {NbdnfsError, *NbdnfsError.__subclasses__()}
    assert len(set(ERRORS.values())) == len(ERRORS)


def test_ctrl_c_prints_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with status 130, as in a shell, and prints nothing."""
    fail_with(monkeypatch, KeyboardInterrupt())
    assert run("serve", URL, "--socket", "s") == 130
    assert capsys.readouterr() == ("", "")


def test_bugs_are_lines_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is not an NbdnfsError: what it is and where, and a traceback only for the asking."""
    monkeypatch.delenv("NBDNFS_DEBUG", raising=False)
    fail_with(monkeypatch, ZeroDivisionError("of course"))
    assert run("serve", URL, "--socket", "s") == os.EX_SOFTWARE
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("nbdnfs: internal error: ZeroDivisionError: of course (test_cli.py:")
    assert second == "nbdnfs: please report it, with what this prints with NBDNFS_DEBUG=1 in its environment"
    monkeypatch.setenv("NBDNFS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["serve", URL, "--socket", "s"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "/proc/swaps"), "Cannot allocate memory"),
        (MemoryError(), "Cannot allocate memory"),
    ],
)
def test_want_is_no_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    """Any call may meet it: it is said, with what helps, and a later try is worth it."""
    monkeypatch.delenv("NBDNFS_DEBUG", raising=False)
    fail_with(monkeypatch, error)
    assert run("serve", URL, "--socket", "s") == os.EX_UNAVAILABLE
    assert capsys.readouterr().err.splitlines() == [
        f"nbdnfs: the command needs more than the kernel gives it now: {reason}",
        "nbdnfs: free memory, or raise the limit of open files (ulimit -n), and try again",
    ]


def nbdnfs(code: str, unbuffered: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """A Python of its own that runs `code`, as the entry point would; `unbuffered` is PYTHONUNBUFFERED."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=30, env=environment, **options
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        (None, 0, ""),  # a caller that has closed it: >&-
        ("/dev/full", os.EX_IOERR, "nbdnfs: stdout: No space left on device"),
    ],
)
def test_stdout_that_takes_nothing(target: str | None, status: int, message: str, unbuffered: str) -> None:
    """No traceback, and a status other than 0 where output is missing; whether Python has a buffer for it or not."""
    code = "from nbdnfs import cli; cli.main(['--version'])"
    if target is None:
        done = nbdnfs(f"import os, sys; os.close(1); sys.stdout = None; {code}", unbuffered)
    else:
        with open(target, "w") as file:
            done = nbdnfs(code, unbuffered, stdout=file)
    assert done.returncode == status
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == (2 if message else 0)


def test_names_with_any_byte() -> None:
    """A name that is not UTF-8 is printed escaped."""
    code = "from nbdnfs import cli; cli._prepare_output(); print('b\\udcffx')"
    assert nbdnfs(code, stdout=subprocess.PIPE).stdout == "b\\udcffx\n"


# None in sys.modules: importing it raises ImportError, as the dynamic linker's error does
WITHOUT_LIBNFS = "import sys; sys.modules['nbdnfs.engine._engine'] = None; from nbdnfs import cli; cli.main({argv})"


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["status"],
        ["status", "no-such-device"],
        ["doctor", "no-such-device"],
        ["detach", "/dev/nbd0"],
        ["down", "no-such-device"],
        ["install-units", "--help"],
    ],
)
def test_without_libnfs(argv: list[str]) -> None:
    """What does not speak to the server works without it."""
    done = nbdnfs(WITHOUT_LIBNFS.format(argv=argv), stdout=subprocess.PIPE)
    assert "engine" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["create", URL, "--size", "1M"],
        ["claim", URL],
        ["bench", URL],
        ["serve", URL, "--socket", "/nonexistent/socket"],
    ],
)
def test_libnfs_is_missing(argv: list[str]) -> None:
    """What does says so, and what to install."""
    done = nbdnfs(WITHOUT_LIBNFS.format(argv=argv), stdout=subprocess.PIPE)
    assert done.returncode == os.EX_UNAVAILABLE
    first, second = done.stderr.splitlines()
    assert first.startswith("nbdnfs: the engine cannot be loaded: ")
    assert "libnfs-dev" in second


DOWN_WITHOUT_LIBNFS = """
import sys
from pathlib import Path
sys.modules["nbdnfs.engine._engine"] = None
from nbdnfs.commands import up_down
from nbdnfs.keeper.records import Records
up_down._take_down(Records("swap0", run=Path({run!r})), None, frozenset())
"""


def test_down_without_libnfs(tmp_path: Path) -> None:
    """A device that has an owner is taken down to the end: the record on the server stays, and a line says so."""
    records = Records("swap0", run=tmp_path)
    records.make()
    records.write(Records.ADDRESS, "nfs://192.0.2.1/export/a.swap\n192.0.2.1")
    done = nbdnfs(DOWN_WITHOUT_LIBNFS.format(run=str(tmp_path)))
    assert done.returncode == 0
    assert done.stderr.startswith("nbdnfs: swap0: the owner record stays: the engine cannot be loaded: ")
    assert len(done.stderr.splitlines()) == 1
    assert not records.path.exists()


@pytest.mark.parametrize("argv", [["--version"], ["--help"]])
def test_a_closed_pipe(argv: list[str]) -> None:
    """`nbdnfs --help | true` prints no traceback and no "Exception ignored"."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nbdnfs", *argv], stdout=writer, stderr=subprocess.PIPE, timeout=30, check=False
        )
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode == os.EX_IOERR


def test_as_a_module() -> None:
    """`python -m nbdnfs` is the same program as `nbdnfs`."""
    done = subprocess.run(
        [sys.executable, "-m", "nbdnfs", "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == f"nbdnfs {__version__}\n"
