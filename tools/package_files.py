# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a distribution's package has besides the Python package: units, manual, completions, an example.

    PYTHONPATH=. python3 tools/package_files.py ROOT     # for example debian/nbdnfs

pkg-config says where systemd has its files and which version it is: drop-ins that an older one does not know are left
out. The package therefore depends on the release that it was built on, as its libraries do.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import completions
import manual

from nbdnfs import config_keys
from nbdnfs.commands import install_units
from nbdnfs.commands.install_units import Layout

PROGRAM = "/usr/bin/nbdnfs"
_COMPLETIONS = {
    "nbdnfs.bash": "usr/share/bash-completion/completions/nbdnfs",
    "_nbdnfs": "usr/share/zsh/vendor-completions/_nbdnfs",
    "nbdnfs.fish": "usr/share/fish/vendor_completions.d/nbdnfs.fish",
}


def _pkg_config(*words: str) -> str:
    return subprocess.check_output(["pkg-config", *words, "systemd"], text=True).strip()


def layout(systemd_folder: str) -> Layout:
    """The folders of a package, where systemd's own is for example "/usr/lib/systemd"; udev's lies beside it."""
    systemd = systemd_folder.strip("/")
    return Layout(lib="usr/lib", systemd=systemd, udev=f"{Path(systemd).parent}/udev")


def install(root: Path, systemd_folder: str, systemd_version: int) -> None:
    """Write all files below `root`."""
    for file in install_units.contents(PROGRAM, systemd_version, layout(systemd_folder)):
        _write(root / file.path, file.data, file.mode)
    for name, text in manual.pages().items():
        _write(root / f"usr/share/man/man{name[-1]}/{name}", text.encode())
    for name, text in completions.files().items():
        _write(root / _COMPLETIONS[name], text.encode())
    _write(root / "usr/share/doc/nbdnfs/examples/swap0.toml", config_keys.render_example().encode())
    (root / "etc/nbdnfs").mkdir(parents=True, exist_ok=True)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def main() -> None:
    install(Path(sys.argv[1]), _pkg_config("--variable=systemdutildir"), int(_pkg_config("--modversion").split(".")[0]))


if __name__ == "__main__":
    main()
