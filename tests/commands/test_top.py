# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs top`: rates and medians from two readings of a region's counters, and the error when there is none."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import pytest

from nbdnfs.commands import top
from nbdnfs.commands.counters import Counters
from nbdnfs.commands.frame import Frame
from nbdnfs.errors import NoInputError

BEFORE: Counters = {"reads": 100, "read_bytes": 0, "nfs_writes": 5, "nfs_written_bytes": 0, "read_us": [1, 1, 0, 0]}
AFTER: Counters = {
    **BEFORE,
    "reads": 300,
    "read_bytes": 200 * 4096,
    "nfs_writes": 7,
    "nfs_written_bytes": 2 * 128 * 1024,
    "read_us": [1, 2, 0, 8],
    "hit_pages": 3,
    "missed_pages": 1,
    "unstable_pages": 512,
    "disconnected": 1,
}


def test_rates_and_medians() -> None:
    """Rates are per second; a median is that of the time span alone; missing counters count as 0."""
    frame = Frame("swap0", 2.0, BEFORE, AFTER)
    assert frame.rate("reads") == 100
    assert frame.ratio("nfs_written_bytes", "nfs_writes") == 128 * 1024
    assert frame.ratio("read_ahead_hits", "read_ahead_pages") == 0
    assert frame.median_us("read_us") == 8
    assert frame.median_us("write_us") == 0
    assert [frame.percentile_us("read_us", share) for share in (0.1, 0.2, 0.99)] == [2, 8, 8]


def test_text() -> None:
    """The lines show what is not on the NAS yet, how writes coalesce, and a server that does not answer."""
    text = Frame("swap0", 2.0, BEFORE, AFTER).text()
    assert text.startswith("swap0: 2.0 MiB not on the NAS yet")
    assert "THE SERVER DOES NOT ANSWER" in text
    assert "75% from the region" in text
    assert "128 KiB each" in text


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each update, with a schema, and with the keys that docs/monitoring.md has."""
    frame = Frame("swap0", 2.0, BEFORE, AFTER)
    monkeypatch.setattr(top, "watch", lambda names, **options: itertools.repeat([frame]))
    top.show(["swap0"], interval_s=1.0, count=2, as_json=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    found = json.loads(first)
    assert found["schema"] == top.SCHEMA
    (device,) = found["devices"]
    assert (device["name"], device["reads_per_s"], device["read_median_us"], device["unstable_pages"]) == (
        *("swap0", 100.0, 8, 512),
    )
    text = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
    assert [key for key in device if not key.endswith(("_per_s", "_median_us")) and f"`{key}`" not in text] == []


def test_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame covers the time since the last one; a new device is shown from its second reading on."""
    looks = iter([{"a": BEFORE}, {"a": AFTER, "b": BEFORE}, {"b": AFTER}])
    times = iter([10.0, 12.0, 13.0])
    slept: list[float] = []
    monkeypatch.setattr(top, "_read", lambda names, root: next(looks))
    frames = top.watch(["a", "b"], interval_s=5, sleep=slept.append, clock=lambda: next(times))
    assert [(frame.name, frame.seconds) for frame in next(frames)] == [("a", 2.0)]
    assert [(frame.name, frame.rate("reads")) for frame in next(frames)] == [("b", 200.0)]
    assert slept == [5, 5]


def test_nothing_to_watch(tmp_path: Path) -> None:
    """Without a worker, the error says where to look."""
    with pytest.raises(NoInputError) as caught:
        next(top.watch(["swap0"], root=tmp_path))
    assert "swap0" in caught.value.message
    assert caught.value.hint == "see why: nbdnfs status; only root can read a region"


def test_no_such_device() -> None:
    """An unknown name is refused, and not shown as a device whose worker has ended."""
    arguments = argparse.Namespace(name="no-such-device", interval="1s", count=1, json=False)
    with pytest.raises(NoInputError, match="there is no device 'no-such-device'"):
        top.run(arguments)
