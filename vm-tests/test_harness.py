# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness's own parts that need no guest: the cache, and how a lost guest is reported."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from vmtest import cache, initramfs

pytestmark = pytest.mark.meta


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own."""
    monkeypatch.setenv("NBDNFS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_builds_once(cache_folder: Path) -> None:
    """Of four that ask at once, one builds and the others wait for it."""
    builds: list[Path] = []
    entries: list[Path] = []

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "file").write_text("x")

    askers = [threading.Thread(target=lambda: entries.append(cache.cached("a", "1", build))) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(10)
    assert len(builds) == 1
    assert entries == [cache_folder / "a-1"] * 4
    assert (cache_folder / "a-1/file").read_text() == "x"


def test_cache_forgets_a_build_that_failed(cache_folder: Path) -> None:
    """Nothing of an interrupted build is ever taken for a result."""

    def interrupted(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.cached("a", "1", interrupted)
    assert not (cache.cached("a", "1", lambda folder: None) / "half").exists()


def test_digest_depends_on_every_part_and_its_borders() -> None:
    """Where one part ends and the next begins counts: ab+c is not a+bc."""
    assert cache.digest("ab", "c") != cache.digest("a", "bc")
    assert cache.digest("ab", "c") == cache.digest("ab", b"c")


def test_modules_that_no_symbol_shows(tmp_path: Path) -> None:
    """ext4 cannot mount without crc32c, which modules.dep does not know: Debian's arm64 kernels have it as a module."""
    for name, text in {
        "modules.dep": "fs/ext4.ko.xz: fs/jbd2.ko.xz\nfs/jbd2.ko.xz:\ncrypto/crc32c_generic.ko.xz:\nfs/other.ko:\n",
        "modules.builtin": "kernel/drivers/virtio_blk.ko\n",
        "modules.alias": "# Aliases\nalias crypto-crc32c crc32c_generic\nalias pci:v*d* other\n",
        "modules.softdep": "# Soft dependencies\nsoftdep ext4 pre: crypto-crc32c not-here post: other\n",
    }.items():
        (tmp_path / name).write_text(text)
    found = initramfs.load_order(tmp_path, ("virtio_blk", "ext4"))
    assert [path.name for path in found] == ["jbd2.ko.xz", "crc32c_generic.ko.xz", "ext4.ko.xz"]


def test_lost_is_neither_failed_nor_passed(tmp_path: Path) -> None:
    """pytest counts a lost guest on its own, shows why, and exits as for a failure."""
    (tmp_path / "test_x.py").write_text(
        "from vmtest.outcome import LostGuestError\n"
        "def test_dies(): raise LostGuestError('it died: [panic] no more swap')\n"
        "def test_lives(): pass\n"
        "def test_fails(): assert False\n"
    )
    plugins = ["-p", "vmtest.report", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "--rootdir", tmp_path, tmp_path],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "1 failed, 1 passed, 1 lost" in done.stdout
    assert "LOST GUESTS" in done.stdout
    assert "it died: [panic] no more swap" in done.stdout
