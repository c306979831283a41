# SPDX-License-Identifier: LGPL-2.1-or-later
"""What counts as a use of an nbd device, on golden trees. What a real kernel does is tested in vm-tests/."""

import errno
import os
import threading
from pathlib import Path

import pytest
from support.nbd_tree import FakeNetlink, add_partition, make_machine, opened_by
from support.waiting import DEADLINE_S

from nbdnfs.errors import BusyError, UnreadableError
from nbdnfs.kernel import device_in_use, waiting
from nbdnfs.kernel import state as kernel_state
from nbdnfs.kernel.nbd_netlink import NbdNetlink


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_machine(tmp_path / "root")


def use_as_swap(root: Path, path: str, kind: str = "partition") -> None:
    (root / "proc/swaps").write_text(f"Filename Type Size Used Priority\n{path} {kind} 65532 10240 -2\n")


def use_as_mount(root: Path, number: str, source: str) -> None:
    line = f"30 25 {number} / /mnt/data rw shared:7 - ext4 {source} rw\n"
    (root / "proc/self/mountinfo").write_text(line)


def refuse(root: Path) -> None:
    device = kernel_state.nbd_device("nbd1", root)
    assert device is not None
    device_in_use.refuse_if_in_use(device, root)


def netlink(kernel: FakeNetlink) -> NbdNetlink:
    return kernel  # type: ignore[return-value]


def refused(root: Path, message: str) -> BusyError:
    with pytest.raises(BusyError, match=message) as caught:
        refuse(root)
    return caught.value


def test_swap(root: Path) -> None:
    """With the command that ends it."""
    use_as_swap(root, "/dev/nbd1")
    assert refused(root, "in use as swap .*10 MiB swapped out").hint == "swapoff /dev/nbd1"


def test_swap_on_a_deleted_node(root: Path) -> None:
    """The kernel appends " (deleted)" to the path of a node that is gone (d_path)."""
    use_as_swap(root, "/dev/nbd1\\040(deleted)")
    refused(root, "in use as swap")


def test_swap_on_a_partition(root: Path) -> None:
    """A partition is part of the device."""
    add_partition(root, 1)
    use_as_swap(root, "/dev/nbd1p1")
    assert refused(root, "in use as swap").hint == "swapoff /dev/nbd1p1"


@pytest.mark.parametrize("number", ["43:32", "43:33"])
def test_swap_under_another_name(root: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    """The device number decides, of the disk or of a partition."""
    add_partition(root, 1)
    monkeypatch.setattr(kernel_state, "device_number", {root / "srv/swapdisk": number}.get)
    use_as_swap(root, "/srv/swapdisk")
    assert refused(root, "in use as swap").hint == "swapoff /srv/swapdisk"


def test_other_swap_does_not_matter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swap on another disk does not count, and the path of a swap file is not looked at."""

    def device_number(path: Path) -> str | None:
        assert path.name == "sda2", "the file may lie on a share that hangs"
        return "8:2"

    monkeypatch.setattr(kernel_state, "device_number", device_number)
    (root / "proc/swaps").write_text("Filename\n/dev/sda2 partition 4 4 1\n/nas/swapfile file 4 4 1\n")
    refuse(root)


@pytest.mark.parametrize(("number", "source"), [("43:32", "/dev/root"), ("43:33", "x"), ("0:44", "/dev/nbd1")])
def test_a_mounted_device(root: Path, number: str, source: str) -> None:
    """By number, of a partition too, and by name where the file system has a number of its own (btrfs)."""
    add_partition(root, 1)
    use_as_mount(root, number, source)
    assert refused(root, "is mounted on /mnt/data").hint == "umount /mnt/data"


def test_other_uses_do_not_matter(root: Path) -> None:
    """A mount of another disk, and swap that lies beside what is on top of the device."""
    use_as_mount(root, "8:1", "/dev/sda1")
    refuse(root)
    (root / "sys/block/nbd1/holders/dm-0").mkdir(parents=True)
    use_as_swap(root, "/dev/sda2")
    assert "swap" not in refused(root, "in use by dm-0$").hint


def test_a_device_with_something_on_top(root: Path) -> None:
    """dm-crypt, LVM or md on the disk or on a partition of it."""
    (add_partition(root, 1) / "holders/dm-0").mkdir(parents=True)
    assert "dm-0" in refused(root, "in use by dm-0").hint


def test_a_device_behind_a_loop_device(root: Path) -> None:
    """The kernel counts it neither as a holder nor as a claim (seen on Linux 6.1)."""
    (root / "sys/block/loop4/loop").mkdir(parents=True)
    (root / "sys/block/loop4/loop/backing_file").write_text("/dev/nbd1\n")
    assert "loop4" in refused(root, "in use by loop4").hint


def test_an_open_device(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processes that have it open, once udev had its time."""
    monkeypatch.setattr(device_in_use, "_OPENERS_GRACE_S", 0.05)
    opened_by(root, 77, "mkfs.ext4", "/dev/nbd1")
    refused(root, r"is open in mkfs\.ext4 \(process 77\)")


def test_waits_for_a_short_look(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """udev opens what has just appeared; detach goes on once it has closed it."""
    descriptor = opened_by(root, 78, "(udev-worker)", "/dev/nbd1")
    monkeypatch.setattr(waiting.time, "sleep", lambda _: descriptor.unlink())
    refuse(root)


def test_overrules_udev(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dead server, udev's look at a new device never ends by itself."""
    monkeypatch.setattr(device_in_use, "_OPENERS_GRACE_S", 0.05)
    opened_by(root, 79, "(udev-worker)", "/dev/nbd1")
    refuse(root)


def test_what_the_kernel_claims(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exclusive open that fails shows a use that no list has."""
    opens: list[tuple[str, int]] = []

    def claimed(path: Path, flags: int) -> int:
        opens.append((path.name, flags))
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(device_in_use.os, "open", claimed)
    refused(root, "claimed by the kernel")
    assert opens == [("nbd1", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)]


def test_a_server_that_is_gone_does_not_keep_the_device(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An open that blocks, reading the partition table from a dead server, does not keep the device."""
    release = threading.Event()
    real_open = os.open

    def hangs(path: Path, flags: int) -> int:
        release.wait(DEADLINE_S)
        return real_open(path, flags)

    monkeypatch.setattr(device_in_use.os, "open", hangs)
    monkeypatch.setattr(device_in_use, "_PROBE_TIMEOUT_S", 0.05)
    before = set(threading.enumerate())
    refuse(root)
    assert "does not answer" in caplog.text
    (left,) = set(threading.enumerate()) - before  # other tests may have left threads, too
    release.set()
    left.join(DEADLINE_S)
    assert not left.is_alive()


def test_disconnect_refuses_what_is_in_use(root: Path) -> None:
    """Swap on a device on top, which no list of swaps leads to: with the order in which to take it down."""
    kernel = FakeNetlink(root)
    (root / "sys/block/nbd1/holders/dm-0").mkdir(parents=True)
    (root / "sys/block/dm-0").mkdir()
    (root / "sys/block/dm-0/dev").write_text("253:0\n")
    use_as_swap(root, "/dev/dm-0")
    with pytest.raises(BusyError, match="in use by dm-0, which is swapped on") as caught:
        device_in_use.disconnect(netlink(kernel), 1, root)
    assert caught.value.hint == "swapoff /dev/dm-0, then take dm-0 down first (see lsblk)"
    assert kernel.disconnects == []


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_a_claim_that_there_is_no_memory_for(root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Then it is not known whether the device is in use, and it stays."""

    def fail(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    kernel = FakeNetlink(root)
    monkeypatch.setattr(device_in_use.os, "open", fail)
    with pytest.raises(UnreadableError, match=os.strerror(number)):
        device_in_use.disconnect(netlink(kernel), 1, root)
    assert kernel.disconnects == []


@pytest.mark.parametrize("number", [errno.ENXIO, errno.EACCES])
def test_a_claim_that_is_refused_for_another_reason(root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It shows no use: the device is taken down."""

    def fail(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    kernel = FakeNetlink(root)
    monkeypatch.setattr(device_in_use.os, "open", fail)
    device_in_use.disconnect(netlink(kernel), 1, root)
    assert kernel.disconnects == [1]


def busy() -> int:
    raise BusyError("cannot attach: the device is in use")


def test_a_device_that_somebody_keeps_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that cannot be attached because it is in use: with the user; where none is found, the kernel's error."""
    monkeypatch.setattr(device_in_use, "_OPENERS_GRACE_S", 0.01)
    with pytest.raises(BusyError, match="cannot attach"):
        device_in_use.retry_while_opened(busy, BusyError("before"), "nbd0", root)
    opened_by(root, 77, "dd", "/dev/nbd0")
    with pytest.raises(BusyError, match=r"/dev/nbd0 is open in dd \(process 77\)"):
        device_in_use.retry_while_opened(busy, BusyError("before"), "nbd0", root)


def test_a_device_that_another_one_attaches_meanwhile(root: Path) -> None:
    """It is not tried again: that would never succeed."""
    with pytest.raises(BusyError, match="/dev/nbd1"):
        device_in_use.retry_while_opened(lambda: pytest.fail("it is tried"), BusyError("before"), "nbd1", root)


def test_a_claim_without_a_thread(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python says RuntimeError."""

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(UnreadableError, match="can't start new thread"):
        refuse(root)


def test_the_device_stays_claimed_until_it_is_disconnected(root: Path) -> None:
    """So that swapon(2) and mount(2) do not come between look and DISCONNECT; then the claim is given up."""
    kernel = FakeNetlink(root)
    claims: list[bool] = []

    def is_open() -> bool:
        return any(os.path.samefile(f"/proc/self/fd/{number}", node) for number in open_files())

    def open_files() -> list[str]:
        return [number for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]

    node = root / "dev/nbd1"

    real = kernel.disconnect

    def disconnect(index: int) -> None:
        claims.append(is_open())
        real(index)

    kernel.disconnect = disconnect  # type: ignore[method-assign]
    device_in_use.disconnect(netlink(kernel), 1, root)
    assert (claims, kernel.disconnects) == ([True], [1])
    assert not is_open()


def test_what_is_not_attached_is_not_asked(root: Path) -> None:
    """A device that never showed up, or is about to go: DISCONNECT is harmless."""
    kernel = FakeNetlink(root)
    device_in_use.disconnect(netlink(kernel), 0, root)
    assert kernel.disconnects == [0]


def test_own_processes_do_not_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mkswap of the caller that a dead server holds up, which has the device claimed: DISCONNECT ends it."""
    monkeypatch.setattr(device_in_use, "_OPENERS_GRACE_S", 0.05)
    monkeypatch.setattr(device_in_use, "_claim", lambda node: pytest.fail("the claim is that process's"))
    opened_by(root, 80, "mkswap", "/dev/nbd1")
    other = opened_by(root, 81, "dd", "/dev/nbd1")
    kernel = FakeNetlink(root)
    with pytest.raises(BusyError, match=r"is open in dd \(process 81\)"):
        device_in_use.disconnect(netlink(kernel), 1, root, ours=frozenset({80}))
    other.unlink()
    device_in_use.disconnect(netlink(kernel), 1, root, ours=frozenset({80}))
    assert kernel.disconnects == [1]


def test_own_swap_does_not_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a caller that turns it off first. What is on a partition, on top, or open does."""
    monkeypatch.setattr(device_in_use, "_OPENERS_GRACE_S", 0.05)
    add_partition(root, 1)
    device = kernel_state.nbd_device("nbd1", root)
    assert device is not None
    use_as_swap(root, "/dev/nbd1")
    device_in_use.refuse_other_uses(device, root)
    use_as_swap(root, "/dev/nbd1p1")
    with pytest.raises(BusyError, match="in use as swap"):
        device_in_use.refuse_other_uses(device, root)
    use_as_swap(root, "/dev/nbd1")
    opened_by(root, 77, "dd", "/dev/nbd1")
    with pytest.raises(BusyError, match="is open in dd"):
        device_in_use.refuse_other_uses(device, root)


def test_fail_requests_asks_nothing(root: Path) -> None:
    """Where another machine has the file, requests must not wait for ever."""
    kernel = FakeNetlink(root)
    use_as_swap(root, "/dev/nbd1")
    device_in_use.fail_requests(netlink(kernel), 1)
    assert kernel.disconnects == [1]
