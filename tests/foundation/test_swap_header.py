# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header of a swap area: one function says for all what it is for. mkswap(8) makes real ones."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from nbdnfs import swap_header
from nbdnfs.kernel import swap_area

PAGE_SIZES = swap_header.PAGE_SIZES_BYTES


def head(*page_sizes: int, version: int = 1, last_page: int = 15, order: str = "<") -> bytes:
    """The beginning of a file with a signature at the end of each of these pages."""
    content = bytearray(swap_header.HEAD_BYTES)
    struct.pack_into(f"{order}II", content, 1024, version, last_page)
    for size_bytes in page_sizes:
        content[size_bytes - 10 : size_bytes] = b"SWAPSPACE2"
    return bytes(content)


@pytest.mark.parametrize("made_for", PAGE_SIZES)
def test_the_kernels_own_page_comes_first(made_for: int) -> None:
    """A remnant of another kernel's area does not hide the one that this kernel can use."""
    for remnant in PAGE_SIZES:
        assert swap_header.page_bytes(head(made_for, remnant), made_for) == made_for


def test_without_the_version_it_is_no_swap_area() -> None:
    """Ten letters at the end of a page are data like any other: such a file is neither grown nor removed."""
    for version in (0, 2, 1 << 16):
        found = head(4096, version=version)
        assert swap_header.page_bytes(found) is None
        assert swap_header.grown(found, 1 << 30) is None


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_the_last_page_of_a_larger_area(page_bytes: int, order: str) -> None:
    """In the byte order of the machine that made it; an area that is as large is left alone."""
    found = head(page_bytes, order=order)
    assert swap_header.grown(found, 100 * page_bytes) == struct.pack(f"{order}II", 1, 99)
    assert swap_header.grown(found, 16 * page_bytes) is None


@pytest.mark.parametrize("made_for", PAGE_SIZES)
def test_a_device_and_a_file_on_the_nas_are_judged_alike(tmp_path: Path, made_for: int) -> None:
    """What mkswap makes: the keeper, which reads the device, and doctor, which reads the file, say the same."""
    area = tmp_path / "area"
    area.write_bytes(bytes(10 * PAGE_SIZES[-1]))
    subprocess.run(["/usr/sbin/mkswap", "-p", str(made_for), str(area)], check=True, capture_output=True)
    start = area.read_bytes()[: swap_header.HEAD_BYTES]
    for kernel_page in PAGE_SIZES:
        assert swap_area.swap_page_bytes(area, kernel_page) == swap_header.page_bytes(start, kernel_page) == made_for
