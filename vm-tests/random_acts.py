# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random acts of an administrator, right and wrong ones, while a program swaps and checks every page.

    python vm-tests/random_acts.py --seed 7 --acts 200

The seed fixes the acts. After each one a model says what the machine must come to, and the machine is looked at until
it has: swap, device, processes, the unit, and what `nbdnfs status` says of them. The run's verdict has each act that
ended otherwise. After such an act the guest boots anew, and the run goes on.

`make vm-test` has twenty acts of it (test_random_acts.py).
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from support.nfs_server import Ganesha, ServerError
from vmtest import image, initramfs
from vmtest.acts import ACTS, Run
from vmtest.guest import Guest
from vmtest.outcome import GuestFailedError, HarnessError, LostGuestError
from vmtest.payload import payload
from vmtest.wheels import wheel

GUEST_MIB = 384
# What a kill, a NAS that pauses and a swap area that goes away look like in the kernel's log. A task that waits for
# longer than a minute is seen on a busy host, too, at boot already. A deadlock shows as an act that does not end.
EXPECTED = frozenset({"nbd", "slow", "hung"})


def main() -> int:
    """0: each act came to what it must. 1: not each; 2: the run broke off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31), help="fixes the acts")
    parser.add_argument("--acts", type=int, default=200, metavar="N", help="how many (200)")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M", help="begin no act after so long (no limit)")
    parser.add_argument("--only", default="", metavar="ACT,…", help="choose among these alone")
    parser.add_argument("--without", default="", metavar="ACT,…", help="leave these out")
    parser.add_argument("--stop", action="store_true", help="stop at the first act that ends otherwise")
    parser.add_argument("--list", action="store_true", help="list the acts, and do nothing")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:<16} {act.__doc__}" for name, act in ACTS.items()))
        return 0
    only, without = ({word for word in text.split(",") if word} for text in (options.only, options.without))
    if unknown := (only | without) - ACTS.keys():
        parser.error(f"no such act: {', '.join(sorted(unknown))}")
    names = [name for name in ACTS if name not in without and (name in only or not only)]
    folder = Path(tempfile.mkdtemp(prefix="nbdnfs-acts-"))
    print(f"--seed {options.seed} --acts {options.acts}; the guest's logs are in {folder}", flush=True)
    try:
        limit_s = 60 * options.minutes or float("inf")
        done, failures = run(folder, options.seed, options.acts, names, stop=options.stop, limit_s=limit_s)
    except (HarnessError, ServerError, GuestFailedError, LostGuestError) as error:
        print(f"the run broke off: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2
    print(f"--seed {options.seed}: {done} acts, {len(failures)} of them ended otherwise than they must")
    print("\n".join(failures))
    if not failures:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures else 0


def run(folder: Path, seed: int, acts: int, names: list[str], *, stop: bool, limit_s: float) -> tuple[int, list[str]]:
    """How many acts were done, and the failures, a text each."""
    built = image.default_image()
    initramfs.initrd(built)
    with Ganesha(folder / "nas") as server:
        guest = Guest(built, payload(built, project=True), folder, memory_mib=GUEST_MIB, allow=EXPECTED)
        with guest:
            acting = Run(guest, server, wheel, seed, names)
            failures = acting.do(acts, stop=stop, limit_s=limit_s)
            return acting.done, failures


if __name__ == "__main__":
    sys.exit(main())
