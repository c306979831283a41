# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line's edge: usage errors, help, and how errors become lines and exit statuses."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from nbdnfs import __version__, cli, errors
from nbdnfs.commands import serve
from nbdnfs.errors import ConfigError, NbdnfsError, UnavailableError
from nbdnfs.keeper import main as keeper_main

URL = "nfs://nas/export/swap"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """main() sets logging up for its process, which here is the tests'."""
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
    """Two lines, the second names the help of the very command; EX_USAGE; nothing on stdout."""
    assert run(*argv) == os.EX_USAGE
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith(f"nbdnfs: {message}")
    assert second == f"nbdnfs: see: nbdnfs{command} --help"


@pytest.mark.parametrize("threads", ["0", "-3", "65"])
def test_threads_out_of_range(capsys: pytest.CaptureFixture[str], threads: str) -> None:
    """Refused before anything is started."""
    assert run("serve", URL, "--socket", "s", f"--threads={threads}") == os.EX_USAGE
    assert capsys.readouterr().err.splitlines()[0] == f"nbdnfs: --threads {threads} is not possible"


@pytest.mark.parametrize("command", [[], ["create"], ["serve"], ["attach"], ["detach"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """On stdout, status 0, and every option has a word of explanation."""
    assert run(*command, "--help") == 0
    out, err = capsys.readouterr()
    assert out.startswith(" ".join(["usage: nbdnfs", *command]))
    assert err == ""


def test_the_help_shows_specifiers_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """%H and %m, with one percent sign."""
    assert run("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "/%H.swap?version=3 with %H for the host name and %m for the machine id" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """On stdout, status 0."""
    assert run("--version") == 0
    assert capsys.readouterr() == (f"nbdnfs {__version__}\n", "")


def test_what_serve_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """URL, socket and options reach the worker; its status is the program's."""
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
    """Have `nbdnfs serve` raise it."""

    def fail(*_arguments: object, **_options: object) -> int:
        raise error

    monkeypatch.setattr(serve, "serve", fail)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_become_lines_and_statuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: type[NbdnfsError]
) -> None:
    """Message and hint on stderr, the status of sysexits(3); without a hint one line."""
    fail_with(monkeypatch, kind("it is broken", "mend it"))
    assert run("serve", URL, "--socket", "s") == ERRORS[kind]
    assert capsys.readouterr() == ("", "nbdnfs: it is broken\nnbdnfs: mend it\n")
    fail_with(monkeypatch, kind("it is broken"))
    assert run("serve", URL, "--socket", "s") == ERRORS[kind]
    assert capsys.readouterr() == ("", "nbdnfs: it is broken\n")


def test_every_error_has_a_status_of_its_own_here() -> None:
    """The table above is complete."""
    assert set(ERRORS) == {NbdnfsError, *NbdnfsError.__subclasses__()}
    assert len(set(ERRORS.values())) == len(ERRORS)


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130, as shells have it, and silence."""
    fail_with(monkeypatch, KeyboardInterrupt())
    assert run("serve", URL, "--socket", "s") == 130
    assert capsys.readouterr() == ("", "")


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no error of ours comes through."""
    fail_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["serve", URL, "--socket", "s"])


@pytest.mark.parametrize("argv", [["--version"], ["--help"]])
def test_a_reader_that_went_away(argv: list[str]) -> None:
    """`nbdnfs --help | true`: no traceback, no "Exception ignored"."""
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
    """`python -m nbdnfs` is the same program."""
    done = subprocess.run(
        [sys.executable, "-m", "nbdnfs", "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == f"nbdnfs {__version__}\n"


@pytest.mark.parametrize(
    ("error", "by_systemd", "waits"),
    [
        (UnavailableError("the server is away"), True, True),
        (ZeroDivisionError(), True, True),
        (ConfigError("it is wrong"), True, False),
        (UnavailableError("the server is away"), False, False),
    ],
)
def test_the_pace_of_keepers_that_fail(
    monkeypatch: pytest.MonkeyPatch, error: Exception, by_systemd: bool, waits: bool
) -> None:
    """One that systemd would start again at once waits for the rest of its second; nobody else does."""
    slept_s: list[float] = []

    def run(name: str, *, steal: bool) -> int:
        raise error

    monkeypatch.setattr(keeper_main, "run", run)
    monkeypatch.setattr(time, "sleep", slept_s.append)
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    if by_systemd:
        monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    with pytest.raises((SystemExit, ZeroDivisionError)):
        cli.main(["run", "swap0"])
    assert [0.5 < slept <= 1.0 for slept in slept_s] == [True] * waits
