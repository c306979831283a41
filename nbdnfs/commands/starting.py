# SPDX-License-Identifier: LGPL-2.1-or-later
"""How `nbdnfs up` starts a keeper, through systemd or without it, and shows how far it has got.

A start that takes longer than `up` waits goes on. `up` then ends with EX_TEMPFAIL, and says where it goes on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator

from nbdnfs import programs
from nbdnfs.commands import systemd_unit
from nbdnfs.config import Config
from nbdnfs.errors import UnavailableError
from nbdnfs.keeper import real_work
from nbdnfs.kernel.waiting import wait_until

_LOOK_EVERY_S = 0.5
_TURN_ON_TIMEOUT_S = 60.0
_POLL_S = 0.05
# unix(7): struct ucred
_CREDENTIALS = struct.Struct("=iII")
_MESSAGE_BYTES_MAX = 4096
_RECORD_BYTES_MAX = 8192
_KMSG = "/dev/kmsg"

# The keeper's steps (keeper.py), for people.
_STEPS = {
    "provision": "looking for the backing file, and claiming it",
    "attach": "connecting to the server, and attaching the device",
    "warm_up": "getting all memory that will be needed",
    "swap_on": "turning swap on",
}


class _Shown:
    """Prints each status once, on stderr."""

    def __init__(self, name: str) -> None:
        self.text = ""
        self._name = name

    def show(self, text: str) -> None:
        text = _STEPS.get(text, text)
        if text and text != self.text and text != "watch":
            self.text = text
            print(f"nbdnfs: {self._name}: {text}", file=sys.stderr, flush=True)


def with_systemd(name: str) -> None:
    """Start the unit of the device, and return when it has started.

    UnavailableError when it fails; with the exit status EX_TEMPFAIL when it goes on after the wait's limit.
    """
    shown = _Shown(name)
    unit = systemd_unit.name_of(name)
    status, errors = systemd_unit.start(name, lambda: shown.show(systemd_unit.status_text(name)), _LOOK_EVERY_S)
    if status == 0:
        return
    if systemd_unit.is_active(name):
        raise _goes_on(name, shown, f"see: nbdnfs status {name}; journalctl -u {unit}")
    print(errors, end="", file=sys.stderr)
    raise UnavailableError(f"{unit} did not start", f"see why: journalctl -u {unit}")


def in_background(name: str, timeout_s: float) -> None:
    """Start a keeper in a session of its own, and wait until it is ready as systemd would: sd_notify(3).

    It keeps none of this process's files, so that a pipe or ssh(1) does not wait for it. What it has to say goes to the
    kernel's log, which no swapped-out page holds up, and from there to stderr here while this waits.

    UnavailableError when it fails, with its exit status; EX_TEMPFAIL when it goes on after `timeout_s`.
    """
    shown = _Shown(name)
    with _notifications() as notifications, _kernel_log() as (log, lines):
        keeper = programs.start(
            programs.python("nbdnfs", "run", name),
            {**programs.python_environment(), "NOTIFY_SOCKET": f"@{notifications.getsockname()[1:].decode()}"},
            output=log,
        )
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = keeper.poll()  # before its last messages are read
            for line in _receive(notifications):
                if line == "READY=1":
                    return
                if line.startswith("STATUS="):
                    shown.show(line.removeprefix("STATUS="))
            _relay(lines)
            if status is not None:
                error = UnavailableError(f"{name} did not come up", f"see why: dmesg | grep nbdnfs; nbdnfs run {name}")
                error.exit_code = status if status > 0 else error.exit_code
                raise error
    raise _goes_on(name, shown, f"see: nbdnfs status {name}; dmesg | grep nbdnfs")


def turn_on_again(settings: Config, path: str) -> None:
    """Swap to an attached device that its keeper keeps, after a foreign swapoff(8).

    UnavailableError, with the exit status of the helper where that has reported why; EX_TEMPFAIL where the server does
    not answer: the helper then goes on.
    """
    helper = programs.start(real_work.swap_on_command(settings, path), programs.python_environment())
    if not wait_until(lambda: helper.poll() is not None, _TURN_ON_TIMEOUT_S):
        error = UnavailableError(
            f"{path} does not answer within {_TURN_ON_TIMEOUT_S:g} s: swap is turned on when it does",
            f"see: nbdnfs status {settings.name}",
        )
        error.exit_code = os.EX_TEMPFAIL
        raise error
    if helper.returncode != 0:
        error = UnavailableError(f"swap on {path} stays off, see above")
        error.exit_code = helper.returncode if helper.returncode > 0 else error.exit_code
        raise error
    print(f"nbdnfs: {settings.name}: swap is on: {path}", file=sys.stderr)


def _goes_on(name: str, shown: _Shown, hint: str) -> UnavailableError:
    error = UnavailableError(f"{name} is still starting, and goes on: {shown.text or 'no status yet'}", hint)
    error.exit_code = os.EX_TEMPFAIL
    return error


@contextlib.contextmanager
def _notifications() -> Iterator[socket.socket]:
    """A socket for sd_notify(3) with a name that the kernel chooses, unix(7): autobind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        made.bind("")
        made.settimeout(_POLL_S)
        yield made


def _receive(notifications: socket.socket) -> list[str]:
    """The assignments of one message of this user's; none when there is none soon. Anyone may send to such a socket."""
    try:
        message, control, _, _ = notifications.recvmsg(_MESSAGE_BYTES_MAX, socket.CMSG_SPACE(_CREDENTIALS.size))
    except TimeoutError:
        return []
    for _, kind, data in control:
        if kind == socket.SCM_CREDENTIALS and _CREDENTIALS.unpack(data)[1] == os.geteuid():
            return message.decode(errors="replace").split("\n")
    return []


@contextlib.contextmanager
def _kernel_log() -> Iterator[tuple[int, int]]:
    """Where a keeper may write for ever, and where its lines can be read from now on: the kernel's log, or nowhere.

    Not a file in /run: its pages may be swapped out, and writing one more line would then wait for the very swap that
    the keeper keeps alive.
    """
    try:
        log = os.open(_KMSG, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        lines = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(lines, 0, os.SEEK_END)
    except OSError:
        lines = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield log, lines
    finally:
        os.close(log)
        os.close(lines)


def _relay(lines: int) -> None:
    """Print what the keeper and its workers have logged since the last call, kernel's Documentation/ABI: dev-kmsg."""
    while True:
        try:
            record = os.read(lines, _RECORD_BYTES_MAX).decode(errors="replace")
        except BrokenPipeError:
            continue  # records were overwritten before they were read
        except OSError:
            return
        if not record:
            return
        text = record.partition(";")[2].splitlines()[0] if ";" in record else ""
        if text.startswith(("nbdnfs: ", "nbdkit: ")):
            print(text.replace("\\x0a", "\n").rstrip("\n"), file=sys.stderr, flush=True)
