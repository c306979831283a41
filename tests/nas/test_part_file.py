# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part file: resumed or replaced, and how it gets its final name, on a server in memory."""

from __future__ import annotations

import errno
import socket
import threading
from dataclasses import replace
from typing import Any

import pytest
from support import fake_files
from support.fake_files import CHUNK, SIZE, URL, WINDOW_CHUNKS, FakeServer, Inode, InterruptAt, fails_with
from support.fake_nas import FakeNas, Oddities
from support.waiting import DEADLINE_S, in_background, wait_until

from nbdnfs import nfs_url
from nbdnfs.errors import BusyError, CannotCreateError, NoInputError, PermissionDeniedError
from nbdnfs.nas import backing_file, owner_record, part_file, patience


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """As fake_files.install."""
    return fake_files.install(monkeypatch)


@pytest.mark.parametrize("done_chunks", [0, 1, 20, 63])
def test_resumes_after_its_creator_was_killed(server: FakeServer, done_chunks: int) -> None:
    """SIGKILL leaves the part file; the next create writes the rest, and no more than the window twice."""
    part = server.add(part_file.name_of(nfs_url.parse(URL)), bytes(done_chunks * CHUNK))
    seen: list[int] = []
    backing_file.create(URL, SIZE, progress=lambda done, total: seen.append(done))
    assert server.files == {"swap0": part}
    assert bytes(part.data) == bytes(SIZE)
    assert server.writes <= SIZE // CHUNK - done_chunks + WINDOW_CHUNKS
    assert seen[0] >= (done_chunks - WINDOW_CHUNKS) * CHUNK


@pytest.mark.parametrize("done_chunks", [0, 1, 20, 63])
def test_an_interruption_leaves_nothing(server: FakeServer, done_chunks: int) -> None:
    """Ctrl-C in the middle: the part file goes, whether it is new or of a creator that was killed."""
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            backing_file.create(URL, SIZE, progress=InterruptAt(done_chunks * CHUNK))
        assert not server.files
        server.add(part_file.name_of(nfs_url.parse(URL)), bytes(done_chunks * CHUNK))


def test_a_stop_leaves_nothing(server: FakeServer) -> None:
    """The event of patience.interruptible, as a signal sets it, ends it between two writes."""
    stop = threading.Event()
    server.hold_write_at = 20 * CHUNK  # nothing is answered from there on, until the end
    try:
        with patience.interruptible(stop), pytest.raises(patience.Interrupted):
            backing_file.create(URL, SIZE, progress=lambda done, total: stop.set() if done == 20 * CHUNK else None)
    finally:
        server.let_go.set()
    assert not server.files


def test_a_part_that_grows_is_another_machines(server: FakeServer) -> None:
    """A clone with the same ids creates the file now: what it writes would be written over the swap of this one."""
    part = server.add(part_file.name_of(nfs_url.parse(URL)), bytes(CHUNK))
    server.before_stat = lambda: part.data.extend(bytes(CHUNK))
    fails_with(BusyError, "another machine with the same machine id", "needs a new id")
    server.before_stat = lambda: None
    assert server.files == {part_file.name_of(nfs_url.parse(URL)): part}
    assert not part.written


@pytest.mark.parametrize(
    "unfit",
    [{"data": b"\xaa" * (SIZE + CHUNK)}, {"mode": 0o644}, {"nlink": 2}],
    ids=["too long", "open to others", "has another name"],
)
def test_an_unfit_part_file_is_replaced(server: FakeServer, unfit: dict[str, Any]) -> None:
    """A part file that cannot be resumed loses its name, and nothing is written into it."""
    name = part_file.name_of(nfs_url.parse(URL))
    old = server.add(name, **unfit)
    backing_file.create(URL, SIZE)
    assert list(server.files) == ["swap0"]
    assert server.files["swap0"] is not old
    assert not old.written


def test_dead_between_link_and_unlink(server: FakeServer) -> None:
    """A complete file with both names is refused by the next create, which removes the part name."""
    name = part_file.name_of(nfs_url.parse(URL))
    server.files["swap0"] = server.add(name, bytes(SIZE), nlink=2)
    fails_with(CannotCreateError, "already exists", "--force")
    assert list(server.files) == ["swap0"]


def test_created_by_another_machine_meanwhile(server: FakeServer) -> None:
    """Of two machines one creates the file; the other reports that and overwrites nothing."""
    server.before_link = lambda: server.files.setdefault("swap0", Inode(1, bytearray(b"theirs")))
    fails_with(CannotCreateError, "was created by another machine", "--force")
    assert bytes(server.files["swap0"].data) == b"theirs"


def test_a_server_without_hard_links(server: FakeServer) -> None:
    """The part file is renamed instead, unless the name is taken by then, however late."""
    server.has_links = False
    backing_file.create(URL, SIZE)
    assert list(server.files) == ["swap0"]
    server.files.clear()
    server.before_create = lambda name: name == "swap0" and server.files.setdefault("swap0", theirs)
    theirs = Inode(1, bytearray(b"theirs"))
    fails_with(CannotCreateError, "was created by another machine", "--force")
    assert server.files == {"swap0": theirs}


@pytest.mark.fake
@pytest.mark.parametrize(("has_hard_links", "op"), [(True, "REMOVE"), (True, "LINK"), (False, "RENAME")])
def test_a_connection_that_ends_when_the_part_file_gets_its_name(has_hard_links: bool, op: str) -> None:
    """The server has done it, and the answer is lost: the part file's name is gone, and nothing looks for it."""
    path = f"/export/{op}"
    with FakeNas(Oddities(has_hard_links=has_hard_links)) as nas:
        nas.drop(op)
        created = in_background(backing_file.create, nas.url(path), 1 << 20)
        wait_until(lambda: nas.struck(op), f"the answer to {op} is lost")
        nas.disconnect()
        created.result(DEADLINE_S)
        assert nas.names("/export") == [op]
        assert nas.on_disk(path) == bytes(1 << 20)


def test_no_room_for_a_name(server: FakeServer) -> None:
    """ENOSPC can come as early as when the file is created."""
    server.create_errno = errno.ENOSPC
    fails_with(CannotCreateError, "no space left", "free space")


@pytest.mark.parametrize(
    ("uid", "number", "message", "hint"),
    [
        (0, errno.EACCES, "does not let root create a file in /export: root is squashed", "no_root_squash"),
        (0, errno.EPERM, "does not let root create a file in /export: root is squashed", "no_root_squash"),
        (1000, errno.EACCES, "does not let uid 1000 create a file in /export", "let that user write there"),
    ],
)
def test_not_allowed(server: FakeServer, uid: int, number: int, message: str, hint: str) -> None:
    """A root without permission is a squashed root; another user simply has no permission."""
    server.create_errno = number
    fails_with(PermissionDeniedError, message, hint, url=URL.replace("uid=0", f"uid={uid}"))


def test_squashed_to_an_owner_with_permission(server: FakeServer) -> None:
    """A new file that belongs to another user is refused and removed, unless the URL names that user."""
    server.new_file_uid = 65534
    fails_with(
        PermissionDeniedError, "squashes root: a new file in /export belongs to uid 65534", "uid=65534&gid=65534"
    )
    assert not server.files
    backing_file.create(URL.replace("uid=0", "uid=65534"), SIZE)
    assert server.files["swap0"].uid == 65534


def test_no_directory(server: FakeServer) -> None:
    """ENOENT for a new file means that its directory is missing."""
    server.create_errno = errno.ENOENT
    fails_with(NoInputError, "192.0.2.1 has no directory /export", "create it")


def test_long_names_keep_within_255_bytes(server: FakeServer) -> None:
    """The part file's name is valid wherever the final one is."""
    url = URL.replace("swap0", "x" * 255)
    assert len(part_file.name_of(nfs_url.parse(url))) <= 255
    backing_file.create(url, SIZE)


def test_part_names_differ_by_file_and_machine(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines that create the same file do not write into each other's part file.

    Clones have the same machine id and host name: the hardware tells them apart, and where it has no id, the boot.
    """
    names = {part_file.name_of(nfs_url.parse(url)) for url in (URL, URL.replace("swap0", "swap1"))}
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    names.add(part_file.name_of(nfs_url.parse(URL)))
    target = nfs_url.parse(URL)
    me = owner_record.Identity("1" * 32, "2" * 32, "-", "box")
    for identity in (me, replace(me, boot="3" * 32), replace(me, hardware="4" * 32), replace(me, hardware="5" * 32)):
        monkeypatch.setattr(owner_record, "identity", lambda identity=identity: identity)
        names.add(part_file.name_of(target))
    assert len(names) == 7
    monkeypatch.setattr(owner_record, "identity", lambda: replace(me, hardware="5" * 32, boot="6" * 32))
    assert part_file.name_of(target) in names  # it is known again after a power failure


def test_a_host_name_of_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """sethostname(2) takes any; the name is that machine's own all the same."""
    target = nfs_url.parse(URL)
    before = part_file.name_of(target)
    monkeypatch.setattr(socket, "gethostname", lambda: "b\udcff\udcfe")
    assert part_file.name_of(target) != before
    assert part_file.name_of(target).isascii()
