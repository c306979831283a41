# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the binding refuses by itself: wrong arguments, what is closed, and URLs that name no file."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import PAGE
from support.fake_nas import FakeNas, Oddities
from support.fake_nfs import NFS3ERR_IO
from support.nfs_server import LOOPBACK, free_ports
from support.waiting import DEADLINE_S

from nbdnfs.engine import Engine, NfsError, NfsFile

PATH = "/export/a/swap"
CONTENT = bytes(16 * PAGE)

FILE_CALLS: dict[str, tuple[Any, ...]] = {
    "pread": (bytearray(1), 0),
    "pwrite": (b"x", 0),
    "stat": (),
    "lookup": ("/swap",),
    "link": ("/swap", "/other"),
    "rename": ("/swap", "/other"),
    "unlink": ("/swap",),
    "chmod": ("/swap", 0o600),
    "space": (),
    "names": (),
    "read_beside": ("/swap", 10),
}
ENGINE_CALLS: dict[str, tuple[Any, ...]] = {
    "pread": (bytearray(PAGE), 0),
    "pwrite": (bytes(PAGE), 0),
    "flush": (),
    "trim": (PAGE, 0),
    "serve": (0,),
    "counters": (),
}


@pytest.fixture(scope="module")
def nas() -> Iterator[FakeNas]:
    """It exports a parent of the file's directory."""
    with FakeNas(Oddities(exports=("/export",))) as server:
        server.add(PATH, CONTENT)
        yield server


@pytest.fixture(scope="module")
def file(nas: FakeNas) -> Iterator[NfsFile]:
    with contextlib.closing(NfsFile(nas.url(PATH), LOOPBACK)) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine(nas: FakeNas) -> Iterator[Engine]:
    with contextlib.closing(Engine(nas.url(PATH), LOOPBACK, region_pages=256)) as opened:
        yield opened


def raises(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=f"Errno {number}") as caught:
        call()
    assert caught.value.errno == number


# What is closed


def test_what_is_closed(nas: FakeNas) -> None:
    """Every call and property says so, and closing again is nothing."""
    file, engine = NfsFile(nas.url(PATH), LOOPBACK), Engine(nas.url(PATH), LOOPBACK, region_pages=256)
    for opened, calls, properties in (
        (file, FILE_CALLS, ("size_bytes",)),
        (engine, ENGINE_CALLS, ("size_bytes", "is_encrypted")),
    ):
        opened.close()
        for name, arguments in calls.items():
            with pytest.raises(ValueError, match="closed"):
                getattr(opened, name)(*arguments)
        for name in properties:
            with pytest.raises(ValueError, match="closed"):
                getattr(opened, name)
        opened.close()


# Arguments of the wrong kind

_WITH_ARGUMENTS = [
    (kind, name) for kind, calls in (("file", FILE_CALLS), ("engine", ENGINE_CALLS)) for name in calls if calls[name]
]


@pytest.mark.parametrize(("kind", "name"), _WITH_ARGUMENTS)
def test_arguments_of_another_kind(request: pytest.FixtureRequest, nas: FakeNas, kind: str, name: str) -> None:
    """Any of them: TypeError, and nothing is sent. So too where one is missing."""
    opened = request.getfixturevalue(kind)
    arguments = (FILE_CALLS if kind == "file" else ENGINE_CALLS)[name]
    before = len(nas.calls())
    for at in range(len(arguments)):
        for wrong in (None, 1.5, object()):
            with pytest.raises(TypeError):
                getattr(opened, name)(*arguments[:at], wrong, *arguments[at + 1 :])
    with pytest.raises(TypeError):
        getattr(opened, name)()
    assert len(nas.calls()) == before


@given(path=st.text() | st.binary())
@settings(deadline=None, max_examples=200)
def test_paths_that_are_none(nas: FakeNas, file: NfsFile, path: str | bytes) -> None:
    """A NUL byte, bytes instead of a str, or a surrogate that stands for no byte: refused, and not sent cut off."""
    if isinstance(path, str) and "\0" not in path:
        path += "\ud800"
    before = len(nas.calls())
    expected = TypeError if isinstance(path, bytes) else NfsError if "\0" in path else UnicodeEncodeError
    try:
        with pytest.raises((expected, UnicodeEncodeError)) as caught:
            file.unlink(path)  # type: ignore[arg-type]
    finally:
        assert len(nas.calls()) == before
    if isinstance(caught.value, NfsError):
        assert (caught.value.errno, caught.value.phase) == (errno.EINVAL, "name")


@pytest.mark.parametrize("offset", [2**64 - 1, 2**64, -1])
def test_offsets_at_the_end_of_64_bits(file: NfsFile, engine: Engine, offset: int) -> None:
    """The last number that there is is a number, and beyond the device; one more, and one less than 0, are EINVAL."""
    raises(errno.EINVAL, lambda: engine.pread(bytearray(PAGE), offset))
    raises(errno.EINVAL, lambda: engine.pwrite(bytes(PAGE), offset))
    raises(errno.EINVAL, lambda: engine.trim(PAGE, offset))
    assert file.pread(bytearray(), 2**64 - 1) == 0


def test_paths_that_are_too_long(nas: FakeNas, file: NfsFile) -> None:
    """Neither name is cut off."""
    before = len(nas.calls())
    for call in (
        lambda: file.lookup("/" + "x" * 5000),
        lambda: file.lookup("/y" * 1024),
        lambda: file.rename("/swap", "/" + "x" * 5000),
    ):
        with pytest.raises(NfsError) as caught:
            call()
        assert (caught.value.errno, caught.value.phase) == (errno.ENAMETOOLONG, "name")
    assert len(nas.calls()) == before


def test_paths_that_are_too_long_with_their_directory(nas: FakeNas) -> None:
    """Below what is exported lie 2,000 bytes of names: neither path of a call is cut off."""
    folder = "/export" + ("/" + "d" * 99) * 21
    nas.add(f"{folder}/file", CONTENT)
    name = "/" + "x" * 2040
    with contextlib.closing(NfsFile(nas.url(f"{folder}/file"), LOOPBACK)) as opened:
        before = len(nas.calls())
        for call in (lambda: opened.lookup(name), lambda: opened.rename("/file", name)):
            with pytest.raises(NfsError) as caught:
                call()
            assert (caught.value.errno, caught.value.phase) == (errno.ENAMETOOLONG, "name")
        assert len(nas.calls()) == before
        assert opened.lookup("/file")["size"] == len(CONTENT)


@pytest.mark.parametrize(
    "options",
    [
        {"region_pages": 255},
        {"connections": 0},
        {"connections": 17},
        {"transport": "tcp"},
        {"cipher": "rot13"},
        {"clear_bytes": 1},
        {"owner_path": "/x"},
        {"owner_identity": "x"},
        {"owner_refresh_ms": 0},
    ],
    ids=str,
)
def test_options_that_cannot_be(nas: FakeNas, options: dict[str, Any]) -> None:
    """ValueError, and the server is not asked."""
    before = len(nas.calls())
    with pytest.raises(ValueError, match="must"):
        Engine(nas.url(PATH), LOOPBACK, **options)
    assert len(nas.calls()) == before


@pytest.mark.parametrize("kind", [Engine, NfsFile])
def test_options_of_another_kind(nas: FakeNas, kind: Any) -> None:
    """TypeError: an option that there is not, one of another type, and no address."""
    before = len(nas.calls())
    for arguments, options in (
        ((nas.url(PATH), LOOPBACK), {"colour": "red"}),
        ((nas.url(PATH), LOOPBACK), {"silence_ms": "long"}),
        ((nas.url(PATH),), {}),
    ):
        with pytest.raises(TypeError):
            kind(*arguments, **options)
    assert len(nas.calls()) == before


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://nas/export/swap",
        "nfs://nas",
        "nfs://nas?version=3",
        "nfs://nas/",
        "nfs://nas/?version=3",
        "nfs://nas/export/",
        "nfs://nas/" + "x" * 5000,
    ],
)
@pytest.mark.parametrize("kind", [Engine, NfsFile])
def test_urls_that_name_no_file(kind: Any, url: str) -> None:
    """EINVAL, before anybody is asked."""
    with pytest.raises(NfsError, match="it names no file") as caught:
        kind(url, LOOPBACK)
    assert (caught.value.errno, caught.value.phase) == (errno.EINVAL, "connect")


def test_options_that_are_too_long(nas: FakeNas) -> None:
    """They are not cut off: libnfs gets them in a buffer of its own."""
    with pytest.raises(NfsError) as caught:
        NfsFile(f"{nas.url(PATH)}&auto-traverse-mounts={'0' * 600}", LOOPBACK)
    assert (caught.value.errno, caught.value.phase) == (errno.EINVAL, "connect")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("50%", "50%"),
        ("%", "%"),
        ("%4", "%4"),
        ("%4x", "%4x"),
        ("%x4", "%x4"),
        ("%%41", "%A"),
        ("%2541", "%41"),
        ("%e2%98%83", "\N{SNOWMAN}"),
        ("%3F", "?"),
    ],
)
def test_percent_signs(nas: FakeNas, written: str, name: str) -> None:
    """Before two hexadecimal digits they make a byte, and stay what they are before anything else (RFC 3986, 2.1)."""
    nas.add(f"/export/percent/{written.encode().hex()}/{name}", CONTENT)
    url = nas.url(f"/export/percent/{written.encode().hex()}/{written}")
    with contextlib.closing(NfsFile(url, LOOPBACK)) as opened:
        assert opened.size_bytes == len(CONTENT)


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1])
def test_files_that_are_no_device(nas: FakeNas, size: int) -> None:
    """A device has whole pages, and at least one."""
    nas.add(f"/export/sizes/{size}", bytes(size))
    with pytest.raises(NfsError, match=f"its size, {size} bytes, is not a positive multiple of 4096") as caught:
        Engine(nas.url(f"/export/sizes/{size}"), LOOPBACK, region_pages=256)
    assert (caught.value.errno, caught.value.phase) == (errno.EINVAL, "open")


def test_a_url_without_options(nas: FakeNas) -> None:
    """Its path is that of the URL with them: a region of it is taken, which says where the server is. Where none does,
    portmapper does not know it."""
    region, bare = os.memfd_create("region", os.MFD_ALLOW_SEALING), nas.url(PATH).partition("?")[0]
    for url in (nas.url(PATH), bare):
        with contextlib.closing(Engine(url, LOOPBACK, region_fd=region, region_pages=256)) as opened:
            opened.pread(page := bytearray(b"x" * PAGE), PAGE)
            assert page == CONTENT[PAGE : 2 * PAGE]
    os.close(region)
    with pytest.raises(NfsError) as caught:
        NfsFile(bare, LOOPBACK, connect_timeout_s=1)
    assert caught.value.phase in ("connect", "mount")


def test_a_device_without_secrets(nas: FakeNas) -> None:
    """All of it is the kernel's first page, which is not encrypted: what was written is there after the end."""
    nas.add("/export/first", bytes(PAGE))
    page = os.urandom(PAGE)
    with contextlib.closing(Engine(nas.url("/export/first"), LOOPBACK, region_pages=256, encrypt=True)) as opened:
        assert opened.is_encrypted
        opened.pwrite(page, 0)
    assert nas.content("/export/first") == page


def test_a_read_that_is_refused(nas: FakeNas, file: NfsFile) -> None:
    """A regular file is not waited for."""
    nas.fail("READ", NFS3ERR_IO, times=1)
    raises(errno.EIO, lambda: file.pread(bytearray(10), 0))
    assert file.pread(bytearray(10), 0) == 10


def test_ports_have_no_names() -> None:
    """From then on, in a process of its own."""
    words = (
        "import socket, sys; from nbdnfs.engine import _engine; before = socket.getservbyport(111);"
        " _engine.forget_services(); print(before);\n"
        "try: socket.getservbyport(111)\n"
        "except OSError: print('none')"
    )
    command = [sys.executable, "-P", "-c", words]  # the checkout must not come before a build that counts
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    assert done.stdout.split() == ["sunrpc", "none"]


def test_nobody_listens() -> None:
    """ECONNREFUSED or the like, of the phase "connect": with one attempt only, because the file would be new."""
    nfs, mount = free_ports(2)
    url = f"nfs://{LOOPBACK}{PATH}?version=3&nfsport={nfs}&mountport={mount}"
    with pytest.raises(NfsError) as caught:
        NfsFile(url, LOOPBACK, create=True, exclusive=True)
    assert caught.value.phase == "connect"
