# SPDX-License-Identifier: LGPL-2.1-or-later
"""The screen of `nbdnfs top`: its lines for any size, its plots, and the real thing on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import termios
import time
from collections.abc import Callable, Iterator

import pytest
from support.waiting import wait_until

from nbdnfs.commands import top_screen
from nbdnfs.commands.counters import Counters
from nbdnfs.commands.frame import MIB, Frame
from nbdnfs.commands.health import Level, Problem
from nbdnfs.commands.status import Status
from nbdnfs.commands.top_screen import Device, bar, lines, plot

STATUS = Status(
    name="swap0",
    state="watch",
    device="/dev/nbd0",
    swap_bytes=1024 * MIB,
    swap_used_bytes=256 * MIB,
    worker_pid=11,
    server="192.0.2.7",
    encrypted=True,
)
BEFORE: Counters = {"reads": 0, "read_us": [0] * 32}


def frame(reads: int, read_bytes: int = 0) -> Frame:
    buckets = [0] * 32
    buckets[8] = reads * 9 // 10
    buckets[12] = reads - buckets[8]
    after: Counters = {
        "reads": reads,
        "read_bytes": read_bytes,
        "slots": 4096,
        "unstable_pages": 1024,
        "reconnects": 2,
        "read_us": buckets,
    }
    return Frame("swap0", 1.0, BEFORE, after)


def device(*frames: Frame, status: Status | None = STATUS) -> dict[str, Device]:
    made = Device(status=status, waits_s=(0.0, 0.25))
    made.frames.extend(frames)
    return {"swap0": made}


def test_what_it_shows() -> None:
    """State, swap, region, rates, percentiles, connections, and the plots where there is room."""
    found = lines(device(frame(0), frame(1000, 8 * MIB)), 120, 40)
    text = "\n".join(line.text for line in found)
    assert found[0] == top_screen.Line("swap0: ok   /dev/nbd0 on 192.0.2.7, encrypted", "ok")
    assert re.search(r"swap +\[#+-+\]  25 %  256 MiB of 1 GiB in use", text)
    assert re.search(r"region +\[#+-+\]  25 %  4 MiB of 16 MiB not on the NAS yet", text)
    assert re.search(r"swap-in +1,000 +8\.0 +256 us +4\.1 ms  .*█", text)
    assert re.search(r"swap-out +0 +0\.0 +- +-", text)
    assert "connections: waiting for answers: 1 for 250.0 ms; 2 made again so far" in text
    assert "swap-in, highest 8.0 MiB/s" in text
    assert "MiB/s, last 2.0 s" in text


@pytest.mark.parametrize(("level", "style"), [(Level.WARNING, "warning"), (Level.CRITICAL, "critical")])
def test_problems_are_seen_first(level: Level, style: str) -> None:
    """In the first line, in its colour."""
    status = Status(name="swap0", state="watch", problems=(Problem(level, "the server does not answer"),))
    first = lines(device(frame(1), status=status), 100, 30)[0]
    assert first.text.startswith("swap0: the server does not answer")
    assert first.style == style


@pytest.mark.parametrize("width", [1, 10, 39, 80, 300])
@pytest.mark.parametrize("height", [1, 5, 24, 100])
def test_any_size(width: int, height: int) -> None:
    """No line is too long, none too many; a device that has just gone is no reason to fail."""
    found = lines(device(*(frame(n, n * MIB) for n in range(500))), width, height)
    assert 1 <= len(found) <= height
    assert all(len(line.text) <= width for line in found)
    assert lines(device(frame(1), status=None), width, height)[0].text == "swap0"[:width]
    assert lines({}, width, height) == []


def test_plot() -> None:
    """The latest values, the highest as tall as all rows; what is little is seen, and what is nothing is not."""
    assert plot([9, 8, 4, 0, 0.001], 4, 1) == ["█▄ ▁"]
    assert plot([8, 4], 3, 2) == [" █ ", " ██"]
    assert plot([0, 0], 2, 1) == ["  "]
    assert plot([], 2, 2) == ["  ", "  "]
    assert plot([1, 2], 2, 1, levels=" .:#") == [":#"]


def test_bar() -> None:
    """From nothing to all, and not beyond."""
    assert [bar(share, 6) for share in (0.0, 0.5, 1.0, 2.0, -1.0)] == ["[----]", "[##--]", "[####]", "[####]", "[----]"]


class Terminal:
    """A process that shows the screen on a pseudo terminal. What it prints is collected by `text`."""

    def __init__(self, rows: int, columns: int, term: str = "xterm") -> None:
        self.printed = b""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            status = 99
            try:
                os.environ |= {"TERM": term, "LC_ALL": "C.UTF-8"}
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
                top_screen.run(self._frames, lambda name: (STATUS, ()), count=None)
                status = 0
            except top_screen.curses.error:
                status = 3
            finally:
                os._exit(status)
        os.set_blocking(self.descriptor, False)

    @staticmethod
    def _frames(wait: Callable[[float], None]) -> Iterator[list[Frame]]:
        while True:
            wait(0.05)
            yield [frame(1000, 8 * MIB)]

    def text(self) -> str:
        try:
            while piece := os.read(self.descriptor, 65536):
                self.printed += piece
        except OSError:  # nothing now, or it has ended
            pass
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\(B", "", self.printed.decode(errors="replace"))

    def shows(self, words: str) -> None:
        wait_until(lambda: words in self.text(), what=f"{words!r} is shown", timeout_s=20)

    def press(self, key: str) -> None:
        os.write(self.descriptor, key.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.kill(self.pid, signal.SIGWINCH)

    def ended(self) -> int:
        """Its exit status."""
        found: list[int] = []

        def has_ended() -> bool:
            self.text()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            found.append(status)
            return pid == self.pid

        wait_until(has_ended, what="it ends", timeout_s=20)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(found[-1])


def test_on_a_terminal() -> None:
    """It is drawn, goes on when the terminal's size changes, and ends with q; the terminal is as it was."""
    terminal = Terminal(40, 120)
    terminal.shows("swap0: ok")
    terminal.shows("highest 8.0 MiB/s")
    terminal.resize(6, 30)
    terminal.resize(50, 140)
    terminal.press("x")
    before = len(terminal.printed)
    wait_until(lambda: terminal.text() and len(terminal.printed) > before, what="it goes on", timeout_s=20)
    terminal.press("q")
    assert terminal.ended() == 0
    assert b"\x1b[?1049l" in terminal.printed, "the other screen is back"


def test_a_terminal_without_a_screen() -> None:
    """An error that `top` answers with lines."""
    assert Terminal(24, 80, term="no-such-terminal").ended() == 3


def test_history_is_bounded() -> None:
    """However long it runs."""
    made = Device()
    made.frames.extend(frame(1) for _ in range(2 * top_screen.HISTORY))
    assert len(made.frames) == top_screen.HISTORY


def test_wait_draws_nothing_before_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time between two readings is as long as asked for, whatever keys are pressed."""

    class Window:
        def __init__(self) -> None:
            self.keys = [ord("x"), top_screen.curses.KEY_RESIZE]
            self.drawn = 0

        def timeout(self, delay_ms: int) -> None:
            assert 1 <= delay_ms <= 1000

        def getch(self) -> int:
            clock[0] += 0.25
            return self.keys.pop() if self.keys else -1

    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    window, drawn = Window(), []
    top_screen._wait(window, 1.0, lambda: drawn.append(clock[0]))  # type: ignore[arg-type]
    assert (clock[0], drawn) == (101.0, [100.25])
