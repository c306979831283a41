# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tiny initramfs: inside/init.c and the few modules that a guest needs to find its root.

Debian's own carries most of the kernel's modules, which an emulated CPU unpacks for a long time.
"""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path
from typing import Literal

from vmtest import cache
from vmtest.chroot import INSIDE, workspace
from vmtest.image import Image

# Not only the root's: what is loaded here is there before udev is.
_ALWAYS = ("virtio_pci", "virtio_console", "virtio_net")
_ROOT = {"disk": ("virtio_blk", "ext4"), "network": ("nfs", "nfsv3", "loop", "squashfs", "overlay")}


def initrd(image: Image, root: Literal["disk", "network"] = "disk") -> Path:
    """The initramfs for `image` and a root there, built when it is not in the cache yet."""
    key = cache.digest(image.key, root, Path(__file__).read_bytes(), (INSIDE / "init.c").read_bytes())

    def build(folder: Path) -> None:
        with workspace(image) as work:
            shutil.move(work.compile("init.c"), folder / "init")
        files = [("init", 0o100755, (folder / "init").read_bytes()), ("modules", 0o040755, b"")]
        for number, module in enumerate(load_order(image.modules, _ALWAYS + _ROOT[root])):
            files.append((f"modules/{number:02}-{module.name.split('.')[0]}.ko", 0o100644, _module_bytes(module)))
        (folder / "initrd").write_bytes(_cpio(files))

    return cache.cached(f"initrd-{image.name}-{root}", key, build) / "initrd"


def load_order(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of `names` and all they need, needs first, as modules.dep and modules.softdep say; built-in ones are
    left out."""
    needs = dict(line.split(":", 1) for line in (modules / "modules.dep").read_text().splitlines())
    files = {_name(file): file for file in needs}
    built_in = {Path(line).stem for line in (modules / "modules.builtin").read_text().splitlines()}
    wishes = _needed_unnamed(modules)
    ordered: list[str] = []

    def add(file: str) -> None:
        for need in [*needs[file].split(), *(files[name] for name in wishes.get(_name(file), ()) if name in files)]:
            if need not in ordered:
                add(need)
        if file not in ordered:
            ordered.append(file)

    for name in names:
        if name not in built_in:
            add(files[name])
    return [modules / file for file in ordered]


def _needed_unnamed(modules: Path) -> dict[str, list[str]]:
    """By module, those that it asks the kernel for by a name (ext4 for crc32c), which no symbol shows:
    "softdep ext4 pre: crypto-crc32c", modprobe.d(5)."""
    lines = (line.split() for line in (modules / "modules.alias").read_text().splitlines())
    names = {words[1]: words[-1] for words in lines if words[0] == "alias"}
    needed: dict[str, list[str]] = {}
    for line in (modules / "modules.softdep").read_text().splitlines():
        if line.startswith("softdep "):
            _, module, *words = line.partition(" post:")[0].split()
            needed[module] = [names.get(word, word.replace("-", "_")) for word in words if word != "pre:"]
    return needed


def _name(file: str) -> str:
    return Path(file).name.split(".")[0].replace("-", "_")


def _module_bytes(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def _cpio(files: list[tuple[str, int, bytes]]) -> bytes:
    """An archive in the "newc" format: Documentation/driver-api/early-userspace/buffer-format.rst."""
    archive = bytearray()
    # The kernel opens /dev/console for the first program before that program can mount anything.
    console = ("dev/console", 0o020600, b"")
    for number, (name, mode, data) in enumerate([("dev", 0o040755, b""), console, *files, ("TRAILER!!!", 0, b"")]):
        device = (5, 1) if mode & 0o170000 == 0o020000 else (0, 0)
        fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive += b"\0" * (-len(archive) % 4) + data
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)
