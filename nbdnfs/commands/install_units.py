# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs install-units`: puts the files of systemd/ in place, on this machine or in the root folder of an image.

All but the example go to /usr/local/lib, where systemd looks for what the administrator did not write but
installed: /etc stays free for `systemctl edit` and other overrides. A list of what was installed, with checksums,
tells whether somebody has changed a file since; then nothing at all is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbdnfs
from nbdnfs import config, config_keys, programs
from nbdnfs.errors import CannotCreateError, ConfigError, NbdnfsError, PermissionDeniedError

_LIB = "usr/local/lib"
_LIST = f"{_LIB}/nbdnfs/installed.sha256"
# In the units and scripts it stands for the program that installs them.
_PROGRAM = "/usr/local/bin/nbdnfs"
_RELOAD_TIMEOUT_S = 90.0

# In systemd/ ▸ where it goes.
_FILES = {
    "nbdnfs@.service": f"{_LIB}/systemd/system/nbdnfs@.service",
    "nbdnfs.slice": f"{_LIB}/systemd/system/nbdnfs.slice",
    "nbdnfs-generator": f"{_LIB}/systemd/system-generators/nbdnfs-generator",
    "reserve": f"{_LIB}/nbdnfs/reserve",
    "modules-load.conf": f"{_LIB}/modules-load.d/nbdnfs.conf",
    "sysctl.conf": f"{_LIB}/sysctl.d/60-nbdnfs.conf",
    "tmpfiles.conf": f"{_LIB}/tmpfiles.d/nbdnfs.conf",
    "udev.rules": f"{_LIB}/udev/rules.d/59-nbdnfs.rules",
}
# What only later versions of systemd know; others would warn at each start.
_SINCE = {
    254: ("nbdnfs@.service-254.conf", f"{_LIB}/systemd/system/nbdnfs@.service.d/50-systemd-254.conf"),
    255: ("nbdnfs@.service-255.conf", f"{_LIB}/systemd/system/nbdnfs@.service.d/50-systemd-255.conf"),
}
_EXAMPLE = "etc/nbdnfs/example.toml.disabled"
_EXECUTABLE = frozenset({"nbdnfs-generator", "reserve"})


@dataclass(frozen=True)
class File:
    """One file to install: its path below the root, its bytes, its mode."""

    path: str
    data: bytes
    mode: int = 0o644


def install(root: Path = Path("/"), *, program: str | None = None, force: bool = False) -> list[Path]:
    """Put everything in place below `root`; returns the files that were written, none when all was there already.

    `program` is what the units are to start (the running one otherwise). Files of an earlier version that this one
    has no more are removed. ConfigError: somebody has changed a file, and not `force`; nothing has been
    written then. PermissionDeniedError, CannotCreateError: it cannot be written.
    """
    files = contents(_running_program() if program is None else program, systemd_version(root))
    before = _read_list(root)
    changed = [
        path for path in sorted({*before, *(file.path for file in files)}) if _is_changed(root, path, files, before)
    ]
    if changed and not force:
        raise ConfigError(
            f"{', '.join(str(root / path) for path in changed)}: changed since nbdnfs installed it",
            "keep your changes in /etc (systemctl edit), then: nbdnfs install-units --force",
        )
    try:
        written = [root / file.path for file in files if _write(root, file)]
        for path in before.keys() - {file.path for file in files}:
            (root / path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                (root / path).parent.rmdir()
        _write(root, File(_LIST, _render_list(files)))
    except OSError as error:
        kind = PermissionDeniedError if isinstance(error, PermissionError) else CannotCreateError
        raise kind(f"cannot write {error.filename}: {error.strerror}", "run it as root, or with --root DIR") from None
    if written and root == Path("/") and Path("/run/systemd/system").is_dir():
        systemctl = programs.find_program("systemctl", "systemd")
        programs.run([systemctl, "daemon-reload"], what="systemctl daemon-reload", timeout_s=_RELOAD_TIMEOUT_S)
    return written


def contents(program: str, systemd: int) -> list[File]:
    """What to install for a program and a version of systemd. ConfigError for a program that units cannot name."""
    if not re.fullmatch(r"/[A-Za-z0-9/._+@-]+", program):
        raise ConfigError(
            f"'{program}' cannot be named in a unit", "install nbdnfs in a folder without blanks in its name"
        )
    chosen = {**_FILES, **dict(entry for since, entry in _SINCE.items() if systemd >= since)}
    found = []
    for name, path in chosen.items():
        data = (_source_folder() / name).read_bytes().replace(_PROGRAM.encode(), program.encode())
        found.append(File(path, data, 0o755 if name in _EXECUTABLE else 0o644))
    return [*found, File(_EXAMPLE, config_keys.render_example().encode())]


def systemd_version(root: Path = Path("/")) -> int:
    """The version of the systemd that is installed below `root`, by its private library's name; 0 for none."""
    folders = ("usr/lib/systemd", "usr/lib/*/systemd", "usr/lib64/systemd", "lib/systemd")
    libraries = (path.name for folder in folders for path in root.glob(f"{folder}/libsystemd-shared-*.so"))
    versions = (re.match(r"libsystemd-shared-(\d+)", name) for name in libraries)
    return max((int(match[1]) for match in versions if match), default=0)


def _source_folder() -> Path:
    """Where the files lie: in the installed package, or beside it in a checkout. ConfigError when they do not."""
    package = Path(nbdnfs.__file__).parent
    for folder in (package / "systemd", package.parent / "systemd"):
        if (folder / "nbdnfs@.service").exists():
            return folder
    raise ConfigError("the systemd units are missing from this installation", "install the package nbdnfs again")


def _running_program() -> str:
    """The path of the command `nbdnfs` that runs, or that belongs to the Python that runs. ConfigError without one."""
    candidates = [Path(sys.argv[0]), Path(sys.executable).with_name("nbdnfs"), Path(_PROGRAM), Path("/usr/bin/nbdnfs")]
    for path in candidates:
        if path.name == "nbdnfs" and path.is_file() and os.access(path, os.X_OK):
            return os.path.abspath(path)
    raise ConfigError("there is no command 'nbdnfs' for the units to start", "install nbdnfs with pip, or its package")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PermissionDeniedError(f"cannot read {path}: {error.strerror}", "run it as root") from None


def _read_list(root: Path) -> dict[str, str]:
    """What was installed last: path ▸ checksum. As sha256sum(1) writes it, from the root folder."""
    lines = (_read(root / _LIST) or b"").decode(errors="replace").splitlines()
    pairs = (line.split("  ", 1) for line in lines)
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2 and not re.search(r"(^|/)\.\.(/|$)|^/", pair[1])}


def _render_list(files: Iterable[File]) -> bytes:
    return "".join(f"{_digest(file.data)}  {file.path}\n" for file in files).encode()


def _is_changed(root: Path, path: str, files: Iterable[File], before: dict[str, str]) -> bool:
    """Whether the file is neither what was installed last nor what is to be installed. One that was removed is not."""
    data = _read(root / path)
    return (
        data is not None
        and _digest(data) != before.get(path)
        and not any(file.path == path and file.data == data for file in files)
    )


def _write(root: Path, file: File) -> bool:
    """Write it whole or not at all; False when it was there already."""
    path = root / file.path
    if _read(path) == file.data and path.stat().st_mode & 0o777 == file.mode:
        return False
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(file.data)
    new.chmod(file.mode)
    new.rename(path)
    return True


def explain(written: list[Path], root: Path) -> str:
    """What to tell who has called it."""
    if not written:
        return "everything is in place already"
    names = "\n".join(str(path) for path in written)
    try:
        devices = config.names(root)
    except (OSError, NbdnfsError):
        devices = []
    first = devices[0] if devices else "swap0"
    hint = "" if devices else f"write /etc/nbdnfs/{first}.toml (see /{_EXAMPLE}), then: "
    return f"{names}\n{hint}systemctl enable --now nbdnfs@{first}"
