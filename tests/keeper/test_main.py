# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `nbdnfs run` does around the keeper, on a real server."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.nfs_server import LOOPBACK, FileOnServer
from support.owner_records import HOLDER, beside, record_path

from nbdnfs import programs
from nbdnfs.config import Config
from nbdnfs.errors import (
    BusyError,
    CannotCreateError,
    ConfigError,
    NbdnfsError,
    NoHostError,
    PermissionDeniedError,
    UnavailableError,
    UnreadableError,
)
from nbdnfs.keeper import failures, main
from nbdnfs.keeper.records import Records
from nbdnfs.keeper.reporter import Reporter
from nbdnfs.keeper.sd_notify import Notifier
from nbdnfs.kernel import nbd_device
from nbdnfs.nas import owner_record, ownership


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the records are. This process is root, has its allocator and is the keeper; no device is attached."""
    monkeypatch.setattr(main.only_keeper, "become", lambda records: -1)
    monkeypatch.setitem(Records.__init__.__kwdefaults__, "run", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    monkeypatch.setattr(nbd_device, "find", lambda backend: None)
    return tmp_path


@pytest.fixture
def slept_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(*arguments: object, **options: object) -> int:
        raise error

    monkeypatch.setattr(main, "_run", run)


@pytest.mark.usefixtures("run_folder")
def test_the_pace_of_keepers_that_fail(
    slept_s: list[float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first one waits for the rest of a second, those that fail in the same way for the rest of ten, and say
    nothing; what is wrong stands in a record for `status`. Another error is said, after a second again."""
    fail_with(monkeypatch, UnavailableError("the driver is away", "wait"))
    assert [main.run("swap0") for _ in range(3)] == [os.EX_UNAVAILABLE] * 3
    assert capfd.readouterr().err.splitlines() == ["nbdnfs: swap0: the driver is away", "nbdnfs: swap0: wait"]
    assert Records("swap0").read(Records.WAITING) == "the driver is away"
    fail_with(monkeypatch, NbdnfsError("something else"))
    main.run("swap0")
    assert [round(one) for one in slept_s] == [1, 10, 10, 1]
    fail_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main.run("swap0")
    assert [round(one) for one in slept_s] == [1, 10, 10, 1, 1]


@pytest.mark.usefixtures("run_folder")
def test_who_reports_an_end(slept_s: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A final error, and any error where a person has started the keeper, is raised each time, and at once."""
    for _ in range(2):
        fail_with(monkeypatch, ConfigError("it is wrong"))
        with pytest.raises(ConfigError):
            main.run("swap0")
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getppid()))  # a shell of some service, or in a terminal
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    for _ in range(2):
        fail_with(monkeypatch, UnavailableError("it is away"))
        with pytest.raises(UnavailableError):
            main.run("swap0")
    assert slept_s == []


@pytest.mark.usefixtures("run_folder", "slept_s")
def test_why_it_ended_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in a record for `status` and doctor, beside the folder, which a device that is not up does not have."""
    records = Records("swap0")
    fail_with(monkeypatch, CannotCreateError("the server has no room", "ask for less"))
    with pytest.raises(CannotCreateError):
        main.run("swap0")
    assert records.read(Records.REFUSED) == "the server has no room\nask for less"
    assert not records.path.exists()
    fail_with(monkeypatch, UnavailableError("it is away"))
    main.run("swap0")
    assert records.read(Records.WAITING) == "it is away"


def test_beside_another_keeper(
    run_folder: Path, slept_s: list[float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The unit's waits, and is started again: the other one may end. A person's ends. Neither writes a record."""

    def become(records: Records) -> int:
        raise main.only_keeper.OtherKeeperError("swap0 already has a keeper: process 7", "see: nbdnfs status swap0")

    monkeypatch.setattr(main.only_keeper, "become", become)
    assert main.run("swap0") == os.EX_UNAVAILABLE
    assert [round(one) for one in slept_s] == [10]
    assert "process 7" in capfd.readouterr().err
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getppid()))
    with pytest.raises(BusyError):
        main.run("swap0")
    assert [round(one) for one in slept_s] == [10]
    assert list(run_folder.iterdir()) == []


@pytest.mark.usefixtures("run_folder", "slept_s")
def test_nothing_is_final_with_the_device_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """But that another machine has the file: there is nothing to keep any more."""
    monkeypatch.setattr(nbd_device, "find", lambda backend: nbd_device.Attached(0, 1 << 20))
    for status in failures.FINAL_STATUSES:
        error = NbdnfsError("it is wrong")
        error.exit_code = status
        fail_with(monkeypatch, error)
        assert main.run("swap0") == os.EX_UNAVAILABLE
    fail_with(monkeypatch, failures.stolen("swap0"))
    with pytest.raises(NbdnfsError) as caught:
        main.run("swap0")
    assert caught.value.exit_code == os.EX_NOPERM


@pytest.mark.usefixtures("run_folder", "slept_s")
def test_an_error_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By that it is not known whether the device is attached: then it is as good as attached."""

    def find(backend: str) -> None:
        raise UnreadableError("cannot read /sys/block: Too many open files")

    error = NbdnfsError("it is wrong")
    error.exit_code = os.EX_CONFIG
    fail_with(monkeypatch, error)
    monkeypatch.setattr(nbd_device, "find", find)
    assert main.run("swap0") == os.EX_UNAVAILABLE
    assert Records("swap0").read(Records.WAITING) == "it is wrong"
    main._release_unless_attached("swap0", "nfs://nas/a", LOOPBACK)  # it does not raise, nor ask the server


@pytest.mark.usefixtures("run_folder")
def test_for_root_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is begun, not even the records."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionDeniedError, match="only root"):
        main.run("swap0")
    assert not Records("swap0").path.exists()


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize("steal", [False, True])
def test_another_allocator(monkeypatch: pytest.MonkeyPatch, steal: bool) -> None:
    """The keeper starts again, with the same words, and before it is the keeper."""

    class Started(Exception):
        """A new program has taken this one's place."""

    def start(path: str, command: list[str], environment: dict[str, str]) -> None:
        raise Started(command[-3:] if steal else command[-2:], environment["PYTHONMALLOC"])

    monkeypatch.delenv("PYTHONMALLOC")
    monkeypatch.setattr(os, "execve", start)
    with pytest.raises(Started) as caught:
        main.run("swap0", steal=steal)
    assert caught.value.args == (["run", "swap0", *(["--steal"] if steal else [])], "malloc")


@pytest.mark.usefixtures("run_folder")
def test_an_error_of_its_own_in_a_terminal(slept_s: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error ends it at once where a person has started it, and late under systemd."""
    fail_with(monkeypatch, ZeroDivisionError("a mistake"))
    with pytest.raises(ZeroDivisionError):
        main.run("swap0")
    assert len(slept_s) == 1
    monkeypatch.delenv("SYSTEMD_EXEC_PID")
    with pytest.raises(ZeroDivisionError):
        main.run("swap0")
    assert len(slept_s) == 1


@pytest.mark.parametrize("realtime", [True, False])
@pytest.mark.parametrize("lock", ["off", "wanted", "required"])
def test_how_memory_is_locked(monkeypatch: pytest.MonkeyPatch, lock: str, realtime: bool) -> None:
    """Off: nothing is tried. Else all is, but for what is not wanted, and `required` decides what a failure is."""
    tried: list[object] = []
    names = ("stack", "memory", "realtime")
    measures = [SimpleNamespace(name=name) for name in names]
    monkeypatch.setattr(main.memlock, "prepare", lambda: measures[:1])
    monkeypatch.setattr(main.memlock, "lock", lambda code, skip: tried.append(skip) or measures[1:])
    monkeypatch.setattr(main.memlock, "require", lambda found: tried.append(("require", [it.name for it in found])))
    monkeypatch.setattr(main.memlock, "report", lambda found: tried.append(("report", [it.name for it in found])))
    main._lock_memory(SimpleNamespace(lock=lock, realtime=realtime))  # type: ignore[arg-type]
    if lock == "off":
        assert tried == []
        return
    skip = () if realtime else ("realtime",)
    verb = "require" if lock == "required" else "report"
    assert tried == [skip, (verb, [name for name in names if name not in skip])]


@pytest.mark.parametrize("recorded", ["", "nfs://nas/e/f?version=3\n192.0.2.7", "\0damaged\n192.0.2.7", "half of it"])
@pytest.mark.parametrize("is_attached", [False, True])
def test_which_server(run_folder: Path, monkeypatch: pytest.MonkeyPatch, is_attached: bool, recorded: str) -> None:
    """With the device attached, the one that the last keeper has recorded, as far as that can be read; the name is not
    looked up then. Else the name is, and what was found is recorded."""
    records = Records("swap0", run=run_folder)
    records.reserve()
    if recorded:
        records.put(Records.ADDRESS, recorded)
    looked_up: list[str] = []
    monkeypatch.setattr(main, "_resolve", lambda url, reporter: looked_up.append(url.text) or "192.0.2.1")
    settings: Any = SimpleNamespace(url="nfs://nas/e/f")
    found = main._server(settings, records, Reporter(records, Notifier({})), is_attached=is_attached)
    if is_attached and recorded.count("\n") == 1:
        assert looked_up == []
        assert found[1] == "192.0.2.7"
        assert found[0] == (settings.url if "damaged" in recorded else recorded.split("\n")[0])
    else:
        assert found == (looked_up[0], "192.0.2.1")
        assert records.read(Records.ADDRESS) == "\n".join(found)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("recorded", [None, "yes", "no"])
@pytest.mark.parametrize("is_attached", [False, True])
def test_whether_there_is_an_owner_record(
    run_folder: Path, is_attached: bool, recorded: str | None, wanted: bool
) -> None:
    """A device goes on as it was started; another one as its configuration says, which the next keeper can read."""
    records = Records("swap0", run=run_folder)
    records.reserve()
    if recorded is not None:
        records.put(Records.OWNER, recorded)
    settings: Any = SimpleNamespace(owner=wanted)
    found = main._has_owner_record(settings, records, is_attached=is_attached)
    assert found is (recorded == "yes" if is_attached and recorded else wanted)
    assert records.read(Records.OWNER) == ("yes" if found else "no")


@pytest.mark.usefixtures("run_folder", "slept_s")
def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done on a guess: what is attached and what is swap could not be seen."""
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith("/proc"))
    assert main.run("swap0") == os.EX_UNAVAILABLE
    assert Records("swap0").read(Records.WAITING) == "/proc is not mounted"


def test_a_name_service_that_comes_up_later(
    run_folder: Path, slept_s: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    """It is waited for, said once, and shown meanwhile."""

    class Url:
        tries = 0

        def resolve(self) -> str:
            self.tries += 1
            if self.tries <= 8:
                raise NoHostError("the NFS server 'nas' is unknown")
            return "192.0.2.1"

    records = Records("swap0", run=run_folder)
    assert main._resolve(Url(), Reporter(records, Notifier({}))) == "192.0.2.1"  # type: ignore[arg-type]
    assert max(slept_s) <= 15
    assert records.read(Records.WAITING) is None
    assert capfd.readouterr().err == "nbdnfs: swap0: the NFS server 'nas' is unknown; trying again until it is known\n"


@pytest.mark.parametrize(
    ("state", "is_booting"),
    [("starting\n", True), ("initializing\n", True), ("running\n", False), ("degraded\n", False)],
)
def test_whether_it_is_the_boot(monkeypatch: pytest.MonkeyPatch, state: str, is_booting: bool) -> None:
    """By systemd's state; without systemd it is not."""
    monkeypatch.setattr(programs, "run", lambda argv, **options: state)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/system")
    assert main._is_booting() == is_booting
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    assert not main._is_booting()


def test_no_room_for_records(tmp_path: Path) -> None:
    """Before there is swap, it is an error that passes; with swap in use it is none."""
    (tmp_path / "swap0").write_text("a file in place of the folder")
    records = Records("swap0", run=tmp_path)
    main._reserve_records(records, is_attached=True)
    with pytest.raises(UnavailableError, match="no room for records"):
        main._reserve_records(records, is_attached=False)


def test_a_failed_keeper_releases_the_file(swap_file: FileOnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that fails releases the file, unless its device is still attached for the next keeper."""
    ownership.claim(swap_file.url(), HOLDER, owner_record.identity())
    monkeypatch.setattr(nbd_device, "find", lambda backend: nbd_device.Attached(0, swap_file.size_bytes))
    main._release_unless_attached("swap0", swap_file.url(), LOOPBACK)
    assert record_path(swap_file).exists()
    monkeypatch.setattr(nbd_device, "find", lambda backend: None)
    main._release_unless_attached("swap0", swap_file.url(), LOOPBACK)
    assert beside(swap_file) == []


def test_starts_again_with_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd has set stays; of the caller's Python settings, nothing does."""
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.setenv("PYTHONPATH", ":/somewhere")
    main._start_again("swap0", ["--steal"])
    ((program, command, environment),) = calls
    assert command == [program, "-P", "-m", "nbdnfs", "run", "swap0", "--steal"]
    assert (environment["PYTHONMALLOC"], environment["NOTIFY_SOCKET"]) == ("malloc", "/run/x")
    assert (environment["LD_BIND_NOW"], environment["LC_ALL"], environment["PYTHONUTF8"]) == ("1", "C", "1")
    assert "somewhere" not in environment["PYTHONPATH"]
    assert all(map(os.path.isabs, environment["PYTHONPATH"].split(":")))


def test_a_loop_that_has_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`loop = true` for a device that was attached for larger requests: the journal says why it has none yet."""
    device = SimpleNamespace(max_sectors_kb=4096)
    attached = nbd_device.Attached(0, 1 << 20)
    monkeypatch.setattr(main.kernel_state, "nbd_device", lambda name: device)
    reporter = Reporter(Records("swap0", run=tmp_path), Notifier({}))
    settings = Config("swap0", "nfs://127.0.0.1/export/a.swap", loop=True)
    assert not main._has_loop(settings, attached, reporter)
    assert "requests of up to 4096 KiB, too large for loop = true" in capfd.readouterr().err
    device.max_sectors_kb = 1024
    assert main._has_loop(settings, attached, reporter)
    assert capfd.readouterr().err == ""
