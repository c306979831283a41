# SPDX-License-Identifier: LGPL-2.1-or-later
"""nbdnfs/region.py says what the engine's region.h says, and reads a live region as the engine does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.fake_nfs import FakeNfsServer

from nbdnfs import engine, region
from nbdnfs.kernel.waiting import wait_until

# The tree's, not the package's: what is installed has no sources.
ENGINE = Path(__file__).parents[2] / "nbdnfs/engine"
PAGE = 4096
LOOPBACK = "127.0.0.1"

# Prints what region.py knows of the header, as JSON.
PROGRAM = """
#include <stdio.h>
#include "region/last_place.h"

#define AT(member) offsetof(struct region_header, member)
#define X(name) printf("%s[\\"" #name "\\", %zu]", separator, AT(counters.name)), separator = ", ";

int main(void)
{
    const char *separator = "";

    printf("{\\"versions\\": [%u, %u, %u], ", REGION_PLAIN, REGION_XCHACHA20, REGION_AES);
    printf("\\"header\\": %zu, \\"buckets\\": %d, ", sizeof(struct region_header), HISTOGRAM_BUCKETS);
    printf("\\"keys\\": [%zu, %zu], ", AT(keys), sizeof(struct cipher_keys));
    printf("\\"failed\\": [%zu, %zu], ", AT(failed_reads), AT(failed_read_ms));
    printf("\\"last_place\\": [%d, %zu], ", LAST_PLACE_OFFSET, sizeof(struct last_place));
    printf("\\"offsets\\": {\\"magic\\": %zu, \\"version\\": %zu, ", AT(magic), AT(version));
    printf("\\"slots\\": %zu, \\"region_bytes\\": %zu, ", AT(slot_count), AT(region_bytes));
    printf("\\"generation\\": %zu, \\"waits\\": %zu}, ", AT(generation), AT(waits));
    printf("\\"waits\\": [%zu, %d, %d], ", AT(waits.waiting_since_ms), REGION_CONNECTIONS, REGION_REQUESTS);
    printf("\\"counters\\": [");
    REGION_COUNTERS(X)
    separator = "";
    printf("], \\"histograms\\": [");
    REGION_HISTOGRAMS(X)
    printf("]}\\n");
    return 0;
}
"""


def header_file(name: str) -> Path:
    """A header of the engine, in whatever folder it lies."""
    (found,) = ENGINE.rglob(name)
    return found


def test_layout(tmp_path: Path) -> None:
    """Version, size, and the offset of every field and counter, in order."""
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text(PROGRAM)
    folders = [f"-I{header_file('region.h').parent}", f"-I{ENGINE}"]
    subprocess.run(["gcc", "-std=c11", "-D_GNU_SOURCE", *folders, "-o", str(program), str(source)], check=True)
    found = json.loads(subprocess.run([program], check=True, capture_output=True).stdout)
    assert found["versions"] == list(region.VERSIONS)
    assert found["keys"] == [region.KEYS_OFFSET, region.KEYS_BYTES]
    assert found["failed"] == [region.FAILED_READS_OFFSET, region.FAILED_READS_OFFSET + 8]
    assert found["last_place"] == [region.LAST_PLACE_OFFSET, region.LAST_PLACE_BYTES]
    assert region.KEYS_OFFSET == region.HEADER_BYTES, "what is read ends before the keys"
    assert found["buckets"] == region.HISTOGRAM_BUCKETS
    assert found["offsets"] == {
        "magic": 0,
        "version": region.VERSION_OFFSET,
        "slots": region.SLOT_COUNT_OFFSET,
        "region_bytes": region.REGION_BYTES_OFFSET,
        "generation": region.GENERATION_OFFSET,
        "waits": region.WAITS_OFFSET,
    }
    assert found["waits"] == [region.WAITS_OFFSET + 16, region.CONNECTIONS, region.REQUESTS]
    assert found["header"] <= PAGE, "the slot table begins there"
    at = region.COUNTERS_OFFSET
    assert found["counters"] == [[name, at + 8 * place] for place, name in enumerate(region.COUNTERS)]
    at += 8 * len(region.COUNTERS)
    step = 8 * region.HISTOGRAM_BUCKETS
    assert found["histograms"] == [[name, at + step * place] for place, name in enumerate(region.HISTOGRAMS)]


@pytest.mark.parametrize(
    ("header", "enum", "endings"),
    [
        ("region.h", "region_file", {region.FILE_DELETED: "_DELETED", region.FILE_REPLACED: "_REPLACED"}),
        ("owner_watch.h", "owner_state", {region.OWNER_HELD: "_HELD", region.OWNER_UNSURE: "_UNSURE"}),
    ],
)
def test_states(header: str, enum: str, endings: dict[int, str]) -> None:
    """The values of the two counters that are an enumeration: four each, in this order."""
    match = re.search(rf"^enum {enum} \{{(.*?)^\}};", header_file(header).read_text(), re.MULTILINE | re.DOTALL)
    assert match is not None
    names = re.findall(r"^\s*([A-Z_]+)\b", match[1], re.MULTILINE)
    assert len(names) == 4
    for value, ending in endings.items():
        assert names[value].endswith(ending)


def test_counters_of_a_live_region() -> None:
    """`read_counters` is what the engine says, after reads, writes and a flush; and the version is this one's."""
    descriptor = region.create()
    assert region.version_of(descriptor) is None
    with FakeNfsServer(bytes(64 * PAGE)) as server:
        device = engine.Engine(server.url(), LOOPBACK, region_fd=descriptor, region_pages=256, read_ahead_pages=0)
        try:
            for page in range(16):
                device.pwrite(os.urandom(PAGE), page * PAGE)
            device.flush()
            buffer = bytearray(PAGE)
            for page in range(64):
                device.pread(buffer, page * PAGE)
            found = region.read_counters(descriptor)
            assert found == device.counters()
            assert list(found) == list(device.counters())
        finally:
            device.close()
    assert (found["reads"], found["writes"], found["flushes"], found["slots"]) == (64, 16, 1, 256)
    assert found["region_bytes"] == os.fstat(descriptor).st_size
    read_us = found["read_us"]
    assert isinstance(read_us, list)
    assert sum(read_us) == 64
    assert region.version_of(descriptor) == region.PLAIN
    os.close(descriptor)


def test_what_is_not_a_region() -> None:
    """A file with something else in it has no version."""
    descriptor = os.memfd_create("other")
    os.write(descriptor, b"SWAPSPACE2" * 10)
    assert region.version_of(descriptor) is None
    os.close(descriptor)


def test_is_disconnected() -> None:
    """The keeper's view of a mapped region: one number."""
    descriptor = region.create()
    os.truncate(descriptor, 2 * PAGE)
    with region.hold_in_memory(descriptor) as mapping:
        assert not region.is_disconnected(mapping)
        os.pwrite(descriptor, b"\1", region.COUNTERS_OFFSET + 8 * region.COUNTERS.index("disconnected"))
        assert region.is_disconnected(mapping)
    os.close(descriptor)


@pytest.mark.parametrize("stops", [False, True])
def test_waits_of_a_live_region(stops: bool) -> None:
    """While the server owes an answer, or has no connection: since when it does, and since when the request runs.
    Nothing afterwards, and the times of another generation's worker are not read."""
    descriptor = region.create()
    with FakeNfsServer(bytes(64 * PAGE)) as server:
        device = engine.Engine(server.url(), LOOPBACK, region_fd=descriptor, region_pages=256, read_ahead_pages=0)
        try:
            heard_ms, waiting_ms, request_ms = region.read_waits(descriptor) or (0, 0, 0)
            assert 0 < heard_ms <= now_ms()
            assert (waiting_ms, request_ms) == (0, 0)
            server.hold("READ")
            began_ms = now_ms()
            reader = threading.Thread(target=device.pread, args=(bytearray(PAGE), 0))
            reader.start()
            server.wait_for(1, 10)
            if stops:
                server.disconnect()
                server.wait_for(2, 10)
                assert wait_until(lambda: (region.read_waits(descriptor) or (0, 0, 0))[0] >= began_ms, 10), (
                    "a connection that is made counts as heard"
                )
            heard_ms, waiting_ms, request_ms = region.read_waits(descriptor) or (0, 0, 0)
            assert began_ms <= request_ms <= now_ms()
            assert began_ms <= waiting_ms <= now_ms()
            with region.hold_in_memory(descriptor) as mapping:
                times = (heard_ms, max(heard_ms, waiting_ms))
                assert wait_until(lambda: region.server_times(mapping) == times, 10), "once it is connected"
                for name, value in (("disconnected", 1), ("file_state", region.FILE_REPLACED)):
                    offset = region.COUNTERS_OFFSET + 8 * region.COUNTERS.index(name)
                    os.pwrite(descriptor, value.to_bytes(8, sys.byteorder), offset)
                    assert region.server_times(mapping) == (heard_ms, 0)
                    os.pwrite(descriptor, bytes(8), offset)
            server.release()
            reader.join(10)
            assert wait_until(lambda: (region.read_waits(descriptor) or (0, 1, 1))[1:] == (0, 0), 10)
            assert (region.read_waits(descriptor) or (0, 0, 0))[0] > 0
            with region.hold_in_memory(descriptor) as mapping:
                assert region.server_times(mapping)[1] == 0
            os.pwrite(descriptor, b"\x7f", region.GENERATION_OFFSET)
            assert region.read_waits(descriptor) is None
        finally:
            device.close()
    os.close(descriptor)


class ReconnectsMeanwhile:
    """A mapped region whose worker connects after the first look at it, and notes first that the server was heard."""

    def __init__(self) -> None:
        self._looks = 0

    def __getitem__(self, at: slice) -> bytes:
        heard_ms, disconnected = (600_000, 0) if self._looks else (1_000, 1)
        self._looks += 1
        header = bytearray(region.HEADER_BYTES)
        for offset, number in (
            (region.GENERATION_OFFSET, 1),
            (region.COUNTERS_OFFSET + 8 * region.COUNTERS.index("disconnected"), disconnected),
            (region.WAITS_OFFSET, 1),
            (region.WAITS_OFFSET + 8, heard_ms),
            (region.WAITS_OFFSET + 16, 900),
        ):
            header[offset : offset + 8] = number.to_bytes(8, sys.byteorder)
        return bytes(header[at])


def test_a_connection_that_is_made_while_it_is_looked_at() -> None:
    """The time before the connection does not count as silence."""
    assert region.server_times(ReconnectsMeanwhile())[1] in (0, 600_000)  # type: ignore[arg-type]


def test_waits_of_an_earlier_version() -> None:
    """Its worker has left zeros there: unknown."""
    descriptor = region.create()
    os.truncate(descriptor, 2 * PAGE)
    os.pwrite(descriptor, b"\1", region.GENERATION_OFFSET)
    assert region.read_waits(descriptor) is None
    with region.hold_in_memory(descriptor) as mapping:
        assert region.server_times(mapping) == (0, 0)
    os.close(descriptor)


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
