# SPDX-License-Identifier: LGPL-2.1-or-later
"""One keeper for a device, and one device for a file."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.nbd_tree import add_device, make_machine
from support.want import no_descriptors

from nbdnfs import name_lock
from nbdnfs.errors import BusyError, UnavailableError, UnreadableError
from nbdnfs.keeper import failures, heir, only_keeper
from nbdnfs.keeper.records import Records

URL = "nfs://nas/export/swap/a.swap?version=3"
ADDRESS = "192.0.2.1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with the processes of this one."""
    return make_machine(tmp_path / "root")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(only_keeper, "_WAIT_S", 0.1)
    monkeypatch.setattr(only_keeper, "_OTHERS_WAIT_S", 0.1)


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        yield process
        process.kill()


def records(root: Path, name: str = "swap0") -> Records:
    """With records in `root`, and processes of this machine."""
    made = Records(name, run=root / "run/nbdnfs")
    made.make()
    return made


def test_a_second_keeper(root: Path) -> None:
    """It is refused before it does anything; with the process that is the keeper."""
    lock = only_keeper.become(records(root))
    with pytest.raises(BusyError, match=rf"swap0 already has a keeper.*: process {os.getpid()}$"):
        only_keeper.become(records(root))
    assert only_keeper.keeper_of(records(root)) == os.getpid()
    os.close(lock)
    os.close(only_keeper.become(records(root)))
    assert only_keeper.keeper_of(records(root)) is None


# The keeper of swap0, in a PID namespace of its own.
UNSEEN_KEEPER = """
import sys
from pathlib import Path
from nbdnfs.keeper import only_keeper
from nbdnfs.keeper.records import Records
only_keeper.become(Records("swap0", run=Path(sys.argv[1])))
print("has the lock", flush=True)
sys.stdin.read()
"""
# Another one that comes.
SECOND_KEEPER = UNSEEN_KEEPER.replace("print", "sys.exit('has the lock, too'); print")


@pytest.mark.server  # root
@pytest.mark.parametrize("seen_from", ["outside", "inside"])
def test_a_second_keeper_in_another_pid_namespace(root: Path, seen_from: str) -> None:
    """It is refused at once, whether it sees the other one in /proc/locks, from outside, or not."""
    run = records(root).path.parent
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with subprocess.Popen(
        [*(apart if seen_from == "outside" else []), sys.executable, "-c", UNSEEN_KEEPER, run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "has the lock\n"
        second = subprocess.run(
            [*(apart if seen_from == "inside" else []), sys.executable, "-c", SECOND_KEEPER, run],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        first.kill()
    expected = "process" if seen_from == "outside" else "a process that cannot be seen from here"
    assert f"swap0 already has a keeper, or is being taken down: {expected}" in second.stderr


def test_removed_records_do_not_free_the_device(root: Path) -> None:
    """The keeper that fails removes its records; the lock stays until it has ended."""
    lock = only_keeper.become(records(root))
    records(root).remove()
    with pytest.raises(BusyError):
        only_keeper.become(records(root))
    os.close(lock)


def test_a_keeper_of_a_version_without_a_lock(root: Path, other_process: subprocess.Popen[bytes]) -> None:
    """Its record counts while it lives."""
    records(root).put_process(Records.KEEPER, other_process.pid, "0.0.1")
    with pytest.raises(BusyError, match=f"process {other_process.pid}"):
        only_keeper.become(records(root))
    assert only_keeper.keeper_of(records(root)) == other_process.pid
    other_process.kill()
    other_process.wait()
    os.close(only_keeper.become(records(root)))


def test_without_a_place_for_the_lock(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error, unless the device is attached: then the keeper is needed more than the lock."""
    shutil.rmtree(root / "run", ignore_errors=True)
    (root / "run").write_text("")
    blocked = Records("swap0", root)
    with pytest.raises(UnavailableError, match="cannot lock the device"):
        only_keeper.become(blocked)
    monkeypatch.setattr(only_keeper.nbd_device, "find", lambda backend: object())
    assert only_keeper.become(blocked) == -1
    assert "going on for the device that is attached" in capsys.readouterr().err


def test_another_keeper_where_there_is_no_lock(
    root: Path, other_process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record counts for a device that is attached, too."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records(root).put_process(Records.KEEPER, other_process.pid, "0.0.1")
    monkeypatch.setattr(name_lock, "take", refuse)
    monkeypatch.setattr(only_keeper.nbd_device, "find", lambda backend: object())
    with pytest.raises(BusyError, match=f"process {other_process.pid}"):
        only_keeper.become(records(root))


@pytest.mark.parametrize("errors", [3, 1000])
def test_no_descriptor_for_the_lock(root: Path, monkeypatch: pytest.MonkeyPatch, errors: int) -> None:
    """It is tried again; no keeper goes on without a lock for that, whatever is attached."""
    refusals = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))] * errors
    take = name_lock.take

    def refuse(*arguments: Any, **options: Any) -> int:
        if refusals:
            raise refusals.pop()
        return take(*arguments, **options)

    monkeypatch.setattr(name_lock, "take", refuse)
    monkeypatch.setattr(failures, "_LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(only_keeper.nbd_device, "find", lambda backend: object())
    if errors == 3:
        os.close(only_keeper.become(records(root)))
        return
    with pytest.raises(UnreadableError, match="cannot lock the device"):
        only_keeper.become(records(root))


def test_a_holder_that_cannot_be_looked_at(other_process: subprocess.Popen[bytes]) -> None:
    """It may be an heir."""
    with no_descriptors(), pytest.raises(UnreadableError, match="Too many open files"):
        heir.is_heir(other_process.pid)
    assert not heir.is_heir(other_process.pid)


@pytest.mark.parametrize(
    "text",
    [
        URL,
        "nfs://nas.example/export/swap/a.swap?version=3",
        "nfs://nas/export/swap/a.swap?version=4&uid=7&nfsport=2049",
    ],
)
def test_a_file_of_another_device(root: Path, text: str) -> None:
    """Refused with the other device's name while that has a keeper, whatever else is in the URL."""
    other = records(root, "other")
    lock = only_keeper.become(other)
    only_keeper.record_address(other, URL, ADDRESS)
    with pytest.raises(BusyError, match=r"a\.swap on 192\.0\.2\.1 is the file of other on this machine") as caught:
        only_keeper.record_address(records(root), text, ADDRESS)
    assert "nbdnfs down other" in caught.value.hint
    assert records(root).read(Records.ADDRESS) is None
    os.close(lock)
    only_keeper.record_address(records(root), text, ADDRESS)
    assert records(root).read(Records.ADDRESS) == f"{text}\n{ADDRESS}"


def test_a_device_that_is_attached_is_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record that cannot be made, or may not, ends no keeper that has something to keep."""
    other = records(root, "other")
    lock = only_keeper.become(other)
    only_keeper.record_address(other, URL, ADDRESS)
    only_keeper.record_address(records(root), URL, ADDRESS, is_attached=True)
    shutil.rmtree(root / "run/nbdnfs/swap0")
    only_keeper.record_address(Records("swap0", run=root / "run/nbdnfs"), f"{URL}&uid=1", "192.0.2.7", is_attached=True)
    assert capsys.readouterr().err.count("going on with the device that is attached") == 2
    os.close(lock)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nfs://nas/export/swap/b.swap?version=3", ADDRESS),
        (URL, "192.0.2.2"),
        (f"{URL}&nfsport=12049", ADDRESS),
    ],
)
def test_other_files(root: Path, text: str, address: str) -> None:
    """Another path, server or port is another file; and a device may record its own again."""
    other = records(root, "other")
    lock = only_keeper.become(other)
    only_keeper.record_address(other, URL, ADDRESS)
    only_keeper.record_address(other, URL, ADDRESS)
    only_keeper.record_address(records(root), text, address)
    os.close(lock)


def test_a_file_of_a_device_without_a_keeper(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two keepers the device counts: it is attached."""
    other = records(root, "other")
    other.write(Records.ADDRESS, f"{URL}\n{ADDRESS}")
    add_device(root, 3, size_bytes=4096, pid=4711, backend="nbdnfs:other")
    find = only_keeper.nbd_device.find
    monkeypatch.setattr(only_keeper.nbd_device, "find", lambda backend, _: find(backend, root))
    with pytest.raises(BusyError, match="the file of other"):
        only_keeper.record_address(records(root), URL, ADDRESS)


def test_damaged_records_are_no_file(root: Path) -> None:
    """Nor are those of this one."""
    other = records(root, "other")
    lock = only_keeper.become(other)
    for text in ("", "nonsense", "nfs://\n1.2.3.4"):
        other.write(Records.ADDRESS, text)
        only_keeper.record_address(records(root), URL, ADDRESS)
    os.close(lock)


# `nbdnfs run t` up to the keeper's loop, in which it waits; the records are below argv[1].
PROGRAM = """
import os, sys, time
from pathlib import Path

root = Path(sys.argv[1])
sys.argv = ["nbdnfs", "run", "t"]
from nbdnfs import cli, config
from nbdnfs.keeper import keeper, main, records

load = config.load
config.load = lambda name, _: load(name, root)
os.geteuid = lambda: 0
main._lock_memory = lambda settings: None
main._survive_shutdown = lambda: None
main._server = lambda settings, records, reporter, is_attached: ("nfs://nas/a", "192.0.2.1")
main.nbdkit.check_nbdkit = lambda: None
main.nbd_device.find = lambda backend: None
main.nbd_device.NbdKernel = lambda backend, **options: None
main.nbd_driver.load = lambda: None
main.RealWork = lambda *arguments, **options: None
main.Keeper = lambda *arguments, **options: Keeper()
records.Records.__init__.__kwdefaults__["run"] = root / "run"

class Keeper:
    def run(self):
        print("runs", flush=True)
        time.sleep(60)

cli.main()
"""


def test_run_twice(tmp_path: Path) -> None:
    """The second `nbdnfs run` names the first and ends with a status after which the unit stays down; the first goes
    on. Once it has been killed, the next one runs."""
    (tmp_path / "etc/nbdnfs").mkdir(parents=True)
    (tmp_path / "etc/nbdnfs/t.toml").write_text('url = "nfs://127.0.0.1/export/t.swap"\nlock = "off"\nowner = false\n')
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = {**os.environ, "PYTHONMALLOC": "malloc"}
    for _ in range(2):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as first:
            assert first.stdout is not None
            assert first.stdout.readline() == b"runs\n"
            second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
            assert second.returncode == os.EX_TEMPFAIL
            assert f"process {first.pid}" in second.stderr
            assert "runs" not in second.stdout
            assert first.poll() is None
            first.kill()
    assert name_lock.holder("t", name_lock.KEEPER, run=tmp_path / "run") is None
