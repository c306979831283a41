# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report of make bench-vm: medians, ratios, how writes coalesce; and that a run can be continued from its JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import vm
from vm_peers import ENCRYPTED, FLOOR, KERNEL_NBD, KERNEL_NFS, OURS
from vm_rounds import Load, Results, Sample, in_model_time
from vmtest.outcome import HarnessError

LOAD = Load(size_mib=96, limit_mib=24, processes=(1, 4), timeout_s=60, passes=("sequential", "random"))
COUNTERS = {"nfs_writes": 2, "nfs_written_bytes": 200 * 1024, "hit_pages": 3, "missed_pages": 1}


def sample(peer: str, seconds: float, **counters: int) -> Sample:
    passes = (seconds / 10, seconds / 5, seconds / 2)
    swap_out = {"nfs_writes": 1, "nfs_written_bytes": 128 * 1024}
    return Sample(peer, 0.0, 1, seconds, passes, pages_out=1, pages_in=1, counters=counters, swap_out=swap_out)


@pytest.fixture
def results() -> Results:
    """Three rounds of ours, the median of which is 30 s, and one of two peers."""
    ours = [sample(OURS, seconds, **COUNTERS) for seconds in (10.0, 90.0, 30.0)]
    return Results(LOAD, (*ours, sample(KERNEL_NFS, 40.0), sample(KERNEL_NBD, 20.0)))


def test_tables(results: Results) -> None:
    """The median counts; ours is given as a multiple of each other's, pass by pass; what did not run has no line."""
    lines = [line.split() for line in vm.tables(results).splitlines() if line.strip()]
    assert vm.tables(results).startswith("96 MiB of pages in a cgroup of 24 MiB; seconds")
    assert lines[2] == ["fill", "sequential", "random", "all"]
    assert lines[3] == [KERNEL_NBD, "2.00", "4.00", "10.00", "20.00"]
    assert lines[4] == ["ours", "/", "this", "1.50", "1.50", "1.50", "1.50"]
    assert lines[5] == [KERNEL_NFS, "4.00", "8.00", "20.00", "40.00"]
    assert lines[6] == ["ours", "/", "this", "0.75", "0.75", "0.75", "0.75"]
    assert lines[7] == [OURS, "3.00", "6.00", "15.00", "30.00"]


def test_without_a_cgroup(results: Results) -> None:
    """The whole guest's memory counts, and what a peer needs of it."""
    load = replace(LOAD, limit_mib=None, memory_mib=256)
    assert vm.tables(Results(load, results.samples)).startswith("96 MiB of pages in a guest of 256 MiB; seconds")


def test_what_encryption_costs(results: Results) -> None:
    """The median with it as a multiple of that without, where both ran."""
    assert "encrypted" not in vm.tables(results)
    both = Results(LOAD, (*results.samples, *(sample(ENCRYPTED, seconds) for seconds in (33.0, 3.0, 99.0))))
    assert vm.tables(both).splitlines()[-1].split() == ["encrypted:", "1.10", "of", "the", "unencrypted", "time"]


def test_our_figures(results: Results) -> None:
    """The size of an NFS write, over all rounds."""
    figures = vm.our_figures(results, 0.0, 1)
    assert "128 KiB for each NFS write of swap-out alone" in figures
    assert "in the whole run 100 KiB for each write" in figures
    assert "75% of pages read were in the region" in figures


def test_json(results: Results, tmp_path: Path) -> None:
    """What was saved comes back, for more rounds; not for another load."""
    results.save(path := tmp_path / "build/bench.json")
    assert Results.load_from(path, LOAD) == results
    with pytest.raises(HarnessError, match="another load"):
        Results.load_from(path, Load(48, 12, 60))


@pytest.mark.parametrize("change", [{"passes": None}, {"processes": 4}])
def test_json_of_an_earlier_version(results: Results, tmp_path: Path, change: dict[str, int | None]) -> None:
    """It says nothing of the passes, or has one number of processes: another load, and no traceback."""
    results.save(path := tmp_path / "bench.json")
    data = json.loads(path.read_text())
    for name, value in change.items():
        del data["load"][name]
        data["load"].update({name: value} if value is not None else {})
    path.write_text(json.dumps(data))
    with pytest.raises(HarnessError, match="another load"):
        Results.load_from(path, LOAD)


def test_a_pass_that_there_is_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before a guest boots."""
    monkeypatch.setattr("sys.argv", ["vm.py", "--passes", "random,zip"])
    with pytest.raises(SystemExit):
        vm.main()
    assert "not known: zip; choose from sequential,random,zipf,strided" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "1,0"], "at least one process"),
        (["--own-memory", "--limit", "8"], "--own-memory has no cgroup"),
    ],
)
def test_what_cannot_be_run(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before a guest boots."""
    monkeypatch.setattr("sys.argv", ["vm.py", *words])
    with pytest.raises(SystemExit):
        vm.main()
    assert message in capsys.readouterr().err


def test_picture(results: Results) -> None:
    """Well-formed, with each pass of each peer that ran, and no other peer."""
    texts = [element.text for element in ElementTree.fromstring(vm.picture(results)).iter() if element.text]
    assert {f"0 ms, 1 process: {name}" for name in ("fill", "sequential", "random", "all")} <= set(texts)
    assert {"3.0", "15.0", "30.0", "20.0", "40.0"} <= set(texts)
    assert FLOOR not in texts


def test_repeatability() -> None:
    """The furthest sample from the median on an idle host, of the rounds there and of those on a busy one."""
    idle = [sample(OURS, seconds) for seconds in (10.0, 10.1, 9.8)]
    busy = [replace(sample(OURS, seconds), host_was_busy=True) for seconds in (10.0, 10.5)]
    results = Results(LOAD, (*idle, *busy))
    (line,) = [line for line in vm.repeatability(results).splitlines() if line.startswith(OURS)]
    assert line.split()[-3:] == ["10.00", "2.0%", "5.0%"]
    assert vm.tables(results).count(" 10.0") == vm.tables(Results(LOAD, tuple(idle))).count(" 10.0"), "idle ones only"


def test_model_time() -> None:
    """What the guest counted in slow motion is divided by that; what are not seconds stays."""
    found = in_model_time(sample(OURS, 80.0, cpu_ms=4000, nfs_writes=7), 8)
    assert (found.seconds, found.passes) == (10.0, (1.0, 2.0, 5.0))
    assert found.counters == {"cpu_ms": 500, "nfs_writes": 7}
