# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report of make bench: medians, ratios, and which goals are missed."""

from __future__ import annotations

from xml.etree import ElementTree

import native_report
from native_report import Result, Row, Sample

READ = Row("read", "random", 4096, 16)
WRITE = Row("write", "random", 4096, 1)


def result(*per_second: float) -> Result:
    return Result([Sample({"per_second": value}, 10.0, 36000, 33000) for value in per_second])


def parts(ours_read: float, ours_write: float) -> dict[str, dict[Row, dict[str, Result]]]:
    return {
        "no added delay": {
            READ: {"nbdnfs": result(1, ours_read, 99999), "qemu-nbd": result(900), "limit": result(2000)},
            WRITE: {"nbdnfs": result(ours_write), "qemu-nbd": result(100), "limit": result(50)},
        }
    }


def test_table() -> None:
    """Medians, ours as a multiple of each other's, and the size."""
    text = native_report.table("no added delay", parts(1500, 300)["no added delay"])
    assert "1,500" in text
    assert "1.67  0.75" in text
    assert "36000" in text


def test_loop() -> None:
    """Its ratios stand behind ours; neither has one to the other."""
    results = {READ: {"nbdnfs": result(100), "nbdnfs-loop": result(300), "qemu-nbd": result(200)}}
    line = next(line for line in native_report.table("", results).splitlines() if "300" in line)
    assert line.split()[-2:] == ["0.50", "1.50"]


def test_goals() -> None:
    """1.3 times at depth 16, three times where a page waits for the one before, 0.7 of the limit; misses are named."""
    assert native_report.missed_goals(parts(1500, 300)) == ["no goal is missed"]
    missed = native_report.missed_goals(parts(1000, 299))
    assert [line.partition(", no")[0] for line in missed] == [
        "missed: random read 4 KiB, depth 16",  # 1.3 of qemu-nbd
        "missed: random read 4 KiB, depth 16",
        "missed: random write 4 KiB, depth 1",
    ]
    assert "1.11 of qemu-nbd, wanted 1.3" in missed[0]
    assert "0.50 of limit, wanted 0.7" in missed[1]


def test_goals_beside_nbdkit_s_own_plugin() -> None:
    """1.3 times its random reads, and no more CPU for a gigabyte."""
    theirs = Result([Sample({"per_second": 1000}, 8.0, 9000, 0)])
    missed = native_report.missed_goals({"near": {READ: {"nbdnfs": result(1200), "nbdkit-nfs": theirs}}})
    assert missed == [
        "missed: random read 4 KiB, depth 16, near: 1.20 of nbdkit-nfs, wanted 1.3",
        "missed: random read 4 KiB, depth 16, near: 1.25 of nbdkit-nfs's CPU, wanted 1",
    ]


def test_picture() -> None:
    """Well-formed, the same each time, a bar for each peer of each row."""
    drawn = native_report.picture(parts(1500, 300))
    assert drawn == native_report.picture(parts(1500, 300))
    bars = [e for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("rect")]
    assert len(bars) == 1 + 3 + 6
