# SPDX-License-Identifier: LGPL-2.1-or-later
"""create and inspect on a real server: every block exists, failures are reported, interruptions are resumed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from support.nfs_server import Ganesha
from support.owner_records import HOLDER, machine
from support.proxy import TcpProxy
from support.small_filesystem import small_filesystem
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs.engine import libnfs_version
from nbdnfs.errors import CannotCreateError, ConfigError, NbdnfsError, NoInputError, PermissionDeniedError
from nbdnfs.nas import backing_file, creator_lock, ownership, zeros

MIB = 1 << 20


@pytest.fixture
def name(ganesha: Ganesha, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of the test's own on the session's server; nothing but it is left there when the test ends."""
    before = set(os.listdir(ganesha.export_path))
    name = f"{request.node.name.partition('[')[0]}.swap"
    yield name
    left = set(os.listdir(ganesha.export_path)) - before
    for file in left:
        (ganesha.export_path / file).unlink()
    assert left <= {name}


def assert_is_backing_file(path: Path, size_bytes: int) -> None:
    """Zeros, no hole, closed to others, one name."""
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == size_bytes
        assert all(not any(chunk) for chunk in iter(lambda: file.read(MIB), b""))
        found = os.fstat(file.fileno())
    assert (found.st_size, found.st_mode & 0o7777, found.st_nlink) == (size_bytes, 0o600, 1)
    assert found.st_blocks * 512 >= size_bytes


def test_a_name_of_any_bytes(ganesha: Ganesha) -> None:
    """Latin-1, a line end, and what ends a path in other URLs; the owner record has a name of its own."""
    path = ganesha.export_path / os.fsdecode(b"100% \xe4\n?#.swap")
    url = ganesha.url("NAME").replace("NAME", "100%25%20%E4%0A%3F%23.swap")
    backing_file.create(url, MIB)
    try:
        assert_is_backing_file(path, MIB)
        assert backing_file.inspect(url).size_bytes == MIB
        before = set(os.listdir(ganesha.export_path))
        ownership.claim(url, HOLDER, me := machine("box1"))
        (record,) = set(os.listdir(ganesha.export_path)) - before
        assert re.fullmatch(r"\.nbdnfs\.[0-9a-f]{32}\.owner", record)
        assert ownership.release(url, HOLDER, me)
        fails_with(CannotCreateError, r"100% \udce4\n?#.swap", "--force", lambda: backing_file.create(url, MIB))
    finally:
        path.unlink()


def fails_with(kind: type[NbdnfsError], message: str, hint: str, action: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        action()
    assert message in caught.value.message
    assert hint in caught.value.hint


def start_create(url: str, size: str, **environment: str) -> subprocess.Popen[str]:
    """`nbdnfs create` as a process; its progress comes on stderr, a line for every tenth part."""
    return subprocess.Popen(
        [sys.executable, "-m", "nbdnfs", "create", url, "--size", size],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def wait_for_percent(creator: subprocess.Popen[str], percent: int) -> IO[str]:
    """Read the progress until that much is done; the rest of stderr."""
    assert creator.stderr is not None
    for line in creator.stderr:
        shown = re.fullmatch(r"nbdnfs: (\d+)% .*\n", line)
        if shown and int(shown[1]) >= percent:
            return creator.stderr
    raise AssertionError(f"it ended before {percent}%: {creator.wait()}")


def test_create_and_inspect(ganesha: Ganesha, name: str) -> None:
    """A file of 33 MiB and a page, and the attributes that the server reports for it."""
    size_bytes = 33 * MIB + 4096
    seen: list[tuple[int, int]] = []
    backing_file.create(ganesha.url(name), size_bytes, progress=lambda *done: seen.append(done))
    path = ganesha.export_path / name
    assert_is_backing_file(path, size_bytes)
    assert (seen[0], seen[-1]) == ((0, size_bytes), (size_bytes, size_bytes))
    found = backing_file.inspect(ganesha.url(name))
    stat = path.stat()
    assert found == backing_file.BackingFile(size_bytes, 0o600, stat.st_ino, stat.st_blocks * 512)


def test_over_nfsv4(ganesha: Ganesha, name: str) -> None:
    """The same over NFSv4; a libnfs that cannot is refused before anything is created."""
    url = ganesha.url(name, version=4)
    if int(libnfs_version.split(".")[0]) < 5:
        fails_with(ConfigError, "NFSv4 needs libnfs 5.0", "version=3", lambda: backing_file.create(url, MIB))
    else:
        backing_file.create(url, 9 * MIB)
        assert_is_backing_file(ganesha.export_path / name, 9 * MIB)
        assert backing_file.inspect(url).size_bytes == 9 * MIB


def test_existing_files(ganesha: Ganesha, name: str) -> None:
    """An existing file is refused; with force it is rewritten and grows, and is never made smaller."""
    path, url = ganesha.export_path / name, ganesha.url(name)
    path.write_bytes(b"\xaa" * MIB)
    path.chmod(0o600)
    fails_with(CannotCreateError, "already exists (1 MiB)", "--force", lambda: backing_file.create(url, 2 * MIB))
    assert path.read_bytes() == b"\xaa" * MIB
    fileid = path.stat().st_ino
    backing_file.create(url, 2 * MIB, force=True)
    assert_is_backing_file(path, 2 * MIB)
    assert path.stat().st_ino == fileid
    fails_with(
        CannotCreateError, "never made smaller", "remove the file", lambda: backing_file.create(url, MIB, force=True)
    )
    assert_is_backing_file(path, 2 * MIB)


def test_directories(ganesha: Ganesha, name: str) -> None:
    """A directory is not a file, and a missing directory cannot hold one."""
    (ganesha.export_path / "folder").mkdir(exist_ok=True)
    fails_with(
        NoInputError,
        "is a directory",
        "name a file",
        lambda: backing_file.create(ganesha.url("folder"), MIB, force=True),
    )
    backing_file.create(ganesha.url(f"folder/{name}"), MIB)
    assert_is_backing_file(ganesha.export_path / "folder" / name, MIB)
    assert os.listdir(ganesha.export_path / "folder") == [name]
    (ganesha.export_path / "folder" / name).unlink()
    (ganesha.export_path / "folder").rmdir()
    fails_with(NoInputError, "no directory", "", lambda: backing_file.create(ganesha.url("folder/x"), MIB))


def test_a_server_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how much room it has; ENOSPC, where that is not the truth, is reported, and the space is freed."""
    with small_filesystem(tmp_path, 16 * MIB) as folder, Ganesha(tmp_path / "server", export=folder) as server:
        url = server.url("swap0")
        free_before = os.statvfs(folder).f_bfree
        fails_with(
            CannotCreateError, "no room in", "ask for a smaller size", lambda: backing_file.create(url, 64 * MIB)
        )
        assert [entry for entry in os.listdir(folder) if entry != "lost+found"] == []
        monkeypatch.setattr(zeros, "refuse_unless_room", lambda *arguments: None)
        fails_with(CannotCreateError, "no space left in", "free space", lambda: backing_file.create(url, 64 * MIB))
        assert [entry for entry in os.listdir(folder) if entry != "lost+found"] == []
        wait_until(lambda: os.statvfs(folder).f_bfree >= free_before - 16, "the server lets the file go")
        backing_file.create(url, 8 * MIB)
        assert_is_backing_file(folder / "swap0", 8 * MIB)


def test_squashed_root(tmp_path: Path) -> None:
    """Root without permission, root that is mapped to another user, and the URL that the hint proposes."""
    with Ganesha(tmp_path, squash="root") as server:
        url = server.url("swap0")
        fails_with(
            PermissionDeniedError, "root is squashed there", "no_root_squash", lambda: backing_file.create(url, MIB)
        )
        server.export_path.chmod(0o777)
        fails_with(
            PermissionDeniedError,
            "squashes root: a new file",
            "uid=65534&gid=65534",
            lambda: backing_file.create(url, MIB),
        )
        assert os.listdir(server.export_path) == []
        backing_file.create(server.url("swap0", uid=65534, gid=65534), MIB)
        assert_is_backing_file(server.export_path / "swap0", MIB)


def test_no_permission(ganesha: Ganesha, name: str) -> None:
    """The error for a user without write permission names the uid."""
    url = ganesha.url(name, uid=1234, gid=1234)
    fails_with(
        PermissionDeniedError, "does not let uid 1234 create a file", "uid=", lambda: backing_file.create(url, MIB)
    )


def test_read_only_export(tmp_path: Path) -> None:
    """EROFS has its own words."""
    with Ganesha(tmp_path, access="RO") as server:
        url = server.url("swap0")
        fails_with(PermissionDeniedError, "read-only", "read-write", lambda: backing_file.create(url, MIB))


def test_resumes_after_the_process_was_killed(ganesha: Ganesha, proxy: TcpProxy, name: str) -> None:
    """Killed at a third, the same command writes the rest, and not all of it again."""
    proxy.throttle(requests_bytes_per_s=40 * MIB)
    with start_create(ganesha.url(name, nfsport=proxy.port), "64M") as creator:
        wait_for_percent(creator, 30)
        creator.kill()
        assert creator.wait(DEADLINE_S) == -signal.SIGKILL
    assert not (ganesha.export_path / name).exists()
    (part,) = (entry for entry in ganesha.export_path.iterdir() if entry.name.startswith(f".{name}."))
    fileid = part.stat().st_ino
    proxy.throttle()
    seen: list[int] = []
    backing_file.create(ganesha.url(name), 64 * MIB, progress=lambda done, total: seen.append(done))
    assert seen[0] >= 64 * MIB * 3 // 10 - 9 * MIB
    assert_is_backing_file(ganesha.export_path / name, 64 * MIB)
    assert (ganesha.export_path / name).stat().st_ino == fileid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_leaves_nothing(ganesha: Ganesha, proxy: TcpProxy, name: str, number: signal.Signals) -> None:
    """The process ends by the signal, as a shell and systemd want it, and the hidden part is gone."""
    before = set(os.listdir(ganesha.export_path))
    proxy.throttle(requests_bytes_per_s=40 * MIB)
    with start_create(ganesha.url(name, nfsport=proxy.port), "64M") as creator:
        wait_for_percent(creator, 30)
        creator.send_signal(number)
        assert creator.wait(DEADLINE_S) == -number
    assert set(os.listdir(ganesha.export_path)) == before


def test_ctrl_c_while_the_server_is_away(own_ganesha: Ganesha) -> None:
    """Ctrl-C ends create although writes are in flight that the server does not answer."""
    with TcpProxy(own_ganesha.nfs_port) as proxy:
        proxy.throttle(requests_bytes_per_s=40 * MIB)
        with start_create(own_ganesha.url("swap0", nfsport=proxy.port), "64M") as creator:
            stderr = wait_for_percent(creator, 10)
            own_ganesha.pause()
            creator.send_signal(signal.SIGINT)
            assert creator.wait(DEADLINE_S) == -signal.SIGINT
            assert "interrupted at" in stderr.read()


def test_the_server_dies_and_comes_back(own_ganesha: Ganesha) -> None:
    """SIGKILL of the server in the middle: create waits for it, and the file is whole."""
    with TcpProxy(own_ganesha.nfs_port) as proxy:
        proxy.throttle(requests_bytes_per_s=40 * MIB)
        done_bytes = [0]

        def note(done: int, total: int) -> None:
            done_bytes[0] = done

        url = own_ganesha.url("swap0", nfsport=proxy.port)
        creation = in_background(lambda: backing_file.create(url, 64 * MIB, progress=note))
        for mark in (8 * MIB, 24 * MIB, 40 * MIB):
            wait_until(lambda mark=mark: done_bytes[0] >= mark, f"{mark} bytes")  # type: ignore[misc]
            own_ganesha.kill()
            own_ganesha.start()
        creation.result(DEADLINE_S)
    assert_is_backing_file(own_ganesha.export_path / "swap0", 64 * MIB)
    assert os.listdir(own_ganesha.export_path) == ["swap0"]


def test_many_resets(ganesha: Ganesha, proxy: TcpProxy, name: str) -> None:
    """A connection that is reset every other MiB costs time and nothing else."""
    proxy.throttle(requests_bytes_per_s=40 * MIB)

    def reset_now_and_then(done: int, total: int) -> None:
        if done % (2 * MIB) == 0:
            proxy.reset()

    backing_file.create(ganesha.url(name, nfsport=proxy.port), 16 * MIB, progress=reset_now_and_then)
    assert_is_backing_file(ganesha.export_path / name, 16 * MIB)


def test_two_machines_make_one_file(
    ganesha: Ganesha, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The faster one creates the file, the other reports that; no other file is left."""
    url, size_bytes = ganesha.url(name), 8 * MIB
    outcomes: list[Any] = []

    def another_machine(done: int, total: int) -> None:
        if done == 4 * MIB:
            with monkeypatch.context() as patch:
                patch.setattr(socket, "gethostname", lambda: "another")
                patch.setattr(creator_lock, "_folder", lambda: tmp_path)
                backing_file.create(url, size_bytes)
            outcomes.append((ganesha.export_path / name).stat().st_ino)

    fails_with(
        CannotCreateError,
        "was created by another machine",
        "use that file",
        lambda: backing_file.create(url, size_bytes, progress=another_machine),
    )
    assert [(ganesha.export_path / name).stat().st_ino] == outcomes
    assert_is_backing_file(ganesha.export_path / name, size_bytes)
    assert not list(ganesha.export_path.glob(f".{name}.*.part"))
