# SPDX-License-Identifier: LGPL-2.1-or-later
"""Readers of /proc and /sys on golden trees, in the formats of Linux 6.1 and 6.12."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.want import no_descriptors

from nbdnfs.errors import UnavailableError, UnreadableError
from nbdnfs.kernel import nbd_device, openers
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.state import MemInfo, Mount, NbdDevice, NbdModule, Swap, VmStat


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_swaps(tmp_path: Path) -> None:
    """Sizes in KiB become bytes, octal escapes become blanks, priorities may be negative."""
    write(
        tmp_path,
        {
            "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
            "/dev/nbd0                               partition\t524284\t\t1024\t\t-2\n"
            "/srv/my\\040swap\\134file                  file\t\t4\t\t0\t\t10\n"
        },
    )
    assert kernel_state.swaps(tmp_path) == [
        Swap("/dev/nbd0", "partition", 524284 * 1024, 1 << 20, -2),
        Swap("/srv/my swap\\file", "file", 4096, 0, 10),
    ]


def test_no_swap(tmp_path: Path) -> None:
    """An empty list, and a kernel without swap support, give no swaps."""
    assert kernel_state.swaps(tmp_path) == []
    write(tmp_path, {"proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"})
    assert kernel_state.swaps(tmp_path) == []


ATTACHED = {
    "sys/block/nbd1/size": "1048576\n",
    "sys/block/nbd1/dev": "43:32\n",
    "sys/block/nbd1/ro": "0\n",
    "sys/block/nbd1/pid": "4711\n",
    "sys/block/nbd1/backend": "nbdnfs:/run/nbdnfs/swap0.sock\n",
    "sys/block/nbd1/queue/max_sectors_kb": "128\n",
    "sys/block/nbd1/queue/io_timeout": "30000\n",
    "sys/block/nbd1/queue/nr_requests": "128\n",
    "sys/block/nbd1/queue/scheduler": "[none] mq-deadline\n",
    "sys/block/nbd1/nbd1p1/dev": "43:33\n",
    "sys/block/nbd1/nbd1p1/holders/dm-0/dev": "",
    "sys/block/nbd1/holders/dm-3/dev": "",
}
IDLE = {"sys/block/nbd0/size": "0\n", "sys/block/nbd0/dev": "43:0\n", "sys/block/nbd0/ro": "1\n"}


def test_an_attached_device(tmp_path: Path) -> None:
    """Everything that a device shows, with its partitions and what is stacked on them."""
    assert kernel_state.nbd_device("nbd1", write(tmp_path, ATTACHED)) == NbdDevice(
        name="nbd1",
        index=1,
        size_bytes=512 << 20,
        connector_pid=4711,
        backend="nbdnfs:/run/nbdnfs/swap0.sock",
        read_only=False,
        partitions=("nbd1p1",),
        device_numbers=frozenset({"43:32", "43:33"}),
        holders=("dm-3", "dm-0"),
        max_sectors_kb=128,
        io_timeout_ms=30000,
        nr_requests=128,
        scheduler="none",
    )


def test_an_idle_device(tmp_path: Path) -> None:
    """Without the file pid it is not attached; queue settings that are not there are None."""
    device = kernel_state.nbd_device("nbd0", write(tmp_path, IDLE))
    assert device is not None
    assert not device.attached
    assert device.read_only
    assert (device.backend, device.io_timeout_ms, device.scheduler) == (None, None, None)


def test_no_such_device(tmp_path: Path) -> None:
    """Neither a missing name nor the name of another disk is an nbd device."""
    write(tmp_path, {**IDLE, "sys/block/nbdx/size": "8\n", "sys/block/sda/size": "8\n"})
    assert kernel_state.nbd_device("nbd7", tmp_path) is None
    assert kernel_state.nbd_device("nbdx", tmp_path) is None
    assert kernel_state.nbd_device("sda", tmp_path) is None


def test_all_devices_in_the_order_of_their_index(tmp_path: Path) -> None:
    """nbd10 comes after nbd2, and what only looks alike is left out."""
    for index in (10, 2, 0):
        write(tmp_path, {f"sys/block/nbd{index}/size": "0\n"})
    write(tmp_path, {"sys/block/nbdfoo/size": "0\n"})
    assert [device.index for device in kernel_state.nbd_devices(tmp_path)] == [0, 2, 10]
    assert kernel_state.nbd_devices(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "chosen"), [("[none] kyber\n", "none"), ("none [mq-deadline]\n", "mq-deadline"), ("none\n", "none")]
)
def test_schedulers(tmp_path: Path, text: str, chosen: str) -> None:
    """The scheduler in brackets, or the only one (Linux before 6.13 writes "none" alone without brackets)."""
    device = kernel_state.nbd_device("nbd0", write(tmp_path, {**IDLE, "sys/block/nbd0/queue/scheduler": text}))
    assert device is not None
    assert device.scheduler == chosen


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, NbdModule(loaded=False, available=False)),
        ({"sys/module/nbd/initstate": "live\n"}, NbdModule(loaded=True, available=True)),
        (
            {"lib/modules/6.1.0-44-amd64/modules.dep": "kernel/drivers/block/nbd.ko:\n"},
            NbdModule(loaded=False, available=True),
        ),
        (
            {"lib/modules/6.1.0-44-amd64/modules.dep": "kernel/drivers/block/nbd.ko.xz: kernel/lib/x.ko.xz\n"},
            NbdModule(loaded=False, available=True),
        ),
        (
            {"lib/modules/6.1.0-44-amd64/modules.dep": "kernel/drivers/block/rnbd.ko:\nkernel/x.ko: kernel/nbd.ko\n"},
            NbdModule(loaded=False, available=False),
        ),
        (
            {"lib/modules/6.1.0-13-amd64/modules.dep": "kernel/drivers/block/nbd.ko:\n"},
            NbdModule(loaded=False, available=False),
        ),
        (
            {"lib/modules/6.1.0-44-amd64/modules.builtin": "kernel/fs/ext4/ext4.ko\nkernel/drivers/block/nbd.ko\n"},
            NbdModule(loaded=False, available=True),
        ),
    ],
)
def test_the_module(tmp_path: Path, files: dict[str, str], state: NbdModule) -> None:
    """Loaded by /sys/module, available by the lists of the running release only."""
    write(tmp_path, {"proc/sys/kernel/osrelease": "6.1.0-44-amd64\n", **files})
    assert kernel_state.nbd_module(tmp_path) == state


def test_mounts(tmp_path: Path) -> None:
    """Device, mount point and source, whatever number of optional fields stands between."""
    write(
        tmp_path,
        {
            "proc/self/mountinfo": "25 1 0:23 / / rw,relatime - nfs4 nas:/root rw,vers=4.2\n"
            "30 25 43:0 / /mnt/a\\040b rw shared:7 master:1 - ext4 /dev/nbd0 rw\n"
        },
    )
    assert kernel_state.mounts(tmp_path) == [Mount("0:23", "/", "nas:/root"), Mount("43:0", "/mnt/a b", "/dev/nbd0")]


def test_loops(tmp_path: Path) -> None:
    """Those that have a file behind them; an idle one has no folder `loop`."""
    write(tmp_path, {"sys/block/loop0/loop/backing_file": "/dev/nbd0\n", "sys/block/loop1/size": "0\n"})
    assert kernel_state.loops(tmp_path) == {"loop0": "/dev/nbd0"}


def test_meminfo(tmp_path: Path) -> None:
    """The five values that are used, in bytes; counters without a unit do not disturb."""
    text = "".join(
        f"{key}:  {value:8} kB\n"
        for key, value in [("MemTotal", 1000), ("MemFree", 200), ("MemAvailable", 500), ("SwapTotal", 64)]
    )
    write(tmp_path, {"proc/meminfo": text + "SwapFree:  32 kB\nHugePages_Total:       0\n"})
    assert kernel_state.meminfo(tmp_path) == MemInfo(1000 << 10, 200 << 10, 500 << 10, 64 << 10, 32 << 10)


def test_vmstat(tmp_path: Path) -> None:
    """Counters by name; oom_kill is 0 on a kernel that does not count it."""
    write(tmp_path, {"proc/vmstat": "nr_free_pages 5\npswpin 1\npswpout 2\npgmajfault 3\n"})
    assert kernel_state.vmstat(tmp_path) == VmStat(1, 2, 3, 0)


def test_this_machine() -> None:
    """On the running kernel."""
    assert kernel_state.meminfo().total_bytes > 1 << 24
    kernel_state.vmstat()
    assert any(mount.mount_point == "/" for mount in kernel_state.mounts())
    kernel_state.swaps()
    kernel_state.nbd_devices()
    kernel_state.nbd_module()


def test_device_numbers(tmp_path: Path) -> None:
    """A file, a character device and a missing path are not block devices."""
    write(tmp_path, {"x": ""})
    assert kernel_state.device_number(tmp_path / "x") is None
    assert kernel_state.device_number(Path("/dev/null")) is None
    assert kernel_state.device_number(tmp_path / "none") is None


def test_the_number_of_a_block_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sysfs writes it."""
    found = SimpleNamespace(st_mode=stat.S_IFBLK | 0o660, st_rdev=os.makedev(43, 32))
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda path: found)
        number = kernel_state.device_number(tmp_path / "nbd1")
    assert number == "43:32"


@pytest.mark.parametrize("read", [kernel_state.meminfo, kernel_state.vmstat])
def test_without_proc(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Neither an empty mount point nor none is a machine without memory."""
    for _ in range(2):
        with pytest.raises(UnavailableError, match="/proc is not mounted"):
            read(tmp_path)
        (tmp_path / "proc").mkdir(exist_ok=True)


def test_proc_that_cannot_be_read_now() -> None:
    """It is mounted, so the message must not say that it is not."""
    with no_descriptors(), pytest.raises(UnreadableError, match="cannot read /proc: Too many open files"):
        kernel_state.require_proc()


@pytest.mark.parametrize(
    "read",
    [
        kernel_state.nbd_devices,
        kernel_state.loops,
        lambda root: kernel_state.nbd_device("nbd0", root),
        lambda root: nbd_device.find("nbdnfs:swap0", root),
    ],
    ids=["nbd_devices", "loops", "nbd_device", "find"],
)
def test_without_sys(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Of a machine that runs, an attached device would look as if it were not. The root of an image has none."""
    assert not read(tmp_path)
    (tmp_path / "sys").mkdir()
    (tmp_path / "proc").mkdir()
    assert not read(tmp_path)
    (tmp_path / "proc/self").mkdir()
    with pytest.raises(UnreadableError, match="/sys is not mounted"):
        read(tmp_path)
    (tmp_path / "sys/block").mkdir()
    assert not read(tmp_path)


def test_block_names(tmp_path: Path) -> None:
    """The last part of where /sys/dev/block/MAJOR:MINOR leads."""
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/43:1").symlink_to("../../devices/virtual/block/nbd0/nbd0p1")
    assert kernel_state.block_name("43:1", tmp_path) == "nbd0p1"
    assert kernel_state.block_name("43:2", tmp_path) is None


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_path_survives_its_escapes(path: str) -> None:
    """What fs/seq_file.c: mangle_path escapes (blank, tab, newline, backslash) comes back."""
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in path)
    assert kernel_state._unescape(escaped) == path


@pytest.mark.parametrize(
    "read",
    [
        kernel_state.swaps,
        kernel_state.nbd_devices,
        kernel_state.mounts,
        kernel_state.loops,
        lambda root: kernel_state.nbd_device("nbd1", root),
        lambda root: nbd_device.find("nbdnfs:/run/nbdnfs/swap0.sock", root),
        lambda root: openers.openers("/dev/nbd1", root),
    ],
)
def test_what_cannot_be_read_is_not_nothing(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """A process without descriptors does not take a device for detached, or one in use for one that is not."""
    write(tmp_path, ATTACHED | {"proc/swaps": "", "proc/self/mountinfo": "", "proc/1/fd/0": ""})
    with no_descriptors(), pytest.raises(UnreadableError, match="Too many open files"):
        read(tmp_path)
    read(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_a_number_that_there_is_no_memory_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It is not known: that is not the number of no device, or the name of none."""

    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", fail)
        patched.setattr(os, "readlink", fail)
        with pytest.raises(UnreadableError) as no_number:
            kernel_state.device_number(tmp_path / "nbd0")
        with pytest.raises(UnreadableError) as no_name:
            kernel_state.block_name("43:0", tmp_path)
    assert os.strerror(number) in no_number.value.message
    assert os.strerror(number) in no_name.value.message


def test_a_file_that_cannot_be_opened_among_others(tmp_path: Path) -> None:
    """With one descriptor folders can be listed, and files be read one after the other."""
    write(tmp_path, ATTACHED)
    with no_descriptors(but=1):
        found = kernel_state.nbd_devices(tmp_path)
    assert found == kernel_state.nbd_devices(tmp_path)
    assert [device.attached for device in found] == [True]
