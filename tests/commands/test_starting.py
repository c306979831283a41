# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `nbdnfs up` waits for and shows, with keepers made for the tests; and the swap that it turns on again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdnfs import config, programs
from nbdnfs.commands import starting, systemd_unit, up_down
from nbdnfs.config import Config
from nbdnfs.errors import BusyError, ConfigError, NbdnfsError, NoInputError, UnavailableError
from nbdnfs.keeper import last_good, only_keeper
from nbdnfs.kernel import nbd_device, swap_area
from nbdnfs.kernel.nbd_device import Attached
from nbdnfs.kernel.state import Swap

# A keeper's messages, and its pid in the file argv[2]; then it goes on.
KEEPER = """
import os, socket, sys, time
from pathlib import Path
Path(sys.argv[2]).write_text(str(os.getpid()))
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
for text in sys.argv[1].split(","):
    notify.sendto(text.encode(), "\\0" + os.environ["NOTIFY_SOCKET"][1:])
time.sleep(60)
"""

UP = """
import sys
from nbdnfs import errors, programs
from nbdnfs.commands import starting
command = sys.argv[2:]
programs.python = lambda *arguments: command
try:
    starting.in_background("swap0", float(sys.argv[1]))
except errors.NbdnfsError as error:
    print(*error.lines(), sep="\\n", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def up(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `up` with pipes, as ssh and scripts do: it has returned only when nothing has them open any more."""

    def run(messages: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        keeper = [sys.executable, "-c", KEEPER, messages, str(tmp_path / "pid")]
        return subprocess.run(
            [sys.executable, "-c", UP, str(timeout_s), *keeper], capture_output=True, text=True, timeout=40, check=False
        )

    return run


def end_keeper(tmp_path: Path) -> None:
    """It must live until now, in a session of its own."""
    pid = int((tmp_path / "pid").read_text())
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGKILL)


def test_returns_when_the_keeper_is_ready(up: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """With its progress on stderr, each once; the keeper goes on, and has none of this process's files."""
    done = up("STATUS=provision,STATUS=creating the backing file: 40%,STATUS=swap_on,STATUS=swap_on,READY=1")
    assert (done.returncode, done.stdout) == (0, "")
    assert [line for line in done.stderr.splitlines() if line.startswith("nbdnfs: swap0: ")] == [
        "nbdnfs: swap0: looking for the backing file, and claiming it",
        "nbdnfs: swap0: creating the backing file: 40%",
        "nbdnfs: swap0: turning swap on",
    ]
    end_keeper(tmp_path)


def test_a_start_that_takes_long_goes_on(up: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """EX_TEMPFAIL, where it goes on, and how far it is; the keeper is left alone."""
    done = up("STATUS=attach", timeout_s=8.0)
    assert done.returncode == os.EX_TEMPFAIL
    assert (
        "swap0 is still starting, and goes on: connecting to the server, and attaching the device\n"
        "nbdnfs: see: nbdnfs status swap0; dmesg | grep nbdnfs\n"
    ) in done.stderr
    end_keeper(tmp_path)


def test_a_keeper_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit status is that of `up`."""
    monkeypatch.setattr(programs, "python", lambda *arguments: ["/bin/sh", "-c", f"exit {os.EX_NOINPUT}"])
    with pytest.raises(UnavailableError, match="swap0 did not come up") as caught:
        starting.in_background("swap0", 20)
    assert caught.value.exit_code == os.EX_NOINPUT


def test_messages_of_other_users_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may send to an abstract socket."""
    with starting._notifications() as notifications:
        for expected in (["READY=1"], []):
            with starting.socket.socket(starting.socket.AF_UNIX, starting.socket.SOCK_DGRAM) as sender:
                sender.sendto(b"READY=1", notifications.getsockname())
            assert starting._receive(notifications) == expected
            monkeypatch.setattr(starting.os, "geteuid", lambda: 4711)


def test_through_systemd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress while systemctl waits; when that gives up, what the unit does now decides what is said."""
    texts = iter(["provision", "provision", "creating the backing file: 7%"])
    monkeypatch.setattr(systemd_unit, "status_text", lambda name: next(texts))

    def start(name: str, look: Callable[[], None], every_s: float) -> tuple[int, str]:
        for _ in range(3):
            look()
        return 1, "Job for nbdnfs@swap0.service canceled.\n"

    monkeypatch.setattr(systemd_unit, "start", start)
    monkeypatch.setattr(systemd_unit, "is_active", lambda name: True)
    with pytest.raises(UnavailableError, match="still starting, and goes on: creating the backing file: 7%") as caught:
        starting.with_systemd("swap0")
    assert caught.value.exit_code == os.EX_TEMPFAIL
    assert capsys.readouterr().err.splitlines() == [
        "nbdnfs: swap0: looking for the backing file, and claiming it",
        "nbdnfs: swap0: creating the backing file: 7%",
    ]
    monkeypatch.setattr(systemd_unit, "is_active", lambda name: False)
    texts = iter(["", "", ""])
    with pytest.raises(UnavailableError, match="did not start") as caught:
        starting.with_systemd("swap0")
    assert caught.value.exit_code == os.EX_UNAVAILABLE
    assert "Job for" in capsys.readouterr().err


class Machine:
    """What `up` finds: a keeper that watches its device, which is swap or not, and what it does about it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.swap: Swap | None = None
        self.attached: Attached | None = Attached(0, 4096)
        self.keeper: int | None = 4711
        self.problem: NbdnfsError | None = None
        monkeypatch.setattr(config, "load", self.load)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(only_keeper, "keeper_of", lambda records: self.keeper)
        self.records = {"state": "watch"}
        monkeypatch.setattr(up_down.Records, "read", lambda records, key: self.records.get(key))
        monkeypatch.setattr(nbd_device, "find", lambda backend: self.attached)
        monkeypatch.setattr(swap_area, "find", lambda path: self.swap)
        monkeypatch.setattr(up_down.kernel_state, "nbd_device", lambda name: None)
        monkeypatch.setattr(up_down.name_lock, "take", lambda name, what, wait_s: -1)
        monkeypatch.setattr(starting, "turn_on_again", lambda settings, path: self.calls.append(f"swapon {path}"))
        monkeypatch.setattr(starting, "with_systemd", lambda name: self.calls.append("systemctl start"))
        monkeypatch.setattr(starting, "in_background", lambda name, timeout_s: self.calls.append("start"))
        monkeypatch.setattr(systemd_unit, "is_loaded", lambda name: True)
        monkeypatch.setattr(systemd_unit, "is_active", lambda name: True)

    def load(self, name: str, root: Path) -> Config:
        if self.problem is not None:
            raise self.problem
        return Config(name, "nfs://nas/export/f")


@pytest.mark.parametrize("problem", [ConfigError("swap0.toml:1: unknown key 'siez'"), NoInputError("there is no file")])
def test_a_bad_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], problem: NbdnfsError
) -> None:
    """With the device attached, `up` goes on with the last good one, as its keeper does, and says so on one line;
    without the device, or without a good one, the error is the file's."""
    machine = Machine(monkeypatch)
    machine.problem = problem
    with pytest.raises(UnavailableError, match="the settings that the device runs with are not recorded"):
        up_down.up("swap0")
    machine.records["config"] = last_good.to_text(Config("swap0", "nfs://nas/export/f"))
    up_down.up("swap0")
    assert machine.calls == ["swapon /dev/nbd0"]
    assert capsys.readouterr().err == (
        f"nbdnfs: swap0: the configuration file is wrong: {problem.message}; the device runs with the last good one\n"
    )
    machine.attached = None
    with pytest.raises(type(problem)):
        up_down.up("swap0")
    assert machine.calls == ["swapon /dev/nbd0"]


@pytest.mark.parametrize("has_unit", [True, False])
def test_swap_that_was_turned_off_by_hand(monkeypatch: pytest.MonkeyPatch, has_unit: bool) -> None:
    """`swapoff -a`: the device and its keeper are there, and `up` turns swap on, instead of saying that all is well."""
    machine = Machine(monkeypatch)
    monkeypatch.setattr(systemd_unit, "is_loaded", lambda name: has_unit)
    up_down.up("swap0")
    assert machine.calls == ["swapon /dev/nbd0"]


def test_swap_that_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd is asked, and has nothing to do; without it, and for a keeper beside the unit, that is an error."""
    machine = Machine(monkeypatch)
    machine.swap = Swap("/dev/nbd0", "partition", 4096, 0, -2)
    up_down.up("swap0")
    assert machine.calls == ["systemctl start"]
    for function in ("is_active", "is_loaded"):
        monkeypatch.setattr(systemd_unit, function, lambda name: False)
        with pytest.raises(BusyError, match="swap0 is already up: its keeper is process 4711"):
            up_down.up("swap0")


def test_a_device_with_something_on_top_is_not_swapped_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on top is named."""
    machine = Machine(monkeypatch)

    def refuse(device: object) -> None:
        raise BusyError("/dev/nbd0 is in use by dm-0")

    monkeypatch.setattr(up_down.kernel_state, "nbd_device", lambda name: object())
    monkeypatch.setattr(up_down.device_in_use, "refuse_if_in_use", refuse)
    with pytest.raises(BusyError, match="dm-0"):
        up_down.up("swap0")
    assert machine.calls == []
