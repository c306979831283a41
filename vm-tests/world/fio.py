# SPDX-License-Identifier: LGPL-2.1-or-later
"""fio: what it wrote, it reads again and compares by checksum (--verify)."""

from __future__ import annotations

from vmtest.machine import Result

from world.benches import WHERE, Place, checked
from world.suite import Bench, Part, Suite, Test, last_words, limited

_DEVICE_MIB = 384
_SIZE_MIB = 48
_MEMORY_MIB = 512
_TIMEOUT_S = 1200.0
_COMMON = "--ioengine=libaio --verify=crc32c --verify_fatal=1 --randseed=7"
# Large enough to come from the NAS again, and in every way in which a kernel sends requests.
_JOBS = {
    "random 4 KiB, 32 at once": "--direct=1 --rw=randwrite --bs=4k --iodepth=32",
    "4 to 128 KiB, verified meanwhile": "--direct=1 --rw=randwrite --bssplit=4k/40:16k/30:64k/20:128k/10 --iodepth=16"
    " --verify_backlog=64",
    "sequential 1 MiB": "--direct=1 --rw=write --bs=1m --iodepth=4",
    "two jobs, each its half": "--direct=1 --rw=randwrite --bs=8k --iodepth=8 --numjobs=2 --group_reporting",
    "fsync after each 8": "--direct=1 --rw=randwrite --bs=4k --iodepth=4 --fsync=8 --io_size=8m",
    "through the page cache": "--direct=0 --rw=randwrite --bs=4k --iodepth=1 --invalidate=1 --io_size=16m",
}
_KEPT = "--direct=1 --rw=randwrite --bs=4k --iodepth=32 --do_verify=0"


def suite(place: Place) -> Suite:
    """On the device, by the worker and guest that come after, and on file systems."""
    return Suite(
        "fio",
        (
            # Not encrypted: the keys would end with the guest.
            Part("the device", lambda: place.plain([_DEVICE_MIB], memory_mib=_MEMORY_MIB, encrypt=False), _on_device),
            Part(
                "the device, after a new boot",
                lambda: place.plain([_DEVICE_MIB], memory_mib=_MEMORY_MIB, encrypt=False, fresh=False),
                lambda bench: [_test("what the last guest wrote", f"{_KEPT} --verify_only", bench.devices[0], "")],
            ),
            *(_on(place, kind) for kind in ("ext4", "xfs")),
        ),
    )


def _on_device(bench: Bench) -> list[Test]:
    (device,) = bench.devices
    trim = {"trim and write": "--direct=1 --rw=randtrimwrite --bs=4k --iodepth=8"}
    jobs = {**_JOBS, **trim, "written for the next guest": f"{_KEPT} --end_fsync=1"}
    return [_test(name, options, device, "") for name, options in jobs.items()]


def _on(place: Place, kind: str) -> Part:
    def tests(bench: Bench) -> list[Test]:
        # Its page cache is smaller than the file: what is read comes from the device.
        jobs = [_test(name, options, f"{WHERE}/file", "--fallocate=none") for name, options in _JOBS.items()]
        return [*jobs, Test("the file system is whole", checked(kind, bench.devices[0]), 900)]

    return Part(
        kind, lambda: place.file_system(kind, _DEVICE_MIB, memory_mib=_MEMORY_MIB, limit_mib=_SIZE_MIB // 2), tests
    )


def _test(name: str, options: str, file: str, more: str) -> Test:
    halves = "--numjobs=2" in options
    size = f"--size={_SIZE_MIB // 2}m --offset_increment={_SIZE_MIB // 2}m" if halves else f"--size={_SIZE_MIB}m"
    command = f"exec fio --name=world --filename={file} {size} {_COMMON} {options} {more}"
    return Test(name, limited(command) if more else command, _TIMEOUT_S, judged)


def judged(result: Result) -> tuple[str, str]:
    if result.status == 0 and "err= 0" in result.stdout:
        return "passed", ""
    complaints = [line for line in (result.stderr + result.stdout).splitlines() if "verify" in line or "err=" in line]
    return "failed", complaints[0].strip() if complaints else last_words(result)
