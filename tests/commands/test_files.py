# SPDX-License-Identifier: LGPL-2.1-or-later
"""list, remove, gc and grow on a folder of a real server: whose files they touch, and whose never."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fake_nas import FakeNas
from support.nfs_server import Ganesha
from support.owner_records import HOLDER, machine

from nbdnfs import backing_size, cli, nfs_url, specifiers
from nbdnfs.commands import gc as gc_command
from nbdnfs.commands import grow as grow_command
from nbdnfs.commands import list as list_command
from nbdnfs.commands import where
from nbdnfs.errors import BusyError
from nbdnfs.keeper.records import Records
from nbdnfs.kernel import nbd_device
from nbdnfs.nas import backing_file, folder, owner_record, ownership, part_file

MIB = 1 << 20
DAY_S = 86400.0


class Folder:
    """A folder of the test's own on the server."""

    def __init__(self, ganesha: Ganesha, name: str) -> None:
        self.path = ganesha.export_path / name
        self.name = name
        self._ganesha = ganesha
        self.path.mkdir()

    def url(self, name: str = "") -> str:
        return self._ganesha.url("NAME").replace("NAME", f"{self.name}/{name}")

    def create(self, name: str, owner: str | None = None, silent_s: float = 0.0) -> Path:
        """A backing file of 1 MiB; with an owner's host name, that machine's."""
        backing_file.create(self.url(name), MIB)
        path = self.path / name
        if owner is not None:
            ownership.claim(self.url(name), HOLDER, machine(owner))
            self.age(path.with_name(f".{name}.owner"), silent_s)
            self.age(path, silent_s)
        return path

    def age(self, path: Path, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(path, (then, then))

    def names(self) -> set[str]:
        return set(os.listdir(self.path))


@pytest.fixture
def place(ganesha: Ganesha, request: pytest.FixtureRequest) -> Iterator[Folder]:
    made = Folder(ganesha, f"folder-{re.sub('[^a-z]', '', request.node.name)[:40]}")
    yield made
    for path in made.path.iterdir():
        path.unlink()
    made.path.rmdir()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run("list", ...)`: the exit status, stdout and stderr."""

    def run_it(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run_it


Run = Callable[..., tuple[int, str, str]]


# list


def test_list_a_folder(place: Folder, run: Run) -> None:
    """Files with their owners, parts and lone records; by the folder's URL, and by that of a file in it."""
    place.create("a.swap", "box1", 3 * DAY_S)
    place.create("b.swap")
    place.create("c.swap", "box3")
    (place.path / "c.swap").unlink()
    (place.path / ".d.swap.0123456789ab.part").write_bytes(bytes(4096))
    (place.path / "notes.txt").write_text("not swap")
    before = place.names()
    for url in (place.url(), place.url().replace("/?", "?"), place.url("b.swap"), place.url("none")):
        status, out, _ = run("list", url, "--json")
        assert status == 0
        found = json.loads(out)
        assert found["schema"] == 1
        rows = {row["name"]: row for row in found["files"]}
        assert set(rows) == {"a.swap", "b.swap", ".d.swap.0123456789ab.part", "c.swap"}
    assert (rows["a.swap"]["owner"], rows["a.swap"]["size_bytes"], rows["a.swap"]["mode"]) == ("box1", MIB, "0600")
    assert rows["a.swap"]["owner_silent_s"] == pytest.approx(3 * DAY_S, abs=60)
    assert rows["a.swap"]["changed_s_ago"] == pytest.approx(3 * DAY_S, abs=60)
    assert rows["b.swap"]["owner"] is None
    assert rows["c.swap"]["kind"] == "record"
    assert place.names() == before
    _, out, _ = run("list", place.url())
    assert re.search(r"(?m)^a.swap +1 MiB  changed 72 h 0 min ago  box1 \(since .*, no sign of life for 72 h\)$", out)


def test_names_of_any_bytes(place: Folder, run: Run) -> None:
    """What is not printable does not reach the terminal; JSON has it."""
    for name in (b"\x1b[2Jred.swap", b"\xe4.swap", "\N{SNOWMAN}.swap".encode()):
        path = place.path / os.fsdecode(name)
        path.write_bytes(bytes(4096))
        path.chmod(0o600)
    _, out, _ = run("list", place.url())
    assert {line.split(" ")[0] for line in out.splitlines()} == {"?[2Jred.swap", "?.swap", "\N{SNOWMAN}.swap"}
    _, out, _ = run("list", place.url(), "--json")
    found = {row["name"] for row in json.loads(out)["files"]}
    assert found == {"\x1b[2Jred.swap", "\udce4.swap", "\N{SNOWMAN}.swap"}


def test_list_many_files_over_few_connections(place: Folder, run: Run, ganesha: Ganesha) -> None:
    """One connection serves them all: a machine has a few hundred reserved ports."""
    text = owner_record.new(machine("box"), HOLDER, None, "held").to_bytes()
    for number in range(150):
        (place.path / f"{number}.swap").write_bytes(bytes(4096))
        (place.path / f"{number}.swap").chmod(0o600)
        (place.path / f".{number}.swap.owner").write_bytes(text)
    started_s = time.monotonic()
    _, out, _ = run("list", place.url(), "--json")
    assert [row["owner"] for row in json.loads(out)["files"]] == ["box"] * 150
    assert time.monotonic() - started_s < 20


def test_no_folder(place: Folder, run: Run) -> None:
    """A sentence."""
    status, _, err = run("list", place.url("none/"))
    assert status == os.EX_NOINPUT
    assert "has no directory" in err


@pytest.mark.parametrize("arguments", [["list"], ["gc", "--dry-run"]], ids=lambda arguments: arguments[0])
def test_a_server_that_hangs(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """It answers other calls, and never this one: an error after a time."""
    monkeypatch.setattr(list_command, "_LIMIT_S", 0.5)
    monkeypatch.setattr(gc_command, "_LIMIT_S", 0.5)
    with FakeNas() as nas:
        nas.add("/export/a.swap", bytes(4096))
        nas.drop("READDIRPLUS", times=None)
        status, _, err = run(*arguments, nas.url("/export/"))
    assert (status, "has not answered for 0.5 s" in err) == (os.EX_UNAVAILABLE, True)


# remove


def test_remove(place: Folder, run: Run) -> None:
    """File, record and this machine's part; nothing else."""
    place.create("a.swap")
    place.create("b.swap", "box2")
    (place.path / part_file.name_of(nfs_url.parse(place.url("a.swap")))).write_bytes(b"")
    status, out, _ = run("remove", place.url("a.swap"), "--yes")
    assert (status, "removed" in out) == (0, True)
    assert place.names() == {"b.swap", ".b.swap.owner"}
    status, _, err = run("remove", place.url("a.swap"), "--yes")
    assert status == os.EX_NOINPUT
    assert "there is no file" in err


def test_remove_refuses(place: Folder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's file, silent or not; what is not swap; what this machine uses; and without an answer."""
    for name, silent_s in (("a.swap", 0.0), ("b.swap", 100 * DAY_S)):
        place.create(name, "box2", silent_s)
        status, _, err = run("remove", place.url(name), "--yes")
        assert status == os.EX_NOPERM
        assert "box2" in err
    (place.path / "letter").write_bytes(b"Dear Sir or Madam" * 1000)
    status, _, err = run("remove", place.url("letter"), "--yes")
    assert (status, "is not removed" in err) == (os.EX_CANTCREAT, True)
    place.create("c.swap")
    status, _, err = run("remove", place.url("c.swap"))
    assert (status, "--yes" in err) == (os.EX_USAGE, True)
    monkeypatch.setattr(Records, "names", lambda root: ["swap7"])
    monkeypatch.setattr(Records, "read", lambda self, key: f"{place.url('c.swap')}\n127.0.0.1")
    monkeypatch.setattr(nbd_device, "find", lambda backend, root: nbd_device.Attached(7, MIB))
    status, _, err = run("remove", place.url("c.swap"), "--yes")
    assert status == os.EX_TEMPFAIL
    assert "in use on this machine, by swap7" in err
    assert place.names() == {"a.swap", ".a.swap.owner", "b.swap", ".b.swap.owner", "letter", "c.swap"}


@pytest.mark.parametrize(
    "command",
    [
        ("remove", "--yes"),
        ("grow", "2M"),
        ("create", "--size=1M", "--force"),
        ("serve", "--socket=/nonexistent/socket", "--no-owner"),
    ],
)
@pytest.mark.parametrize("is_attached", [True, False])
def test_a_file_of_this_machine_by_another_name(
    place: Folder,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: tuple[str, ...],
    is_attached: bool,
) -> None:
    """The server's name instead of its address; attached, or with a keeper that is about to attach it. Without an owner
    record."""
    path = place.create("a.swap")
    path.write_bytes(b"swapped out".ljust(MIB))
    own = Records("swap7", tmp_path)
    own.make()
    own.write(Records.ADDRESS, f"{place.url('a.swap').replace('127.0.0.1', 'localhost')}\n127.0.0.1")
    if not is_attached:
        (tmp_path / "proc").symlink_to("/proc")
        own.put_process(Records.KEEPER, os.getpid(), "1")
    device = nbd_device.Attached(7, MIB) if is_attached else None
    monkeypatch.setattr(nbd_device, "find", lambda backend, root: device)
    monkeypatch.setattr(where.refuse_if_attached, "__defaults__", (tmp_path,))
    status, _, err = run(command[0], place.url("a.swap"), *command[1:])
    assert (status, "in use on this machine, by swap7" in err) == (os.EX_TEMPFAIL, True)
    assert path.read_bytes() == b"swapped out".ljust(MIB)


def test_the_answer_counts(place: Folder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No is no."""
    place.create("a.swap")
    monkeypatch.setattr(where, "confirm", lambda question, yes: "a.swap" not in question)
    assert run("remove", place.url("a.swap"))[0] == 1
    assert place.names() == {"a.swap"}


@pytest.mark.parametrize("command", [("remove", "--yes"), ("grow", "2M")])
def test_a_file_with_the_old_name(
    place: Folder, run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, str]
) -> None:
    """What an earlier version named with the machine id is the file that %m names now."""
    before, now = "3d1219c7c4c5404aaa1f6d2a48adfda4", "b9e750d45d3b47a2b82a46fe5dd6e8df"
    monkeypatch.setattr(specifiers, "machine_id", lambda root: now)
    monkeypatch.setattr(specifiers, "raw_machine_id", lambda root: before)
    place.create(f"{before}.swap")
    name, argument = command
    status, _, _ = run(name, place.url(f"{now}.swap"), argument)
    assert status == 0
    assert place.names() == (set() if name == "remove" else {f"{now}.swap"})


# files that are not swap


def an_image(kind: str) -> bytes:
    """12 MiB that nbdnfs must not take for its own: a btrfs, whose superblock follows 64 KiB of zeros; a disk of zeros
    but for some data in the middle, or at the very end; a LUKS volume."""
    noise = os.urandom(MIB)
    if kind == "btrfs":
        return bytes(64 << 10) + b"_BHRfS_M".ljust(4096, b"\2") + (noise * 12)[: 12 * MIB - (68 << 10)]
    if kind == "middle":
        return bytes(5 * MIB) + noise + bytes(6 * MIB)
    if kind == "end":
        return bytes(12 * MIB - 1) + b"\1"
    return b"LUKS\xba\xbe".ljust(64 << 10, b"\1") + (noise * 12)[: 11 * MIB] + bytes(MIB - (64 << 10))


IMAGES = ["btrfs", "middle", "end"]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize(
    "command", [("grow", "16M"), ("remove", "--yes"), ("create", "--size=12M", "--if-missing")], ids=lambda it: it[0]
)
def test_an_image_that_begins_with_zeros(place: Folder, run: Run, command: tuple[str, ...], kind: str) -> None:
    """It is not taken for an empty backing file, and no byte of it is changed; the message says where there is data."""
    path = place.path / "vm.img"
    path.write_bytes(data := an_image(kind))
    path.chmod(0o600)
    status, _, err = run(command[0], place.url("vm.img"), *command[1:])
    assert status == os.EX_CANTCREAT
    assert "has no swap area, and has data at" in err
    assert path.read_bytes() == data


def test_data_in_the_window_that_grow_writes(place: Folder, run: Run) -> None:
    """A look at some places does not find it, and grow reads what it overwrites: the file stays as it is."""
    path = place.path / "vm.img"
    with path.open("wb") as file:
        file.truncate(200 * MIB)
        file.seek(194 * MIB)
        file.write(b"thesis")
    path.chmod(0o600)
    status, _, err = run("grow", place.url("vm.img"), "201M")
    assert (status, "has data at 194 MiB" in err) == (os.EX_CANTCREAT, True)
    assert path.stat().st_size == 200 * MIB
    assert place.names() == {"vm.img"}


def test_a_luks_header(place: Folder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """dm-crypt on a device may have swap in it or other data: --if-missing and grow leave all of that as it is, and
    remove says so in its question."""
    path = place.path / "a.swap"
    path.write_bytes(data := an_image("luks"))
    path.chmod(0o600)
    assert run("create", place.url("a.swap"), "--size=12M", "--if-missing")[0] == 0
    assert path.read_bytes() == data
    assert run("grow", place.url("a.swap"), "16M")[0] == 0
    assert path.read_bytes() == data + bytes(4 * MIB)
    asked: list[str] = []
    monkeypatch.setattr(where, "confirm", lambda question, yes: asked.append(question))
    assert run("remove", place.url("a.swap"))[0] == 1
    assert "begins with a LUKS header, and is not certain to be swap" in asked[0]
    assert place.names() == {"a.swap"}


# gc


def test_gc(place: Folder, run: Run) -> None:
    """Files of owners that were silent long enough, and records without a file; never one without a record."""
    place.create("old.swap", "box1", 91 * DAY_S)
    place.create("new.swap", "box2", 89 * DAY_S)
    place.create("lone.swap", "box3", 91 * DAY_S)
    (place.path / "lone.swap").unlink()
    place.age(place.create("nobodys.swap"), 400 * DAY_S)
    place.age(place.create("free.swap"), 400 * DAY_S)
    released = dataclasses.replace(owner_record.new(machine("box4"), HOLDER, None, "held"), state="free")
    (place.path / ".free.swap.owner").write_bytes(released.to_bytes())
    place.age(place.path / ".free.swap.owner", 400 * DAY_S)
    left = {"nobodys.swap", "free.swap", ".free.swap.owner"}
    stay = {"new.swap", ".new.swap.owner", *left}
    before = place.names()
    status, out, _ = run("gc", place.url(), "--dry-run")
    assert (status, place.names()) == (0, before)
    assert re.search(r"(?m)^old.swap +1 MiB  box1, silent for 91 days$", out)
    assert "would remove 2 files, 1 MiB" in out
    assert run("gc", place.url())[0] == os.EX_USAGE
    assert place.names() == before
    assert run("gc", place.url(), "--yes")[0] == 0
    assert place.names() == stay
    status, out, _ = run("gc", place.url(), "--yes")
    assert (status, "no owner has been silent for 90 days" in out) == (0, True)
    assert run("gc", place.url(), "--yes", "--older-than", "88d")[0] == 0
    assert place.names() == left


def test_gc_refuses_a_short_time(place: Folder, run: Run) -> None:
    """A machine that is off overnight is not gone."""
    place.create("a.swap", "box1", 3600)
    status, _, err = run("gc", place.url(), "--older-than", "30min", "--yes")
    assert (status, "too short" in err) == (os.EX_USAGE, True)
    assert place.names() == {"a.swap", ".a.swap.owner"}


@pytest.mark.parametrize("what", ["refreshes", "claims"])
def test_gc_and_an_owner_that_comes_back(place: Folder, what: str) -> None:
    """Between the question and the answer: the file stays."""
    place.create("a.swap", "box1", 91 * DAY_S)
    found = folder.find(place.url())
    (entry,) = found.entries()
    record = place.path / ".a.swap.owner"
    if what == "claims":
        record.write_bytes(owner_record.new(machine("box9"), HOLDER, None, "held").to_bytes())
        place.age(record, 91 * DAY_S)
    else:
        place.age(record, 0.0)
    assert not found.remove_silent(entry, machine("me"), 90 * DAY_S)
    assert place.names() == {"a.swap", ".a.swap.owner"}


def test_gc_keeps_what_is_not_swap(place: Folder, run: Run) -> None:
    """Whatever its record says."""
    path = place.create("a.swap", "box1", 91 * DAY_S)
    path.write_bytes(b"thesis" * 1000)
    place.age(path, 91 * DAY_S)
    status, _, err = run("gc", place.url(), "--yes")
    assert (status, "a.swap stays" in err) == (1, True)
    assert place.names() == {"a.swap", ".a.swap.owner"}


@pytest.mark.parametrize("is_swap", [True, False])
def test_gc_and_a_hidden_file(place: Folder, run: Run, is_swap: bool) -> None:
    """One whose name begins with a dot is a file like any other with a record: it is listed, and looked at."""
    path = place.create(".a.swap", "box1", 91 * DAY_S)
    if not is_swap:
        path.write_bytes(b"thesis" * 1000)
        place.age(path, 91 * DAY_S)
    _, out, _ = run("list", place.url(), "--json")
    assert [(row["kind"], row["name"]) for row in json.loads(out)["files"]] == [("file", ".a.swap")]
    status, _, err = run("gc", place.url(), "--yes")
    assert (status, ".a.swap stays" in err) == ((0, False) if is_swap else (1, True))
    assert place.names() == (set() if is_swap else {".a.swap", "..a.swap.owner"})


@pytest.mark.parametrize("listed_as", ["record", "file"])
@pytest.mark.parametrize("is_swap", [True, False])
def test_gc_and_a_file_that_comes_back(place: Folder, listed_as: str, is_swap: bool) -> None:
    """A file that appears between the question and the answer, perhaps from a snapshot, stays."""
    path = place.create("a.swap", "box1", 91 * DAY_S)
    if listed_as == "record":
        path.unlink()
    found = folder.find(place.url())
    (entry,) = found.entries()
    assert entry.kind == listed_as
    path.write_bytes(bytes(MIB) if is_swap else b"thesis" * 1000)
    with pytest.raises(BusyError, match="has changed since it was listed"):
        found.remove_silent(entry, machine("me"), 90 * DAY_S)
    assert place.names() == {"a.swap", ".a.swap.owner"}


# grow


def swap_header(path: Path) -> tuple[int, int, bytes]:
    """version, last page, and what follows: uuid and label."""
    with path.open("rb") as file:
        file.seek(1024)
        return *struct.unpack("=II", file.read(8)), file.read(36)


def test_grow(place: Folder, run: Run) -> None:
    """Blocks for what is added, the same swap area with the new size, mode and name as before."""
    path = place.create("a.swap")
    subprocess.run(["mkswap", "--quiet", "--label", "mine", path], check=True, timeout=10)
    before = swap_header(path)
    page = os.sysconf("SC_PAGE_SIZE")
    status, out, _ = run("grow", place.url("a.swap"), "20M")
    assert (status, "had 1 MiB, and has 20 MiB now" in out) == (0, True)
    assert path.stat().st_size == 20 * MIB
    assert path.stat().st_blocks * 512 >= 20 * MIB
    assert path.stat().st_mode & 0o7777 == 0o600
    assert swap_header(path) == (1, 20 * MIB // page - 1, before[2])
    assert place.names() == {"a.swap"}
    assert run("grow", place.url("a.swap"), "20M")[0] == 0
    status, _, err = run("grow", place.url("a.swap"), "19M")
    assert (status, "never made smaller" in err) == (os.EX_CANTCREAT, True)
    assert run("grow", place.url("a.swap"), "200T")[0] == os.EX_USAGE
    assert path.stat().st_size == 20 * MIB


def test_grow_refuses(place: Folder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's file, what is not swap, and one that this machine uses, with the commands to run."""
    place.create("a.swap", "box2")
    assert run("grow", place.url("a.swap"), "2M")[0] == os.EX_NOPERM
    (place.path / "letter").write_bytes(b"x" * 8192)
    assert run("grow", place.url("letter"), "2M")[0] == os.EX_CANTCREAT
    path = place.create("b.swap")
    monkeypatch.setattr(Records, "names", lambda root: ["swap7"])
    monkeypatch.setattr(Records, "read", lambda self, key: f"{place.url('b.swap')}\n127.0.0.1")
    monkeypatch.setattr(nbd_device, "find", lambda backend, root: nbd_device.Attached(7, MIB))
    url = place.url("b.swap")
    status, _, err = run("grow", url, "2M")
    assert status == os.EX_TEMPFAIL
    assert f"nbdnfs down swap7; nbdnfs grow {url} 2M; nbdnfs up swap7" in err
    assert path.stat().st_size == MIB


def test_grow_with_a_restart(place: Folder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """down, grow, up; and up also where it did not grow."""
    path = place.create("a.swap")
    calls: list[str] = []
    monkeypatch.setattr(where, "url_of", lambda name: place.url("a.swap"))
    monkeypatch.setattr(grow_command.up_down, "down", lambda name, report: calls.append(f"down {name}"))
    monkeypatch.setattr(grow_command.up_down, "up", lambda name: calls.append(f"up {name}"))
    assert run("grow", "swap0", "2M", "--restart")[0] == 0
    assert path.stat().st_size == 2 * MIB
    assert run("grow", "swap0", "1M", "--restart")[0] == os.EX_CANTCREAT
    assert calls == ["down swap0", "up swap0"] * 2
    assert run("grow", place.url("a.swap"), "3M", "--restart")[0] == os.EX_USAGE


# `grow --restart` with a device that it seems to take down, and bring up again; "at" says where it waits for ever
GROW = """
import sys, time
from nbdnfs import cli
from nbdnfs.commands import grow, up_down, where
from nbdnfs.nas import existing_file, patience

at = sys.argv[1]


def wait(stop=None):
    print("here", flush=True)
    with patience.interruptible(stop):
        patience.pause(60)


def down(name, report):
    print("down", flush=True)
    if at == "down":
        wait()


def grow_file(url, size_bytes, progress, stop):
    wait(stop)


up_down.down, up_down.up = down, lambda name: print("up", flush=True)
where.url_of = lambda name: "nfs://127.0.0.1/x/y"
where.adopt_old_name = lambda url: wait() if at == "name" else None
existing_file.grow = grow_file
cli.main(["grow", "swap0", "8G", "--restart"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", ["down", "name", "write"])
def test_grow_with_a_restart_that_a_signal_ends(at: str, number: int) -> None:
    """The device comes up again, and the command has ended by that signal."""
    process = subprocess.Popen([sys.executable, "-c", GROW, at], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        while process.stdout.readline() != "here\n":
            assert process.poll() is None
        process.send_signal(number)
        assert process.stdout.read() == "up\n"
    assert process.returncode == -number


# create --if-missing


def test_if_missing(place: Folder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What create would have made passes; anything else is refused, and a mode is set where that is asked for."""
    url = place.url("a.swap")
    path = place.create("a.swap")
    assert run("create", url, "--size", "1M", "--if-missing")[0] == 0
    subprocess.run(["mkswap", "--quiet", path], check=True, timeout=10)
    assert run("create", url, "--size", "1M", "--if-missing")[0] == 0
    status, _, err = run("create", url, "--size", "2M", "--if-missing")
    assert status == os.EX_CANTCREAT
    assert "exists, and has 1 MiB (1048576 bytes), not 2 MiB (2097152 bytes)" in err
    assert "nbdnfs grow" in err
    monkeypatch.setattr(backing_size, "memory_bytes", lambda root: 9 * MIB)
    assert run("create", url, "--size", "ram / 8", "--if-missing")[0] == 0
    other = place.create("c.swap")
    os.truncate(other, MIB - MIB // 16)
    assert run("create", place.url("c.swap"), "--size", "ram / 8", "--if-missing")[0] == 0
    assert run("create", place.url("c.swap"), "--size", "1M", "--if-missing")[0] == os.EX_CANTCREAT
    other.unlink()
    path.chmod(0o644)
    status, _, err = run("create", url, "--size", "1M", "--if-missing")
    assert (status, "has mode 0644" in err, "--fix-mode" in err) == (os.EX_CONFIG, True, True)
    assert run("create", url, "--size", "1M", "--if-missing", "--fix-mode")[0] == 0
    assert path.stat().st_mode & 0o7777 == 0o600
    path.write_bytes(b"precious" * (MIB // 8))
    status, _, err = run("create", url, "--size", "1M", "--if-missing")
    assert (status, "holds something else" in err) == (os.EX_CANTCREAT, True)
    assert run("create", place.url("b.swap"), "--size", "1M", "--if-missing")[0] == 0
    assert place.names() == {"a.swap", "b.swap"}
