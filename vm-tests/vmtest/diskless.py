# SPDX-License-Identifier: LGPL-2.1-or-later
"""Roots for guests without a disk: a folder on an NFS server, or squashfs images on one under an overlay in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.nfs_server import Ganesha

from nbdnfs.commands import install_units
from vmtest import cache, host
from vmtest.image import Image

_PROGRAM = "/usr/local/bin/nbdnfs"

KINDS = ("nfs", "squashfs")

# Replaces udev's own file of that name, which loads a driver for each piece of hardware: an emulated CPU takes minutes
# for it from an NFS root. The initramfs has loaded all that the guest needs.
_NO_DRIVERS = "etc/udev/rules.d/80-drivers.rules"


@dataclass(frozen=True)
class NetworkRoot:
    """What a guest boots from. One guest at a time writes to a root of the kind "nfs"; it is there after a reboot."""

    server: Ganesha
    folder: Path
    layers: Sequence[str] = ()

    def arguments(self, host_address: str) -> list[str]:
        """The kernel arguments that inside/init.c reads. The server is on the host's loopback."""
        options = (
            *("vers=3", "proto=tcp", "mountproto=tcp", "nolock", "hard"),
            *(f"addr={host_address}", f"mountaddr={host_address}"),
            *(f"port={self.server.nfs_port}", f"mountport={self.server.mount_port}"),
        )
        found = [f"guest.nfs={host_address}:{self.folder}", f"guest.nfs_options={','.join(options)}"]
        return [*found, *([f"guest.layers={':'.join(self.layers)}"] if self.layers else [])]


def export(kind: str, image: Image, payload: Path, server: Ganesha) -> NetworkRoot:
    """Put a root of one of KINDS, with the project's units, into the folder "root" of the export of `server`.

    image, payload  as a Guest has them

    Needs root, and takes some ten seconds.
    """
    host.need_root("exporting a root")
    folder = server.export_path / "root"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=server.workdir) as temporary:
        top = Path(temporary) / "top"
        shutil.copytree(payload.with_name("tree"), top, symlinks=True)
        for file in install_units.contents(_PROGRAM, install_units.systemd_version(image.root)):
            path = top / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data)
            path.chmod(file.mode)
        no_drivers = top / _NO_DRIVERS
        no_drivers.parent.mkdir(parents=True, exist_ok=True)
        no_drivers.touch()
        if kind == "nfs":
            for source in (image.root, top):
                host.run(["cp", "-a", f"{source}/.", folder], what="copying a root", timeout_s=600)
            return NetworkRoot(server, folder)
        layers = {"top.squashfs": folder / "top.squashfs", "root.squashfs": folder / "root.squashfs"}
        _squash(top, layers["top.squashfs"])
        _link(_squashed(image), layers["root.squashfs"])
        return NetworkRoot(server, folder, tuple(layers))


def _squashed(image: Image) -> Path:
    """The image's root as a squashfs image, made when it is not in the cache yet."""
    key = cache.digest(image.key, Path(__file__).read_bytes())
    name = "root.squashfs"
    return cache.cached(f"squashfs-{image.name}", key, lambda folder: _squash(image.root, folder / name)) / name


def _squash(tree: Path, target: Path) -> None:
    host.run(
        [
            *(host.find_program("mksquashfs", "squashfs-tools"), tree, target),
            *("-comp", "zstd", "-Xcompression-level", "1", "-no-progress", "-quiet"),
        ],
        what=f"making {target.name}",
        timeout_s=900,
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system
        shutil.copy(source, target)
