# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole worker with encryption, and a real server: nothing of a page's content is on the wire or in the file, and
what that holds from before is neither shown nor harmed unseen."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from support.nbd_client import NbdClient
from support.nfs_server import FileOnServer
from support.proxy import TcpProxy
from support.waiting import DEADLINE_S
from support.worker_process import serving

from nbdnfs.errors import CannotCreateError
from nbdnfs.nas import existing_file

PAGE = 4096
PAGES = 1024
REGION_PAGES = 256
# Text that compresses to a hundredth; each page says which one it is.
MARKER = b"the secret of page "


def content(page: int) -> bytes:
    words = b"%s%06d; " % (MARKER, page)
    return (words * (PAGE // len(words))).ljust(PAGE, b"!")


def compressed(data: bytes) -> float:
    """The share of its length that is left. Random bytes: 1.0."""
    return len(zlib.compress(data, 6)) / len(data)


def test_nothing_is_seen(backing_file: FileOnServer, proxy: TcpProxy, tmp_path: Path) -> None:
    """More pages than the region has room for, written and read back through the server: right bytes for the kernel,
    and noise in both directions on the wire and in the file. The same worker without encryption shows every page."""
    assert compressed(b"".join(map(content, range(PAGES)))) < 0.02
    for encrypt in (True, False):
        options = (*(["--encrypt"] if encrypt else []), f"--plugin-setting=region_pages={REGION_PAGES}")
        url = backing_file.url(nfsport=proxy.port)
        with serving(url, tmp_path, *options) as worker, NbdClient(worker.socket, DEADLINE_S) as client:
            proxy.record()
            for page in range(1, PAGES):
                client.write(page * PAGE, content(page))
            client.flush()
            assert [page for page in range(1, PAGES) if client.read(page * PAGE, PAGE) != content(page)] == []
            written, read = proxy.recorded()
        stored = backing_file.path.read_bytes()[PAGE : PAGES * PAGE]
        assert len(written) > (PAGES - 1) * PAGE
        assert len(read) > (PAGES - REGION_PAGES - 2) * PAGE
        if encrypt:
            assert [MARKER in data for data in (written, read, stored)] == [False, False, False]
            # a call and an answer have heads of some hundred bytes, which compress
            assert [compressed(data) > 0.9 for data in (written, read)] == [True, True]
            assert compressed(stored) > 0.999
            assert len({stored[at : at + PAGE] for at in range(0, len(stored), PAGE)}) == PAGES - 1
        else:
            assert written.count(MARKER) == stored.count(MARKER) == (PAGES - 1) * content(1).count(MARKER)


def test_data_that_the_device_does_not_show(backing_file: FileOnServer, tmp_path: Path) -> None:
    """A file system whose first page is empty reads as zeros through a device that is encrypted; the file itself is
    what says that it holds data, and a start refuses it."""
    size_bytes = backing_file.path.stat().st_size
    backing_file.path.write_bytes(bytes(65536) + b"a file system" + bytes(size_bytes - 65536 - 13))
    with serving(backing_file.url(), tmp_path, "--encrypt") as worker, NbdClient(worker.socket, DEADLINE_S) as client:
        assert client.read(0, 32 * PAGE) == bytes(32 * PAGE)
        with pytest.raises(CannotCreateError, match="neither swap nor empty"):
            existing_file.swap_page_bytes(backing_file.url())


def test_from_one_kind_to_the_other(backing_file: FileOnServer, tmp_path: Path) -> None:
    """The first page, which is the swap header, stays readable from each start to the next, encrypted or not. The rest
    is of no use to an encrypted device: zeros, and no error."""
    size_bytes = backing_file.path.stat().st_size
    for number, encrypt in enumerate((False, True, True, False)):
        options = ["--encrypt"] if encrypt else []
        with serving(backing_file.url(), tmp_path, *options) as worker, NbdClient(worker.socket, DEADLINE_S) as client:
            if number:
                assert client.read(0, PAGE) == content(number - 1)
            if encrypt:
                assert client.read(PAGE, 8 * PAGE) == bytes(8 * PAGE)
            for page in range(8):
                client.write(page * PAGE, content(page or number))
            client.flush()
            assert client.read(PAGE, PAGE) == content(1)
        stored = backing_file.path.read_bytes()
        assert len(stored) == size_bytes
        assert stored[:PAGE] == content(number)
        assert (stored[PAGE : 2 * PAGE] == content(1)) is not encrypt
