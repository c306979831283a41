# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting programs, and that nothing else in the package does."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.silent_program import SilentProgram
from support.waiting import wait_until

import nbdnfs
from nbdnfs import programs
from nbdnfs.errors import NbdnfsError, UnavailableError

PACKAGE = Path(nbdnfs.__file__).parent
SHELL = "/bin/sh"


def test_find_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """In root's folders too; what is missing is named with its package."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert programs.find_program("mkswap", "util-linux").endswith("sbin/mkswap")
    with pytest.raises(UnavailableError, match="'no-such-thing' is not installed") as caught:
        programs.find_program("no-such-thing", "thing")
    assert "apt install thing" in caught.value.hint


def test_programs_in_the_current_directory_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What root calls is not what lies where root happens to stand."""
    (tmp_path / "mkswap").write_text("#!/bin/sh\n")
    (tmp_path / "mkswap").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for path in (".", "", ":", f"..:../{tmp_path.name}"):
        monkeypatch.setenv("PATH", path)
        assert programs.find_program("mkswap", "util-linux").startswith("/")


def test_python_runs_no_code_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `nbdnfs`, and modules with the names of the standard library's, whatever the caller's environment is."""
    (tmp_path / "nbdnfs").mkdir()
    for name in ("nbdnfs/__init__.py", "nbdnfs/__main__.py", "argparse.py", "sitecustomize.py", "usercustomize.py"):
        (tmp_path / name).write_text("import os; os._exit(99)\n")
    monkeypatch.chdir(tmp_path)
    for variable, value in (("PYTHONPATH", ":"), ("PYTHONPATH", "."), ("PYTHONHOME", "."), ("PYTHONSTARTUP", "x.py")):
        monkeypatch.setenv(variable, value)
        assert "PYTHONHOME" not in programs.python_environment()
        done = programs.run(programs.python("nbdnfs", "--version"), what="asking", env=programs.python_environment())
        assert done == f"nbdnfs {nbdnfs.__version__}\n"


def test_run() -> None:
    """Stdout of a success; of a failure the last line, preferably of stderr, and the command."""
    assert programs.run([SHELL, "-c", "echo out; echo err >&2"], what="trying") == "out\n"
    for script, message in (
        ("echo out; echo one >&2; echo two >&2; exit 1", "trying: two"),
        ("echo out; exit 1", "trying: out"),
        ("exit 7", "trying: exit status 7"),
    ):
        with pytest.raises(NbdnfsError) as caught:
            programs.run([SHELL, "-c", script], what="trying")
        assert caught.value.message == message
        assert caught.value.hint.startswith("the command was: /bin/sh -c ")
    with pytest.raises(NbdnfsError, match=r"trying: /bin/sleep did not end within 0\.1 s"):
        programs.run(["/bin/sleep", "60"], what="trying", timeout_s=0.1)
    with pytest.raises(NbdnfsError, match="trying: cannot start /no/such: No such file"):
        programs.run(["/no/such"], what="trying")


def test_status_and_output() -> None:
    """Exit status and stdout of a program that fails."""
    script = [SHELL, "-c", "echo stopping; exit 3"]
    assert programs.status(script) == 3
    assert programs.output(script) == "stopping\n"


def test_watch() -> None:
    """Progress while it runs; at the end status and stderr."""
    ticks: list[int] = []
    done = programs.watch([SHELL, "-c", "sleep 0.3; echo x >&2; exit 4"], lambda: ticks.append(1), every_s=0.05)
    assert done == (4, "x\n")
    assert ticks


def test_watch_that_is_interrupted(tmp_path: Path) -> None:
    """The program ends, by SIGTERM, before the exception goes on."""
    pid = tmp_path / "pid"

    def interrupt() -> None:
        if pid.exists():
            raise KeyboardInterrupt

    script = f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60"
    with pytest.raises(KeyboardInterrupt):
        programs.watch([SHELL, "-c", script], interrupt, every_s=0.02)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_start() -> None:
    """In a session of its own, with the environment given."""
    started = programs.start([sys.executable, "-c", "import os; exit(os.getsid(0) == os.getpid() and 5)"], {"X": "1"})
    assert started.wait(30) == 5


def test_a_program_that_stays_keeps_nothing_of_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that `up` was called in can be unmounted; and what is made in /run has the modes that it has
    where systemd starts a keeper."""
    monkeypatch.chdir(tmp_path)
    code = "import os; exit(5 if os.getcwd() == '/' and os.umask(0) == 0o022 else 1)"
    before = os.umask(0o077)
    try:
        assert programs.start([sys.executable, "-c", code], {}).wait(30) == 5
    finally:
        os.umask(before)


def started(spawn: programs.Spawn) -> int:
    """Its pid, once it has started."""
    wait_until(spawn.is_over, what="it has started", timeout_s=30)
    assert spawn.error is None
    return spawn.pid


def children() -> set[str]:
    """The pids of this process's children, living or not yet waited for."""
    tasks = Path("/proc/self/task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("new_session", [False, True])
def test_spawn(new_session: bool) -> None:
    """Its own argv[0], session and descriptors, no other ones, and no signal ignored or blocked."""
    read, write = os.pipe()
    os.set_inheritable(read, True)
    code = (
        "import os, signal; print(os.getsid(0) == os.getpid(), signal.getsignal(signal.SIGHUP).name,"
        " signal.pthread_sigmask(signal.SIG_BLOCK, []), len(os.listdir('/proc/self/fd')))"
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        pid = started(
            programs.Spawn(
                sys.executable,
                ["@name", "-c", code],
                {},
                {1: write, 200: write},
                new_session=new_session,
                ordinary_priority=True,
            )
        )
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(write)
    with open(read) as output:
        assert output.read() == f"{new_session} SIG_DFL set() 5\n"  # the fifth is that of the listing
    assert os.waitpid(pid, 0)[1] == 0


def test_a_program_that_cannot_be_started() -> None:
    """The error says why, and there is no child."""
    spawn = programs.Spawn("/no/such", ["x"], {}, {})
    wait_until(spawn.is_over, what="it has failed", timeout_s=30)
    assert isinstance(spawn.error, FileNotFoundError)
    assert spawn.pid == 0


def test_what_cannot_be_opened_does_not_hold_the_caller(tmp_path: Path) -> None:
    """The next ones wait behind it; cancelled ones are never started, and one that is just being started is killed."""
    before = children()
    with SilentProgram(tmp_path / "first") as silent:
        first = programs.Spawn(str(silent.path), ["first"], {}, {})
        silent.wait_until_opened()
        second, third, fourth = (
            programs.Spawn("/bin/sh", ["sh", "-c", f"echo > {tmp_path}/{name}"], {}, {}) for name in "abc"
        )
        assert [spawn.is_over() for spawn in (first, second, third, fourth)] == [False] * 4
        assert not first.is_late(first.began_s + programs.SPAWN_LATE_AFTER_S / 2)
        assert first.is_late(first.began_s + programs.SPAWN_LATE_AFTER_S)
        first.cancel()
        third.cancel()
    for spawn in (second, fourth):
        assert os.waitpid(started(spawn), 0)[1] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "first"]
    assert children() <= before


def test_while_it_cannot_be_opened_no_descriptor_is_held(tmp_path: Path) -> None:
    """But those that it is to have: the other end of any other one is closed when this process closes it."""
    ours, theirs = socket.socketpair()
    with ours, SilentProgram(tmp_path / "program") as silent:
        spawn = programs.Spawn(str(silent.path), ["program"], {}, {})
        silent.wait_until_opened()
        theirs.close()
        assert ours.recv(1) == b""
    os.waitpid(started(spawn), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_ends_while_a_program_cannot_be_opened(tmp_path: Path, number: signal.Signals) -> None:
    """By itself, with all that a Python program does at its end, or killed."""
    code = (
        "import signal, sys; from nbdnfs import programs; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "spawn = programs.Spawn(sys.argv[1], ['x'], {}, {})\n"
        "while True: signal.pause()"
    )
    with (
        SilentProgram(tmp_path / "program") as silent,
        subprocess.Popen([sys.executable, "-c", code, silent.path]) as process,
    ):
        silent.wait_until_opened()
        process.send_signal(number)
        assert process.wait(20) == (5 if number == signal.SIGTERM else -signal.SIGKILL)


STARTERS = ("subprocess.", "os.posix_spawn", "os.spawn", "os.system", "os.popen", "os.fork")


def calls(tree: ast.AST) -> Iterator[str]:
    """The functions that are called as MODULE.NAME."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name)):
                yield f"{module}.{name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_only_place_that_starts_programs(path: Path) -> None:
    """Replacing oneself (os.execve) starts no other program."""
    starts = [name for name in calls(ast.parse(path.read_text())) if name.startswith(STARTERS)]
    assert bool(starts) == (path == Path(programs.__file__))
