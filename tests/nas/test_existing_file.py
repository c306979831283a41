# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file holds when a device is started on it: nothing, a swap area of any kernel, or data that is kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import fake_files
from support.fake_files import URL, FakeServer

from nbdnfs.errors import CannotCreateError, NoInputError
from nbdnfs.nas import existing_file

MIB = 1 << 20


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """As fake_files.install."""
    return fake_files.install(monkeypatch)


@pytest.mark.parametrize("offset", [0, 4095, 65536, 3 * MIB - 1, 5 * MIB + 8191])
def test_data_is_refused(server: FakeServer, offset: int) -> None:
    """A single byte anywhere counts as data; the file stays as it is."""
    size_bytes = 5 * MIB + 8192
    server.add("swap0", bytes(size_bytes))
    assert existing_file.swap_page_bytes(URL) is None
    content = bytes(offset) + b"x" + bytes(size_bytes - offset - 1)
    server.add("swap0", content)
    with pytest.raises(CannotCreateError, match=r"swap0 on 192\.0\.2\.1 is neither swap nor empty") as caught:
        existing_file.swap_page_bytes(URL)
    assert caught.value.hint
    assert bytes(server.files["swap0"].data) == content


@pytest.mark.parametrize("page_bytes", [4096, 16384, 65536])
def test_swap_areas(server: FakeServer, tmp_path: Path, page_bytes: int) -> None:
    """Those of kernels with any page size, whatever the pages behind the header hold."""
    area = tmp_path / "area"
    area.write_bytes(bytes(MIB))
    subprocess.run(["/usr/sbin/mkswap", "-p", str(page_bytes), str(area)], check=True, capture_output=True)
    server.add("swap0", area.read_bytes()[: MIB // 2] + b"swapped out" + bytes(MIB // 2 - 11))
    assert existing_file.swap_page_bytes(URL) == page_bytes


def test_no_file(server: FakeServer) -> None:
    """That is said as elsewhere."""
    with pytest.raises(NoInputError):
        existing_file.swap_page_bytes(URL)
