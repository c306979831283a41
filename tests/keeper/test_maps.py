# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper's process, from `nbdnfs run` up to its loop: what it has mapped, and what it has imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# the keeper looks for nbdkit before its loop
pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]

# `nbdnfs run t`, with a configuration below another root, on a machine that need not have the nbd driver. In place of
# its loop the keeper prints what is asked here.
PROGRAM = """
import json, os, sys
from pathlib import Path

root = Path(sys.argv[1])
sys.argv = ["nbdnfs", "run", "t"]
from nbdnfs import cli, config
from nbdnfs.keeper import keeper, main, records


class Kernel:
    def __init__(self, *arguments, **options):
        pass

    def find(self):
        return None


def report(self):
    with open("/proc/self/maps") as maps, open("/proc/self/status") as status:
        files = sorted({line.split(maxsplit=5)[5].strip() for line in maps if "/" in line})
        lines = [line.split() for line in status if line.startswith(("VmRSS", "RssAnon"))]
        sizes = {words[0]: int(words[1]) for words in lines}
    print(json.dumps({"files": files, "modules": sorted(sys.modules), "sizes_kib": sizes}))
    return 0


load = config.load
config.load = lambda name, _: load(name, root)
os.geteuid = lambda: 0
main.nbd_device.find = lambda backend: None
main.nbd_device.NbdKernel = Kernel
main.nbd_driver.load = lambda: None
records.Records.__init__.__kwdefaults__["run"] = root / "run"
keeper.Keeper.run = report
cli.main()
"""


@pytest.fixture(scope="module")
def keeper_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What it has reported."""
    root = tmp_path_factory.mktemp("root")
    (root / "etc/nbdnfs").mkdir(parents=True)
    (root / "etc/nbdnfs/t.toml").write_text('url = "nfs://127.0.0.1/export/t.swap"\nlock = "off"\n')
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root)],
        env={**os.environ, "PYTHONMALLOC": "malloc", "LD_BIND_NOW": "1"},
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    print(found["sizes_kib"], "with", len(found["modules"]), "modules")
    return found


def test_neither_engine_nor_libnfs_is_mapped(keeper_process: dict[str, list[str]]) -> None:
    """Both would be in locked memory, and the keeper does no I/O on the server."""
    names = [file.rpartition("/")[2] for file in keeper_process["files"]]
    assert any(name.startswith("_memlock.") for name in names), "the maps are those of the keeper"
    assert not [name for name in names if name.startswith(("_engine.", "libnfs"))]


@pytest.mark.parametrize(
    "module",
    [
        *("nbdnfs.engine", "nbdnfs.nas.explain", "nbdnfs.nas.ownership", "nbdnfs.nas.backing_file"),
        *("nbdnfs.worker.life", "nbdnfs.parser", "argparse", "shutil"),
    ],
)
def test_what_stays_unloaded(keeper_process: dict[str, list[str]], module: str) -> None:
    """What helpers and workers need, they import themselves; and the unit's command line needs no parser."""
    assert module not in keeper_process["modules"]
