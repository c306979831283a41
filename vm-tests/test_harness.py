# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness's own parts that need no guest: the cache, and how a lost guest is reported."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from vmtest import cache, initramfs
from vmtest.architecture import ARCHITECTURES
from vmtest.guest import Guest
from vmtest.image import Image
from vmtest.outcome import GuestFailedError, HungBootWarning, LostGuestError

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


# Writes what the kernel would log, says READY for the agent if it is told to, and stays until it is killed.
_FAKE_QEMU = """\
import os, signal, sys
log, said, channel, is_there = sys.argv[1:]
open(log, "w").write(said)
if is_there == "True":
    os.write(int(channel), b"READY boot\\n")
signal.pause()
"""
_HUNG = "[   99.0] INFO: task systemd:1 blocked for more than 60 seconds."


class FakeGuest(Guest):
    """With a fake of QEMU, whose first boots log `hung` and go no further."""

    def __init__(self, workdir: Path, *, hung_boots: int, **options: object) -> None:
        (workdir / "disk").write_bytes(bytes(1 << 20))
        image = FakeImage("none", "none", ARCHITECTURES["amd64"], workdir)
        super().__init__(image, workdir / "payload", workdir, **options)  # type: ignore[arg-type]
        self.hung_boots = hung_boots

    def _qemu(self, channel_fd: int) -> list[str | Path]:
        hangs = self._boots <= self.hung_boots
        log = "\n".join(["first", _HUNG, *["trace"] * 30, "last"]) if hangs else "fine"
        return [sys.executable, "-c", _FAKE_QEMU, self.kernel_log_path, log, str(channel_fd), str(not hangs)]


class FakeImage(Image):
    """Nothing but a disk."""

    disk = property(lambda self: self.folder / "disk")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the kernel log all the time, and do not wait for what a lost guest logs."""
    monkeypatch.setattr("vmtest.guest._BOOT_LOOK_S", 0.0)
    monkeypatch.setattr("vmtest.guest._SYSRQ_QUIET_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_boot_that_hangs_is_tried_again(tmp_path: Path) -> None:
    """Once, from a new disk, with a warning that has the kernel's finding and the end of its log."""
    guest = FakeGuest(tmp_path, hung_boots=1)
    with pytest.warns(HungBootWarning) as warned:
        guest.boot()
    assert guest.channel.boot_id == "boot"
    assert guest.kernel_log == "fine"
    guest.crash()
    text = str(warned[0].message)
    assert text.startswith(f"one more try: guest hangs as it boots: {_HUNG}")
    assert "first\n" not in text
    assert text.endswith("last")
    assert (tmp_path / "guest.1.kernel.log").exists()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("hung_boots", "options"), [(2, {}), (1, {"arguments": ("nbdnfs=nfs://nas/export/box.swap",)})]
)
def test_a_boot_that_hangs_is_lost(tmp_path: Path, hung_boots: int, options: dict[str, object]) -> None:
    """The second time, and where the project may have a part in it."""
    guest = FakeGuest(tmp_path, hung_boots=hung_boots, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HungBootWarning)
        with pytest.raises(LostGuestError, match="hangs as it boots") as caught, guest:
            pass
    assert f"kernel.log:\n{_HUNG}\ntrace" in caught.value.__notes__[0]
    assert guest._boots == hung_boots


@pytest.mark.usefixtures("impatient")
def test_the_note_of_a_failure_has_the_end_of_the_log(tmp_path: Path) -> None:
    """Also where the kernel has complained of nothing."""
    guest = FakeGuest(tmp_path, hung_boots=0)
    guest.boot()
    guest.kernel_log_path.write_text("\n".join(str(number) for number in range(100)))
    error = GuestFailedError()
    guest.__exit__(GuestFailedError, error, None)
    assert error.__notes__[0].splitlines()[1:] == [str(number) for number in range(75, 100)]


@pytest.mark.usefixtures("impatient")
def test_a_later_boot_that_hangs_is_lost(tmp_path: Path) -> None:
    """Its disk has what the test has done."""
    guest = FakeGuest(tmp_path, hung_boots=0)
    with guest:
        guest.hung_boots = 2
        guest.crash()
        with pytest.raises(LostGuestError, match="hangs as it boots"):
            guest.boot()
        guest.allow = frozenset({"hung"})
    assert guest._boots == 2
