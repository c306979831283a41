# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a worker is started: nbdkit's command line, its environment, and whether this nbdkit can run the plugin."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbdnfs
from nbdnfs import defaults, nfs_url, programs
from nbdnfs.errors import ConfigError, NbdnfsError, UnavailableError
from nbdnfs.nas import owner_record
from nbdnfs.worker import protocol

log = logging.getLogger(__name__)


def serve_argv(plugin_settings: Mapping[str, str], *, threads: int = defaults.THREADS) -> list[str]:
    """The command of a worker in the foreground, on a listening socket that it inherits (sd_listen_fds(3))."""
    return [_program(), "--foreground", "--exit-with-parent", *_arguments(plugin_settings, threads)]


def standby_command(plugin_settings: Mapping[str, str], *, threads: int) -> tuple[str, list[str]]:
    """The program and the arguments of a keeper's worker: it serves one connection, and waits to be activated.

    UnavailableError or ConfigError where nbdkit or the plugin is missing.
    """
    inherited = {"region_fd": str(protocol.REGION_FD), "control_fd": str(protocol.CONTROL_FD)}
    arguments = _arguments({**plugin_settings, **inherited}, threads)
    return _program(), [protocol.PROCESS_NAME, "--single", "--log=stderr", *arguments]


def _program() -> str:
    return programs.find_program("nbdkit", "nbdkit")


def _arguments(plugin_settings: Mapping[str, str], threads: int) -> list[str]:
    settings = (f"{key}={value}" for key, value in plugin_settings.items())
    return [f"--threads={threads}", "python", str(plugin_path()), *settings]


def worker_environment() -> dict[str, str]:
    """The environment in which nbdkit's Python finds this very package, and writes nothing to the disk.

    LD_BIND_NOW (ld.so(8)): the linker looks a function up at its first call otherwise, in the tables of all libraries,
    which are not in locked memory. A standby makes some of its first calls when it takes over.

    LC_ALL: nbdkit's Python takes UTF-8 from the locale, and from no variable. The worker leaves it when it has started:
    memlock.use_locale_c().
    """
    inherited = programs.python_environment()
    paths = [inherited["PYTHONPATH"]]
    reference = importlib.util.find_spec("libnfs")
    if reference is not None and reference.origin is not None:
        paths.append(str(Path(reference.origin).parents[1]))
    return {
        **inherited,
        "LC_ALL": "C.UTF-8",
        "LD_BIND_NOW": "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONMALLOC": "malloc",
    }


def plugin_path() -> Path:
    """The plugin: in the installed package, or beside it in a checkout. ConfigError where it is missing."""
    package = Path(nbdnfs.__file__).parent
    for folder in (package, package.parent):
        path = folder / "plugin" / "nbdnfs_plugin.py"
        if path.exists():
            return path
    raise ConfigError("nbdnfs_plugin.py is missing from this installation", "install the package nbdnfs again")


def check_nbdkit(version_info: Sequence[int] = sys.version_info[:2]) -> None:
    """Check that nbdkit has its Python plugin, with a Python that can load ours. UnavailableError or ConfigError.

    A Python of another minor version than this one works, because the extension uses the limited API of 3.11: that is a
    warning.
    """
    program = _program()
    try:
        dump = programs.run(
            [program, "python", "--dump-plugin"],
            what="asking nbdkit for its Python plugin",
            env=programs.python_environment(),
        )
    except NbdnfsError:
        raise UnavailableError(
            "nbdkit has no Python plugin", "install it (Debian: apt install nbdkit-plugin-python)"
        ) from None
    fields = dict(line.split("=", 1) for line in dump.splitlines() if "=" in line)
    embedded = fields.get("python_version", "")
    embedded_info = tuple(int(word) for word in embedded.split(".")[:2] if word.isdigit())
    if len(embedded_info) < 2 or embedded_info < (3, 11):
        raise ConfigError(
            f"nbdkit embeds Python {embedded or 'of unknown version'}; nbdnfs needs 3.11 or newer",
            "use nbdkit of Debian 12 or newer",
        )
    if embedded_info != tuple(version_info[:2]):
        log.warning(
            "nbdkit embeds Python %s, this is Python %s.%s: make the venv with /usr/bin/python3 -m venv",
            embedded,
            *version_info[:2],
        )


def owner_settings(text: str) -> dict[str, str]:
    """The plugin's settings for a file that this machine has claimed; `text` is its URL."""
    return owner_record.plugin_settings(nfs_url.parse(text).name, owner_record.boot_id())
