# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where /sys is not mounted, no device looks attached: nothing is taken for down because of that."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nbdnfs import programs

pytestmark = pytest.mark.server  # root

# In a mount namespace of its own, so that this machine's /sys stays, and /run/nbdnfs as well.
_APART = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys && mount -t tmpfs none /run && exec "$@"', "sh"]
_ERROR = ["nbdnfs: /sys is not mounted", "nbdnfs: mount -t sysfs sysfs /sys"]

_DOWN = """
import os, subprocess, sys
from nbdnfs import cli
from nbdnfs.keeper.records import Records

records = Records("swap0")
records.make()
records.write(Records.STATE, "watch")
null = subprocess.DEVNULL
processes = [subprocess.Popen(["/bin/sleep", "60"], stdout=null, stderr=null) for _ in range(3)]
for key, process in zip((Records.KEEPER, Records.WORKER, Records.STANDBY), processes):
    assert records.put_process(key, process.pid, "0.0.1")
before = sorted(os.listdir(records.path))
try:
    status = cli.main(["down", "swap0"])
    assert [process.poll() for process in processes] == [None] * 3, "it has ended what it must keep"
    assert sorted(os.listdir(records.path)) == before
finally:
    for process in processes:
        process.kill()
sys.exit(status)
"""


def apart(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_APART, *command],
        capture_output=True,
        text=True,
        timeout=60,
        env=programs.python_environment(),
    )


def test_down() -> None:
    """It would end keeper, worker and standby of a device with swap on it: it refuses, and nothing has changed."""
    done = apart(sys.executable, "-c", _DOWN)
    assert (done.returncode, done.stderr.splitlines()) == (69, _ERROR)


@pytest.mark.parametrize(
    "command", [("status",), ("status", "swap0"), ("list",), ("metrics",), ("run", "swap0")], ids=" ".join
)
def test_an_error_of_two_lines(command: tuple[str, ...]) -> None:
    """What is wrong, and what to do."""
    done = apart(sys.executable, "-m", "nbdnfs", *command)
    assert (done.returncode, done.stderr.splitlines()[-2:]) == (69, _ERROR)
    assert "Traceback" not in done.stderr
