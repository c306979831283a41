# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server that has forgotten the file's handle: the file is found by its name again, and not by libnfs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import PAGE, OpenEngine, opening, read_pages, write_pages_and_flush
from support.fake_nas import FakeNas, Oddities
from support.fake_nfs import NFS3ERR_ACCES
from support.file_tree import SYMLINK, Node
from support.nfs_server import LOOPBACK
from support.owner_records import machine
from support.waiting import DEADLINE_S, SaidOnStderr, in_background, wait_until

from nbdnfs.engine import Engine, NfsError
from nbdnfs.nas import owner_record
from nbdnfs.region import FILE_DELETED, FILE_REPLACED, FILE_THERE, OWNER_HELD

PAGES = 64
OPTIONS = {"region_pages": 256, "silence_ms": 300, "connect_timeout_s": 1}
# What the wire never calls.
OF_LIBNFS = ("MOUNT_NULL", "ACCESS", "EXPORT", "PATHCONF", "UMNT")


@pytest.fixture
def nas() -> Iterator[FakeNas]:
    with FakeNas() as nas:
        yield nas


@pytest.fixture
def open_engine(nas: FakeNas) -> Iterator[OpenEngine]:
    """As in support/engines.py; closed before the server ends."""
    with opening(**OPTIONS) as open_it:
        yield open_it


def served(nas: FakeNas, open_engine: OpenEngine, path: str, name: str = "") -> tuple[Engine, bytes]:
    """An engine on a new file, which may have another name in the URL, and what is in it; some pages are known."""
    content = os.urandom(PAGES * PAGE)
    nas.add(path, content)
    engine = open_engine(nas.url(name or path))
    for page in range(0, PAGES, 8):
        write_pages_and_flush(engine, page, content[page * PAGE : (page + 1) * PAGE])
    return engine, content


def put_back(nas: FakeNas, directory: str, name: str) -> None:
    """Restore the file as from a backup: the same bytes and the same name, another handle and another number."""
    path = f"{directory}/{name}"
    with nas.files() as tree:
        parent, node = tree.find(directory), tree.find(path)
        assert parent is not None
        assert node is not None
        tree.remove(parent, name)
        tree.add(path, bytes(node.content))


def read_again(engine: Engine, content: bytes, page: int) -> None:
    assert in_background(read_pages, engine, page).result(DEADLINE_S) == content[page * PAGE : (page + 1) * PAGE]


@pytest.mark.parametrize("folder", ["/export", "/export/a/b"])
def test_the_directory_is_known(nas: FakeNas, open_engine: OpenEngine, folder: str) -> None:
    """Its handle is good: mountd is not needed."""
    engine, content = served(nas, open_engine, f"{folder}/swap")
    put_back(nas, folder, "swap")
    nas.stop_mountd()
    before = len(nas.calls("MNT"))
    read_again(engine, content, 30)
    assert len(nas.calls("MNT")) == before
    read_again(engine, content, 31)


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("folder", ["/export", "/export/a/b"])
def test_all_handles_are_stale(nas: FakeNas, open_engine: OpenEngine, folder: str, connections: int) -> None:
    """MNT and LOOKUPs over the wire, from connections that libnfs never made as well; and the next time again."""
    content = os.urandom(PAGES * PAGE)
    nas.add(f"{folder}/swap", content)
    engine = open_engine(nas.url(f"{folder}/swap"), connections=connections)
    for page in range(2):
        before = len(nas.calls(*OF_LIBNFS))
        mounts = len(nas.calls("MNT"))
        nas.expire_handles()
        if connections > 1:
            nas.disconnect()
        read_again(engine, content, 30 + page)
        assert len(nas.calls("MNT")) > mounts
        assert len(nas.calls(*OF_LIBNFS)) == before


def make_link(nas: FakeNas, name: str, target: str) -> Node:
    """A symbolic link in /export, where there is a directory `real`."""
    with nas.files() as tree:
        tree.make_directories("/export/real")
        link = tree.make(tree.make_directories("/export"), name, SYMLINK, 0o777)
        link.target = target
    return link


@pytest.mark.parametrize("target", ["real", "/export/real", "/export//./real/", "real/" + "./" * 500])
def test_a_symbolic_link_on_the_way(nas: FakeNas, open_engine: OpenEngine, target: str) -> None:
    """It is followed, as libnfs did at the first open; libnfs 4.0 fails where it is an absolute one."""
    link = make_link(nas, "way", "real")
    engine, content = served(nas, open_engine, "/export/real/swap", "/export/way/swap")
    with nas.files():
        link.target = target
    nas.expire_handles()
    read_again(engine, content, 30)


@pytest.mark.parametrize(
    "target",
    [
        *("way", "way/" + "x/" * 500, "/elsewhere", "/exported/real", "x" * 1025, "nowhere", "x" * 256, "/exporter"),
        "/export",
    ],
)
def test_a_symbolic_link_that_leads_nowhere(
    nas: FakeNas, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str], target: str
) -> None:
    """To itself, out of what is mounted, or for too long: no connection, and no file is written; until it is right."""
    link = make_link(nas, "way", "real")
    engine, content = served(nas, open_engine, "/export/real/swap", "/export/way/swap")
    said = SaidOnStderr(capfd)
    with nas.files():
        link.target = target
    nas.expire_handles()
    reading = in_background(read_pages, engine, 30)
    said.wait_for("waiting for")
    assert not target.startswith("way/") or "File name too long" in said.lines[0]  # and not too many links
    assert not reading.done()
    with nas.files():
        link.target = "real"
    assert reading.result(DEADLINE_S) == content[30 * PAGE : 31 * PAGE]


@pytest.mark.parametrize("target", ["real", "/export/real", "/export//real/"])
def test_a_symbolic_link_below_the_root(target: str) -> None:
    """The server exports "/" alone: a target that is absolute begins there."""
    with FakeNas(Oddities(exports=("/",))) as nas, opening(**OPTIONS) as open_it:
        link = make_link(nas, "way", "real")
        engine, content = served(nas, open_it, "/export/real/swap", "/export/way/swap")
        with nas.files():
            link.target = target
        nas.expire_handles()
        read_again(engine, content, 30)


@pytest.mark.parametrize("stale", ["all handles", "the file's"])
@pytest.mark.parametrize("target", ["real/swap", "/export/real/swap", "./real//swap"])
def test_a_file_that_is_a_symbolic_link(nas: FakeNas, open_engine: OpenEngine, target: str, stale: str) -> None:
    """Its name is one. An absolute target begins at what is mounted, which mountd has to say."""
    link = make_link(nas, "swap", "real/swap")
    engine, content = served(nas, open_engine, "/export/real/swap", "/export/swap")
    with nas.files():
        link.target = target
    if stale == "all handles":
        nas.expire_handles()
    else:
        put_back(nas, "/export/real", "swap")
    mounts = len(nas.calls("MNT"))
    read_again(engine, content, 30)
    assert len(nas.calls("MNT")) - mounts == (stale == "all handles" or target[0] == "/")


def test_a_directory_in_the_files_place(nas: FakeNas, open_engine: OpenEngine) -> None:
    """It has the file's name: that is another file. The old one is waited for."""
    engine, content = served(nas, open_engine, "/export/swap")
    with nas.files() as tree:
        tree.remove(tree.make_directories("/export"), "swap")
        tree.make_directories("/export/swap")
    reading = in_background(read_pages, engine, 30)
    wait_until(lambda: engine.counters()["file_state"] == FILE_REPLACED, "it is noticed")
    assert not reading.done()
    with nas.files() as tree:
        tree.remove(tree.make_directories("/export"), "swap")
        tree.add("/export/swap", content)
    assert reading.result(DEADLINE_S) == content[30 * PAGE : 31 * PAGE]


def test_the_file_was_deleted_and_mountd_is_dead(nas: FakeNas, open_engine: OpenEngine) -> None:
    """The state is what the directory says."""
    engine, content = served(nas, open_engine, "/export/swap")
    nas.stop_mountd()
    with nas.files() as tree:
        tree.rename(tree.make_directories("/export"), "swap", tree.make_directories("/export"), "away")
        node = tree.find("/export/away")
        assert node is not None
        tree.remove(tree.make_directories("/export"), "away")
    reading = in_background(read_pages, engine, 30)
    wait_until(lambda: engine.counters()["file_state"] == FILE_DELETED, "it is noticed")
    nas.add("/export/swap", content)
    assert reading.result(DEADLINE_S) == content[30 * PAGE : 31 * PAGE]


def test_one_answer_that_says_that_the_file_has_no_name(
    nas: FakeNas, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """The state is what the last answer has shown, be the next one a READ's or a WRITE's; both changes are logged."""
    said = SaidOnStderr(capfd)
    engine, content = served(nas, open_engine, "/export/swap")

    def set_links(links: int) -> None:
        with nas.files() as tree:
            node = tree.find("/export/swap")
            assert node is not None
            node.links = links

    for page in (9, 10):
        set_links(0)
        read_again(engine, content, page)
        assert engine.counters()["file_state"] == FILE_DELETED
        set_links(1)
        if page == 9:
            read_again(engine, content, page)
        else:
            write_pages_and_flush(engine, page, content[page * PAGE : (page + 1) * PAGE])
        assert engine.counters()["file_state"] == FILE_THERE
    assert sum("was deleted on the server" in line for line in said.lines) == 2
    assert sum("has a name on the server again" in line for line in said.lines) == 2


@pytest.mark.parametrize("status", [1, 2, 13, 20, 22, 10006])
def test_mountd_refuses_for_a_while(nas: FakeNas, open_engine: OpenEngine, status: int) -> None:
    """Whatever the reason: its exports are not read again yet, or their disk is not there."""
    engine, content = served(nas, open_engine, "/export/swap")
    nas.fail("MNT", status, times=3)
    nas.expire_handles()
    read_again(engine, content, 30)


@pytest.mark.parametrize("folder", ["/export", "/export/a"])
def test_an_owner_looks_while_nothing_is_read(
    nas: FakeNas, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str], folder: str
) -> None:
    """Its LOOKUP finds the stale handles: at once, the directory is found again, and no write waits for the next look.

    Again and again: handles that expire twice within a few seconds are two faults, not one.
    """
    me = machine("box1")
    record = f"{folder}/{owner_record.name_of('swap')}"
    nas.add(f"{folder}/swap", bytes(PAGES * PAGE))
    nas.add(record, owner_record.new(me, "keeper:swap0", None, "held", owner_record.TIMING).to_bytes())
    engine = open_engine(
        nas.url(f"{folder}/swap"),
        owner_path=f"/{owner_record.name_of('swap')}",
        owner_identity=f"\nboot {me.boot}\n",
        owner_refresh_ms=1500,
    )
    said = SaidOnStderr(capfd)
    for turn in range(3):
        looks = len(nas.calls("LOOKUP"))
        refreshed = nas.content(record)
        nas.expire_handles()
        wait_until(lambda looks=looks: len(nas.calls("LOOKUP")) > looks, "the owner looks")
        wait_until(lambda refreshed=refreshed: nas.content(record) != refreshed, "the look ends well", 1.0)
        begun_s = time.monotonic()
        in_background(write_pages_and_flush, engine, turn, os.urandom(PAGE)).result(DEADLINE_S)
        assert time.monotonic() - begun_s < 2.0
    assert not [line for line in said.lines if "writes wait" in line]


def test_a_directory_that_is_always_stale(
    nas: FakeNas, open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server gives a handle and does not know it: a few connections are spent on that, and then it is an error."""
    me = machine("box1")
    nas.add("/export/swap", bytes(PAGES * PAGE))
    record = owner_record.new(me, "keeper:swap0", None, "held", owner_record.TIMING).to_bytes()
    nas.add(f"/export/{owner_record.name_of('swap')}", record)
    engine = open_engine(
        nas.url("/export/swap"),
        owner_path=f"/{owner_record.name_of('swap')}",
        owner_identity=f"\nboot {me.boot}\n",
        owner_refresh_ms=500,
    )
    said = SaidOnStderr(capfd)
    nas.fail("LOOKUP", 70)
    said.wait_for("LOOKUP: Stale file handle): writes wait")
    mounts = len(nas.calls("MNT"))
    assert mounts <= 5
    looks = len(nas.calls("LOOKUP"))
    wait_until(lambda: len(nas.calls("LOOKUP")) > looks + 2, "it goes on looking")
    assert len(nas.calls("MNT")) == mounts
    assert in_background(read_pages, engine, 5).result(DEADLINE_S) == bytes(PAGE)


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_a_directory_that_was_not_found_at_first(nas: FakeNas, open_engine: OpenEngine, times: int | None) -> None:
    """The file was, and the look-up of its directory, which only the owner's record needs, was refused: it is looked up
    again before the first look. Where it is refused then, the look is."""
    me = machine("box1")
    nas.add("/export/a/swap", bytes(PAGES * PAGE))
    record = f"/export/a/{owner_record.name_of('swap')}"
    nas.add(record, owner_record.new(me, "keeper:swap0", None, "held", owner_record.TIMING).to_bytes())
    owner = {"owner_path": f"/{owner_record.name_of('swap')}", "owner_identity": f"\nboot {me.boot}\n"}
    open_engine(nas.url("/export/a/swap"), **owner).close()
    names = [call.name for call in nas.calls("LOOKUP")]
    of_the_directory = max(number for number, name in enumerate(names) if name == "a")
    mounts, refreshed = len(nas.calls("MNT")), nas.content(record)
    nas.fail("LOOKUP", NFS3ERR_ACCES, times=times, after=of_the_directory)
    if times is None:
        with pytest.raises(NfsError) as caught:
            open_engine(nas.url("/export/a/swap"), **owner)
        assert caught.value.errno == errno.EACCES
        assert nas.content(record) == refreshed
    else:
        engine = open_engine(nas.url("/export/a/swap"), **owner)
        assert nas.struck("LOOKUP")
        assert engine.counters()["owner_state"] == OWNER_HELD
        assert nas.content(record) != refreshed
    assert len(nas.calls("MNT")) == 2 * mounts + 1


@pytest.mark.long
def test_a_read_that_is_refused_before_and_after_a_pause(nas: FakeNas, open_engine: OpenEngine) -> None:
    """Between the two there was no connection for longer than refusals are borne: the second is a first one again."""
    engine, content = served(nas, open_engine, "/export/swap")
    nas.stop_mountd()
    nas.fail("READ", 5, times=1)
    nas.fail("READ", 70, times=1)
    nas.fail("GETATTR", 70)
    nas.fail("LOOKUP", 70)
    reading = in_background(read_pages, engine, 30)
    time.sleep(31)  # REFUSED_READ_MS
    nas.end_faults()
    nas.fail("READ", 5, times=2)
    nas.start_mountd()
    assert reading.result(DEADLINE_S) == content[30 * PAGE : 31 * PAGE]


@pytest.mark.long
def test_a_file_that_is_gone_before_and_after_a_silence(nas: FakeNas, open_engine: OpenEngine) -> None:
    """In between the server says nothing for longer than gone_limit: it has not said for so long that there is none."""
    content = os.urandom(PAGES * PAGE)
    nas.add("/export/swap", content)
    engine = open_engine(nas.url("/export/swap"), gone_limit_ms=8000)
    nas.fail("LOOKUP", 2)
    nas.expire_handles()
    reading = in_background(read_pages, engine, 30)
    wait_until(lambda: engine.counters()["file_state"] == FILE_DELETED, "it is found gone")
    nas.stop()
    time.sleep(8.5)  # gone_limit
    nas.end_faults()
    nas.fail("LOOKUP", 2, times=2)  # of the directory that is known, and of the one that mountd says
    nas.start()
    assert reading.result(DEADLINE_S) == content[30 * PAGE : 31 * PAGE]


MOVES = """
import os, socket, sys
from support.engines import PAGE, opening, read_pages
from support.fake_nas import FakeNas, Oddities
from support.nfs_server import free_ports
from support.sunrpc import record
from support.waiting import DEADLINE_S, in_background, wait_until

content = os.urandom(64 * PAGE)
with FakeNas(portmap_port=111) as nas:
    nas.add("/export/a/swap", content)
    with opening(region_pages=256, silence_ms=300, connect_timeout_s=1) as open_engine:
        engine = open_engine("nfs://{host}/export/a/swap?version=3&uid=0&gid=0")
        nas.stop()
        nas.port, nas.mount_port = free_ports(2)
        if "stale" in sys.argv:
            nas.expire_handles()
        before = len(nas.calls("MOUNT_NULL", "ACCESS", "PATHCONF"))
        reading = in_background(read_pages, engine, 5)
        if "away" in sys.argv:  # portmapper comes later than the server
            nas._portmap_port = None
            nas.start()
            with socket.create_server(("{host}", 111)) as another:
                another.settimeout(DEADLINE_S)
                another.accept()[0].close()
            nas._portmap_port = 111
        if "unknown" in sys.argv:  # to portmapper, which says 0
            nas.mutate(lambda call, message: record(message[:-4] + bytes(4)) if call.op == "PORTMAP" else None)
            asked = len(nas.calls("PORTMAP"))
            nas.start()
            wait_until(lambda: len(nas.calls("PORTMAP")) > asked + 1, "it has answered, and is asked again")
            nas.mutate(None)
        nas.start()
        assert reading.result(DEADLINE_S) == content[5 * PAGE : 6 * PAGE]
        assert in_background(read_pages, engine, 5).result(DEADLINE_S) == content[5 * PAGE : 6 * PAGE]
        assert len(nas.calls("MOUNT_NULL", "ACCESS", "PATHCONF")) == before
        assert len(nas.calls("PORTMAP")) > 0
print("right")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="portmapper's port and a network of its own need root")
@pytest.mark.parametrize("what", ["moved", "stale", "away", "unknown"])
def test_a_server_on_other_ports(what: str) -> None:
    """A URL without ports: portmapper is asked over the wire, where the server is and where mountd is; again and again,
    where it does not answer, or does not know it yet."""
    tests = str(Path(__file__).resolve().parents[1])
    # a sanitizer is for the last of these programs alone
    script = 'ip link set lo up; LD_PRELOAD=$1; export LD_PRELOAD; shift; exec "$@"'
    preloaded = os.environ.get("LD_PRELOAD", "")
    program = [sys.executable, "-P", "-c", MOVES.replace("{host}", LOOPBACK), what]
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, "sh", preloaded, *program],
        env={**os.environ, "LD_PRELOAD": "", "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.stdout.endswith("right\n"), done.stdout
