#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the engine's read-ahead makes of traces of vm_trace.py: `read_ahead.py [--runs] [--engine FOLDER] [TRACE ...]`

For each trace, of how many reads the reader waits for the NAS, and how many pages were fetched ahead and read. The
model is read_ahead.c. `--engine` takes streams.c and streams.h from another copy of nbdnfs/engine, to compare two.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_ENGINE = _HERE.parent / "nbdnfs/engine"
_PAGES_A_MIB = 256
_WINDOW_PAGES = 64
_RUNS = (2, 4, 8, 16, 32, 64)
_RUN_READS = 60_000
_DEVICE_PAGES = 1 << 18


@dataclass(frozen=True)
class Guessed:
    """Requests: `reads`, and those `waiting` for a page that was in no slot; READs to the NAS: `fetches`. Pages:
    `fetched` ahead, of which `used` were read and `wasted` were dropped unread."""

    reads: int
    waiting: int
    fetched: int
    fetches: int
    used: int
    wasted: int


def build(engine: Path, folder: Path) -> Path:
    """The model with that engine's streams.c. CalledProcessError when it does not compile."""
    program = folder / "read_ahead"
    sources = [str(_HERE / "read_ahead.c"), str(engine / "block/streams.c")]
    subprocess.run(["gcc", "-std=gnu11", "-O2", f"-I{engine}", "-o", str(program), *sources], check=True)
    return program


def play(program: Path, trace: str, region_mib: int) -> Guessed:
    """`trace` is the text. CalledProcessError where a line is not a request."""
    command = [str(program), str(region_mib * _PAGES_A_MIB), str(_WINDOW_PAGES)]
    done = subprocess.run(command, input=trace, capture_output=True, text=True, check=True)
    return Guessed(**json.loads(done.stdout))


def runs(pages: int) -> str:
    """A trace of reads of one page each: so many in a row, and then at another place of a device of 1 GiB."""
    draw = random.Random(pages)
    starts = (draw.randrange(_DEVICE_PAGES - pages) for _ in range(_RUN_READS // pages))
    return "".join(f"0 R {start + at} 1\n" for start in starts for at in range(pages))


def _line(name: str, found: Guessed) -> str:
    share, used = found.waiting / max(found.reads, 1), found.used / max(found.fetched, 1)
    return f"{name:28} {found.reads:9,} {found.waiting:9,} {share:6.3f} {found.fetched:9,} {used:6.2f}"


def main() -> int:
    """Print a line for each trace."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    parser.add_argument("--runs", action="store_true", help="runs of pages at random places, read one by one")
    parser.add_argument("--region", type=int, default=16, metavar="MIB", help="default 16")
    parser.add_argument("--engine", type=Path, default=_ENGINE, metavar="FOLDER")
    options = parser.parse_args()
    if options.region < 1:
        parser.error("--region: at least 1")
    if not options.traces and not options.runs:
        parser.error("name a trace, or give --runs")
    with tempfile.TemporaryDirectory(prefix="nbdnfs-bench-") as folder:
        try:
            program = build(options.engine, Path(folder))
        except (OSError, subprocess.CalledProcessError):
            print("read_ahead.py: the model was not built: see above, and check --engine", file=sys.stderr)
            return 69
        print(f"{'':28} {'reads':>9} {'waiting':>9} {'share':>6} {'fetched':>9} {'used':>6}")
        for pages in _RUNS if options.runs else ():
            print(_line(f"runs of {pages} pages", play(program, runs(pages), options.region)))
        for path in options.traces:
            try:
                with gzip.open(path, "rt") as file:
                    found = play(program, file.read(), options.region)
            except (OSError, ValueError, EOFError, zlib.error, subprocess.CalledProcessError):
                print(f"read_ahead.py: {path} is not a trace: record one with vm.py --trace", file=sys.stderr)
                return 65
            print(_line(path.name, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
