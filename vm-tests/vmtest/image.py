# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest image: a Debian root folder (programs are built in it, natively) and the same thing as a root disk.

Nothing of the project is in it, and nothing of the harness: what is under test arrives with the payload
(payload.py), which the initramfs (initramfs.py) copies over a stock root before systemd starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmtest import cache, host
from vmtest.architecture import Architecture, chosen, default_architecture

SUITES = ("bookworm", "trixie")

_PACKAGES = (
    # the machine
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "e2fsprogs"),
    *("iproute2", "procps", "util-linux", "strace", "cryptsetup-bin", "dmsetup"),
    # the path from the kernel's nbd to the NAS, and the kernel's own NFS to compare with
    *("nbdkit", "nbdkit-plugin-python", "python3", "python3-pyroute2", "libnbd-bin"),
    *("nfs-common", "nfs-kernel-server"),
    # what builds the project and the programs in inside/
    *("gcc", "libc6-dev", "libnfs-dev", "libsodium-dev", "nettle-dev", "pkg-config"),
    *("python3-dev", "python3-pip", "python3-setuptools", "python3-wheel"),
)

# Timers and consoles that would run in the middle of a measurement. What may be of use to a test is
# disabled, not masked.
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *(
        "e2scrub_reap.service",
        "fstrim.timer",
        "systemd-timesyncd.service",
        "getty@tty1.service",
        "serial-getty@ttyS0.service",
        "serial-getty@ttyAMA0.service",
    ),
    *("systemd-tmpfiles-clean.timer", "systemd-pcrphase.service"),
    *("systemd-pcrphase-sysinit.service",),
)
_DISABLED = ("rpcbind.service", "rpcbind.socket", "nfs-server.service", "nfs-blkmap.service")

# QEMU's user networking: the host is 10.0.2.2 and hands out 10.0.2.15 anyway.
_NETWORK = """\
[Match]
Name=e*

[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
LinkLocalAddressing=no
IPv6AcceptRA=no
"""

_DISK_SIZE = "4G"


@dataclass(frozen=True)
class Image:
    """A built image. `folder` holds `root/`, `root.raw` and `vmlinuz`; all are read-only.

    `kernel_name` is one of `architecture.kernels`.
    """

    suite: str
    kernel_name: str
    architecture: Architecture
    folder: Path

    @property
    def name(self) -> str:
        """Tells it from the other images, in names of the cache's entries and for people."""
        return _name(self.suite, self.kernel_name, self.architecture)

    @property
    def root(self) -> Path:
        """The root folder, for `chroot`. Leave nothing in it."""
        return self.folder / "root"

    @property
    def disk(self) -> Path:
        """The root file system as a raw disk: the backing file of every guest's overlay."""
        return self.folder / "root.raw"

    @property
    def kernel(self) -> Path:
        """What QEMU boots directly."""
        return self.folder / "vmlinuz"

    @property
    def key(self) -> str:
        """Stands for everything that went into the image."""
        return self.folder.name

    @property
    def modules(self) -> Path:
        """The folder of the only kernel's modules."""
        (folder,) = (self.root / "usr/lib/modules").iterdir()
        return folder


def default_suite() -> str:
    """$SUITE, or Debian 12. HarnessError for a suite that nothing is known about."""
    return chosen("SUITE", SUITES)


def default_image() -> Image:
    """The image that the environment asks for: $SUITE, $ARCH and $KERNEL."""
    return image(*_defaults())


def default_name() -> str:
    """What `default_image().name` will be, without building it."""
    return _name(*_defaults())


def _defaults() -> tuple[str, str, Architecture]:
    architecture = default_architecture()
    return default_suite(), chosen("KERNEL", tuple(architecture.kernels)), architecture


def image(suite: str, kernel: str, architecture: Architecture) -> Image:
    """The image of `suite` with one of the architecture's kernels, built when it is not in the cache yet.

    Needs root, and takes some two minutes; a quarter of an hour for another architecture than the host's.
    """
    key = cache.digest(suite, architecture.name, architecture.kernels[kernel], Path(__file__).read_bytes())
    name = f"image-{_name(suite, kernel, architecture)}"
    found = cache.cached(name, key, lambda folder: _build(suite, kernel, architecture, folder))
    return Image(suite, kernel, architecture, found)


def _name(suite: str, kernel: str, architecture: Architecture) -> str:
    return f"{suite}-{architecture.name}-{kernel}"


def _build(suite: str, kernel: str, architecture: Architecture, folder: Path) -> None:
    host.need_root("building a guest image")
    architecture.need_to_run_programs()
    mmdebstrap = host.find_program("mmdebstrap", "mmdebstrap")
    mke2fs = host.find_program("mke2fs", "e2fsprogs")
    root = folder / "root"
    # It mounts /proc, /sys and /dev in the folder. In a mount namespace of its own, nothing stays mounted, and
    # nothing of the host's is removed with the folder, when it is killed half-way.
    host.run(
        [
            *(host.find_program("unshare", "util-linux"), "--mount", mmdebstrap),
            "--variant=minbase",
            f"--architectures={architecture.name}",
            f"--include={','.join((architecture.kernels[kernel], *_PACKAGES))}",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            suite,
            root,
        ],
        what=f"installing Debian {suite} in a folder",
        timeout_s=3600,
    )
    _configure(root)
    (file,) = (root / "boot").glob("vmlinuz-*")
    file.rename(folder / "vmlinuz")
    for initrd in (root / "boot").glob("initrd*"):
        initrd.unlink()
    host.run(
        [mke2fs, "-q", "-t", "ext4", "-L", "root", "-d", root, folder / "root.raw", _DISK_SIZE],
        what="making the root disk",
        timeout_s=600,
    )


def _configure(root: Path) -> None:
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost guest\n10.0.2.2 nas\n")
    # Empty, not missing: a missing one would mean "first boot" to systemd, which presets every unit then.
    (root / "etc/machine-id").write_text("")
    (root / "etc/systemd/network/10-guest.network").write_text(_NETWORK)
    host.run(["chroot", root, "passwd", "-q", "-d", "root"], what="opening root's account", timeout_s=60)
    for verb, units in (("enable", ("systemd-networkd.service",)), ("disable", _DISABLED), ("mask", _MASKED)):
        host.run(["chroot", root, "systemctl", verb, *units], what=f"systemctl {verb}", timeout_s=60)
