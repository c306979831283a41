# SPDX-License-Identifier: LGPL-2.1-or-later
"""The world's own tests of file systems, block devices and memory, in guests, on a device of ours.

    python vm-tests/run_world.py --only fio,stress-ng
    python vm-tests/run_world.py --ltp /opt/ltp --xfstests /src/xfstests --blktests /src/blktests

fio and stress-ng are Debian's. The other suites are not packaged: build each as its own documentation says, in the
Debian of the guest, and name its folder. fsx comes with xfstests.

What they came to is kept in build/world.json, also from one run to the next; --write puts it into docs/proof.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from support.nfs_server import Ganesha
from vmtest import image, initramfs
from vmtest.more_packages import with_packages
from vmtest.outcome import HarnessError
from vmtest.payload import payload
from world import blktests, fio, fsx, ltp, outcomes, stress_ng, xfstests
from world.benches import Place
from world.run import run_suite

_SUITES = {
    "fio": fio.suite,
    "stress-ng": stress_ng.suite,
    "fsx": fsx.suite,
    "ltp": ltp.suite,
    "blktests": blktests.suite,
    "xfstests": xfstests.suite,
}
# What the suites need of Debian.
_PACKAGES = (
    *("fio", "stress-ng", "xfsprogs", "libaio1", "acl", "attr", "bc", "bsdextrautils", "file", "gawk", "perl"),
    *("parted", "psmisc", "quota", "uuid-runtime", "liburing2", "libgdbm6"),
)
_RESULTS = Path(__file__).parents[1] / "build/world.json"


def main() -> int:
    """0: nothing failed and no guest was lost. 1: something did; 2: the run broke off."""
    options = _options()
    try:
        bad = 0 if options.table else _run(options)
    except HarnessError as error:
        print(f"world: {error}", file=sys.stderr)
        return 2
    text = outcomes.page_of(outcomes.load(_RESULTS), _SUITES)
    print(text)
    if options.write:
        outcomes.put_page(text)
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(_SUITES), metavar="SUITE,…", help=f"of {', '.join(_SUITES)} (all)")
    parser.add_argument("--on", default="", metavar="GLOB,…", help="run the parts that the table has as such alone")
    parser.add_argument("--tests", default="", metavar="GLOB,…", help="run the tests with such names alone")
    parser.add_argument("--minutes", type=float, default=240.0, help="a suite begins no test after so long (240)")
    for name in ("ltp", "xfstests", "blktests"):
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=f"where {name} was built or installed")
    parser.add_argument("--table", action="store_true", help="print what is known, and run nothing")
    parser.add_argument("--write", action="store_true", help="put the table into docs/proof.md")
    options = parser.parse_args()
    options.only = [name for name in options.only.split(",") if name]
    options.on = [pattern for pattern in options.on.split(",") if pattern]
    options.tests = [pattern for pattern in options.tests.split(",") if pattern]
    if unknown := set(options.only) - _SUITES.keys():
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    return options


def _run(options: argparse.Namespace) -> int:
    """How many outcomes are neither "passed" nor "not run"."""
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - started:7.1f} s] {text}", flush=True)

    over = _asked_to_end(tell)
    tell("preparing an image with fio and stress-ng")
    built = with_packages(image.default_image(), "world", _PACKAGES)
    initramfs.initrd(built)
    payload(built, project=True)
    extras = {name: getattr(options, name) for name in ("ltp", "xfstests", "blktests") if getattr(options, name)}
    on, date = f"{built.suite}, {built.modules.name}", datetime.date.today().isoformat()
    bad = 0
    for name in options.only:
        new: list[outcomes.Outcome] = []
        old = outcomes.load(_RESULTS)
        with tempfile.TemporaryDirectory(prefix="nbdnfs-world-") as folder, Ganesha(Path(folder) / "nas") as server:
            suite = _SUITES[name](Place(built, server, Path(folder), extras))
            until = time.monotonic() + 60 * options.minutes
            is_over = lambda until=until: over.is_set() or time.monotonic() > until  # noqa: E731
            for one in run_suite(suite, on=options.on, patterns=options.tests, is_over=is_over, tell=tell):
                new.append(dataclasses.replace(one, on=on, date=date))
                outcomes.save(_RESULTS, outcomes.merged(old, new, whole=not options.tests))
        bad += sum(one.result in ("failed", "lost") for one in new)
    return bad


def _asked_to_end(tell: Callable[[str], None]) -> threading.Event:
    """Set by the first SIGINT or SIGTERM: no test begins any more, and none goes missing. The second one kills."""
    over = threading.Event()

    def ask(number: int, _: FrameType | None) -> None:
        over.set()
        signal.signal(number, signal.SIG_DFL)
        tell("no test begins any more; once more to end at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return over


if __name__ == "__main__":
    sys.exit(main())
