# SPDX-License-Identifier: LGPL-2.1-or-later
"""What %H, %m, %M and %u stand for: the same at each boot, a machine's own, or refused with what to use instead."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdnfs import nfs_url, specifiers
from nbdnfs.errors import UnavailableError, UsageError
from nbdnfs.keeper import failures

MACHINE_ID = "3d1219c7c4c5404aaa1f6d2a48adfda4"
FILE_ID = "b9e750d45d3b47a2b82a46fe5dd6e8df"
MAC = "3c:fd:fe:12:34:5a"
UUID = "4c4c4544-0038-4a10-8051-b3c04f4d3533"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine that booted from disk: two interfaces, one of which has the default route, and a product UUID."""
    write(tmp_path, "etc/machine-id", f"{MACHINE_ID}\n")
    write(tmp_path, "proc/cmdline", "root=/dev/sda1 quiet\n")
    write(tmp_path, "proc/self/mountinfo", mount_line("/", "ext4"))
    write(tmp_path, "proc/net/route", route("Iface", "Destination", "Mask", "Metric") + route("eno1", metric="100"))
    interface(tmp_path, "eno1", MAC)
    interface(tmp_path, "eno2", "3c:fd:fe:12:34:5b")
    write(tmp_path, "sys/class/dmi/id/product_uuid", UUID.upper() + "\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def mount_line(place: str, kind: str) -> str:
    """proc_pid_mountinfo(5)"""
    return f"23 1 0:21 / {place} rw shared:1 - {kind} none rw\n"


def route(name: str, destination: str = "00000000", mask: str = "00000000", metric: str = "0") -> str:
    return f"{name}\t{destination}\t0102000A\t0003\t0\t0\t{metric}\t{mask}\t0\t0\t0\n"


def interface(root: Path, name: str, address: str, assigned: str = "0") -> None:
    write(root, f"sys/class/net/{name}/address", f"{address}\n")
    write(root, f"sys/class/net/{name}/addr_assign_type", f"{assigned}\n")
    write(root, f"sys/class/net/{name}/device/vendor", "")


def name_in(root: Path, text: str) -> str:
    return nfs_url.parse(f"nfs://nas/export/{text}.swap", root).name


def refused(root: Path, text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        nfs_url.parse(f"nfs://nas/export/{text}.swap", root)
    return caught.value


# %m


def test_the_machine_id_is_hashed_as_systemd_hashes_it(root: Path) -> None:
    """No part of the id is in the name: machine-id(5) calls it confidential. systemd-id128 finds the file."""
    assert name_in(root, "%m") == f"{FILE_ID}.swap"
    if Path("/usr/bin/systemd-id128").exists() and (own := Path("/etc/machine-id")).exists() and own.read_text():
        command = ["systemd-id128", "machine-id", f"--app-specific={specifiers.APPLICATION_ID}"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        assert specifiers._for_the_application(own.read_text().strip()) == answer.stdout.strip()


@pytest.mark.parametrize("kind", ["ext4", "nfs", "btrfs"])
def test_a_disk_keeps_the_machine_id(root: Path, kind: str) -> None:
    """Wherever else tmpfs is mounted."""
    write(root, "proc/self/mountinfo", mount_line("/", kind) + mount_line("/run", "tmpfs"))
    assert name_in(root, "%m") == f"{FILE_ID}.swap"


@pytest.mark.parametrize(
    "mounts",
    [
        mount_line("/", "ext4") + mount_line("/etc/machine-id", "tmpfs"),
        mount_line("/", "overlay"),
        mount_line("/", "rootfs"),
        mount_line("/", "nfs") + mount_line("/etc", "tmpfs"),
    ],
    ids=["in /run", "overlay", "initramfs", "/etc in memory"],
)
def test_an_id_of_this_boot_is_refused(root: Path, mounts: str) -> None:
    """It would be a new file at each boot; the kernel command line's id, and an image's own, are not of this boot."""
    write(root, "proc/self/mountinfo", mounts)
    error = refused(root, "%m")
    assert "gets a new id at each boot" in error.message
    assert "%M" in error.hint
    assert "%u" in error.hint
    write(root, "proc/cmdline", f"quiet systemd.machine_id={MACHINE_ID}\n")
    assert name_in(root, "%m") == f"{FILE_ID}.swap"


def test_an_id_that_the_image_brought_along(root: Path) -> None:
    """It is older than the boot: the same at each one. Its clones are told apart by the owner record."""
    write(root, "proc/self/mountinfo", mount_line("/", "overlay"))
    before = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - 3600
    os.utime(root / "etc/machine-id", (before, before))
    assert name_in(root, "%m") == f"{FILE_ID}.swap"


NTP_STEP_S = 400 * 86400.0
DAY_S = 86400.0


@pytest.fixture
def clockless(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A board without a clock, whose root is an overlay: it boots at the time of systemd's build, 400 days ago, which
    is when PID 1 has made its file in /run. The function sets the clock, so much back from now."""
    write(root, "proc/self/mountinfo", mount_line("/", "overlay"))
    write(root, "run/systemd/inaccessible/reg", "")
    real = time.time
    early_s = real() - NTP_STEP_S
    os.utime(root / "run/systemd/inaccessible/reg", (early_s, early_s))
    return lambda back_s: monkeypatch.setattr(time, "time", lambda: real() - back_s)


@pytest.mark.parametrize("back_s", [NTP_STEP_S, 0.0], ids=["before NTP", "after NTP"])
def test_an_images_id_on_a_board_without_a_clock(root: Path, clockless: Callable[[float], None], back_s: float) -> None:
    """The image was made after systemd was built: its id is in the future, and then in the past, but not of this boot,
    however long that has lasted."""
    made_s = time.time() - 30 * DAY_S
    os.utime(root / "etc/machine-id", (made_s, made_s))
    clockless(back_s)
    assert name_in(root, "%m") == f"{FILE_ID}.swap"


@pytest.mark.parametrize("back_s", [NTP_STEP_S - 60.0, 0.0], ids=["before NTP", "after NTP"])
def test_an_id_of_this_boot_on_a_board_without_a_clock(
    root: Path, clockless: Callable[[float], None], back_s: float
) -> None:
    """PID 1 has written it by the clock that it found, whatever that is set to afterwards."""
    written_s = time.time() - NTP_STEP_S + 0.5
    os.utime(root / "etc/machine-id", (written_s, written_s))
    clockless(back_s)
    assert "gets a new id at each boot" in refused(root, "%m").message


# %M


def test_the_interface_of_the_default_route(root: Path) -> None:
    """The one with the least metric, as the kernel prefers it; with hyphens, in lower case."""
    assert name_in(root, "%M") == "3c-fd-fe-12-34-5a.swap"


def test_it_stays_the_same_for_a_boot(root: Path) -> None:
    """Also when the default route goes elsewhere."""
    first = name_in(root, "%M")
    write(root, "proc/net/route", route("Iface", "Destination", "Mask", "Metric") + route("eno2"))
    assert name_in(root, "%M") == first
    (root / "run/nbdnfs/.boot-mac").unlink()
    assert name_in(root, "%M") == "3c-fd-fe-12-34-5b.swap"
    assert [path.name for path in (root / "run/nbdnfs").iterdir()] == [".boot-mac"]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("BOOTIF=01-3c-fd-fe-99-99-99", "3c-fd-fe-99-99-99"),
        ("BOOTIF=3C:FD:FE:99:99:99", "3c-fd-fe-99-99-99"),
        ("ip=eno2:dhcp", "3c-fd-fe-12-34-5b"),
        ("ip=10.0.0.5::10.0.0.1:255.255.255.0:box:eno2:none", "3c-fd-fe-12-34-5b"),
        ("ip=dhcp", "3c-fd-fe-12-34-5a"),
        ("ip=eth7:dhcp", "3c-fd-fe-12-34-5a"),
        ("BOOTIF=nonsense", "3c-fd-fe-12-34-5a"),
    ],
)
def test_the_command_line_knows_the_boot_interface(root: Path, word: str, name: str) -> None:
    """pxelinux's BOOTIF= (with the hardware type first) and ip=; a name that udev has changed since is not found."""
    write(root, "proc/cmdline", f"quiet {word} ro\n")
    assert name_in(root, "%M") == f"{name}.swap"


@pytest.mark.parametrize(("address", "assigned"), [("52:54:00:12:34:56", "0"), (MAC, "1"), ("01:00:5e:00:00:01", "0")])
def test_an_address_that_is_no_identity(root: Path, address: str, assigned: str) -> None:
    """Locally administered (all of QEMU's), random, or of a group."""
    interface(root, "eno1", address, assigned)
    error = refused(root, "%M")
    assert error.message.endswith("is a random or locally administered address, which other machines may have, too")
    assert "%u" in error.hint


def test_no_default_route(root: Path) -> None:
    """The only interface counts; of two, none, but one may get a route."""
    write(root, "proc/net/route", "")
    with pytest.raises(UnavailableError, match="not known yet which interface"):  # which is tried again
        name_in(root, "%M")
    (root / "sys/class/net/eno2/device/vendor").unlink()
    (root / "sys/class/net/eno2/device").rmdir()
    assert name_in(root, "%M") == "3c-fd-fe-12-34-5a.swap"


def test_ipv6_alone(root: Path) -> None:
    """proc_net_ipv6_route: a default route is ::/0; the kernel's own on lo does not count."""
    zeros = "0" * 32
    lines = [
        f"{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200 lo",
        f"{zeros} 00 {zeros} 00 fe80{zeros[4:]} 00000400 00000001 00000000 00000003 eno2",
    ]
    write(root, "proc/net/route", "")
    write(root, "proc/net/ipv6_route", "\n".join(lines) + "\n")
    assert name_in(root, "%M") == "3c-fd-fe-12-34-5b.swap"


# %u


def test_the_product_uuid(root: Path) -> None:
    """In lower case; a board's serial number where there is no SMBIOS."""
    assert name_in(root, "%u") == f"{UUID}.swap"
    (root / "sys/class/dmi/id/product_uuid").unlink()
    write(root, "proc/device-tree/serial-number", "10000000ABCD1234\0")
    assert name_in(root, "%u") == "10000000abcd1234.swap"


@pytest.mark.parametrize("text", ["03000200-0400-0500-0006-000700080009", "Not Settable", "0" * 36, "../../etc/shadow"])
def test_a_uuid_that_is_no_identity(root: Path, text: str) -> None:
    """What whole product lines have, and what cannot be a name."""
    write(root, "sys/class/dmi/id/product_uuid", text)
    error = refused(root, "%u")
    assert "no UUID of its own" in error.message
    assert "%M" in error.hint


# %H


@pytest.mark.parametrize("name", ["", "(none)", "localhost", "LOCALHOST", "localhost.localdomain"])
def test_no_host_name(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """.swap, (none).swap and localhost.swap would be the file of every machine without a name. It may get one, by DHCP:
    the keeper is started again."""
    monkeypatch.setattr("socket.gethostname", lambda: name)
    with pytest.raises(UnavailableError, match="has no host name") as caught:
        name_in(root, "%H")
    assert "hostnamectl" in caught.value.hint
    assert not failures.is_final(caught.value.exit_code, on_server=False)
