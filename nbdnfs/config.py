# SPDX-License-Identifier: LGPL-2.1-or-later
"""One device's configuration: NAME.toml and the drop-ins NAME.toml.d/*.toml, read once and checked in full.

Both are looked up in /etc/nbdnfs, then in /run/nbdnfs-config, where systemd/nbdnfs-generator puts what the kernel
command line asks for. The first NAME.toml counts. Drop-ins of both folders are read in the order of their names, later
ones win, and one in /etc hides one of the same name in /run, as systemd.unit(5) has it. An empty file hides as well.

Each file must be right on its own, also where a later one overrides it. What is wrong is a ConfigError with
file, line and what would have been right.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import defaults, nfs_url, quantities
from nbdnfs.errors import ConfigError, NoInputError, UsageError

# In this order of precedence.
FOLDERS = ("etc/nbdnfs", "run/nbdnfs-config")

PAGE_BYTES = 4096
_MIB = 1 << 20
_FILE_BYTES_MAX = 16 * 1024
LOCKS = ("required", "wanted", "off")
RECOVERIES = ("hard", "soft")


@dataclass(frozen=True)
class Config:
    """What `nbdnfs run NAME` is to do.

    `url` has its specifiers replaced and is written as `url.parse` takes it (a percent sign is doubled).
    `size_bytes` is 0 where a missing backing file must not be created, `priority` None where the kernel is to
    choose, `device` "" for any free one.
    """

    name: str
    url: str
    size_bytes: int = 0
    priority: int | None = None
    discard: bool = False
    region_pages: int = 16 * _MIB // PAGE_BYTES
    connections: int = defaults.CONNECTIONS
    stable_writes: bool = False
    read_ahead_pages: int = 64
    threads: int = defaults.THREADS
    device: str = ""
    lock: str = "required"
    realtime: bool = True
    io_timeout_ms: int = 1000
    max_sectors_kb: int = 128
    reclaim_check: bool = True
    recovery: str = "hard"
    soft_limit_ms: int = 60_000
    gone_limit_ms: int = 300_000
    owner: bool = True

    @property
    def region_bytes(self) -> int:
        """The size of the shared memory in which acknowledged pages wait for the NAS."""
        return self.region_pages * PAGE_BYTES


def load(name: str, root: Path = Path("/")) -> Config:
    """Read and check the configuration of the device `name` below `root`.

    UsageError: no possible name. NoInputError: there is no such file. ConfigError: it is wrong, and says where.
    """
    check_name(name)
    files = _files(name, root)
    fields: dict[str, object] = {}
    for path in files:
        text = _read(path)
        for key, value in _parse(text, path).items():
            try:
                fields[_KEYS[key].field] = _KEYS[key].value(key, value, root)
            except UsageError as error:
                raise ConfigError(f"{path}:{_line_of(key, text)}: {error.message}", error.hint) from None
    if "url" not in fields:
        raise ConfigError(f"{files[0]}:1: there is no url", 'say where the file lies: url = "nfs://nas/export/%H.swap"')
    return Config(name=name, **fields)  # type: ignore[arg-type]


def names(root: Path = Path("/")) -> list[str]:
    """The names of all devices that have a configuration, right or wrong, in order."""
    found = {path.stem for folder in FOLDERS for path in (root / folder).glob("*.toml") if path.is_file()}
    return sorted(name for name in found if _is_name(name))


def check_name(name: str) -> None:
    """Raise UsageError when `name` cannot be the name of a device."""
    if ".toml" in name:
        raise UsageError(f"'{name}' is a file's name", f"leave the ending out: {name.partition('.toml')[0] or 'swap0'}")
    if not _is_name(name):
        raise UsageError(
            f"'{name}' cannot be the name of a device",
            "it has letters, digits, '_', '-' and '.', does not begin with '.', and is at most 64 long",
        )


def _is_name(name: str) -> bool:
    # 64: what is left for it in the path of a Unix socket, and in the backend identifier
    return re.fullmatch(r"(?!\.)[A-Za-z0-9_.-]{1,64}", name) is not None and ".toml" not in name


def _files(name: str, root: Path) -> list[Path]:
    """The main file and the drop-ins that count, in the order in which they are read."""
    candidates = [root / folder / f"{name}.toml" for folder in FOLDERS]
    main = next((path for path in candidates if os.path.exists(path)), None)
    if main is None:
        near = difflib.get_close_matches(name, names(root), n=1)
        raise NoInputError(
            f"there is no {candidates[0]}",
            f"did you mean '{near[0]}'?" if near else 'write it, one line is enough: url = "nfs://nas/export/%H.swap"',
        )
    drop_ins: dict[str, Path] = {}
    for folder in reversed(FOLDERS):
        drop_ins |= {path.name: path for path in (root / folder / f"{name}.toml.d").glob("*.toml")}
    return [main, *(drop_ins[key] for key in sorted(drop_ins))]


def _read(path: Path) -> str:
    try:
        if path.is_char_device():  # masked: a link to /dev/null
            return ""
        with open(path, "rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", "make it a file that root may read") from None
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError(f"{path}: is larger than {_FILE_BYTES_MAX // 1024} KiB", "is it the right file?")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: byte {data[error.start]:#x} is not UTF-8", "save it as UTF-8") from None


def _parse(text: str, path: Path) -> dict[str, object]:
    """The values of a file, whose keys are all known."""
    import tomllib

    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also comes bare, from a number of 5,000 digits
        line, what = _place_of(error, text)
        raise ConfigError(
            f"{path}:{line}: {what}",
            'write lines like size = "2G" or discard = true, with texts in quotes (TOML)',
        ) from None
    for key, value in values.items():
        if key not in _KEYS:
            raise ConfigError(f"{path}:{_line_of(key, text)}: {_unknown(key, value)}", _nearest(key))
    return values


def _place_of(error: Exception, text: str) -> tuple[int, str]:
    """Line and reason in what tomllib says: "Invalid value (at line 2, column 7)", "... (at end of document)"."""
    said = " ".join(str(error).split()) if isinstance(error, ValueError) else "nested too deeply"
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", said)
    if match is None:
        return _first_bad_line(text), f"no valid TOML: {said}"
    line = int(match[1]) if match[1] else max(text.rstrip("\n").count("\n") + 1, 1)
    return line, f"no valid TOML: {said[: match.start()]}"


def _first_bad_line(text: str) -> int:
    return next((number for number, _, error in _statements(text) if error), 1)


def _statements(text: str) -> Iterator[tuple[int, dict[str, object], bool]]:
    """A file's statements, one by one: the line where each begins, what it sets, and whether it is wrong.

    tomllib tells no lines. A statement is the least number of whole lines that parses; lines that are empty
    or a comment are statements that set nothing. After a table's header comes what belongs to the table.
    """
    import tomllib

    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines(): TOML knows no other ends of lines
    first, is_table = 0, False
    while first < len(lines):
        for after in range(first + 1, len(lines) + 1):
            try:
                values = tomllib.loads("\n".join(lines[first:after]))
            except tomllib.TOMLDecodeError:
                continue
            except (ValueError, RecursionError):
                yield first + 1, {}, True
                return
            is_header = lines[first].lstrip(" \t").startswith("[")
            is_table = is_table or is_header
            yield first + 1, values if is_header or not is_table else {}, False
            first = after
            break
        else:
            yield first + 1, {}, True
            return


def _line_of(key: str, text: str) -> int:
    """The line on which the top-level key begins in a text that is valid TOML; 1 where it cannot be found."""
    return next((line for line, values, _ in _statements(text) if key in values), 1)


def _unknown(key: str, value: object) -> str:
    shown = _shown(key)
    return f"there is no table [{shown}]" if isinstance(value, dict) else f"there is no key '{shown}'"


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key.lower().replace("-", "_"), _KEYS, n=1)
    return f"did you mean '{near[0]}'?" if near else "the keys are " + ", ".join(_KEYS)


def _shown(value: object) -> str:
    """A value on one line, as TOML would have it, not too long."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 80 else text[:77] + "..."


def _of_type(key: str, value: object, wanted: type, example: str) -> None:
    # a bool is an int to Python, and not to TOML
    if type(value) is not wanted:
        kinds = {str: "a text in quotes", int: "a whole number", bool: "true or false"}
        raise UsageError(f"{key} is to be {kinds[wanted]}", f"write for example {key} = {example}")


def _boolean(key: str, value: object, root: Path) -> bool:
    _of_type(key, value, bool, "true")
    return bool(value)


def _whole(low: int, high: int) -> Callable[[str, object, Path], int]:
    def check(key: str, value: object, root: Path) -> int:
        _of_type(key, value, int, str(high if low < 0 else low))
        assert isinstance(value, int)
        if not low <= value <= high:
            # str() refuses numbers of thousands of digits; TOML may have them in hexadecimal
            shown = str(value) if abs(value) < 10**30 else "so large"
            raise UsageError(f"{key} cannot be {shown}", f"it is a number from {low} to {high}")
        return value

    return check


def _priority(key: str, value: object, root: Path) -> int | None:
    priority = _whole(-1, 32767)(key, value, root)
    return None if priority == -1 else priority


def _size(
    low_bytes: int, high_bytes: int, unit_bytes: int, example: str, *, step_bytes: int = PAGE_BYTES
) -> Callable[[str, object, Path], int]:
    """Counts units of `unit_bytes`. "0" is possible where `low_bytes` is 0."""

    def check(key: str, value: object, root: Path) -> int:
        _of_type(key, value, str, f'"{example}"')
        size_bytes = _parsed(key, str(value), quantities.parse_size_bytes, example)
        if not low_bytes <= size_bytes <= high_bytes:
            raise UsageError(
                f"{key} cannot be '{_shown(value)}'",
                f"it is {quantities.format_size(low_bytes)} to {quantities.format_size(high_bytes)},"
                f' for example "{example}"',
            )
        if size_bytes % step_bytes:
            raise UsageError(
                f"{key} cannot be '{_shown(value)}': it is no multiple of {step_bytes} bytes",
                f'write for example {key} = "{example}"',
            )
        return int(size_bytes // unit_bytes)

    return check


def _backing_size(key: str, value: object, root: Path) -> int:
    # mkswap(8) wants ten pages; the largest is what fits into the kernel's 32-bit page numbers
    return 0 if value == "" else _size(_MIB, (2**32 - 1) * PAGE_BYTES, 1, "2G")(key, value, root)


def _duration_ms(low_s: float, high_s: float, example: str) -> Callable[[str, object, Path], int]:
    def check(key: str, value: object, root: Path) -> int:
        _of_type(key, value, str, f'"{example}"')
        seconds = _parsed(key, str(value), quantities.parse_duration_s, example)
        if not low_s <= seconds <= high_s:
            raise UsageError(
                f"{key} cannot be '{_shown(value)}'", f'it is {low_s:g} to {high_s:g} seconds, for example "{example}"'
            )
        return round(seconds * 1000)

    return check


def _parsed(key: str, text: str, parse: Callable[[str], float], example: str) -> float:
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{key}: {_shown(error.message)}", error.hint) from None
    except (ValueError, OverflowError):  # thousands of digits
        raise UsageError(f"{key} cannot be '{_shown(text)}'", f'write for example {key} = "{example}"') from None


def _url(key: str, value: object, root: Path) -> str:
    _of_type(key, value, str, '"nfs://nas/export/swap/%H.swap"')
    try:
        expanded = nfs_url.parse(str(value), root).text
    except UsageError as error:
        raise UsageError(_shown(f"{key}: {error.message}"), error.hint) from None
    return expanded.replace("%", "%%")


def _device(key: str, value: object, root: Path) -> str:
    _of_type(key, value, str, '"/dev/nbd0"')
    text = str(value)
    if text and not re.fullmatch(r"/dev/nbd(0|[1-9][0-9]{0,4})", text):
        raise UsageError(f"{key} cannot be '{_shown(text)}'", 'it is "/dev/nbd0" and so on, or "" for any free one')
    return text


def _one_of(words: tuple[str, ...]) -> Callable[[str, object, Path], str]:
    def check(key: str, value: object, root: Path) -> str:
        _of_type(key, value, str, f'"{words[0]}"')
        if value not in words:
            near = difflib.get_close_matches(str(value)[:80], words, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "it is one of: " + ", ".join(words)
            raise UsageError(f"{key} cannot be '{_shown(value)}'", hint)
        return str(value)

    return check


@dataclass(frozen=True)
class _Key:
    """One key of the file: where its value goes, how it is checked, its default in TOML, what to say about it.

    `default` is "" for a key without one; `about` then ends with an example.
    """

    field: str
    value: Callable[[str, object, Path], object]
    default: str
    about: str


_KEYS = {
    "url": _Key(
        "url",
        _url,
        "",
        "The backing file: nfs://HOST/EXPORT/PATH/FILE?version=3&nfsport=N&mountport=N&uid=N&gid=N"
        " and mostly no options. %H is this machine's host name, %m its machine id, %% a percent"
        " sign. Each machine needs a file of its own. This is the only key that has to be there.",
    ),
    "size": _Key(
        "size_bytes",
        _backing_size,
        '""',
        'How large to make the file when it is missing, for example "2G". All its blocks are written then, which takes'
        ' as long as copying so much to the server. "": a missing file is an error.',
    ),
    "priority": _Key(
        "priority",
        _priority,
        "-1",
        "The swap area with the highest priority is used first, see swapon(8): 0 to 32767."
        " -1: the kernel chooses, lower for each further area.",
    ),
    "discard": _Key(
        "discard",
        _boolean,
        "false",
        "Tell the worker which pages are free again (swapon --discard). It forgets what it has of them; the file keeps"
        " its blocks.",
    ),
    "region": _Key(
        "region_pages",
        _size(_MIB, 1 << 30, PAGE_BYTES, "16M"),
        '"16M"',
        "The locked memory in which pages wait until the server has them, and which holds what was read ahead:"
        " 1 MiB to 1 GiB. It outlives the worker and the keeper.",
    ),
    "connections": _Key(
        "connections",
        _whole(1, 16),
        str(defaults.CONNECTIONS),
        "TCP connections to the server: one for writes, read-ahead and all else, and each further one for one read at a"
        " time. As many as there are threads are of use; 1 spares a server that many clients share, and costs speed.",
    ),
    "stable_writes": _Key(
        "stable_writes",
        _boolean,
        "false",
        "Write each page stably (FILE_SYNC). Otherwise one COMMIT makes many stable, and pages stay in the region until"
        " then. Both survive a crash of the server.",
    ),
    "read_ahead": _Key(
        "read_ahead_pages",
        _size(0, 16 * _MIB, PAGE_BYTES, "256K"),
        '"256K"',
        'At most so much is read ahead of a process that reads in sequence: "0" to "16M".',
    ),
    "threads": _Key(
        "threads",
        _whole(1, 16),
        str(defaults.THREADS),
        "Threads of the worker, 1 to 16: as many requests are under way. Each costs 50 KiB of locked memory, beyond the"
        f" {defaults.THREADS}th 180.",
    ),
    "device": _Key(
        "device",
        _device,
        '""',
        'The kernel\'s device, for example "/dev/nbd0". "": one that is free.',
    ),
    "lock": _Key(
        "lock",
        _one_of(LOCKS),
        '"required"',
        '"required": do not start unless all memory can be locked and all else holds that keeps swap from deadlock.'
        ' "wanted": warn. "off": do without, which is for tests only: under pressure the machine will hang.',
    ),
    "realtime": _Key(
        "realtime",
        _boolean,
        "true",
        "Run the worker at the lowest real-time priority: busy processors do not starve it, and it may dip deeper into"
        " the kernel's reserve of memory.",
    ),
    "io_timeout": _Key(
        "io_timeout_ms",
        _duration_ms(0.5, 300.0, "1s"),
        '"1s"',
        "How soon the kernel sends again what was on its way when a worker was replaced. While the server is away it"
        ' logs one line for each request in each such time: "500ms" to "300s".',
    ),
    "max_sectors": _Key(
        "max_sectors_kb",
        _size(PAGE_BYTES, 32 * _MIB, 1024, "128K"),
        '"128K"',
        'The largest request that the kernel makes of the device: "4K" to "32M".',
    ),
    "recovery": _Key(
        "recovery",
        _one_of(RECOVERIES),
        '"hard"',
        '"hard": a server that is away is waited for, for as long as it takes. "soft": what has waited for soft_limit'
        " is an I/O error, which kills the process whose page it was. See nfs(5). What was written already is kept and"
        " brought to the server in both.",
    ),
    "soft_limit": _Key(
        "soft_limit_ms",
        _duration_ms(1.0, 86_400.0, "60s"),
        '"60s"',
        'How long recovery = "soft" waits: "1s" to "1d".',
    ),
    "gone_limit": _Key(
        "gone_limit_ms",
        _duration_ms(1.0, 86_400.0, "5min"),
        '"5min"',
        "How long a server may say that the file is not there, or is another one, before what waits for it is an I/O"
        ' error, also with recovery = "hard". It is what a NAS may need to mount its disks after it has started to'
        ' answer: "1s" to "1d".',
    ),
    "reclaim_check": _Key(
        "reclaim_check",
        _boolean,
        "true",
        "Refuse to take the device down (nbdnfs down, systemctl stop) when what is swapped out does not fit in memory.",
    ),
    "owner": _Key(
        "owner",
        _boolean,
        "true",
        "Keep a record beside the file (.FILE.owner) of which machine swaps to it, and refuse a file that is another"
        " one's. Two machines on one file destroy each other's memory. The directory must be writable for that.",
    ),
}

KEYS = tuple(_KEYS)


def render_example() -> str:
    """The commented example file: every key with its default. It is valid; only its url is set."""
    import textwrap

    def comment(text: str) -> str:
        return "\n".join(textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False))

    parts = [
        comment(
            "nbdnfs: one swap device. Copy this file to /etc/nbdnfs/NAME.toml, write the url, and start the device:"
            " systemctl enable --now nbdnfs@NAME"
        )
        + "\n"
        + comment("What is commented out is the default. Files /etc/nbdnfs/NAME.toml.d/*.toml override this one.")
    ]
    for key, entry in _KEYS.items():
        setting = f"#{key} = {entry.default}" if entry.default else f'{key} = "nfs://nas.example/export/swap/%H.swap"'
        parts.append(f"{comment(entry.about)}\n{setting}")
    return "\n\n".join(parts) + "\n"
