# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs doctor` on golden trees: a machine that is set up well, and each thing that can be wrong with one."""

import errno
import os
import threading
from pathlib import Path

import pytest

from nbdnfs.commands import counters, doctor, machine_checks, process_checks, status
from nbdnfs.commands.counters import Counters, Reading
from nbdnfs.commands.findings import Finding
from nbdnfs.config import Config
from nbdnfs.errors import UnavailableError, UsageError
from nbdnfs.keeper import last_good

ALL_CAPABILITIES = "000001ffffffffff"
ROLLUP = "00400000-7fff0000 ---p 00000000 00:00 0 [rollup]\nRss:  {rss} kB\nPss:  1 kB\nLocked:  {locked} kB\n"
# Linux 6.1: 0x580140 is PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE among others; policy 2 is SCHED_RR
STAT = "{pid} ({name}) S 1 1 1 0 -1 {flags} 7036 0 {major} 0 193 166 0 0 -2 0 8 0 7476" + 17 * " 0" + " 1 {policy} 0\n"

MACHINE = {
    "proc/sys/kernel/osrelease": "6.1.0-38-cloud-amd64\n",
    "sys/module/nbd/refcnt": "0\n",
    "sys/block/loop0/size": "0\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
    "proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units     \n"
    "Max locked memory         unlimited            unlimited            bytes     \n",
    "proc/self/status": f"Name:\tnbdnfs\nCapEff:\t{ALL_CAPABILITIES}\nCapBnd:\t{ALL_CAPABILITIES}\n",
    "proc/meminfo": "MemTotal: 1000000 kB\nMemFree: 1 kB\nMemAvailable: 1 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
    "proc/sys/vm/min_free_kbytes": "8192\n",
    "proc/sys/vm/watermark_scale_factor": "100\n",
    "proc/sys/vm/watermark_boost_factor": "0\n",
    "proc/sys/vm/overcommit_memory": "0\n",
    "proc/sys/vm/swappiness": "60\n",
    "proc/sys/vm/compact_unevictable_allowed": "0\n",
    "proc/sys/vm/page-cluster": "3\n",
    "proc/net/netstat": "TcpExt: SyncookiesSent PFMemallocDrop\nTcpExt: 5 0\nIpExt: InOctets\nIpExt: 1\n",
    "sys/devices/system/cpu/cpu0/online": "1\n",
    "sys/devices/system/cpu/cpu1/online": "1\n",
    "sys/devices/system/cpu/cpufreq/boost": "1\n",
    "sys/class/net/lo/operstate": "unknown\n",
    "sys/class/net/eth0/operstate": "up\n",
    "sys/class/net/eth0/speed": "1000\n",
    "sys/class/net/eth1/operstate": "down\n",
    "sys/class/net/eth1/speed": "10000\n",
    "sys/module/zswap/parameters/enabled": "N\n",
    "sys/module/zswap/parameters/max_pool_percent": "20\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def process(
    pid: int,
    *,
    name: str = "nbdkit",
    locked_kib: int = 34000,
    flags: int = 0x580140,
    policy: int = 2,
    oom: int = -1000,
    command: str = "nbdkit\0python\0/usr/lib/nbdnfs_plugin.py\0url=nfs://nas/a/b\0",
) -> dict[str, str]:
    """The files of /proc for a worker with two threads."""
    stat = {"flags": flags, "policy": policy, "name": name, "major": 2}
    return {
        f"proc/{pid}/stat": STAT.format(pid=pid, **stat),
        f"proc/{pid}/task/{pid}/stat": STAT.format(pid=pid, **stat),
        f"proc/{pid}/task/{pid + 1}/stat": STAT.format(pid=pid + 1, **stat),
        f"proc/{pid}/status": f"Name:\t{name}\nVmLck:\t{240_000 if locked_kib else 0} kB\nVmRSS:\t35000 kB\n",
        f"proc/{pid}/smaps_rollup": ROLLUP.format(rss=35000, locked=locked_kib),
        f"proc/{pid}/oom_score_adj": f"{oom}\n",
        f"proc/{pid}/comm": f"{name}\n",
        f"proc/{pid}/cmdline": command,
    }


def up(policy: int = 2) -> dict[str, str]:
    """swap0 is configured, up, and in use as swap: keeper 500, worker 300, /dev/nbd0."""
    return {
        **MACHINE,
        **process(300, policy=policy),
        **process(500, name="python3", policy=policy, command="python3\0-m\0nbdnfs\0run\0swap0\0"),
        "etc/nbdnfs/swap0.toml": 'url = "nfs://nas/export/swap"\n',
        "run/nbdnfs/swap0/worker": "300 7476 0.1.0\n",
        "run/nbdnfs/swap0/keeper": "500 7476 0.1.0\n",
        "run/nbdnfs/swap0/state": "watch\n",
        "run/nbdnfs/swap0/address": "nfs://nas/export/swap\n192.0.2.7\n",
        "sys/block/nbd0/size": "16\n",
        "sys/block/nbd0/pid": "300\n",
        "sys/block/nbd0/backend": "nbdnfs:swap0\n",
        "proc/swaps": "Filename Type Size Used Priority\n/dev/nbd0 partition 8 0 100\n",
        "run/systemd/sleep.conf.d/nbdnfs@swap0.conf": "x",
    }


@pytest.fixture
def region(monkeypatch: pytest.MonkeyPatch) -> Counters:
    """What the worker's region shows: nothing bad. The files of proc_pid_fd(5) cannot be made."""
    found: dict[str, int | list[int]] = {}
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: Reading(found, is_encrypted=True))
    return found


def bad(root: Path, name: str | None = None) -> dict[str, Finding]:
    return {finding.subject: finding for finding in doctor.examine(name, root) if not finding.good}


def test_a_machine_that_is_set_up(tmp_path: Path) -> None:
    """Every finding is good, none has advice, and the exit status is 0."""
    findings = doctor.examine(root=write(tmp_path, MACHINE))
    assert [finding for finding in findings if not finding.good or finding.advice] == []
    assert doctor.exit_status(findings) == 0
    assert all(finding.text().startswith("ok   ") for finding in findings)
    assert len({finding.subject for finding in findings}) == len(findings) == 16


@pytest.mark.parametrize(
    ("file", "text", "subject", "advice"),
    [
        ("proc/sys/kernel/osrelease", "5.10.0-28-amd64\n", "kernel", "5.14"),
        ("sys/fs/cgroup/cgroup.controllers", "cpu io\n", "cgroup", "unified_cgroup_hierarchy"),
        ("proc/self/status", "CapEff:\t0\nCapBnd:\t0000000000800000\n", "capabilities", "container"),
        ("proc/sys/vm/min_free_kbytes", "1848\n", "vm.min_free_kbytes", "sysctl vm.min_free_kbytes=8192"),
        ("proc/sys/vm/watermark_scale_factor", "10\n", "vm.watermark_scale_factor", "=100"),
        ("proc/sys/vm/watermark_boost_factor", "15000\n", "vm.watermark_boost_factor", "=0"),
        ("proc/sys/vm/overcommit_memory", "2\n", "vm.overcommit_memory", "=0"),
        ("proc/sys/vm/swappiness", "0\n", "vm.swappiness", "60"),
        ("proc/sys/vm/compact_unevictable_allowed", "1\n", "vm.compact_unevictable_allowed", "=0"),
        ("proc/sys/vm/page-cluster", "6\n", "vm.page-cluster", "=5"),
        ("proc/net/netstat", "TcpExt: A PFMemallocDrop\nTcpExt: 5 3\n", "packets dropped for lack of memory", "raise"),
        ("sys/class/net/eth0/speed", "10000\n", "vm.min_free_kbytes", "sysctl vm.min_free_kbytes=61540"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, file: str, text: str, subject: str, advice: str) -> None:
    """One wrong setting makes one bad finding, which says what to do."""
    findings = bad(write(tmp_path, {**MACHINE, file: text}))
    assert list(findings) == [subject]
    assert advice in findings[subject].advice
    assert doctor.exit_status(list(findings.values())) == os.EX_CONFIG


@pytest.mark.parametrize("lib", ["usr/lib", "usr/local/lib"])
def test_advice_where_the_settings_are_installed(tmp_path: Path, lib: str) -> None:
    """Where a package or `install-units` has brought the settings along, nothing advises `install-units` for them: it
    would refuse, or change nothing."""
    write(tmp_path, {name: text for name, text in MACHINE.items() if "nbd" not in name})
    write(tmp_path, {"lib/modules/6.1.0-38-cloud-amd64/modules.dep": "kernel/drivers/block/nbd.ko:\n"})
    write(tmp_path, {f"proc/sys/vm/{name}": "1\n" for name in ("watermark_scale_factor", "watermark_boost_factor")})
    write(tmp_path, {"proc/sys/vm/compact_unevictable_allowed": "1\n"})
    assert ["install-units" in finding.advice for finding in bad(tmp_path).values()] == [True] * 4
    write(tmp_path, {f"{lib}/sysctl.d/60-nbdnfs.conf": "", f"{lib}/modules-load.d/nbdnfs.conf": ""})
    assert ["install-units" in finding.advice for finding in bad(tmp_path).values()] == [False] * 4


def test_the_driver(tmp_path: Path) -> None:
    """A driver that is not loaded and a driver that is missing get different advice."""
    files = {name: text for name, text in MACHINE.items() if "nbd" not in name}
    assert "CONFIG_BLK_DEV_NBD" in bad(write(tmp_path, files))["nbd driver"].advice
    write(tmp_path, {"lib/modules/6.1.0-38-cloud-amd64/modules.dep": "kernel/drivers/block/nbd.ko:\n"})
    assert "modprobe nbd" in bad(tmp_path)["nbd driver"].advice


@pytest.mark.parametrize(("capabilities", "good"), [("0", False), (ALL_CAPABILITIES, True)])
def test_a_limit_that_a_capability_overrides(tmp_path: Path, capabilities: str, good: bool) -> None:
    """A low RLIMIT_MEMLOCK does not apply to root: can_do_mlock in mm/mlock.c."""
    limits = "Max locked memory         8388608              8388608              bytes\n"
    status = f"CapEff:\t{capabilities}\nCapBnd:\t{ALL_CAPABILITIES}\n"
    findings = bad(write(tmp_path, {**MACHINE, "proc/self/limits": limits, "proc/self/status": status}))
    assert ("RLIMIT_MEMLOCK" not in findings) is good


def test_the_reserve() -> None:
    """8 MiB at least, more for fast networks and many CPUs, never more than a sixteenth of memory."""
    gib = 1 << 30
    assert machine_checks.reserve_bytes(100, 2, gib) == 8 << 20
    assert machine_checks.reserve_bytes(1000, 2, gib) == 8 << 20
    assert machine_checks.reserve_bytes(1000, 2, 64 << 20) == 4 << 20
    assert machine_checks.reserve_bytes(10_000, 2, 16 * gib) == 61540 << 10
    assert machine_checks.reserve_bytes(1000, 64, 16 * gib) == 22232 << 10


@pytest.mark.parametrize(
    ("settings", "begin", "warns"),
    [
        ({}, "not supported", False),
        ({"enabled": "N", "shrinker_enabled": "N"}, "off", False),
        ({"enabled": "Y", "max_pool_percent": "50", "shrinker_enabled": "Y"}, "on, with up to 50 %", False),
        ({"enabled": "Y", "max_pool_percent": "20", "shrinker_enabled": "N"}, "on, with up to 20 %", True),
        ({"enabled": "Y", "max_pool_percent": "20"}, "on, with up to 20 %", True),  # before Linux 6.8
    ],
)
def test_zswap(tmp_path: Path, settings: dict[str, str], begin: str, warns: bool) -> None:
    """It is good either way; without its shrinker, what that does to a cgroup with a limit is told."""
    folder = "sys/module/zswap/parameters"
    write(tmp_path, {name: text for name, text in MACHINE.items() if folder not in name})
    write(tmp_path, {f"{folder}/{name}": f"{value}\n" for name, value in settings.items()})
    (found,) = [one for one in doctor.examine(root=tmp_path) if one.subject == "zswap"]
    assert found.good
    assert found.found.startswith(begin)
    assert ("shrinker" in found.found) is warns


def test_an_interface_without_a_speed(tmp_path: Path) -> None:
    """Virtual interfaces report -1, or fail to read: 1 Gbit/s is assumed."""
    write(tmp_path, {**MACHINE, "sys/class/net/eth0/speed": "-1\n"})
    (found,) = [one.found for one in doctor.examine(root=tmp_path) if one.subject == "vm.min_free_kbytes"]
    assert "1000 Mbit/s (eth0) and 2 CPUs" in found


def test_without_sys(tmp_path: Path) -> None:
    """What is not known is not blamed on the kernel: it is said what to mount."""
    write(tmp_path, {path: text for path, text in MACHINE.items() if not path.startswith("sys/")})
    found = {one.subject: one for one in doctor.examine(root=tmp_path)}
    for subject in ("nbd driver", "cgroup"):
        assert found[subject] == Finding(subject, False, "unknown: /sys is not mounted", "mount -t sysfs sysfs /sys")


def test_a_worker_by_hand(tmp_path: Path) -> None:
    """A worker without a record is found by its plugin; other nbdkit processes are left out."""
    write(tmp_path, {**MACHINE, **process(300), **process(400, command="nbdkit\0memory\0001G\0")})
    findings = [one for one in doctor.examine(root=tmp_path) if one.subject.startswith("worker")]
    assert [one.subject for one in findings if not one.good] == []
    assert {one.subject.split(",")[0] for one in findings} == {"worker 300"}
    assert "33.2 MiB of 34.2 MiB resident are locked" in findings[0].found


@pytest.mark.parametrize(
    ("name", "swapped"), [("postgres", ""), ("postgres", "VmSwap:\t4 kB\n"), ("nbdkit", "VmSwap:\t4 kB\n")]
)
def test_a_process_that_is_swapped_out(tmp_path: Path, name: str, swapped: str) -> None:
    """Its command line is in its own memory, and reading that waits for ever while swap stands still: it is not read.
    A FIFO stands for such a file."""
    write(tmp_path, process(400, name=name))
    status = tmp_path / "proc/400/status"
    status.write_text(status.read_text() + swapped)
    (tmp_path / "proc/400/cmdline").unlink()
    os.mkfifo(fifo := tmp_path / "proc/400/cmdline")
    found: list[list[int]] = []
    looks = threading.Thread(target=lambda: found.append(process_checks.workers_by_hand(tmp_path)), daemon=True)
    looks.start()
    looks.join(5)
    if not found:  # let it go
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    assert found == [[]]


def test_a_worker_that_is_swapped_out(tmp_path: Path) -> None:
    """It is known by its region."""
    write(tmp_path, process(300))
    status = tmp_path / "proc/300/status"
    status.write_text(status.read_text() + "VmSwap:\t4 kB\n")
    (tmp_path / "proc/300/fd").symlink_to(f"/proc/{os.getpid()}/fd")
    region_fd = os.memfd_create("nbdnfs-region")
    try:
        assert process_checks.workers_by_hand(tmp_path) == [300]
    finally:
        os.close(region_fd)


@pytest.mark.parametrize(
    ("wrong", "subject"),
    [
        ({"locked_kib": 0}, "worker 300, memory"),
        ({"flags": 0x400140}, "worker 300, IO flusher"),
        ({"policy": 0}, "worker 300, scheduling"),
        ({"oom": 0}, "worker 300, OOM score"),
    ],
)
def test_an_unsafe_worker(tmp_path: Path, wrong: dict[str, int], subject: str) -> None:
    """Each measure that a worker lacks makes one bad finding."""
    write(tmp_path, {**MACHINE, **process(300, **wrong)})  # type: ignore[arg-type]
    assert list(bad(tmp_path)) == [subject]


@pytest.mark.usefixtures("region")
def test_a_device(tmp_path: Path) -> None:
    """The configuration, and the keeper and the worker of the records; realtime = false is respected."""
    write(tmp_path, up(policy=0))
    write(tmp_path, {"etc/nbdnfs/swap0.toml": 'url = "nfs://nas/export/swap"\nrealtime = false\n'})
    assert bad(tmp_path, "swap0") == {}
    subjects = {one.subject for one in doctor.examine("swap0", tmp_path)}
    assert {"swap0: worker, memory", "swap0: keeper, memory", "swap0: configuration"} <= subjects


@pytest.mark.usefixtures("region")
@pytest.mark.parametrize("name", ["swap0", None])
def test_a_standby(tmp_path: Path, name: str | None) -> None:
    """It is a process of its device, with a name and without, and no worker by hand; and once only when it serves."""
    write(tmp_path, {**up(), **process(303), "run/nbdnfs/swap0/standby": "303 7476 0.1.0\n"})
    subjects = [one.subject for one in doctor.examine(name, tmp_path) if one.subject.endswith(", memory")]
    assert subjects == ["swap0: keeper, memory", "swap0: worker, memory", "swap0: standby, memory"]
    write(tmp_path, {"run/nbdnfs/swap0/standby": "300 7476 0.1.0\n"})
    subjects = [one.subject for one in doctor.examine("swap0", tmp_path) if one.subject.endswith(", memory")]
    assert subjects == ["swap0: keeper, memory", "swap0: worker, memory"]


@pytest.mark.parametrize(
    ("encrypted", "line", "good"),
    [(True, "", True), (True, "encrypt = false", True), (False, "encrypt = false", True), (False, "", False)],
)
def test_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encrypted: bool, line: str, good: bool) -> None:
    """Whether pages are encrypted is said. It is bad where the configuration asks for it and they are not."""
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: Reading(is_encrypted=encrypted))
    write(
        tmp_path,
        {
            **MACHINE,
            **process(300),
            "etc/nbdnfs/swap0.toml": f'url = "nfs://nas/export/swap"\n{line}\n',
            "run/nbdnfs/swap0/worker": "300 7476 0.1.0\n",
        },
    )
    (found,) = (one for one in doctor.examine("swap0", tmp_path) if one.subject == "swap0: pages")
    assert found.good is good
    assert found.found == f"{'' if encrypted else 'not '}encrypted on the NAS"
    assert ("nbdnfs down swap0 and nbdnfs up swap0" in found.advice) is not good


@pytest.mark.usefixtures("region")
def test_a_bad_configuration_of_a_device_that_is_up(tmp_path: Path) -> None:
    """It is one bad finding. The rest is judged by what the device runs with."""
    write(
        tmp_path,
        {
            **up(policy=0),
            "etc/nbdnfs/swap0.toml": "siez = 1\n",
            "run/nbdnfs/swap0/config": last_good.to_text(Config("swap0", "nfs://nas/export/swap", realtime=False)),
            "run/nbdnfs/swap0/config_error": "unknown key 'siez'\n",
        },
    )
    found = bad(tmp_path, "swap0")
    assert list(found) == ["swap0: configuration"]
    assert "unknown key 'siez'; the device runs with the last good one" in found["swap0: configuration"].found


@pytest.mark.usefixtures("region")
def test_a_configuration_that_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that is up, that is said first, with both and what to do. The file in use is looked at."""
    looked_at: list[Config] = []
    monkeypatch.setattr(doctor, "_backing_file", lambda settings, pid, root: looked_at.append(settings) or ())
    write(tmp_path, {**up(), "etc/nbdnfs/swap0.toml": 'url = "nfs://nas/swpa/box"\nsize = "1G"\n'})
    findings = [one for one in doctor.examine("swap0", tmp_path) if one.subject.startswith("swap0")]
    assert findings[0] == Finding(
        "swap0: configuration",
        False,
        "it names nfs://nas/swpa/box, and the device uses nfs://nas/export/swap until nbdnfs down",
        "if that is a mistake, correct url; if it is meant: nbdnfs down swap0; nbdnfs up swap0",
    )
    assert [one.subject for one in findings if not one.good] == ["swap0: configuration"]
    assert [(one.url, one.size_bytes) for one in looked_at] == [("nfs://nas/export/swap", 0)]


@pytest.mark.usefixtures("region")
@pytest.mark.parametrize("recorded", ["nfs://nas/export/swap\n192.0.2.7\n", "damaged\n", ""])
def test_a_configuration_that_names_the_file_in_use(tmp_path: Path, recorded: str) -> None:
    """In whatever form; and without a record, nothing is known to differ."""
    write(tmp_path, {**up(), "etc/nbdnfs/swap0.toml": 'url = "nfs://nas/export/%73wap"\n'})
    (tmp_path / "run/nbdnfs/swap0/address").write_text(recorded)
    assert bad(tmp_path, "swap0") == {}


@pytest.mark.parametrize(
    ("states", "drop_in", "good"),
    [
        ("freeze mem disk", "nbdnfs@swap0.conf", True),
        ("freeze mem disk", "other.conf", False),
        ("freeze mem", "", True),
    ],
)
def test_hibernation(tmp_path: Path, states: str, drop_in: str, good: bool) -> None:
    """With a device up the kernel or systemd must refuse to hibernate; without one, nothing is said about it."""
    write(tmp_path, {**MACHINE, "sys/power/state": f"{states}\n", f"run/systemd/sleep.conf.d/{drop_in or 'a'}": "x"})
    assert "hibernation" not in {finding.subject for finding in doctor.examine(None, tmp_path)}
    write(tmp_path, {"sys/block/nbd0/size": "0\n", "sys/block/nbd0/backend": "nbdnfs:swap0\n"})
    found = {finding.subject: finding for finding in doctor.examine(None, tmp_path)}
    assert found["hibernation"].good is good


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    """It makes one bad finding; a name that no device can have is an error."""
    assert bad(write(tmp_path, MACHINE), "swap0") == {
        "swap0: device": Finding("swap0: device", False, "there is no device 'swap0'", "write /etc/nbdnfs/swap0.toml"),
    }
    with pytest.raises(UsageError):
        doctor.examine("../etc", tmp_path)


def test_a_device_that_is_gone(tmp_path: Path) -> None:
    """Of one that was removed, the empty folder of its records is left. It is not looked at; asked for, it is none."""
    write(tmp_path, MACHINE)
    (tmp_path / "run/nbdnfs/swap1").mkdir(parents=True)
    assert bad(tmp_path) == {}
    assert bad(tmp_path, "swap1")["swap1: device"].found == "there is no device 'swap1'"


def test_a_start_that_failed(tmp_path: Path) -> None:
    """Why the last keeper ended for good makes a bad finding, with its own advice, while the device is not up."""
    write(tmp_path, {**MACHINE, "etc/nbdnfs/swap0.toml": 'url = "nfs://nas/export/swap"\n'})
    assert bad(tmp_path, "swap0") == {
        "swap0: device": Finding("swap0: device", False, "not up", "nbdnfs up swap0"),
    }
    refused = "x is in use as swap by box2\nrun nbdnfs down there\n"
    write(tmp_path, {"run/nbdnfs/.swap0.refused": refused})
    assert bad(tmp_path, "swap0") == {
        "swap0: device": Finding("swap0: device", False, "not up", "the next finding says why, and what to do"),
        "swap0: last start": Finding("swap0: last start", False, *refused.splitlines()),
    }


def test_a_keeper_that_waits(tmp_path: Path) -> None:
    """Why it does so is a bad finding, and the advice says that it does not read a changed configuration by itself."""
    write(tmp_path, {name: text for name, text in up().items() if "nbd0" not in name and not name.endswith("worker")})
    write(tmp_path, {"run/nbdnfs/swap0/waiting": "/export has no directory swpa\n"})
    found = bad(tmp_path, "swap0")
    assert list(found) == ["swap0: device", "swap0: the keeper waits"]
    assert found["swap0: the keeper waits"].found == "/export has no directory swpa"
    assert "systemctl restart nbdnfs@swap0" in found["swap0: the keeper waits"].advice


def test_what_systemd_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a device that is configured is not up, and the command once."""
    write(tmp_path, {**MACHINE, "etc/nbdnfs/swap0.toml": 'url = "nfs://nas/export/swap"\n'})
    read = status.read
    text = "nbdnfs@swap0.service is not started: systemctl enable --now nbdnfs@swap0.service"
    monkeypatch.setattr(status, "read", lambda name, root: read(name, root, lambda name: text))
    assert bad(tmp_path, "swap0")["swap0: unit"] == Finding("swap0: unit", False, *text.split(": "))


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ({}, {"file_state": 1}),
        ({}, {"file_state": 2}),
        ({}, {"file_state": 3}),
        ({}, {"write_back_error": errno.ENOSPC}),
        ({}, {"checksum_failures": 1}),
        ({}, {"disconnected": 1}),
        ({}, {"owner_state": 2}),
        ({}, {"owner_state": 3}),
        ({"proc/swaps": ""}, {}),
        ({"proc/300/stat": ""}, {}),
        ({"proc/500/stat": ""}, {}),
        ({"sys/block/nbd0/backend": ""}, {}),
        ({"run/nbdnfs/swap0/state": "stolen\n"}, {}),
        ({"run/nbdnfs/swap0/config_error": "unknown key 'siez'\n"}, {}),
    ],
)
def test_never_green_where_status_is_not(
    tmp_path: Path, region: dict[str, int], files: dict[str, str], shown: dict[str, int]
) -> None:
    """Each problem of `status` is a bad finding, with what to do."""
    write(tmp_path, up())
    assert status.read("swap0", tmp_path).is_green
    assert bad(tmp_path, "swap0") == {}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        if not text:
            (tmp_path / name).unlink()
    region.update(shown)
    texts = status.read("swap0", tmp_path).texts
    found = [one for one in doctor.examine("swap0", tmp_path) if not one.good]
    assert texts
    assert set(texts) <= {one.found for one in found}
    assert all(one.advice for one in found)


def test_without_proc(tmp_path: Path) -> None:
    """One line, for which no finding stands."""
    (tmp_path / "proc").mkdir()
    with pytest.raises(UnavailableError, match="/proc is not mounted"):
        doctor.examine(root=tmp_path)


def test_this_machine() -> None:
    """On any machine, each finding has a subject and a text, and a bad one says what to do."""
    findings = doctor.examine()
    assert all(finding.subject and finding.found for finding in findings)
    assert all(finding.advice for finding in findings if not finding.good)
    assert {"subject", "good", "found", "advice"} == set(findings[0].to_json())
