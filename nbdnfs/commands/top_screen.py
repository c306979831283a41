# SPDX-License-Identifier: LGPL-2.1-or-later
"""The screen of `nbdnfs top`: what it shows as lines of text, and the terminal that shows them.

The lines are made without a terminal, from readings; only `run` touches one, by curses(3).
"""

from __future__ import annotations

import contextlib
import curses
import locale
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nbdnfs import quantities
from nbdnfs.commands.counters import number
from nbdnfs.commands.frame import MIB, Frame
from nbdnfs.commands.health import Level
from nbdnfs.commands.status import Status
from nbdnfs.sizes import SLOT_BYTES

# Updates that are remembered: the width of a very wide terminal.
HISTORY = 400
_NAME_WIDTH = 11
# Eighths of a character's height, from none to all; and what a terminal without Unicode gets.
_EIGHTHS, _ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
_PLOT_ROWS = 4

# Swap-in and swap-out, and the NFS calls behind them: the label, and the counters of number, bytes and time.
_FLOWS = (
    ("swap-in", "reads", "read_bytes", "read_us"),
    ("swap-out", "writes", "written_bytes", "write_us"),
    ("NFS read", "nfs_reads", "nfs_read_bytes", "nfs_read_us"),
    ("NFS write", "nfs_writes", "nfs_written_bytes", "nfs_write_us"),
)
_STYLES = {Level.OK: "ok", Level.WARNING: "warning", Level.CRITICAL: "critical", Level.UNKNOWN: "warning"}


@dataclass(frozen=True)
class Line:
    """One line of the screen. `style` is one of "", "head", "ok", "warning", "critical"."""

    text: str
    style: str = ""


@dataclass
class Device:
    """What is known of one device: its latest readings, and the frames of the last minutes, the latest last."""

    frames: deque[Frame] = field(default_factory=lambda: deque(maxlen=HISTORY))
    status: Status | None = None
    waits_s: Sequence[float] = ()  # of each connection, for answers; 0.0: for none

    @property
    def last(self) -> Frame:
        return self.frames[-1]


def lines(devices: Mapping[str, Device], width: int, height: int, *, levels: str = _EIGHTHS) -> list[Line]:
    """The screen, at most `height` lines of at most `width` characters. Plots are left out where there is no room."""
    shown = [device for device in devices.values() if device.frames]
    room = height // max(1, len(shown))
    found: list[Line] = []
    for device in shown:
        text = _device(device, width, levels)
        if room >= len(text) + 2 * (_PLOT_ROWS + 1) + 1:
            text += [Line(""), *_plots(device, width, levels)]
        found += [*text, Line("")]
    return [Line(line.text[:width], line.style) for line in found[:height]]


def plot(values: Sequence[float], width: int, rows: int, *, levels: str = _EIGHTHS) -> list[str]:
    """Bars of the latest `width` values, in `rows` lines, the highest of them as tall as all lines together."""
    recent = list(values)[-width:]
    highest = max(recent, default=0.0)
    steps = len(levels) - 1
    heights = [round(value / highest * rows * steps) if highest else 0 for value in recent]
    # what is not nothing is seen
    heights = [max(height, 1) if value > 0 else height for height, value in zip(heights, recent, strict=True)]
    return [
        "".join(levels[min(max(height - row * steps, 0), steps)] for height in heights).rjust(width)
        for row in reversed(range(rows))
    ]


def bar(share: float, width: int) -> str:
    """A share from 0 to 1, as a bar of `width` characters with its brackets."""
    inside = max(0, width - 2)
    return f"[{'#' * round(min(max(share, 0.0), 1.0) * inside):-<{inside}}]"


def _device(device: Device, width: int, levels: str) -> list[Line]:
    status, frame = device.status, device.last
    found = [_title(frame.name, status)]
    if status is not None and status.swap_bytes and status.swap_used_bytes is not None:
        found.append(_gauge("swap", status.swap_used_bytes, status.swap_bytes, width, "in use"))
    unstable_bytes = number(frame.after, "unstable_pages") * SLOT_BYTES
    if slots := number(frame.after, "slots"):
        found.append(_gauge("region", unstable_bytes, slots * SLOT_BYTES, width, "not on the NAS yet"))
    minutes = quantities.format_duration(sum(one.seconds for one in device.frames))
    head = f"  {'':<{_NAME_WIDTH - 2}}{'per second':>10} {'MiB/s':>8} {'median':>9} {'99 %':>9}"
    found.append(Line(f"{head}  MiB/s, last {minutes}", "head"))
    spark_width = max(0, width - len(head) - 2)
    for label, count, size, duration in _FLOWS:
        rates = [one.rate(size) for one in device.frames]
        (spark,) = plot(rates, min(spark_width, len(rates)), 1, levels=levels)
        times = "".join(f" {_time(frame.percentile_us(duration, share)):>9}" for share in (0.5, 0.99))
        text = f"  {label:<{_NAME_WIDTH - 2}}{frame.rate(count):>10,.0f} {frame.rate(size) / MIB:>8.1f}{times}"
        found.append(Line(f"{text}  {spark}"))
    return [*found, *_details(device)]


def _title(name: str, status: Status | None) -> Line:
    if status is None:
        return Line(name, "head")
    where = f"{status.device or 'no device'} on {status.server or 'an unknown server'}"
    secret = "" if status.encrypted is None else f", {'' if status.encrypted else 'not '}encrypted"
    return Line(f"{name}: {'; '.join(status.texts) or 'ok'}   {where}{secret}", _STYLES[status.level])


def _gauge(label: str, part_bytes: int, whole_bytes: int, width: int, what: str) -> Line:
    size = quantities.format_size
    text = f"{size(part_bytes)} of {size(whole_bytes)} {what}"
    share = part_bytes / whole_bytes
    return Line(f"  {label:<{_NAME_WIDTH - 2}}{bar(share, max(10, min(40, width // 3)))} {100 * share:>3.0f} %  {text}")


def _details(device: Device) -> Iterator[Line]:
    frame = device.last
    looked_up = frame.rate("hit_pages") + frame.rate("missed_pages")
    hits = f"{100 * frame.rate('hit_pages') / looked_up:.0f}" if looked_up else "-"
    ahead = f"{100 * frame.ratio('read_ahead_hits', 'read_ahead_pages'):.0f}"
    each_kib = frame.ratio("nfs_written_bytes", "nfs_writes") / 1024
    yield Line(f"  {hits} % of the swapped-in pages were in the region, {ahead} % of the read-ahead was used")
    yield Line(
        f"  {each_kib:.0f} KiB in each NFS write, {frame.rate('nfs_commits'):.1f} commits/s,"
        f" {frame.rate('stalls'):.0f} writes/s waited for room, {number(frame.after, 'nfs_in_flight')} under way"
    )
    waiting = [f"{index} for {_time(wait_s * 1e6)}" for index, wait_s in enumerate(device.waits_s) if wait_s]
    text = f"waiting for answers: {', '.join(waiting)}" if waiting else "none waits for an answer"
    yield Line(f"  connections: {text}; {number(frame.after, 'reconnects')} made again so far")


def _plots(device: Device, width: int, levels: str) -> Iterator[Line]:
    for label, _, size, _ in _FLOWS[:2]:
        rates = [one.rate(size) / MIB for one in device.frames]
        space = max(1, width - _NAME_WIDTH - 2)
        yield Line(f"  {label}, highest {max(rates[-space:]):.1f} MiB/s", "head")
        for row in plot(rates, space, _PLOT_ROWS, levels=levels):
            yield Line(f"{'':<{_NAME_WIDTH}}|{row}")


def _time(duration_us: float) -> str:
    """As a person reads it: 0 is nothing measured."""
    if not duration_us:
        return "-"
    if duration_us < 1000:
        return f"{duration_us:.0f} us"
    return f"{duration_us / 1000:.1f} ms" if duration_us < 1e6 else f"{duration_us / 1e6:.1f} s"


# The terminal


def run(
    frames: Callable[[Callable[[float], None]], Iterable[list[Frame]]],
    describe: Callable[[str], tuple[Status | None, Sequence[float]]],
    *,
    count: int | None,
) -> None:
    """Show the screen until q or Ctrl-C, or for `count` updates.

    frames    called with the function that waits between two readings, yields the activity of all devices
    describe  the state of a device, and how long each of its connections has waited

    curses.error: this terminal cannot do it. Errors of `frames` come out once the terminal is as it was.
    """
    locale.setlocale(locale.LC_CTYPE, "")
    levels = _EIGHTHS if locale.nl_langinfo(locale.CODESET).upper() == "UTF-8" else _ASCII

    def show(window: curses.window) -> None:
        _prepare()
        devices: dict[str, Device] = {}
        _draw(window, [Line("nbdnfs top: the first update comes after one interval; q ends it")])

        def draw() -> None:
            _draw(window, lines(devices, *_size(window), levels=levels))

        def wait(seconds: float) -> None:
            _wait(window, seconds, draw if devices else lambda: None)

        try:
            for shown, update in enumerate(frames(wait), 1):
                for frame in update:
                    device = devices.setdefault(frame.name, Device())
                    device.frames.append(frame)
                    device.status, device.waits_s = describe(frame.name)
                draw()
                if shown == count:
                    return
        except _QuitError:
            return

    curses.wrapper(show)


class _QuitError(Exception):
    """q was pressed."""


def _prepare() -> None:
    if curses.has_colors():
        curses.use_default_colors()
        for index, colour in enumerate((curses.COLOR_GREEN, curses.COLOR_YELLOW, curses.COLOR_RED), 1):
            curses.init_pair(index, colour, -1)
    with contextlib.suppress(curses.error):  # a terminal that always shows its cursor
        curses.curs_set(0)


def _size(window: curses.window) -> tuple[int, int]:
    """Width and height. The last column is left free: a character there moves the cursor out of the window."""
    height, width = window.getmaxyx()
    return max(1, width - 1), height


def _draw(window: curses.window, text: Sequence[Line]) -> None:
    window.erase()
    pairs = ("ok", "warning", "critical") if curses.has_colors() else ()
    styles = {"head": curses.A_DIM, "ok": curses.A_BOLD, "warning": curses.A_BOLD, "critical": curses.A_REVERSE}
    styles |= {style: curses.color_pair(index) | curses.A_BOLD for index, style in enumerate(pairs, 1)}
    for row, line in enumerate(text):
        try:
            window.addstr(row, 0, line.text, styles.get(line.style, curses.A_NORMAL))
        except curses.error:  # it was made smaller meanwhile
            break
    window.refresh()


def _wait(window: curses.window, seconds: float, draw: Callable[[], None]) -> None:
    """Until the next reading is due; q ends it, a new size of the terminal is drawn at once."""
    due_s = time.monotonic() + seconds
    while (left_s := due_s - time.monotonic()) > 0:
        window.timeout(max(1, round(left_s * 1000)))
        key = window.getch()
        if key in (ord("q"), ord("Q")):
            raise _QuitError
        if key == curses.KEY_RESIZE:
            draw()
