# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel with pages of 16 KiB, as far as one with 4 KiB can tell: what asks for the page size gets that one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Before anything of nbdnfs is imported.
PREAMBLE = """
import os, sys
from pathlib import Path
real = os.sysconf
os.sysconf = lambda name: 16384 if name == "SC_PAGE_SIZE" else real(name)
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python program on that kernel."""
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + program, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_sizes() -> None:
    """The kernel's page follows, the engine's slot does not; what is made of the two is right."""
    done = run(
        "from nbdnfs import backing_size, sizes\n"
        "print(sizes.KERNEL_PAGE_BYTES, sizes.SLOT_BYTES, backing_size.MIN_BYTES)"
    )
    assert (done.stdout, done.stderr) == ("16384 4096 163840\n", "")


def test_the_largest_request_is_a_page_at_least() -> None:
    """queue_max_sectors_store() in block/blk-sysfs.c refuses less."""
    program = (
        "from nbdnfs.config_keys import KEYS\nfrom nbdnfs.errors import UsageError\n"
        "try:\n    print(KEYS['max_sectors'].value('max_sectors', sys.argv[1], Path('/')))\n"
        "except UsageError as error:\n    print(error.hint)\n"
    )
    assert run(program, "16K").stdout == "16\n"
    assert run(program, "8K").stdout == 'it must be from 16 KiB to 32 MiB, for example "128K"\n'


def test_swap_comes_up_at_each_boot(tmp_path: Path) -> None:
    """The helper that turns swap on, with everything but swapon itself and the warm-up of a device."""
    area = tmp_path / "area"
    area.write_bytes(bytes(1 << 20))
    program = (
        "from nbdnfs import programs\nfrom nbdnfs.keeper.helpers import swap_on\nfrom nbdnfs.kernel import warm_up\n"
        "from nbdnfs.nas import existing_file\nexisting_file.swap_page_bytes = lambda url: None\n"  # zeros on the NAS
        "warm_up.warm_up = lambda path, *, timeout_s: None\n"
        "find = programs.find_program\n"
        "programs.find_program = lambda name, package: '/bin/true' if name == 'swapon' else find(name, package)\n"
        "sys.exit(swap_on.main(sys.argv[1:]))\n"
    )
    first = run(program, str(area), "-", "swap0", "nfs://nas/export/area")
    assert (first.returncode, first.stderr) == (0, "")
    made = area.read_bytes()
    assert made[16374:16384] == b"SWAPSPACE2"
    second = run(program, str(area), "-", "swap0", "nfs://nas/export/area", "--owned")
    assert (second.returncode, second.stderr) == (0, "")
    assert area.read_bytes() == made
