# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs install-units` and `uninstall-units`: the files of systemd/, on this machine or in the root of an image.

All but the example go to /usr/local/lib, where systemd looks for units that the administrator installed but did not
write: /etc stays free for `systemctl edit` and other overrides. A list of the installed files, with checksums, shows
whether a file was changed since; then nothing at all is written or removed.

A distribution's package has the same files elsewhere: tools/package_files.py installs them with a `Layout` of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbdnfs
from nbdnfs import config, config_keys, programs
from nbdnfs.errors import BusyError, CannotCreateError, ConfigError, NbdnfsError, PermissionDeniedError
from nbdnfs.kernel import state as kernel_state

_LIB = "usr/local/lib"
_LIST = f"{_LIB}/nbdnfs/installed.sha256"
# Stand in the files of systemd/ for the program that they start, and for the folder of its scripts.
_PROGRAM = "/usr/local/bin/nbdnfs"
_SCRIPTS = "/usr/local/lib/nbdnfs"
_UNIT = "nbdnfs@.service"
_TIMER = "nbdnfs-metrics.timer"
_RELOAD_TIMEOUT_S = 90.0
_SYSTEMD_SYSCTL = (Path("/usr/lib/systemd/systemd-sysctl"), Path("/lib/systemd/systemd-sysctl"))
# Drop-ins with settings that only later versions of systemd know: older ones would warn at each start.
_DROP_INS_SINCE = (254, 255)
# Where a distribution's package has its units.
_PACKAGED = ("usr/lib/systemd/system", "lib/systemd/system")
_ENABLED = "etc/systemd/system"
# Folders that stay, even empty.
_KEPT = frozenset({_LIB, "etc", _ENABLED})


@dataclass(frozen=True)
class Layout:
    """The folders that the files go to, below the root: systemd's units and generators, udev's rules, and the rest."""

    lib: str = _LIB
    systemd: str = f"{_LIB}/systemd"
    udev: str = f"{_LIB}/udev"

    def paths(self, systemd_version: int) -> dict[str, str]:
        """File of systemd/ ▸ where it is installed, for a version of systemd."""
        unit = f"{self.systemd}/system/{_UNIT}"
        found = {
            _UNIT: unit,
            "nbdnfs-start-timeout@.service": f"{self.systemd}/system/nbdnfs-start-timeout@.service",
            "nbdnfs.slice": f"{self.systemd}/system/nbdnfs.slice",
            "nbdnfs-metrics.service": f"{self.systemd}/system/nbdnfs-metrics.service",
            _TIMER: f"{self.systemd}/system/{_TIMER}",
            "nbdnfs-generator": f"{self.systemd}/system-generators/nbdnfs-generator",
            "reserve": f"{self.lib}/nbdnfs/reserve",
            "no-pressure": f"{self.lib}/nbdnfs/no-pressure",
            "pace": f"{self.lib}/nbdnfs/pace",
            "start-timeout": f"{self.lib}/nbdnfs/start-timeout",
            "modules-load.conf": f"{self.lib}/modules-load.d/nbdnfs.conf",
            "sysctl.conf": f"{self.lib}/sysctl.d/60-nbdnfs.conf",
            "tmpfiles.conf": f"{self.lib}/tmpfiles.d/nbdnfs.conf",
            "udev.rules": f"{self.udev}/rules.d/59-nbdnfs.rules",
        }
        for since in _DROP_INS_SINCE:
            if systemd_version >= since:
                found[f"{_UNIT}-{since}.conf"] = f"{unit}.d/50-systemd-{since}.conf"
        return found


LOCAL = Layout()
# As a merged /usr shows it, whatever the package calls it.
PACKAGE = Layout(lib="usr/lib", systemd="usr/lib/systemd", udev="usr/lib/udev")
_EXAMPLE = "etc/nbdnfs/example.toml.disabled"
_EXECUTABLE = frozenset({"nbdnfs-generator", "reserve", "no-pressure", "pace", "start-timeout"})


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


def run_uninstall(args: argparse.Namespace) -> int:
    """Remove, and print what was removed. Errors as `uninstall`."""
    removed = uninstall(args.root, force=args.force)
    print("\n".join(str(path) for path in removed) or "nothing is installed")
    return 0


def install(root: Path = Path("/"), *, program: str | None = None, force: bool = False) -> list[Path]:
    """Install all files below `root`, and return the paths of those that were written: none when all were up to date.

    `program` is the absolute path of what the units start; by default, of the running nbdnfs. Files that an earlier
    version installed and this one does not have are removed. On this machine, systemd reloads its units, and the kernel
    settings are applied.

    ConfigError: without `force`, a file was changed since its installation; nothing has been written. Also where
    `program` cannot stand in a unit, where a distribution's package has units already, and where this installation has
    none. PermissionDeniedError, CannotCreateError: a file cannot be read or written.
    """
    if (packaged := packaged_unit(root)) is not None:
        raise ConfigError(
            f"the units of the package nbdnfs are installed: {packaged}",
            "there is nothing to do; for the units of another nbdnfs, first remove the package",
        )
    files = contents(_running_program() if program is None else program, systemd_version(root))
    before = _read_list(root)
    _refuse_changed(root, {*before, *(file.path for file in files)}, files, before, force, "install-units")
    try:
        written = [root / file.path for file in files if _write(root, file)]
        for path in before.keys() - {file.path for file in files}:
            _remove(root, path)
        _write(root, File(_LIST, _render_list(files)))
    except OSError as error:
        raise _not_written(error) from None
    if written and _is_running_system(root):
        _put_into_force()
    return written


def _put_into_force() -> None:
    """Have systemd know the units, and the kernel the settings of sysctl.conf, or what the administrator's own files
    say instead."""
    _reload()
    keys = re.findall(r"^-?([a-z0-9_.]+) *=", (_source_folder() / "sysctl.conf").read_text(), re.MULTILINE)
    for program in (path for path in _SYSTEMD_SYSCTL if path.exists()):
        prefixes = [f"--prefix=/{key.replace('.', '/')}" for key in keys]
        try:
            programs.run([str(program), *prefixes], what="setting vm.* as sysctl.d says", timeout_s=_RELOAD_TIMEOUT_S)
        except NbdnfsError as error:  # in a container: the next boot does it, or the host
            print(f"nbdnfs: {error.message}; see: nbdnfs doctor", file=sys.stderr)
        return


def uninstall(root: Path = Path("/"), *, force: bool = False) -> list[Path]:
    """Remove what `install` installed below `root`, and return the paths. On this machine, systemd reloads its units.

    Folders go if they are empty then, and so do the links of enabled devices, unless a package has units that they may
    mean. Files that are missing already are passed over.

    BusyError: a device is up, and no package has units for it. ConfigError: without `force`, a file was changed since
    its installation; nothing has been removed. PermissionDeniedError, CannotCreateError as `install`.
    """
    before = _read_list(root)
    packaged = packaged_unit(root)
    if before and packaged is None:
        _refuse_devices(root)
    _refuse_changed(root, before, [], before, force, "uninstall-units")
    links = _enabled_links(root) if before and packaged is None else []
    if links and _is_running_system(root):
        _stop_timer()
    try:
        removed = [root / path for path in sorted(before) if _remove(root, path)]
        removed += [link for link in links if _remove(root, str(link.relative_to(root)))]
        if _remove(root, _LIST):
            removed.append(root / _LIST)
    except OSError as error:
        raise _not_written(error) from None
    if removed and _is_running_system(root):
        _reload()
    return removed


def _stop_timer() -> None:
    """Which would otherwise start a unit every minute that is no longer there."""
    systemctl = programs.find_program("systemctl", "systemd")
    with contextlib.suppress(NbdnfsError):  # it does not run
        programs.run([systemctl, "stop", _TIMER], what=f"stopping {_TIMER}", timeout_s=_RELOAD_TIMEOUT_S)


def is_shadowing_package(root: Path = Path("/")) -> bool:
    """Whether a package has units, and others are in /usr/local, which systemd takes instead."""
    return packaged_unit(root) is not None and (root / LOCAL.paths(0)[_UNIT]).exists()


def is_installed(name: str, root: Path = Path("/")) -> bool:
    """Whether a file of systemd/ is in its place, by `install` or by a package."""
    return any((root / layout.paths(0)[name]).exists() for layout in (LOCAL, PACKAGE))


def packaged_unit(root: Path = Path("/")) -> Path | None:
    """The unit of a distribution's package; None where there is none."""
    candidates = (root / folder / _UNIT for folder in _PACKAGED)
    return next((path for path in candidates if path.exists()), None)


def differing(root: Path = Path("/")) -> list[str] | None:
    """The installed files, below `root`, that are not those of this version, and those that are missing; None where
    nothing is installed. The example does not count, nor drop-ins that a package lacks: it has those of its release.

    Files in /usr/local are looked at before those of a package, as systemd does.

    ConfigError: this installation has no units. PermissionDeniedError: a file cannot be read.
    """
    unit, layout = _read(root / LOCAL.paths(0)[_UNIT]), LOCAL
    if unit is None and (packaged := packaged_unit(root)) is not None:
        unit, layout = _read(packaged), PACKAGE
    if unit is None:
        return None
    started = re.search(rb"^ExecStart=(\S+) run %i", unit, re.MULTILINE)
    program = started[1].decode(errors="replace") if started else _PROGRAM
    wanted = {
        file.path: file.data for file in contents(program, systemd_version(root), layout) if file.path != _EXAMPLE
    }
    found = {path: _read(root / path) for path in wanted}
    lacking = {path for path in wanted if layout == PACKAGE and f"{_UNIT}.d/" in path and found[path] is None}
    return [f"/{path}" for path, data in wanted.items() if found[path] != data and path not in lacking]


def contents(program: str, systemd: int, layout: Layout = LOCAL) -> list[File]:
    """The files for a program and a version of systemd, the example last. ConfigError: a unit cannot name the program.

    Of a package (another `layout`) there is no example: /etc is for what it may not replace.
    """
    if not re.fullmatch(r"/[A-Za-z0-9/._+@-]+", program):
        raise ConfigError(
            f"'{program}' cannot be named in a unit", "install nbdnfs in a directory without spaces in its path"
        )
    found = []
    for name, path in layout.paths(systemd).items():
        data = (_source_folder() / name).read_bytes()
        data = data.replace(_PROGRAM.encode(), program.encode())
        data = data.replace(_SCRIPTS.encode(), f"/{layout.lib}/nbdnfs".encode())
        found.append(File(path, data, 0o755 if name in _EXECUTABLE else 0o644))
    return [*found, File(_EXAMPLE, config_keys.render_example().encode())] if layout == LOCAL else found


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


def _refuse_changed(
    root: Path, paths: Iterable[str], files: Iterable[File], before: dict[str, str], force: bool, command: str
) -> None:
    changed = [] if force else [path for path in sorted(paths) if _is_changed(root, path, files, before)]
    if changed:
        raise ConfigError(
            f"{', '.join(str(root / path) for path in changed)}: changed since nbdnfs installed it",
            f"keep your changes in /etc (systemctl edit), then: nbdnfs {command} --force",
        )


def _is_changed(root: Path, path: str, files: Iterable[File], before: dict[str, str]) -> bool:
    """Whether the file exists, and is neither what was installed last nor what is to be installed."""
    data = _read(root / path)
    return (
        data is not None
        and _digest(data) != before.get(path)
        and not any(file.path == path and file.data == data for file in files)
    )


def _refuse_devices(root: Path) -> None:
    """A device that is up needs its unit: without it, systemd cannot turn swap off before the network goes down."""
    up = [device for device in kernel_state.nbd_devices(root) if (device.backend or "").startswith("nbdnfs:")]
    if up:
        name = (up[0].backend or "").removeprefix("nbdnfs:")
        raise BusyError(f"the device {name} is up", f"first: nbdnfs down {name}")


def _enabled_links(root: Path) -> list[Path]:
    """The links that `systemctl enable` of a device, or of the timer, made."""
    # not Path.glob with a whole name: it follows the link, which points to where it will be on the machine
    found = (path for path in (root / _ENABLED).glob("*.wants/nbdnfs*") if path.is_symlink())
    return sorted(path for path in found if path.name == _TIMER or path.match("nbdnfs@*.service"))


def _remove(root: Path, path: str) -> bool:
    """Remove a file, and the folders that are empty then. False: there was no such file."""
    try:
        (root / path).unlink()
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):  # not empty
        for folder in itertools.takewhile(lambda parent: str(parent) not in _KEPT, Path(path).parents):
            (root / folder).rmdir()
    return True


def _not_written(error: OSError) -> NbdnfsError:
    kind = PermissionDeniedError if isinstance(error, PermissionError) else CannotCreateError
    return kind(f"cannot write {error.filename}: {error.strerror}", "run it as root, or with --root DIR")


def _is_running_system(root: Path) -> bool:
    return root == Path("/") and Path("/run/systemd/system").is_dir()


def _reload() -> None:
    systemctl = programs.find_program("systemctl", "systemd")
    programs.run([systemctl, "daemon-reload"], what="systemctl daemon-reload", timeout_s=_RELOAD_TIMEOUT_S)


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
