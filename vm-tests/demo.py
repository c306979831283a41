# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demo behind `make demo`: a machine swaps onto a file on an NFS server, and every page is checked.

A throwaway NFS server runs on this host's loopback; the machine is a Debian guest in QEMU or, with --here, this one.
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
_STRESS_TIMEOUT_S = 1200.0


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
    parser.add_argument("-v", "--verbose", action="store_true", help="show the programs that are started")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        measured = _run(Teller(), arguments.here)
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


def _run(tell: Teller, here: bool) -> swap.Measured:
    if here:
        check_here()
    host.need_root("the throwaway NFS server")
    with contextlib.ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdnfs-demo-")))
        tell("starting NFS-Ganesha on loopback")
        server = stack.enter_context(Ganesha(workdir / "nas"))
        tell(f"creating a backing file of {_FILE_MIB} MiB: nbdnfs create")
        url = server.url("demo.swap")
        host.nbdnfs_create(url, _FILE_MIB, timeout_s=300)
        sizes = {"size_mib": _HOG_MIB, "limit_mib": _LIMIT_MIB}
        if here:
            machine = stack.enter_context(LocalMachine())
            return swap.run(machine, url, **sizes, timeout_s=_STRESS_TIMEOUT_S, tell=tell, on_progress=tell.progress)
        return _in_guest(tell, workdir, url, sizes)


def _in_guest(tell: Teller, workdir: Path, url: str, sizes: dict[str, int]) -> swap.Measured:
    suite, kernel = image.default_suite(), image.default_kernel()
    tell(f"preparing a guest image of Debian {suite}, {kernel} kernel (about two minutes the first time, then cached)")
    built = image.image(suite, kernel)
    initramfs.initrd(built)
    tell("building nbdnfs for the guest")
    disk = payload(built, project=True)
    tell(f"booting a guest with {_GUEST_MIB} MiB in QEMU, without hardware acceleration")
    with Guest(built, disk, workdir / "guest", memory_mib=_GUEST_MIB) as guest:
        guest.settle()
        kernel = guest.run("uname -r").stdout.strip()
        tell(f"the guest runs Linux {kernel}")
        measured = swap.run(
            guest,
            seen_from_guest(url),
            **sizes,
            timeout_s=_STRESS_TIMEOUT_S,
            tell=tell,
            on_progress=tell.progress,
        )
        tell("powering off")
        guest.shutdown()
    return measured


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
