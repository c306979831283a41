# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keys of a configuration file: how each is checked, its default, and its description in the example file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import backing_size, defaults, nfs_url, quantities
from nbdnfs.errors import UsageError
from nbdnfs.sizes import KERNEL_PAGE_BYTES, SLOT_BYTES

_MIB = 1 << 20
LOCKS = ("required", "wanted", "off")
RECOVERIES = ("hard", "soft")


_MESSAGE_LENGTH_MAX = 400


def shown(value: object, length_max: int = 80) -> str:
    """A value on one line, as TOML writes it, shortened where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= length_max else text[: length_max - 3] + "..."


def _of_type(key: str, value: object, wanted: type, example: str) -> None:
    # to Python, but not to TOML, a bool is an int
    if type(value) is not wanted:
        kinds = {str: "a string in quotes", int: "a whole number", bool: "true or false"}
        raise UsageError(f"{key} must be {kinds[wanted]}", f"for example: {key} = {example}")


def _boolean(key: str, value: object, root: Path) -> bool:
    _of_type(key, value, bool, "true")
    return bool(value)


def _boolean_or_auto(key: str, value: object, root: Path) -> bool | None:
    if value == "auto":
        return None
    if not isinstance(value, bool):
        raise UsageError(f'{key} must be true, false or "auto"', f"for example: {key} = true")
    return value


def _whole(low: int, high: int) -> Callable[[str, object, Path], int]:
    def check(key: str, value: object, root: Path) -> int:
        _of_type(key, value, int, str(high if low < 0 else low))
        assert isinstance(value, int)
        if not low <= value <= high:
            # str() refuses numbers of thousands of digits, which TOML allows in hexadecimal
            shown = str(value) if abs(value) < 10**30 else "that large"
            raise UsageError(f"{key} cannot be {shown}", f"it must be from {low} to {high}")
        return value

    return check


def _priority(key: str, value: object, root: Path) -> int | None:
    priority = _whole(-1, 32767)(key, value, root)
    return None if priority == -1 else priority


def _size(
    low_bytes: int, high_bytes: int, unit_bytes: int, example: str, *, step_bytes: int = SLOT_BYTES
) -> Callable[[str, object, Path], int]:
    """A check for sizes that returns a number of units of `unit_bytes`. "0" is valid where `low_bytes` is 0."""

    def check(key: str, value: object, root: Path) -> int:
        _of_type(key, value, str, f'"{example}"')
        size_bytes = _parsed(key, str(value), quantities.parse_size_bytes, example)
        if not low_bytes <= size_bytes <= high_bytes:
            raise UsageError(
                f"{key} cannot be '{shown(value)}'",
                f"it must be from {quantities.format_size(low_bytes)} to {quantities.format_size(high_bytes)},"
                f' for example "{example}"',
            )
        if size_bytes % step_bytes:
            raise UsageError(
                f"{key} cannot be '{shown(value)}': it is not a multiple of {step_bytes} bytes",
                f'for example: {key} = "{example}"',
            )
        return int(size_bytes // unit_bytes)

    return check


def _backing_size(key: str, value: object, root: Path) -> int:
    _of_type(key, value, str, '"2G"')
    if value == "":
        return 0
    return int(_parsed(key, str(value), lambda text: backing_size.parse(text, root), "2G"))


def _duration_ms(low_s: float, high_s: float, example: str) -> Callable[[str, object, Path], int]:
    def check(key: str, value: object, root: Path) -> int:
        _of_type(key, value, str, f'"{example}"')
        seconds = _parsed(key, str(value), quantities.parse_duration_s, example)
        if not low_s <= seconds <= high_s:
            raise UsageError(
                f"{key} cannot be '{shown(value)}'",
                f'it must be from {low_s:g} to {high_s:g} seconds, for example "{example}"',
            )
        return round(seconds * 1000)

    return check


def _parsed(key: str, text: str, parse: Callable[[str], float], example: str) -> float:
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{key}: {shown(error.message, _MESSAGE_LENGTH_MAX)}", error.hint) from None
    except (ValueError, OverflowError):  # thousands of digits
        raise UsageError(f"{key} cannot be '{shown(text)}'", f'for example: {key} = "{example}"') from None


def _url(key: str, value: object, root: Path) -> str:
    _of_type(key, value, str, '"nfs://nas/export/swap/%H.swap"')
    try:
        return nfs_url.parse(str(value), root).text
    except UsageError as error:
        raise UsageError(shown(f"{key}: {error.message}", _MESSAGE_LENGTH_MAX), error.hint) from None


def _device(key: str, value: object, root: Path) -> str:
    _of_type(key, value, str, '"/dev/nbd0"')
    text = str(value)
    if text and not re.fullmatch(r"/dev/nbd(0|[1-9][0-9]{0,4})", text):
        raise UsageError(f"{key} cannot be '{shown(text)}'", 'use "/dev/nbd0" or the like, or "" for any free one')
    return text


def _one_of(words: tuple[str, ...]) -> Callable[[str, object, Path], str]:
    def check(key: str, value: object, root: Path) -> str:
        _of_type(key, value, str, f'"{words[0]}"')
        if value not in words:
            import difflib  # only here: the keeper is resident

            near = difflib.get_close_matches(str(value)[:80], words, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "use one of: " + ", ".join(words)
            raise UsageError(f"{key} cannot be '{shown(value)}'", hint)
        return str(value)

    return check


@dataclass(frozen=True)
class Key:
    """One key of the file.

    field    the field of Config that has its value
    value    checks what the file has (key, value, root) and returns the value of the field; UsageError
    default  in TOML; "" for a key without a default
    about    its description in the example file
    """

    field: str
    value: Callable[[str, object, Path], object]
    default: str
    about: str


KEYS = {
    "url": Key(
        "url",
        _url,
        "",
        "The backing file: nfs://HOST/EXPORT/PATH/FILE?version=3&nfsport=N&mountport=N&uid=N&gid=N. Most servers need"
        " no options. %H stands for this machine's host name, %m for a hash of its machine id, %M for the MAC address"
        " of its boot interface, %u for the product UUID of its firmware, %20 for a space. A diskless machine has the"
        " last two. Each machine needs a file of its own. This is the only key that is required.",
    ),
    "size": Key(
        "size_bytes",
        _backing_size,
        '""',
        'Size of the backing file when it is missing and has to be created, for example "2G", or relative to this'
        ' machine\'s memory: "ram", "ram / 2", "ram * 1.5", "ram / 2, at most 8G". Creating it writes all of its'
        " blocks, which takes as long as copying a file of this size to the server. A file that exists is used as it"
        ' is; nbdnfs grow makes it larger. "": it must exist already.',
    ),
    "priority": Key(
        "priority",
        _priority,
        "-1",
        "Priority of the swap area, 0 to 32767; the highest is used first, see swapon(8). -1: the kernel chooses, with"
        " a lower priority for each further area.",
    ),
    "discard": Key(
        "discard",
        _boolean,
        "false",
        "Report freed pages to the worker (swapon --discard). It drops them from the region; the file stays as it is.",
    ),
    "region": Key(
        "region_pages",
        _size(_MIB, 1 << 30, SLOT_BYTES, "16M"),
        '"16M"',
        "Size of the locked memory that holds pages until the server has them, and pages that were read ahead:"
        ' "1M" to "1G". It outlives the worker and the keeper.',
    ),
    "connections": Key(
        "connections",
        _whole(1, 16),
        str(defaults.CONNECTIONS),
        "TCP connections to the server, 1 to 16. The first carries writes, read-ahead and everything else, each further"
        " one a single read at a time; more than there are threads are not used. 1 spares a server that many clients"
        " share, and is slower.",
    ),
    "stable_writes": Key(
        "stable_writes",
        _boolean,
        "false",
        "true: write each page stably (FILE_SYNC). false: make many pages stable with one COMMIT, and keep them in the"
        " region until then. Both survive a crash of the server.",
    ),
    "read_ahead": Key(
        "read_ahead_pages",
        _size(0, 16 * _MIB, SLOT_BYTES, "256K"),
        '"256K"',
        'Most that is read ahead of a process that reads sequentially: "0" to "16M".',
    ),
    "threads": Key(
        "threads",
        _whole(1, 16),
        str(defaults.THREADS),
        "Threads of the worker, 1 to 16, which is how many requests it serves at once. Each costs 50 KiB of locked"
        f" memory, each beyond number {defaults.THREADS} 180 KiB.",
    ),
    "device": Key(
        "device",
        _device,
        '""',
        'The kernel\'s nbd device, for example "/dev/nbd0". "": any free one.',
    ),
    "lock": Key(
        "lock",
        _one_of(LOCKS),
        '"required"',
        '"required": do not start unless all memory can be locked and every other measure against deadlock works.'
        ' "wanted": start, and log a warning for each that does not. "off": take no such measure. That is for tests:'
        " under memory pressure the machine will hang.",
    ),
    "realtime": Key(
        "realtime",
        _boolean,
        "true",
        "Run the worker at the lowest real-time priority: busy processors do not starve it, and it may use more of the"
        " kernel's memory reserve.",
    ),
    "io_timeout": Key(
        "io_timeout_ms",
        _duration_ms(0.5, 300.0, "1s"),
        '"1s"',
        "How soon the kernel resends requests that were in flight when a worker was replaced. While the server is away,"
        ' the kernel logs one line for each request each time this passes: "500ms" to "300s".',
    ),
    "max_sectors": Key(
        "max_sectors_kb",
        # the kernel refuses less than one of its pages: block/blk-sysfs.c
        _size(max(SLOT_BYTES, KERNEL_PAGE_BYTES), 32 * _MIB, 1024, "128K"),
        '"128K"',
        'Largest request that the kernel sends to the device: a page of the kernel ("4K" on most machines) to "32M".',
    ),
    "recovery": Key(
        "recovery",
        _one_of(RECOVERIES),
        '"hard"',
        '"hard": wait for a server that is away, for as long as it takes. "soft": fail requests with an I/O error once'
        " they have waited for soft_limit, which kills the processes that need those pages. See nfs(5). Pages already"
        " written are kept in both cases, and reach the server when it is back.",
    ),
    "soft_limit": Key(
        "soft_limit_ms",
        _duration_ms(1.0, 86_400.0, "60s"),
        '"60s"',
        'How long requests wait for the server with recovery = "soft": "1s" to "1d".',
    ),
    "gone_limit": Key(
        "gone_limit_ms",
        _duration_ms(1.0, 86_400.0, "5min"),
        '"5min"',
        "How long the server may answer that the file does not exist, or is another file, or may not be read, before"
        ' requests that wait for it fail with an I/O error, also with recovery = "hard". A NAS that has just booted may'
        ' answer so until its disks are mounted: "1s" to "1d".',
    ),
    "reclaim_check": Key(
        "reclaim_check",
        _boolean,
        "true",
        "Refuse to take the device down (nbdnfs down, systemctl stop) while swapped-out pages do not fit in memory.",
    ),
    "owner": Key(
        "owner",
        _boolean,
        "true",
        "Record beside the file (.FILE.owner) which machine swaps to it, and refuse a file that belongs to another"
        " machine: two machines on one file destroy each other's memory. The directory must be writable.",
    ),
    "encrypt": Key(
        "encrypt",
        _boolean,
        "true",
        "Encrypt pages on the network and on the server, and check that the server returns what was written. The keys"
        " are random, in this machine's memory alone, and new each time the device is started. false, for a network"
        " and a server that are trusted, saves 1 MiB of locked memory for each GiB of the file, and a few microseconds"
        " of processor time for each page. A device that is up keeps what it was started with.",
    ),
    "loop": Key(
        "loop",
        _boolean_or_auto,
        '"auto"',
        "Serve the kernel's requests in one loop of the worker, in place of nbdkit's threads: less processor time for"
        " each request, on one processor. threads does not matter then, and max_sectors is at most 1M; a device"
        ' that is up with a larger one keeps the threads. "auto": on a'
        " machine with one processor.",
    ),
}


def render_example() -> str:
    """The commented example file: every key with its default. It is valid, and sets the url only."""
    import textwrap

    def comment(text: str) -> str:
        return "\n".join(textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False))

    parts = [
        comment(
            "nbdnfs: one swap device. Copy this file to /etc/nbdnfs/NAME.toml, set the url, and start the device:"
            " systemctl enable --now nbdnfs@NAME"
        )
        + "\n"
        + comment("Commented settings are the defaults. Files in /etc/nbdnfs/NAME.toml.d/*.toml override this one.")
    ]
    for key, entry in KEYS.items():
        setting = f"#{key} = {entry.default}" if entry.default else f'{key} = "nfs://nas.example/export/swap/%H.swap"'
        parts.append(f"{comment(entry.about)}\n{setting}")
    return "\n\n".join(parts) + "\n"
