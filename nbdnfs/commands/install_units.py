# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs install-units`: installs the files of systemd/, on this machine or in the root directory of an image.

All but the example go to /usr/local/lib, where systemd looks for units that the administrator installed but did not
write: /etc stays free for `systemctl edit` and other overrides. A list of the installed files, with checksums, shows
whether a file was changed since; then nothing at all is written.
"""

from __future__ import annotations

import argparse
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
# Stands in the units and scripts for the program that they start.
_PROGRAM = "/usr/local/bin/nbdnfs"
_RELOAD_TIMEOUT_S = 90.0
_SYSTEMD_SYSCTL = (Path("/usr/lib/systemd/systemd-sysctl"), Path("/lib/systemd/systemd-sysctl"))

# File of systemd/ ▸ where it is installed.
_FILES = {
    "nbdnfs@.service": f"{_LIB}/systemd/system/nbdnfs@.service",
    "nbdnfs.slice": f"{_LIB}/systemd/system/nbdnfs.slice",
    "nbdnfs-generator": f"{_LIB}/systemd/system-generators/nbdnfs-generator",
    "reserve": f"{_LIB}/nbdnfs/reserve",
    "pace": f"{_LIB}/nbdnfs/pace",
    "modules-load.conf": f"{_LIB}/modules-load.d/nbdnfs.conf",
    "sysctl.conf": f"{_LIB}/sysctl.d/60-nbdnfs.conf",
    "tmpfiles.conf": f"{_LIB}/tmpfiles.d/nbdnfs.conf",
    "udev.rules": f"{_LIB}/udev/rules.d/59-nbdnfs.rules",
}
# Drop-ins with settings that only later versions of systemd know: older ones would warn at each start.
_SINCE = {
    254: ("nbdnfs@.service-254.conf", f"{_LIB}/systemd/system/nbdnfs@.service.d/50-systemd-254.conf"),
    255: ("nbdnfs@.service-255.conf", f"{_LIB}/systemd/system/nbdnfs@.service.d/50-systemd-255.conf"),
}
_EXAMPLE = "etc/nbdnfs/example.toml.disabled"
_EXECUTABLE = frozenset({"nbdnfs-generator", "reserve", "pace"})


@dataclass(frozen=True)
class File:
    """One file to install: its path below the root, its content, its permission bits."""

    path: str
    data: bytes
    mode: int = 0o644


def run(args: argparse.Namespace) -> int:
    """Install, and print what was written and what to do next. Errors as `install`."""
    print(report(install(args.root, program=args.program, force=args.force), args.root))
    return 0


def install(root: Path = Path("/"), *, program: str | None = None, force: bool = False) -> list[Path]:
    """Install all files below `root`, and return the paths of those that were written: none when all were up to date.

    `program` is the absolute path of what the units start; by default, of the running nbdnfs. Files that an earlier
    version installed and this one does not have are removed. On this machine, systemd reloads its units, and the kernel
    settings are applied.

    ConfigError: without `force`, a file was changed since its installation; nothing has been written. Also where
    `program` cannot stand in a unit, and where this installation has no units. PermissionDeniedError,
    CannotCreateError: a file cannot be read or written.
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
        _put_into_force()
    return written


def _put_into_force() -> None:
    """Have systemd know the units, and the kernel the settings of sysctl.conf, or what the administrator's own files
    say instead."""
    systemctl = programs.find_program("systemctl", "systemd")
    programs.run([systemctl, "daemon-reload"], what="systemctl daemon-reload", timeout_s=_RELOAD_TIMEOUT_S)
    keys = re.findall(r"^-?([a-z0-9_.]+) *=", (_source_folder() / "sysctl.conf").read_text(), re.MULTILINE)
    for program in (path for path in _SYSTEMD_SYSCTL if path.exists()):
        prefixes = [f"--prefix=/{key.replace('.', '/')}" for key in keys]
        try:
            programs.run([str(program), *prefixes], what="setting vm.* as sysctl.d says", timeout_s=_RELOAD_TIMEOUT_S)
        except NbdnfsError as error:  # in a container: the next boot does it, or the host
            print(f"nbdnfs: {error.message}; see: nbdnfs doctor", file=sys.stderr)
        return


def differing(root: Path = Path("/")) -> list[str] | None:
    """The installed files, below `root`, that are not those of this version, and those that are missing; None where
    nothing is installed. The example does not count.

    ConfigError: this installation has no units. PermissionDeniedError: a file cannot be read.
    """
    unit = _read(root / _FILES["nbdnfs@.service"])
    if unit is None:
        return None
    started = re.search(rb"^ExecStart=(\S+) run %i", unit, re.MULTILINE)
    program = started[1].decode(errors="replace") if started else _PROGRAM
    wanted = [file for file in contents(program, systemd_version(root)) if file.path != _EXAMPLE]
    return [f"/{file.path}" for file in wanted if _read(root / file.path) != file.data]


def contents(program: str, systemd: int) -> list[File]:
    """The files for a program and a version of systemd. ConfigError: a unit cannot name the program."""
    if not re.fullmatch(r"/[A-Za-z0-9/._+@-]+", program):
        raise ConfigError(
            f"'{program}' cannot be named in a unit", "install nbdnfs in a directory without spaces in its path"
        )
    chosen = {**_FILES, **dict(entry for since, entry in _SINCE.items() if systemd >= since)}
    found = []
    for name, path in chosen.items():
        data = (_source_folder() / name).read_bytes().replace(_PROGRAM.encode(), program.encode())
        found.append(File(path, data, 0o755 if name in _EXECUTABLE else 0o644))
    return [*found, File(_EXAMPLE, config_keys.render_example().encode())]


def systemd_version(root: Path = Path("/")) -> int:
    """The version of the systemd that is installed below `root`, from the name of its private library; 0 for none."""
    folders = ("usr/lib/systemd", "usr/lib/*/systemd", "usr/lib64/systemd", "lib/systemd")
    libraries = (path.name for folder in folders for path in root.glob(f"{folder}/libsystemd-shared-*.so"))
    versions = (re.match(r"libsystemd-shared-(\d+)", name) for name in libraries)
    return max((int(match[1]) for match in versions if match), default=0)


def _source_folder() -> Path:
    """The directory of the files: in the installed package, or beside it in a checkout. ConfigError: neither."""
    package = Path(nbdnfs.__file__).parent
    for folder in (package / "systemd", package.parent / "systemd"):
        if (folder / "nbdnfs@.service").exists():
            return folder
    raise ConfigError("the systemd units are missing from this installation", "install the package nbdnfs again")


def _running_program() -> str:
    """The path of the running command `nbdnfs`, or of that of the running Python. ConfigError: there is none."""
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
    """Path ▸ checksum of what was installed last. The file is as sha256sum(1) writes it in the root directory."""
    lines = (_read(root / _LIST) or b"").decode(errors="replace").splitlines()
    pairs = (line.split("  ", 1) for line in lines)
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2 and not re.search(r"(^|/)\.\.(/|$)|^/", pair[1])}


def _render_list(files: Iterable[File]) -> bytes:
    return "".join(f"{_digest(file.data)}  {file.path}\n" for file in files).encode()


def _is_changed(root: Path, path: str, files: Iterable[File], before: dict[str, str]) -> bool:
    """Whether the file exists, and is neither what was installed last nor what is to be installed."""
    data = _read(root / path)
    return (
        data is not None
        and _digest(data) != before.get(path)
        and not any(file.path == path and file.data == data for file in files)
    )


def _write(root: Path, file: File) -> bool:
    """Write the whole file or nothing. False: it was up to date."""
    path = root / file.path
    if _read(path) == file.data and path.stat().st_mode & 0o777 == file.mode:
        return False
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(file.data)
    new.chmod(file.mode)
    new.rename(path)
    return True


def report(written: list[Path], root: Path) -> str:
    """The text for the user: what was written, and the command that starts a device."""
    if not written:
        return "everything is already installed"
    names = "\n".join(str(path) for path in written)
    try:
        devices = config.names(root)
    except (OSError, NbdnfsError):
        devices = []
    first = devices[0] if devices else "swap0"
    hint = "" if devices else f"write /etc/nbdnfs/{first}.toml (see /{_EXAMPLE}), then: "
    return f"{names}\n{hint}systemctl enable --now nbdnfs@{first}"
