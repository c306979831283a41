# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest is given besides a stock Debian: the harness's programs and, installed in /usr/local, the project.

It is a small disk whose files the initramfs copies over the root at the first boot of an overlay, and the same as a
folder, `tree` beside it, for guests without a disk (diskless.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vmtest import cache, host, wheels
from vmtest.chroot import INSIDE, Workspace, workspace
from vmtest.image import Image


def payload(image: Image, *, project: bool) -> Path:
    """The payload disk for `image`, with the project as it is in the tree now or with the tools alone."""
    tools = [path for path in sorted(INSIDE.iterdir()) if path.name != "init.c"]
    key = cache.digest(
        image.key,
        Path(__file__).read_bytes(),
        *(part for path in tools for part in (path.name, path.read_bytes())),
        *(wheels.source_parts() if project else ()),
    )
    name = f"payload-{image.name}" if project else f"tools-{image.name}"
    return cache.cached(name, key, lambda folder: _build(image, project, folder)) / "payload.raw"


def _build(image: Image, project: bool, folder: Path) -> None:
    with workspace(image) as work:
        tree = work.path / "payload"
        _install_tools(work, tree)
        if project:
            wheels.install(work, wheels.build(work), tree.name)
        host.run(
            [
                *(host.find_program("mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-L", "payload"),
                *("-O", "^has_journal", "-d", tree, folder / "payload.raw", "32M"),
            ],
            what="making the payload disk",
            timeout_s=120,
        )
        shutil.copytree(tree, folder / "tree", symlinks=True)


# For a root on NFS: networkd takes the card over from the initramfs, and leaves it at its end.
_KEEP_NETWORK = "[Network]\nKeepConfiguration=yes\n"


def _install_tools(work: Workspace, tree: Path) -> None:
    for folder in ("usr/local/lib/guest", "usr/local/bin", "etc/systemd/system/sysinit.target.wants"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(work.compile("agent.c"), tree / "usr/local/lib/guest/agent")
    shutil.copy(work.compile("hog.c"), tree / "usr/local/bin/hog")
    unit = tree / "etc/systemd/system/guest-agent.service"
    shutil.copy(INSIDE / unit.name, unit)
    (unit.parent / "sysinit.target.wants" / unit.name).symlink_to(f"/etc/systemd/system/{unit.name}")
    network = tree / "etc/systemd/network/10-guest.network.d"
    network.mkdir(parents=True)
    (network / "keep.conf").write_text(_KEEP_NETWORK)
