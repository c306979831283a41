# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs metrics`: Prometheus's own parser and linter accept it, it says what status says, and its file is safe."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdnfs import cli, region
from nbdnfs.commands import metrics, status
from nbdnfs.commands.counters import Counters, Waits
from nbdnfs.commands.health import Level, Problem
from nbdnfs.commands.status import Status
from nbdnfs.errors import CannotCreateError, UsageError

ROOT = Path(__file__).resolve().parents[2]
# Every counter has a value of its own, and bucket n of each histogram has n.
COUNTERS: Counters = {
    **{name: 1000 + index for index, name in enumerate(region.COUNTERS)},
    **{name: list(range(region.HISTOGRAM_BUCKETS)) for name in region.HISTOGRAMS},
    "slots": 4096,
    "generation": 3,
    "region_bytes": 18_000_000,
}
UP = Status(
    name="swap0",
    state="watch",
    device="/dev/nbd3",
    device_bytes=2 << 30,
    swap_bytes=(2 << 30) - 4096,
    swap_used_bytes=1 << 20,
    keeper_pid=10,
    worker_pid=11,
    server="192.0.2.7",
    encrypted=True,
    waits=Waits(unheard_s=7.5, oldest_request_s=0.0, last_heard_s=7.5),
    counters=COUNTERS,
    problems=(Problem(Level.WARNING, "the server is unheard"),),
)
DOWN = Status(name="swap1", state="not running", problems=(Problem(Level.CRITICAL, "not up"),))


def promtool(*arguments: str, text: str = "") -> str:
    """What promtool prints; it ends with 0."""
    found = shutil.which("promtool")
    assert found is not None, "promtool is missing (Debian: apt install prometheus)"
    done = subprocess.run([found, *arguments], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def samples(text: str) -> dict[str, float]:
    """A line's name and labels ▸ its value."""
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def test_promtool_accepts_it() -> None:
    """Its parser and its linter: HELP, TYPE, units and names."""
    assert promtool("check", "metrics", text=metrics.render([UP, DOWN])) == ""


def test_it_says_what_status_says() -> None:
    """The level, the waits and the sizes; of a device that is down only what is known."""
    found = samples(metrics.render([UP, DOWN]))
    assert found['nbdnfs_device_level{name="swap0"}'] == Level.WARNING
    assert found['nbdnfs_device_level{name="swap1"}'] == Level.CRITICAL
    assert found['nbdnfs_server_unheard_seconds{name="swap0"}'] == 7.5
    assert found['nbdnfs_swap_used_bytes{name="swap0"}'] == 1 << 20
    assert found['nbdnfs_device_info{name="swap0",device="/dev/nbd3",server="192.0.2.7",state="watch"}'] == 1
    about_down = {name.partition("{")[0].removeprefix("nbdnfs_") for name in found if 'name="swap1"' in name}
    assert about_down == {"device_info", "device_level", "device_problems", "device_up", "keeper_up", "worker_up"}


def test_every_counter_is_there() -> None:
    """Each number of the region is the value of a metric, less the one that is a time of day of the worker's own."""
    values = set(samples(metrics.render([UP])).values())
    missing = [
        name
        for name in set(region.COUNTERS) - {"twins_until_ms", "unstable_pages"}
        if float(COUNTERS[name]) not in values  # type: ignore[arg-type]
    ]
    assert missing == []
    assert (1000 + region.COUNTERS.index("unstable_pages")) * 4096.0 in values


def test_histograms_are_cumulative() -> None:
    """A bucket counts what took less than its bound, with everything below it; the last one counts all."""
    found = samples(metrics.render([UP]))
    assert found['nbdnfs_read_duration_seconds_bucket{name="swap0",le="1.6e-05"}'] == 0 + 1 + 2 + 3 + 4
    assert found['nbdnfs_read_duration_seconds_bucket{name="swap0",le="3.2e-05"}'] == 0 + 1 + 2 + 3 + 4 + 5
    everything = sum(range(region.HISTOGRAM_BUCKETS))
    assert found['nbdnfs_read_duration_seconds_bucket{name="swap0",le="+Inf"}'] == everything
    assert found['nbdnfs_read_duration_seconds_count{name="swap0"}'] == everything


def test_every_metric_is_documented() -> None:
    """docs/monitoring.md has each name, and none that does not exist."""
    names = {name.partition("{")[0] for name in samples(metrics.render([UP]))}
    names = {re.sub(r"_(bucket|count)$", "", name) for name in names}
    text = (ROOT / "docs/monitoring.md").read_text()
    assert set(re.findall(r"`(nbdnfs_\w+)`", text)) == names


# contrib/


def test_alert_rules() -> None:
    """promtool accepts the rules, and they fire in the cases of their test, and in no other."""
    promtool("check", "rules", str(ROOT / "contrib/alerts/nbdnfs.rules.yml"))
    promtool("test", "rules", str(ROOT / "contrib/alerts/nbdnfs.test.yml"))


@pytest.mark.parametrize("path", ["contrib/alerts/nbdnfs.rules.yml", "contrib/grafana/nbdnfs.json"])
def test_contrib_uses_metrics_that_exist(path: str) -> None:
    """A name that is misspelled would never show anything."""
    text = (ROOT / path).read_text()
    names = {name.partition("{")[0] for name in samples(metrics.render([UP]))}
    used = set(re.findall(r"nbdnfs_[a-z_]+", text))
    assert used
    assert used - names == set()


def test_dashboard() -> None:
    """Each panel asks something, no two have one id, and none overlaps another."""
    panels = json.loads((ROOT / "contrib/grafana/nbdnfs.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 5
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert all(x < 24 for x, _ in mine)
        assert not cells & mine
        cells |= mine


# The file


def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, and written again, readable for all, with nothing left beside it; the command ends with 0."""
    monkeypatch.setattr(status, "read_all", lambda: [UP, DOWN])
    path = tmp_path / "nbdnfs.prom"
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            cli.main(["metrics", "--textfile", str(path)])
        assert ended.value.code == 0
        assert path.read_text() == metrics.render([UP, DOWN])
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["nbdnfs.prom"]


def test_name_that_node_exporter_ignores(tmp_path: Path) -> None:
    """Files without .prom are never read."""
    with pytest.raises(UsageError, match=r"end in \.prom"):
        metrics.write(tmp_path / "nbdnfs.txt", "x")


@pytest.mark.parametrize("kind", ["file", "link", "folder", "pipe"])
def test_what_is_not_ours_stays(tmp_path: Path, kind: str) -> None:
    """Another program's metrics, a link and whatever else has the name: nothing is written."""
    path, other = tmp_path / "node.prom", tmp_path / "other"
    other.write_text("keep\n")
    if kind == "file":
        path.write_text("# HELP other_total Of another program.\n")
    elif kind == "link":
        path.symlink_to(other)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CannotCreateError, match="nbdnfs metrics has not written it"):
        metrics.write(path, metrics.render([UP]))
    assert (other.read_text(), sorted(os.listdir(tmp_path))) == ("keep\n", before)


def test_missing_folder(tmp_path: Path) -> None:
    """An error in words, and no file."""
    with pytest.raises(CannotCreateError, match="No such file or directory"):
        metrics.write(tmp_path / "missing/nbdnfs.prom", "x")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays, and nothing is left beside it."""
    path = tmp_path / "nbdnfs.prom"
    metrics.write(path, metrics.render([UP]))

    def fails(descriptor: int, mode: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", fails)
    with pytest.raises(CannotCreateError, match="No space left on device"):
        metrics.write(path, metrics.render([DOWN]))
    assert path.read_text() == metrics.render([UP])
    assert os.listdir(tmp_path) == ["nbdnfs.prom"]
