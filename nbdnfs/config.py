# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration of one device: NAME.toml and the drop-ins NAME.toml.d/*.toml, read once and checked in full.

Both are looked up in /etc/nbdnfs, then in /run/nbdnfs-config, where systemd/nbdnfs-generator puts what the kernel
command line asks for. The first NAME.toml counts. Drop-ins of both folders are read in the order of their names; later
ones override earlier ones, and one in /etc hides one of the same name in /run, as in systemd.unit(5). An empty file
hides as well. Files whose names begin with "." are ignored.

Each file must be valid on its own, also where a later one overrides it. An error is a ConfigError with file, line and
remedy. The keys are in config_keys.py.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import defaults
from nbdnfs.config_keys import KEYS, shown
from nbdnfs.errors import (
    ConfigError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from nbdnfs.sizes import SLOT_BYTES

# In this order of precedence.
FOLDERS = ("etc/nbdnfs", "run/nbdnfs-config")
# The first words of a file that systemd/nbdnfs-generator makes.
_GENERATED = "# Made by nbdnfs-generator"

_MIB = 1 << 20
_FILE_BYTES_MAX = 16 * 1024
# Permanent errors: the path is not a readable file or folder. Others may go away.
_NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL)


@dataclass(frozen=True)
class Config:
    """The settings of one device, all of them valid.

    `url` is the canonical form of the URL, with its specifiers replaced. `size_bytes` is 0 where a missing backing file
    must not be created, `priority` None where the kernel chooses, `device` "" for any free one, `loop` None
    where the keeper decides by the number of processors.
    """

    name: str
    url: str
    size_bytes: int = 0
    priority: int | None = None
    discard: bool = False
    region_pages: int = 16 * _MIB // SLOT_BYTES
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
    encrypt: bool = True
    loop: bool | None = None

    @property
    def region_bytes(self) -> int:
        """The size of the shared memory in which acknowledged pages wait for the NAS."""
        return self.region_pages * SLOT_BYTES


def load(name: str, root: Path = Path("/")) -> Config:
    """Read and check the configuration of the device `name` below `root`.

    UsageError: not a valid name. NoInputError: there is no such file. ConfigError: a file is not valid.
    PermissionDeniedError: one of its files or folders may not be read. UnavailableError: a file cannot be read now, or
    the URL has %M or %H and there is no network or no host name yet.
    """
    check_name(name)
    files = _files(name, root)
    fields: dict[str, object] = {}
    for path in files:
        text = _read(path)
        for key, value in _parse(text, path).items():
            try:
                fields[KEYS[key].field] = KEYS[key].value(key, value, root)
            except UsageError as error:
                raise ConfigError(f"{_place(key, text, path)}: {error.message}", error.hint) from None
    if "url" not in fields:
        raise ConfigError(f"{files[0]}:1: url is missing", 'name the backing file: url = "nfs://nas/export/%H.swap"')
    return Config(name=name, **fields)  # type: ignore[arg-type]


def names(root: Path = Path("/")) -> list[str]:
    """The names of all devices that have a configuration, valid or not, in order. PermissionDeniedError: a folder may
    not be read. UnavailableError: it cannot be, now."""
    paths = [path for folder in FOLDERS for path in _in_folder(root / folder)]
    return sorted({path.stem for path in paths if _is_name(path.stem) and _may_be_file(path)})


def _in_folder(folder: Path) -> list[Path]:
    """The *.toml files in `folder`, except hidden ones, in any order; [] where it does not exist. Errors as names()."""
    try:
        found = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(folder, error) from None
    return [folder / name for name in found if name.endswith(".toml") and not name.startswith(".")]


def _unreadable(path: Path, error: OSError) -> NbdnfsError:
    """Most errors say nothing of what is there, and are no fault of the configuration."""
    what = f"{path} cannot be read: {error.strerror}"
    if isinstance(error, PermissionError):
        return PermissionDeniedError(what, "run this as root")
    if error.errno in _NO_FILE:
        return ConfigError(what, f"look at it: ls -ld {path}")
    if isinstance(error, FileNotFoundError):
        return UnavailableError(what, "it has just been removed or replaced: try again")
    return UnavailableError(what, "try again later; the kernel's log may say more: dmesg | tail")


def _exists(path: Path) -> bool:
    """os.path.lexists() takes every error for a no: another folder's file would be taken instead."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from None
    return True


def _may_be_file(path: Path) -> bool:
    """Also a link that leads nowhere, a FIFO, and what cannot be looked at: load() says what is wrong with these."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return os.path.islink(path)
    except OSError:
        return True
    return not (stat.S_ISDIR(found.st_mode) or _is_masked(found))


def check_name(name: str) -> None:
    """Raise UsageError when `name` cannot be the name of a device."""
    if ".toml" in name:
        raise UsageError(f"'{name}' is the name of a file", f"omit the ending: {name.partition('.toml')[0] or 'swap0'}")
    if not _is_name(name):
        raise UsageError(
            f"'{name}' cannot be the name of a device",
            "use at most 64 letters, digits, '_', '-' and '.', and do not begin with '.'",
        )


def _is_name(name: str) -> bool:
    # 64: the room in the path of a Unix socket and in the backend identifier
    return re.fullmatch(r"(?!\.)[A-Za-z0-9_.-]{1,64}", name) is not None and ".toml" not in name


def _files(name: str, root: Path) -> list[Path]:
    """The main file and the drop-ins that apply, in the order in which they are read."""
    candidates = [root / folder / f"{name}.toml" for folder in FOLDERS]
    main = next((path for path in candidates if _exists(path)), None)
    if main is None:
        import difflib  # only here: the keeper is resident

        near = difflib.get_close_matches(name, names(root), n=1)
        raise NoInputError(
            f"{candidates[0]} does not exist",
            f"did you mean '{near[0]}'?" if near else 'create it; one line is enough: url = "nfs://nas/export/%H.swap"',
        )
    drop_ins: dict[str, Path] = {}
    for folder in reversed(FOLDERS):
        drop_ins |= {path.name: path for path in _in_folder(root / folder / f"{name}.toml.d")}
    return [main, *(drop_ins[key] for key in sorted(drop_ins))]


def _read(path: Path) -> str:
    try:
        if _is_masked(found := os.stat(path)):
            return ""
        if _is_special(found):  # before it is opened: a tape may move
            raise _not_a_file(path)
        with open(path, "rb", opener=_open_at_once) as file:
            if _is_special(os.fstat(file.fileno())):
                raise _not_a_file(path)
            data = file.read(_FILE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise ConfigError(
                f"{path} is a link that leads nowhere: {os.readlink(path)}", "mend it, or remove it"
            ) from None
        raise _unreadable(path, error) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError(f"{path} is larger than {_FILE_BYTES_MAX // 1024} KiB", "check that this is the right file")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: byte {data[error.start]:#x} is not UTF-8", "save it as UTF-8") from None


def _is_masked(found: os.stat_result) -> bool:
    """Whether it is a link to /dev/null, as systemd has it."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)


def _is_special(found: os.stat_result) -> bool:
    """Whether it is a FIFO, a socket or a device."""
    return not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode))


def _open_at_once(path: str, flags: int) -> int:
    """A FIFO would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _not_a_file(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is a FIFO, a socket or a device, not a file", f"look at it: ls -l {path}; and remove it"
    )


def _parse(text: str, path: Path) -> dict[str, object]:
    """The values of a file. ConfigError for a key that does not exist."""
    import tomllib

    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also comes bare, from a number of 5,000 digits
        line, what = _place_of(error, text)
        if twice := _set_twice(text):
            raise ConfigError(f"{path}:{twice[1]}: {twice[0]} is set twice", "keep one of the two") from None
        raise ConfigError(
            f"{path}:{line}: {what}",
            'write lines like size = "2G" or discard = true, with strings in quotes (TOML)',
        ) from None
    for key, value in values.items():
        if key not in KEYS:
            raise ConfigError(f"{path}:{_line_of(key, text)}: {_unknown(key, value)}", _nearest(key))
    return values


def _place_of(error: Exception, text: str) -> tuple[int, str]:
    """Line and reason in a message of tomllib: "Invalid value (at line 2, column 7)", "... (at end of document)"."""
    said = " ".join(str(error).split()) if isinstance(error, ValueError) else "nested too deeply"
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", said)
    if match is None:
        return _first_bad_line(text), f"not valid TOML: {said}"
    line = int(match[1]) if match[1] else max(text.rstrip("\n").count("\n") + 1, 1)
    return line, f"not valid TOML: {said[: match.start()]}"


def _first_bad_line(text: str) -> int:
    return next((number for number, _, error in _statements(text) if error), 1)


def _statements(text: str) -> Iterator[tuple[int, dict[str, object], bool]]:
    """The statements of a file, one by one: the line where each begins, what it sets, and whether it is invalid.

    tomllib does not report lines. A statement is the least number of whole lines that parses; an empty line or a
    comment is a statement that sets nothing. Statements after the header of a table belong to the table.
    """
    import tomllib

    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines(): TOML has no other line ends
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


def _set_twice(text: str) -> tuple[str, int] | None:
    """The first of KEYS that is set more than once, and the line where it is again."""
    seen: set[str] = set()
    for line, values, _ in _statements(text):
        for key in values:
            if key in seen and key in KEYS:
                return key, line
            seen.add(key)
    return None


def _place(key: str, text: str, path: Path) -> str:
    """Where an administrator has set the key."""
    if path.parent.name == Path(FOLDERS[1]).name and text.startswith(_GENERATED):
        return f"nbdnfs.{key} on the kernel command line"
    return f"{path}:{_line_of(key, text)}"


def _line_of(key: str, text: str) -> int:
    """The line on which the top-level key begins, in valid TOML; 1 where it cannot be found."""
    return next((line for line, values, _ in _statements(text) if key in values), 1)


def _unknown(key: str, value: object) -> str:
    return f"unknown table [{shown(key)}]" if isinstance(value, dict) else f"unknown key '{shown(key)}'"


def _nearest(key: str) -> str:
    import difflib  # only here: the keeper is resident

    near = difflib.get_close_matches(key.lower().replace("-", "_"), KEYS, n=1)
    return f"did you mean '{near[0]}'?" if near else "the keys are " + ", ".join(KEYS)
