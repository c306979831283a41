# SPDX-License-Identifier: LGPL-2.1-or-later
"""The size of the device is what the server says: it may not cost more memory than the machine can spare."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from support.engines import PAGE, OpenEngine
from support.fake_nfs import FakeNfsServer

from nbdnfs.engine import NfsError

GIB, MIB = 1 << 30, 1 << 20
LIMIT_BYTES = max(64 * MIB, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
# Four bytes for each page are twice the limit.
CLAIMED_BYTES = 2 * LIMIT_BYTES // 4 * PAGE


def resident_bytes() -> int:
    """The most that this process has had. proc_pid_status(5)."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_a_file_that_is_too_large_is_refused(open_engine: OpenEngine) -> None:
    """With the figures, and before memory is used for it."""
    with FakeNfsServer(bytes(MIB)) as server:
        server.claim_size(CLAIMED_BYTES)
        before = resident_bytes()
        with pytest.raises(NfsError) as caught:
            open_engine(server.url(), region_pages=256)
        assert resident_bytes() - before < LIMIT_BYTES // 2
    error = caught.value
    assert (error.errno, error.phase) == (errno.EFBIG, "open")
    assert f"{CLAIMED_BYTES // GIB} GiB" in str(error)
    assert f"at most {LIMIT_BYTES // MIB} MiB" in str(error)


@pytest.mark.parametrize("claimed_bytes", [1 << 62, (1 << 64) - PAGE])
def test_sizes_that_no_file_has(open_engine: OpenEngine, claimed_bytes: int) -> None:
    """No sum wraps on the way."""
    with FakeNfsServer(bytes(MIB)) as server:
        server.claim_size(claimed_bytes)
        with pytest.raises(NfsError) as caught:
            open_engine(server.url())
    assert caught.value.errno == errno.EFBIG


def test_a_region_that_is_there_is_not_refused_for_its_size(open_engine: OpenEngine) -> None:
    """It has acknowledged pages, and is in memory already: what counts is whether it belongs to the file."""
    descriptor = os.memfd_create("region")
    os.write(descriptor, b"x" + os.urandom(2 * PAGE - 1))  # a zero at the beginning: there is none yet
    with FakeNfsServer(bytes(MIB)) as server:
        server.claim_size(CLAIMED_BYTES)
        with pytest.raises(NfsError, match="not a region") as caught:
            open_engine(server.url(), region_fd=descriptor)
    assert caught.value.errno == errno.EPROTO
    os.close(descriptor)
