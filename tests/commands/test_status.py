# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs status` on a golden tree: when a device is green, which problems are named, and the JSON form."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdnfs import config
from nbdnfs.commands import counters, health, status
from nbdnfs.commands.counters import Counters, Reading, Waits
from nbdnfs.commands.health import Level
from nbdnfs.config import Config
from nbdnfs.errors import NoInputError, UnavailableError, UnreadableError, UsageError
from nbdnfs.keeper import last_good
from nbdnfs.keeper.records import Records

CALM = Waits(unheard_s=0.0, oldest_request_s=0.0, last_heard_s=0.5)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """swap0 is configured and up: keeper 10, worker 11, /dev/nbd3."""
    files = {
        "etc/nbdnfs/swap0.toml": 'url = "nfs://nas/export/x.swap"\n',
        "sys/block/nbd3/size": "131072\n",
        "sys/block/nbd3/pid": "9\n",
        "sys/block/nbd3/backend": "nbdnfs:swap0\n",
        "proc/swaps": "Filename Type Size Used Priority\n/dev/nbd3 partition 65532 1024 100\n",
        "run/nbdnfs/swap0/keeper": "10 100 1.0\n",
        "run/nbdnfs/swap0/worker": "11 200 1.0\n",
        "run/nbdnfs/swap0/state": "watch\n",
        "run/nbdnfs/swap0/address": "nfs://nas/export/x.swap\n192.0.2.7\n",
    }
    for pid, started in ((10, 100), (11, 200)):
        files[f"proc/{pid}/stat"] = f"{pid} (a b) S " + " ".join(["0"] * 18) + f" {started} 0 0\n"
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # the files of proc_pid_fd(5) cannot be made: tests/foundation/test_region_layout.py reads real ones
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: Reading({"generation": 1}, CALM))
    return tmp_path


def shows(monkeypatch: pytest.MonkeyPatch, found: Counters, waits: Waits | None = CALM) -> None:
    """Have the worker's region show this."""
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: Reading(found, waits))


def test_green(root: Path) -> None:
    """A healthy device: every field is known, and there is no problem."""
    found = status.read("swap0", root)
    assert found.is_green
    assert (found.device, found.keeper_pid, found.worker_pid, found.server) == ("/dev/nbd3", 10, 11, "192.0.2.7")
    assert (found.swap_bytes, found.swap_used_bytes) == (65532 * 1024, 1 << 20)
    assert found.text().startswith("swap0: ok\n")
    assert "\n  pages    not encrypted on the NAS" in found.text()
    assert found.to_json()["encrypted"] is False
    assert json.loads(json.dumps(found.to_json()))["green"] is True


@pytest.mark.parametrize(
    ("encrypted", "setting", "line"),
    [
        (True, True, "encrypted on the NAS"),
        (False, False, "not encrypted on the NAS"),
        (False, True, "not encrypted on the NAS; encrypted from the next start on (nbdnfs down and up, or a boot)"),
        (True, False, "encrypted on the NAS; not encrypted from the next start on (nbdnfs down and up, or a boot)"),
    ],
)
def test_what_pages_are_and_will_be(
    root: Path, monkeypatch: pytest.MonkeyPatch, encrypted: bool, setting: bool, line: str
) -> None:
    """After an upgrade, or a change of the configuration, a device stays as it was started. That is no problem."""
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: Reading({}, CALM, encrypted))
    Records("swap0", root).write(
        Records.CONFIG, last_good.to_text(Config("swap0", "nfs://nas/export/x.swap", encrypt=setting))
    )
    found = status.read("swap0", root)
    assert found.text().endswith(f"\n  pages    {line}")
    assert (found.to_json()["encrypted"], found.to_json()["encrypt"]) == (encrypted, setting)
    assert found.is_green


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("proc/10/stat", "no keeper is running"),
        ("proc/11/stat", "no worker is running"),
        ("proc/swaps", "not in use as swap"),
        ("sys/block/nbd3/pid", "not up"),
    ],
)
def test_problems(root: Path, missing: str, problem: str) -> None:
    """Each missing part is named."""
    (root / missing).unlink()
    found = status.read("swap0", root)
    assert found.texts == [problem]
    assert not found.is_green
    assert problem in found.text()


@pytest.mark.parametrize(
    ("counter", "value", "words"),
    [
        ("disconnected", 1, "the server does not answer"),
        ("file_state", 1, "was deleted"),
        ("file_state", 2, "was replaced"),
        ("file_state", 3, "was truncated"),
        ("write_back_error", errno.ENOSPC, "No space left on device"),
        ("write_back_error", errno.EDQUOT, "quota exceeded"),
        ("checksum_failures", 1, "is the export 'async'?"),
    ],
)
def test_problems_in_the_region(
    root: Path, monkeypatch: pytest.MonkeyPatch, counter: str, value: int, words: str
) -> None:
    """Each bad state of the server and of the file is named."""
    shows(monkeypatch, {counter: value})
    (problem,) = status.read("swap0", root).texts
    assert words in problem


@pytest.mark.parametrize(
    ("ago_s", "shown"), [(None, []), (7200.0, ["reads have failed (3, the last 2 h 0 min ago)"]), (24 * 3600.0, [])]
)
def test_failed_reads(root: Path, monkeypatch: pytest.MonkeyPatch, ago_s: float | None, shown: list[str]) -> None:
    """They are told of for a day: what was killed by them may be missed later."""
    found = Reading({"generation": 1, "failed_reads": 3}, CALM, failed_read_s=ago_s)
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: found)
    assert [text.partition(":")[0] for text in status.read("swap0", root).texts] == shown


def test_a_stolen_file(root: Path) -> None:
    """The keeper took the device down and ended: the theft is reported, and not that the device is down."""
    (root / "sys/block/nbd3/pid").unlink()
    (root / "run/nbdnfs/swap0/state").write_text("lost\n")
    (problem,) = status.read("swap0", root).texts
    assert problem.startswith("another machine has stolen the backing file")


@pytest.mark.parametrize(
    ("state", "problem"), [(1, None), (2, "writes wait"), (3, "another machine has stolen the backing file")]
)
def test_owner_state(root: Path, monkeypatch: pytest.MonkeyPatch, state: int, problem: str | None) -> None:
    """The states of enum owner_state, as the region's counters hold them."""
    shows(monkeypatch, {"owner_state": state})
    problems = status.read("swap0", root).texts
    assert problem in problems[0] if problem else not problems


def test_why_the_last_start_failed(root: Path) -> None:
    """What a keeper that ended for good has left is shown, without what to do, until the next one starts."""
    (root / "sys/block/nbd3/pid").unlink()
    records = Records("swap0", root)
    records.write(Records.REFUSED, "x is in use as swap by box2\nrun nbdnfs down there")
    assert status.read("swap0", root).texts == ["not up", "x is in use as swap by box2"]
    assert status.names(root) == ["swap0"]
    records.write(Records.REFUSED, "")
    assert status.read("swap0", root).texts == ["not up"]


@pytest.mark.parametrize(
    ("files", "is_listed"),
    [
        ({}, False),
        ({"run/nbdnfs/old/state": "watch\n", "run/nbdnfs/old/worker": "12 1 1.0\n"}, False),
        ({"run/nbdnfs/old/worker": "11 200 1.0\n"}, True),
        ({"run/nbdnfs/old/standby": "11 200 1.0\n"}, True),
        ({"run/nbdnfs/old/keeper": "10 100 1.0\n"}, True),
        ({"run/nbdnfs/old/state": "stolen\n"}, True),
        ({"run/nbdnfs/.old.refused": "the file has another owner\nnbdnfs up --steal"}, True),
        ({"sys/block/nbd4/backend": "nbdnfs:old\n", "sys/block/nbd4/pid": "9\n", "sys/block/nbd4/size": "8\n"}, True),
        ({"etc/nbdnfs/old.toml": ""}, True),
    ],
)
def test_names(root: Path, files: dict[str, str], is_listed: bool) -> None:
    """Devices that are configured, and devices without a configuration of which there is more than a folder."""
    (root / "run/nbdnfs/old").mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert status.names(root) == (["old", "swap0"] if is_listed else ["swap0"])
    assert [one.name for one in status.read_all(root)] == status.names(root)
    if not is_listed:
        with pytest.raises(NoInputError, match="there is no device 'old'"):
            status.read("old", root)


def test_a_device_of_which_the_kernel_alone_knows(root: Path) -> None:
    """It is listed without a folder in /run. Another program's nbd device is not."""
    for number, backend in enumerate(("nbdnfs:old", "nbdnfs:", "old", "nbdnfs:a b"), 4):
        folder = root / f"sys/block/nbd{number}"
        folder.mkdir(parents=True)
        for name, text in (("backend", backend), ("pid", "9"), ("size", "8")):
            (folder / name).write_text(f"{text}\n")
    assert status.names(root) == ["old", "swap0"]


def test_advice_that_fits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on whether a keeper is running. Text from systemd is not taken for a command."""

    def advices() -> list[str]:
        return [problem.advice for problem in status.read("swap0", root, unit_state=lambda name: unit).problems]

    (root / "sys/block/nbd3/pid").unlink()
    unit = "asking systemd: Failed to connect to bus: Permission denied"
    records = Records("swap0", root)
    monkeypatch.setattr(Records, "living", lambda self, role: None)
    assert advices() == ["the next finding says why, and what to do", "see: journalctl -u nbdnfs@swap0"]
    records.write(Records.WAITING, "the server does not answer")
    assert advices()[1] == "no keeper is running any more: nbdnfs up swap0"
    monkeypatch.undo()
    assert advices()[1].startswith("it tries again by itself")
    records.write(Records.WAITING, "")
    assert advices() == ["its keeper is starting it: wait, and see: journalctl -u nbdnfs@swap0"]


def test_names_that_cannot_be_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may be there is listed."""

    def fail(records: Records, key: str) -> None:
        raise UnreadableError("cannot read the record: Too many open files")

    (root / "run/nbdnfs/old").mkdir()
    monkeypatch.setattr(Records, "living", fail)
    assert status.names(root) == ["old", "swap0"]


def test_no_such_device(root: Path) -> None:
    """A name that is neither configured nor up: the error lists the devices that exist."""
    with pytest.raises(NoInputError) as caught:
        status.read("swapO", root)
    assert caught.value.hint == "there are: swap0"
    with pytest.raises(UsageError):
        status.read("../swap0", root)


@pytest.mark.parametrize(
    ("found", "waits", "level", "words"),
    [
        ({}, Waits(4.9, 4.9, 4.9), Level.OK, ""),
        ({}, Waits(5.0, 5.0, 5.0), Level.WARNING, "the server is unheard for 5.0 s, and answers are outstanding"),
        ({}, Waits(75.0, 74.0, 75.0), Level.CRITICAL, "the server is unheard for 1 min 15 s"),
        ({}, Waits(8.2, 46.0, 8.2), Level.CRITICAL, "the server is unheard for 8.2 s"),
        ({}, Waits(0.0, 0.0, 9999.0), Level.OK, ""),  # it was asked nothing
        ({}, Waits(0.1, 12.0, 0.1), Level.WARNING, "a request of the kernel has waited for 12 s"),
        ({}, Waits(0.1, 31.0, 0.1), Level.CRITICAL, "a request of the kernel has waited for 31 s"),
        ({"disconnected": 1}, Waits(42.0, 41.0, 42.0), Level.CRITICAL, "the server does not answer, unheard for 42 s"),
        ({"disconnected": 1}, None, Level.CRITICAL, "the server does not answer"),
        ({"owner_state": 2}, CALM, Level.WARNING, "writes wait"),
        ({"file_state": 9}, CALM, Level.CRITICAL, "unknown state 9"),
    ],
)
def test_levels(
    root: Path, monkeypatch: pytest.MonkeyPatch, found: Counters, waits: Waits | None, level: Level, words: str
) -> None:
    """How long the server is silent while it owes an answer, and how long a request takes: first a warning."""
    shows(monkeypatch, found, waits)
    one = status.read("swap0", root)
    assert one.level is level
    assert words in one.text().splitlines()[0]


def test_large_packets_get_lost(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers small calls, now and then: how long the request has waited is said as well."""
    shows(monkeypatch, {}, Waits(8.2, 46.0, 8.2))
    text = status.read("swap0", root).text()
    assert "unheard for 8.2 s" in text
    assert "a request of the kernel has waited for 46 s" in text


def test_counters_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root: unknown, and not "ok"; what is worse than unknown is still reported."""
    monkeypatch.setattr(counters, "of_worker", lambda pid, root: None)
    found = status.read("swap0", root)
    assert (found.level, found.unstable_bytes, found.waits) == (Level.UNKNOWN, None, None)
    assert found.text().startswith("swap0: unknown: the counters of process 11 cannot be read (run this as root)")
    (root / "proc/swaps").unlink()
    assert status.read("swap0", root).level is Level.CRITICAL


def test_exit_statuses() -> None:
    """The worst device decides; unknown may be critical, and is more than a warning."""
    assert [int(level) for level in (Level.OK, Level.WARNING, Level.CRITICAL, Level.UNKNOWN)] == [0, 1, 2, 3]
    assert health.worst([]) is Level.OK
    assert health.worst([Level.WARNING, Level.UNKNOWN, Level.OK]) is Level.UNKNOWN
    assert health.worst([Level.CRITICAL, Level.UNKNOWN]) is Level.CRITICAL


def test_why_it_is_not_up(root: Path) -> None:
    """What the keeper waits for; without a keeper, what systemd says of the unit."""
    (root / "sys/block/nbd3/pid").unlink()
    records = Records("swap0", root)
    records.write(Records.WAITING, "the server does not export /export")
    found = status.read("swap0", root, lambda name: "is not asked")
    assert found.texts == ["not up", "the server does not export /export"]
    (root / "run/nbdnfs/swap0/waiting").unlink()
    (root / "proc/10/stat").unlink()
    found = status.read("swap0", root, lambda name: f"nbdnfs@{name}.service is not started")
    assert found.texts == ["not up", "nbdnfs@swap0.service is not started"]
    assert found.level is Level.CRITICAL
    (root / "etc/nbdnfs/swap0.toml").write_text("ulr = 'x'")
    found = status.read("swap0", root, lambda name: "is not asked")
    assert found.texts[0] == "not up"
    assert "unknown key 'ulr'" in found.texts[1]
    assert [problem.advice for problem in found.problems] == [
        "correct its configuration: nbdnfs check swap0",
        "did you mean 'url'?",
    ]


@pytest.mark.parametrize("why", ["no network", "only root may read it", "it cannot be read now"])
def test_a_configuration_that_is_not_known(root: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Not one that is wrong: what systemd says of the unit is what is known."""
    (root / "sys/block/nbd3/pid").unlink()
    (root / "proc/10/stat").unlink()

    def load(name: str, root: Path) -> None:
        raise UnavailableError("%M needs a default route, and there is none yet")

    def fail(path: Path, *mode: str, **options: object) -> None:
        number = errno.EACCES if why == "only root may read it" else errno.EIO
        raise OSError(number, os.strerror(number), str(path))

    if why == "no network":
        monkeypatch.setattr(config, "load", load)
    elif why == "only root may read it":
        monkeypatch.setattr(config, "open", fail, raising=False)
    else:
        monkeypatch.setattr(config, "load", fail)
    found = status.read("swap0", root, lambda name: f"nbdnfs@{name}.service is not started")
    assert found.texts == ["not up", "nbdnfs@swap0.service is not started"]


def test_a_configuration_that_is_not_used(root: Path) -> None:
    """The device goes on with the last good one: a warning, with what is wrong."""
    Records("swap0", root).write(Records.CONFIG_ERROR, "/etc/nbdnfs/swap0.toml:1: unknown key 'siez'")
    found = status.read("swap0", root)
    assert found.level is Level.WARNING
    assert "'siez'" in found.texts[0]


def test_one_bad_entry(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other programs, of damaged records: the others are reported all the same."""
    (root / "run/nbdnfs/not a device").mkdir()
    os.mkdir(os.fsencode(root / "run/nbdnfs") + b"/\xff")
    (root / "etc/nbdnfs/bad.toml").write_text("")
    monkeypatch.setattr(status, "read", spoilt(status.read, "bad"))
    assert status.names(root) == ["bad", "swap0"]
    bad, good = status.read_all(root)
    assert (bad.level, good.level) == (Level.UNKNOWN, Level.OK)
    assert bad.texts == ["its state cannot be read: of all things"]


def spoilt(read: Callable[[str, Path], status.Status], name: str) -> Callable[[str, Path], status.Status]:
    def spoilt_read(one: str, root: Path) -> status.Status:
        if one == name:
            raise ValueError("of all things")
        return read(one, root)

    return spoilt_read


def test_without_proc(tmp_path: Path) -> None:
    """One line, not a device that is not swapped on."""
    (tmp_path / "proc").mkdir()
    with pytest.raises(UnavailableError, match="/proc is not mounted"):
        status.read("swap0", tmp_path)


def test_json(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys that docs/monitoring.md has, each of them there."""
    shows(monkeypatch, {"generation": 2}, Waits(6.5, 7.0, 6.5))
    found = status.read("swap0", root).to_json()
    assert (found["schema"], found["level"], found["green"]) == (status.SCHEMA, "warning", False)
    assert (found["unheard_s"], found["oldest_request_s"], found["last_heard_s"]) == (6.5, 7.0, 6.5)
    text = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
    assert [key for key in found if f"`{key}`" not in text] == []
