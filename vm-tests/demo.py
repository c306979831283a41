# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demo behind `make demo`: a machine swaps onto a file on an NFS server, and every page is checked.

A throwaway NFS server runs on this host's loopback; the machine is a Debian guest in QEMU or, with --here, this one.
With --diskless the guest has no disk: the same server has its root, and the kernel command line is all it is given.
Exit status 0 when pages went out and came in, none was wrong and nothing was killed; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from support.nfs_server import Ganesha, ServerError
from vmtest import diskless as diskless_roots
from vmtest import host, image, initramfs, swap
from vmtest.guest import Guest, seen_from_guest
from vmtest.local import LocalMachine, check_here
from vmtest.outcome import GuestFailedError, HarnessError, LostGuestError
from vmtest.payload import payload
from vmtest.verdict import Progress

_FILE_MIB = 256
_HOG_MIB = 64
_LIMIT_MIB = _HOG_MIB // 4
_GUEST_MIB = 512
# The guest makes it, and reads all of it before it makes a swap area there.
_DISKLESS_FILE_MIB = 96
_BOOT_TIMEOUT_S = 600.0
_STRESS_TIMEOUT_S = 1200.0
_POWER_OFF_TIMEOUT_S = 150.0
# What a slow host, or one with other work, makes the kernel report: nothing is wrong with the guest.
_ALLOWED = frozenset({"slow"})


class Teller:
    """Prints progress, each line with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = ("", -1)

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def progress(self, progress: Progress) -> None:
        """One line for every quarter of a pass."""
        quarter = 4 * progress.done // progress.pages
        if (progress.order, quarter) == self._shown or not quarter:
            return
        self._shown = (progress.order, quarter)
        self(f"  {progress.order:<10}  {25 * quarter:3}%  wrong pages: {progress.wrong}")


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description="A machine swaps onto a file on an NFS server; a table at the end.")
    parser.add_argument("--here", action="store_true", help="use this machine, which must have nbd, instead of a guest")
    parser.add_argument("--diskless", action="store_true", help="use a guest that boots from the server, too")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the programs that are started")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        measured = _run(Teller(), here=arguments.here, diskless=arguments.diskless)
        print(f"\n{measured.table()}\n", flush=True)
        measured.check()
    except HarnessError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except ServerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except GuestFailedError as error:
        print(f"demo: failed: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except LostGuestError as error:
        print(f"demo: the guest is lost: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 0


def _run(tell: Teller, *, here: bool, diskless: bool) -> swap.Measured:
    if here:
        check_here()
    host.need_root("the throwaway NFS server")
    with contextlib.ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdnfs-demo-")))
        tell("starting NFS-Ganesha on loopback")
        server = stack.enter_context(Ganesha(workdir / "nas", attr_cache_s=60 if diskless else 0))
        if diskless:
            return _without_a_disk(tell, workdir, server)
        tell(f"creating a backing file of {_FILE_MIB} MiB: nbdnfs create")
        url = server.url("demo.swap")
        host.nbdnfs_create(url, _FILE_MIB, timeout_s=300)
        sizes = {"size_mib": _HOG_MIB, "limit_mib": _LIMIT_MIB}
        if here:
            machine = stack.enter_context(LocalMachine())
            return swap.run(machine, url, **sizes, timeout_s=_STRESS_TIMEOUT_S, tell=tell, on_progress=tell.progress)
        return _in_guest(tell, workdir, url, sizes)


def _in_guest(tell: Teller, workdir: Path, url: str, sizes: dict[str, int]) -> swap.Measured:
    built, disk = _prepare(tell)
    tell(f"booting a guest with {_GUEST_MIB} MiB in QEMU, without hardware acceleration")
    with Guest(built, disk, workdir / "guest", memory_mib=_GUEST_MIB, allow=_ALLOWED) as guest:
        guest.settle()
        tell(f"the guest runs Linux {guest.run('uname -r').stdout.strip()}")
        measured = swap.run(
            guest,
            seen_from_guest(url),
            **sizes,
            timeout_s=_STRESS_TIMEOUT_S,
            tell=tell,
            on_progress=tell.progress,
        )
        tell("powering off")
        tell(f"off after {guest.shutdown(_POWER_OFF_TIMEOUT_S):.1f} s")
    return measured


def _without_a_disk(tell: Teller, workdir: Path, server: Ganesha) -> swap.Measured:
    built, disk = _prepare(tell)
    tell("putting the guest's root on the server")
    root = diskless_roots.export("nfs", built, disk, server)
    url = seen_from_guest(server.url("demo.swap"))
    arguments = (f"nbdnfs.url={url}", f"nbdnfs.size={_DISKLESS_FILE_MIB}M")
    tell(f"booting a guest without a disk, with {_GUEST_MIB} MiB: root on NFS, {' '.join(arguments)}")
    with Guest(
        built, disk, workdir / "guest", root=root, memory_mib=_GUEST_MIB, arguments=arguments, allow=_ALLOWED
    ) as guest:
        mounted = guest.run("findmnt -no FSTYPE,SOURCE /").stdout.split()
        tell(f"the guest runs Linux {guest.run('uname -r').stdout.strip()}; its root is {' '.join(mounted)}")
        tell(f"nbdnfs@cmdline makes a file of {_DISKLESS_FILE_MIB} MiB on the server, and swaps to it")
        guest.run("until grep -q ^/dev/nbd /proc/swaps; do sleep 0.5; done", _BOOT_TIMEOUT_S)
        guest.settle()
        worker = guest.run("cut -d ' ' -f 1 /run/nbdnfs/cmdline/worker").stdout
        measured = swap.measure(
            guest,
            "/dev/" + guest.run("cat /run/nbdnfs/cmdline/device").stdout.strip(),
            int(worker),
            size_mib=_HOG_MIB,
            limit_mib=_LIMIT_MIB,
            timeout_s=_STRESS_TIMEOUT_S,
            tell=tell,
            on_progress=tell.progress,
        )
        tell("powering off")
        tell(f"off after {guest.shutdown(_POWER_OFF_TIMEOUT_S):.1f} s")
    return measured


def _prepare(tell: Teller) -> tuple[image.Image, Path]:
    """The guest's image, and nbdnfs for it."""
    tell(f"preparing a guest image, {image.default_name()} (about two minutes the first time, then cached)")
    built = image.default_image()
    initramfs.initrd(built)
    tell("building nbdnfs for the guest")
    return built, payload(built, project=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
