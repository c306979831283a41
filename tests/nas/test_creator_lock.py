# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lock of a machine for one file: what it is about, what others can do to it, and what stays of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.waiting import DEADLINE_S

from nbdnfs import nfs_url
from nbdnfs.errors import BusyError, CannotCreateError
from nbdnfs.nas import creator_lock

URL = "nfs://nas/export/a.swap?version=3"
ADDRESS = "192.0.2.1"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the locks."""
    monkeypatch.setattr(creator_lock, "_folder", lambda: tmp_path)
    return tmp_path


def is_free(url: str, address: str = ADDRESS) -> bool:
    try:
        with creator_lock.held(nfs_url.parse(url), address):
            return True
    except BusyError:
        return False


def test_one_file(runtime: Path) -> None:
    """Server, port and path are the file; what else is in the URL is not."""
    with creator_lock.held(nfs_url.parse(URL), ADDRESS):
        assert not is_free(URL)
        assert not is_free("nfs://the-same-nas/export/./a.swap?nfsport=2049&uid=7")
        assert is_free(URL, "192.0.2.2")
        assert is_free(URL.replace("a.swap", "b.swap"))
        assert is_free(URL + "&nfsport=2050")
    assert is_free(URL)
    assert not list(runtime.iterdir())


def test_the_holder_was_killed(runtime: Path) -> None:
    """The kernel drops the lock; the file that stays does not block."""
    program = (
        "import sys, time; from pathlib import Path; from nbdnfs import nfs_url; from nbdnfs.nas import creator_lock;"
        f"creator_lock._folder = lambda: Path({str(runtime)!r});"
        f"lock = creator_lock.held(nfs_url.parse({URL!r}), {ADDRESS!r}); lock.__enter__();"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert not is_free(URL)
        holder.kill()
        holder.wait(DEADLINE_S)
    assert len(list(runtime.iterdir())) == 1
    assert is_free(URL)


def test_an_abstract_socket_does_not_block(runtime: Path) -> None:
    """What earlier versions locked with, and any user could hold."""
    target = nfs_url.parse(URL)
    digest = hashlib.sha256(f"{target.host}\0{target.path}".encode()).hexdigest()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        lock.bind(f"\0nbdnfs-create-{digest}")
        assert is_free(URL)


def test_one_of_many(runtime: Path) -> None:
    """However they overlap, two never hold it."""
    inside: list[int] = []
    most = 0

    def attempt(number: int) -> int:
        nonlocal most
        try:
            with creator_lock.held(nfs_url.parse(URL), ADDRESS):
                inside.append(number)
                most = max(most, len(inside))
                inside.remove(number)
            return 1
        except BusyError:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(400))) >= 1
    assert most == 1
    assert not list(runtime.iterdir())


def test_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In /tmp anyone may have made it first: it is refused, and so is one that others may write."""
    user = 4242
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    if os.getuid() == 0:
        (tmp_path / "nbdnfs").mkdir()
    else:
        (tmp_path / "nbdnfs").mkdir(mode=0o777)
        (tmp_path / "nbdnfs").chmod(0o777)
    with pytest.raises(CannotCreateError, match="is not a folder that only uid 4242 may write"):
        creator_lock._folder()
    if os.getuid() == 0:
        os.chown(tmp_path / "nbdnfs", user, user)
        assert creator_lock._folder() == tmp_path / "nbdnfs"


def test_the_folder_of_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users may read it under any umask, as `status` does; one that is there is left as it is."""
    monkeypatch.setattr(creator_lock, "_ROOTS_FOLDER", folder := tmp_path / "nbdnfs")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for mode in (0o755, 0o750):
        before = os.umask(0o077)
        try:
            with contextlib.suppress(CannotCreateError):  # without root it is another user's
                creator_lock._folder()
        finally:
            os.umask(before)
        assert folder.stat().st_mode & 0o777 == mode
        folder.chmod(0o750)


@pytest.mark.parametrize("user", [0, 4242])
@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EROFS, "mounted read-only"),
        (errno.ENOSPC, "free space in"),
        (errno.ENOTDIR, "remove what is in the way"),
        (errno.EACCES, "see why"),
    ],
)
def test_no_place_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, number: int, hint: str
) -> None:
    """What to do depends on why, and on who asks: root's folder is always the same, whatever the environment says."""

    def fail(self: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(CannotCreateError, match="for a lock") as caught:
        creator_lock._folder()
    assert hint in caught.value.hint
    assert ("XDG_RUNTIME_DIR" in caught.value.hint) == (user != 0)
    folder = "/run" if user == 0 else str(tmp_path)
    assert folder in caught.value.message
    monkeypatch.undo()
    monkeypatch.setattr(os, "open", lambda *arguments: fail(tmp_path))
    with pytest.raises(CannotCreateError, match="for a lock") as caught:
        creator_lock._locked(tmp_path / "a.lock", nfs_url.parse(URL))
    assert hint in caught.value.hint
