# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults, an administrator's acts and loads at once, in guests of both Debians, for hours.

    python vm-tests/soak.py --hours 8 --seed 7

A round is one guest. In it a program swaps and checks each of its pages, another one reads files all the time, random
acts are done (random_acts.py), and faults of the NAS and of the network before it strike (tests/support/strikes.py):
both from the round's seed, each on its own. The report is in build/soak.md after each round.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from random_acts import EXPECTED, GUEST_MIB
from support.nfs_server import Ganesha, ServerError
from support.proxy import TcpProxy
from support.small_filesystem import small_filesystem
from support.strikes import Strikes
from vmtest import image, initramfs
from vmtest.acts import ACTS, DEVICE_MIB, Run
from vmtest.architecture import default_architecture
from vmtest.guest import Guest
from vmtest.image import SUITES
from vmtest.outcome import GuestFailedError, HarnessError, LostGuestError
from vmtest.payload import payload
from vmtest.wheels import wheel

REPORT = Path(__file__).parents[1] / "build/soak.md"
# The strikes have it, too, and two of one kind at once would undo each other.
_NAMES = [name for name in ACTS if name != "pause-nas"]
_MIB = 1 << 20
_FAULT_S = (1.0, 12.0)
# Long enough for the machine to become what an act must come to.
_QUIET_S = (30.0, 90.0)
# The page cache of these files takes the memory that the pages of the load are in.
_READ_FILES = "while :; do find /usr/lib -type f -size -2000k -exec cat {} + > /dev/null 2>&1; sleep 5; done"


# No round is shorter, but the first: a guest takes minutes until it swaps.
_ROUND_S_MIN = 600.0


@dataclass
class Round:
    """What one guest came to. `broke_off`: why it ended before its time."""

    number: int
    suite: str
    seed: int
    minutes: float = 0.0
    acts: int = 0
    checked: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    broke_off: str = ""

    @property
    def is_good(self) -> bool:
        return not self.failures and not self.broke_off and self.checked > 0


def report(rounds: list[Round], wanted_hours: float) -> str:
    """Markdown: sums, a row for each round, and what ended otherwise than it must."""
    hours = sum(one.minutes for one in rounds) / 60
    faults = sum((one.faults for one in rounds), Counter[str]())
    bad = [one for one in rounds if not one.is_good]
    lines = [
        "# Soak",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {hours:.1f} hours of guests, of {wanted_hours:g} hours that were"
        f" asked for; {len(rounds)} rounds, {len(bad)} of them not as they must be.",
        "",
        "| round | Debian | seed | minutes | acts | faults | pages checked | |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in rounds:
        bad_because = f"{len(one.failures)} failures" if one.failures else "no page was checked"
        state = "good" if one.is_good else one.broke_off or bad_because
        numbers = f"{one.seed} | {one.minutes:.0f} | {one.acts} | {one.faults.total()} | {one.checked:,}"
        lines.append(f"| {one.number} | {one.suite} | {numbers} | {' '.join(state.split())} |")
    lines += ["", "| fault | times |", "| --- | ---: |"]
    lines += [f"| {name} | {count} |" for name, count in sorted(faults.items())]
    for one in bad:
        lines += ["", f"## Round {one.number}: `--seed {one.seed} --suites {one.suite}`", "", "```"]
        lines += [*one.failures, *([one.broke_off] if one.broke_off else []), "```"]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def striking(strikes: Strikes, draw: random.Random, counted: Counter[str]) -> Iterator[None]:
    """Faults, one after the other, until the end; the last one is mended. A fault that cannot be made or mended is what
    is raised at the end, as ServerError for a server that is not back, whatever became of the guest because of it."""
    over = threading.Event()
    errors: list[Exception] = []
    of_guest: Exception | None = None

    def strike() -> None:
        try:
            while not over.wait(draw.uniform(*_QUIET_S)):
                name, mend = strikes.strike()
                counted[name] += 1
                over.wait(draw.uniform(*_FAULT_S))
                mend()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=strike, name="strikes")
    thread.start()
    try:
        yield
    except Exception as error:
        of_guest = error
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0] from of_guest
    if of_guest is not None:
        raise of_guest


def run_round(one: Round, folder: Path, minutes: float) -> Round:
    """Fills it in. Logs of the guest stay in `folder` where it is not good."""
    started = monotonic()
    try:
        built = image.image(one.suite, next(iter(default_architecture().kernels)), default_architecture())
        initramfs.initrd(built)
        with contextlib.ExitStack() as stack:
            small = stack.enter_context(small_filesystem(folder / "export", 2 * DEVICE_MIB * _MIB))
            server = stack.enter_context(Ganesha(folder / "nas", export=small))
            proxy = stack.enter_context(TcpProxy(server.nfs_port))
            guest = Guest(built, payload(built, project=True), folder, memory_mib=GUEST_MIB, allow=EXPECTED)
            stack.enter_context(guest)
            acting = Run(guest, server, wheel, one.seed, _NAMES, nfs_port=proxy.port)
            draw = random.Random(one.seed)
            with striking(Strikes(server, proxy, draw), draw, one.faults):
                guest.start(_READ_FILES, 60 * minutes + 3600)
                try:
                    one.failures = acting.do(sys.maxsize, stop=False, limit_s=60 * minutes)
                finally:
                    one.acts, one.checked = acting.done, acting.checked
    except (GuestFailedError, LostGuestError, ServerError) as error:
        one.broke_off = str(error)
    except HarnessError:
        raise
    except (OSError, RuntimeError) as error:
        one.broke_off = f"on the host: {error!r}"
    one.minutes = (monotonic() - started) / 60
    return one


def main() -> int:
    """0: each round was good. 1: not each; 2: it could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0, help="no round begins later (1)")
    parser.add_argument("--minutes", type=float, default=45.0, metavar="M", help="of one round (45)")
    parser.add_argument("--guests", type=int, default=1, metavar="N", help="so many at once (1)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31), help="of the first round")
    parser.add_argument("--suites", default=",".join(SUITES), metavar="SUITE,…", help="taken in turns")
    options = parser.parse_args()
    suites = options.suites.split(",")
    if unknown := set(suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    folder = Path(tempfile.mkdtemp(prefix="nbdnfs-soak-"))
    print(f"--seed {options.seed}; logs of rounds that are not good are in {folder}", flush=True)
    try:
        rounds = soak(folder, suites, options)
    except HarnessError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    print(report(rounds, options.hours))
    return 0 if all(one.is_good for one in rounds) else 1


def soak(folder: Path, suites: list[str], options: argparse.Namespace) -> list[Round]:
    """Rounds until the time is up, so many at once as there are to be guests."""
    until = monotonic() + 3600 * options.hours
    done: list[Round] = []
    lock = threading.Lock()  # guards `done`, the report and `begun`
    begun = 0

    def work() -> None:
        nonlocal begun
        shortest_s = 0.0
        while (left_s := until - monotonic()) > shortest_s:
            shortest_s = _ROUND_S_MIN
            with lock:
                number, begun = begun, begun + 1
            one = Round(number + 1, suites[number % len(suites)], options.seed + number)
            place = folder / f"{one.number}"
            run_round(one, place, min(options.minutes, left_s / 60))
            if one.is_good:
                shutil.rmtree(place, ignore_errors=True)
            with lock:
                done.append(one)
                REPORT.parent.mkdir(exist_ok=True)
                REPORT.write_text(report(sorted(done, key=lambda each: each.number), options.hours))

    with ThreadPoolExecutor(options.guests) as pool:
        for worker in [pool.submit(work) for _ in range(options.guests)]:
            worker.result()
    return sorted(done, key=lambda each: each.number)


if __name__ == "__main__":
    sys.exit(main())
