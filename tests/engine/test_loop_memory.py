# SPDX-License-Identifier: LGPL-2.1-or-later
"""The loop where the kernel has no memory for a socket, now and then: nothing ends because of that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What moves much, with many requests under way, and a client that leaves.
TESTS = "test_model or test_many_at_once or test_a_client_that_does_not_receive or test_disconnect or hangs_up"


@pytest.mark.timeout(300)
def test_sockets_that_fail(tmp_path: Path) -> None:
    """The loop's own tests pass while every third message fails with ENOBUFS or ENOMEM, and others are cut short."""
    library = tmp_path / "poor_socket.so"
    source = HERE / "poor_socket.c"
    subprocess.run(["cc", "-std=c11", "-Wall", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    before = os.environ.get("LD_PRELOAD", "")  # a sanitizer's, which must be the first
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS, HERE / "test_loop.py"]
    done = subprocess.run(
        argv,
        cwd=HERE.parents[1],
        env={**os.environ, "LD_PRELOAD": f"{before} {library}".strip()},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
