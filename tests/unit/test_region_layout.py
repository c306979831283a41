# SPDX-License-Identifier: LGPL-2.1-or-later
"""Python's table of the region's header against the C header, and what it reads against what was written."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdnfs import engine, region_counters

ENGINE = Path(region_counters.__file__).parent / "engine"

# A region belongs to one machine, but both of the machine's word sizes must see the same in it.
WORD_SIZES = ("-m64", "-m32") if platform.machine() == "x86_64" else ("",)


@pytest.fixture
def region_fd() -> Iterator[int]:
    """A memfd as large as a header, with random bytes for content."""
    fd = os.memfd_create("nbdnfs-region")
    os.write(fd, os.urandom(region_counters.HEADER_BYTES))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("word_size", WORD_SIZES)
def test_the_table_is_the_header(word_size: str, tmp_path: Path) -> None:
    """Each number of the table as a _Static_assert; nothing has to run for it."""
    identity = ("device_bytes", "fileid", "path_hash")
    offsets = {
        f"identity.{name}" if name in identity else name: offset
        for name, (offset, _) in region_counters.HEADER_FIELDS.items()
    }
    offsets |= {f"counters.{name}": region_counters.counter_offset(name) for name in region_counters.COUNTERS}
    histograms_offset = region_counters.COUNTERS_OFFSET + 8 * len(region_counters.COUNTERS)
    for index, name in enumerate(region_counters.HISTOGRAMS):
        offsets[f"counters.{name}"] = histograms_offset + 8 * region_counters.HISTOGRAM_BUCKETS * index
    facts = [f"offsetof(struct region_header, {name}) == {offset}" for name, offset in offsets.items()]
    facts += [
        f"sizeof(struct region_header) == {region_counters.HEADER_BYTES}",
        f"REGION_VERSION == {region_counters.REGION_VERSION}",
        f"HISTOGRAM_BUCKETS == {region_counters.HISTOGRAM_BUCKETS}",
        *(
            f"sizeof(((struct region_header *)0)->{field}) == {struct.calcsize('=' + code)}"
            for field, (_, code) in zip(offsets, region_counters.HEADER_FIELDS.values(), strict=False)
        ),
    ]
    source = tmp_path / "layout.c"
    source.write_text(
        '#include "region/region.h"\n' + "".join(f'_Static_assert({fact}, "{fact}");\n' for fact in facts)
    )
    # freestanding: for the other word size there may be a compiler without a C library
    command = ["gcc", "-std=c11", "-ffreestanding", "-fsyntax-only", "-Wall", f"-I{ENGINE}", str(source)]
    subprocess.run([*command, *filter(None, [word_size])], check=True)


def test_what_is_read_is_what_the_engine_reads(region_fd: int) -> None:
    """Every key and every value, in order."""
    found = region_counters.read_counters(region_fd)
    assert list(found.items()) == list(engine.region_counters(region_fd).items())
    assert engine.region_version == region_counters.REGION_VERSION
    assert engine.disconnected_offset == region_counters.DISCONNECTED_OFFSET


def test_the_version_is_read_of_regions_only(region_fd: int) -> None:
    """Eight bytes of magic, then the version."""
    assert region_counters.read_version(region_fd) is None
    os.pwrite(region_fd, region_counters.MAGIC + struct.pack("=I", 7), 0)
    assert region_counters.read_version(region_fd) == 7
    os.ftruncate(region_fd, 0)
    assert region_counters.read_version(region_fd) is None


def test_half_a_header_is_an_error(region_fd: int) -> None:
    """Not counters that are zero."""
    os.ftruncate(region_fd, region_counters.HEADER_BYTES - 1)
    with pytest.raises(ValueError, match="1328 bytes"):
        region_counters.read_counters(region_fd)


def test_it_loads_no_engine() -> None:
    """The keeper reads regions and must not map the extension."""
    code = "import sys; import nbdnfs.region_counters; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-S", "-c", code], text=True, cwd=ENGINE.parents[1]).split()
    assert not {"nbdnfs.engine", "dataclasses", "re", "pathlib", "typing", "enum"} & set(loaded)
