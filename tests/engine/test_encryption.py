# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages that are encrypted on the server: what it sees, what it may change without effect, and what a new worker reads.

The server is the attacker here: it knows what was written, and answers as it likes.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator

import pytest
from support.engines import OpenEngine, read_pages, write_pages, write_pages_and_flush
from support.fake_nfs import NFS3ERR_NOENT, FakeNfsServer
from support.nfs_server import LOOPBACK
from support.waiting import DEADLINE_S, in_background

from nbdnfs import region as shared_region
from nbdnfs.engine import Engine, warm_cipher

PAGE = 4096
PAGES = 1024
SLOTS = 256
MARKER = b"a page of the device has this marker: "


@pytest.fixture
def fake() -> Iterator[FakeNfsServer]:
    """A server with 4 MiB of random bytes."""
    with FakeNfsServer(os.urandom(PAGES * PAGE)) as server:
        yield server


@pytest.fixture(params=["aes", "xchacha20"])
def cipher(request: pytest.FixtureRequest) -> str:
    """Everything below holds with either."""
    return str(request.param)


@pytest.fixture
def engine_options(cipher: str) -> dict[str, object]:
    """Small regions, and pages that are encrypted."""
    return {"region_pages": SLOTS, "encrypt": True, "cipher": cipher}


def marked(page: int) -> bytes:
    """Text that compresses well, with the marker and the number in it."""
    return (MARKER + b"%08d\n" % page).ljust(64, b".") * (PAGE // 64)


def counter(engine: Engine, name: str) -> int:
    value = engine.counters()[name]
    assert isinstance(value, int)
    return value


def write_all(engine: Engine, pages: range) -> None:
    """Marked pages, and all of them on the server."""
    for page in pages:
        write_pages(engine, page, marked(page))
    in_background(engine.flush).result(DEADLINE_S)


def drop_clean_pages(engine: Engine, pages: range) -> None:
    """Fill the region with other pages: what was in it is on the server alone. Flushed first, since a page that is
    written back later than one of these is behind it."""
    in_background(engine.flush).result(DEADLINE_S)
    for page in pages:
        write_pages(engine, page, os.urandom(PAGE))
    in_background(engine.flush).result(DEADLINE_S)


def page_on_server(fake: FakeNfsServer, page: int) -> bytes:
    return page_of(fake.content, page)


def test_the_server_sees_nothing(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """No marker in its file or in a WRITE on its way there, nothing that compresses, no two pages alike; filled pages
    and pages of the same bytes included. The first page is as it was written."""
    engine = open_engine(fake.url())
    assert engine.is_encrypted
    for page in range(600):
        write_pages(engine, page, marked(page))
    for page in range(600, 800):
        write_pages(engine, page, marked(7))
    write_pages(engine, 800, bytes(200 * PAGE))
    in_background(engine.flush).result(DEADLINE_S)
    content = fake.content[PAGE : 1000 * PAGE]
    assert MARKER[:16] not in content
    assert len(zlib.compress(content, 9)) > len(content)
    pages = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
    assert len(set(pages)) == len(pages)
    for page in pages:
        assert len(set(page)) > 200, "of 256 values of a byte, random bytes have all but a few"
    assert page_on_server(fake, 0) == marked(0)
    assert [read_pages(engine, page) for page in (0, 1, 599)] == [marked(0), marked(1), marked(599)]
    assert [read_pages(engine, page) for page in (600, 799)] == [marked(7)] * 2
    assert read_pages(engine, 800, 200) == bytes(200 * PAGE)
    assert counter(engine, "checksum_rereads") == 0


def test_the_clear_part_is_given(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """A kernel with pages of 16 KiB has its swap header in four of ours: they are readable, before and after they are
    written, and the next one is not."""
    before = fake.content
    engine = open_engine(fake.url(), clear_bytes=4 * PAGE)
    assert read_pages(engine, 0, 5) == before[: 4 * PAGE] + bytes(PAGE)
    write_all(engine, range(5))
    assert fake.content[: 4 * PAGE] == b"".join(marked(page) for page in range(4))
    assert MARKER not in page_on_server(fake, 4)


def test_clear_bytes_are_whole_pages(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Anything else is the caller's mistake."""
    with pytest.raises(ValueError, match="multiple of 4096"):
        open_engine(fake.url(), clear_bytes=1000)


def test_what_was_never_written_is_zeros(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Whatever the server has, also when it is read sequentially: its bytes are of other keys. The server is asked, so
    that reading such pages warms up what reading others needs."""
    engine = open_engine(fake.url(), read_ahead_pages=64)
    for page in range(1, 200):
        assert read_pages(engine, page) == bytes(PAGE)
    assert sum(call.count for call in fake.calls("READ")) >= 199 * PAGE
    assert counter(engine, "read_ahead_hits") > 0
    write_pages_and_flush(engine, 5, marked(5))
    drop_clean_pages(engine, range(200, 200 + SLOTS))
    assert read_pages(engine, 4, 3) == bytes(PAGE) + marked(5) + bytes(PAGE)
    engine.trim(PAGE, 5 * PAGE)
    assert read_pages(engine, 5) == bytes(PAGE)


def test_sequential_reads(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """What is read ahead is decrypted and checked as well."""
    engine = open_engine(fake.url(), read_ahead_pages=64, connections=2)
    write_all(engine, range(1, 600))
    for page in range(1, 600):
        assert read_pages(engine, page) == marked(page)
    assert counter(engine, "read_ahead_hits") > 100
    assert counter(engine, "checksum_rereads") == 0


def test_a_changed_page_that_is_read_ahead(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """It is dropped, and EIO when it is asked for; its neighbours are served."""
    engine = open_engine(fake.url(), read_ahead_pages=64)
    write_all(engine, range(1, 600))
    drop_clean_pages(engine, range(600, 600 + SLOTS))  # page 300 among them, however late its WRITE was answered
    fake.overwrite(300 * PAGE + 17, bytes([page_on_server(fake, 300)[17] ^ 4]))
    for page in range(250, 350):
        if page == 300:
            assert_is_refused(engine, page)
        else:
            assert read_pages(engine, page) == marked(page)


def assert_is_refused(engine: Engine, page: int) -> None:
    """EIO, and counted once."""
    before = counter(engine, "checksum_failures")
    with pytest.raises(OSError, match="Input/output error") as caught:
        read_pages(engine, page)
    assert caught.value.errno == errno.EIO
    assert counter(engine, "checksum_failures") == before + 1


def page_of(content: bytes, page: int) -> bytes:
    return content[page * PAGE : (page + 1) * PAGE]


def exclusive_or(*pages: bytes) -> bytes:
    result = 0
    for page in pages:
        result ^= int.from_bytes(page, "little")
    return result.to_bytes(PAGE, "little")


def forgery(attack: int, draw: random.Random, page: int, good: bytes, earlier: bytes) -> bytes:
    """What a server that knows all plaintexts may put in place of `page`; `earlier` is the file as it was before."""
    there, written = page_of(good, page), marked(page + PAGES)
    kinds = (
        lambda: exclusive_or(there, (1 << draw.randrange(8 * PAGE)).to_bytes(PAGE, "little")),
        lambda: exclusive_or(there, written, marked(page)),  # without authentication: any page that it likes
        lambda: page_of(good, page - 1 if page > 1 else page + 1),
        lambda: page_of(earlier, page),
        lambda: bytes(PAGE),
        lambda: page_of(good, page % 700 + 2 + draw.randrange(50)),
        lambda: written,
    )
    return kinds[attack % len(kinds)]()


@pytest.mark.parametrize("attacks", [700, pytest.param(10_000, marks=pytest.mark.long)])
def test_flipped_exchanged_and_replayed(fake: FakeNfsServer, open_engine: OpenEngine, attacks: int) -> None:
    """Changes that a server may make without keys, each an I/O error, counted, and never wrong bytes:
    a flipped bit, a known difference over the page, two pages exchanged, the page's own earlier bytes, zeros, another
    page's bytes, and the bytes of the page in the clear. The page is served again once its bytes are back."""
    engine = open_engine(fake.url())
    write_all(engine, range(PAGES - SLOTS))
    earlier = fake.content
    for page in range(PAGES - SLOTS):
        write_pages(engine, page, marked(page + PAGES))
    drop_clean_pages(engine, range(PAGES - SLOTS, PAGES))
    good = fake.content
    draw = random.Random(1)
    known = range(1, PAGES - SLOTS)
    for attack in range(attacks):
        page = draw.choice(known)
        fake.overwrite(page * PAGE, forgery(attack, draw, page, good, earlier))
        assert_is_refused(engine, page)
        fake.overwrite(page * PAGE, page_of(good, page))
    for page in known:
        assert read_pages(engine, page) == marked(page + PAGES)
    assert counter(engine, "checksum_failures") == attacks


def test_the_clear_page_is_checked(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Once it is written under these keys, the server cannot change it."""
    engine = open_engine(fake.url())
    write_all(engine, range(2))
    drop_clean_pages(engine, range(2, 2 + SLOTS))
    fake.overwrite(0, b"!")
    assert_is_refused(engine, 0)


def test_a_new_worker_takes_over(fake: FakeNfsServer, open_engine: OpenEngine, region_fd: int) -> None:
    """What the server has, what was only in slots, and filled pages: all of it under the same keys."""
    first = open_engine(fake.url(), region_fd=region_fd)
    write_all(first, range(300))
    write_pages(first, 400, bytes(PAGE))
    write_pages(first, 401, marked(401))
    fake.hold("WRITE")
    for page in range(10):
        write_pages(first, page, marked(page + PAGES))
    keys = os.pread(region_fd, shared_region.KEYS_BYTES, shared_region.KEYS_OFFSET)
    first.close()
    fake.release()
    second = open_engine(fake.url(), region_fd=region_fd)
    assert os.pread(region_fd, shared_region.KEYS_BYTES, shared_region.KEYS_OFFSET) == keys
    assert any(keys)
    assert [read_pages(second, page) for page in range(10)] == [marked(page + PAGES) for page in range(10)]
    assert [read_pages(second, page) for page in range(10, 300)] == [marked(page) for page in range(10, 300)]
    assert read_pages(second, 400, 2) == bytes(PAGE) + marked(401)
    in_background(second.flush).result(DEADLINE_S)
    assert MARKER not in fake.content[PAGE:]
    assert counter(second, "checksum_failures") == 0


def test_new_keys_read_nothing(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """After a boot: the swap header's page is there, all others are zeros, and the two sets of keys differ."""
    first = open_engine(fake.url())
    write_all(first, range(50))
    first.close()
    there = fake.content
    second = open_engine(fake.url())
    assert read_pages(second, 0) == marked(0)
    assert read_pages(second, 1, 49) == bytes(49 * PAGE)
    write_all(second, range(50))
    for page in range(1, 50):
        assert page_on_server(fake, page) != there[page * PAGE : (page + 1) * PAGE]


def test_the_end_writes_what_can_be_read_later(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The keys end with a region of the engine's own. Its first page goes to the server, and the others, filled or
    not, do not."""
    engine = open_engine(fake.url())
    there = fake.content
    for page in range(100):
        write_pages(engine, page, marked(page))
    write_pages(engine, 100, b"".join(bytes([word]) * PAGE for word in range(200)))
    in_background(engine.close).result(DEADLINE_S)
    assert fake.on_disk == marked(0) + there[PAGE:]


def test_the_end_waits_for_what_is_under_way(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """Nobody needs these pages, but a WRITE that the server carries out later might meet the next engine's."""
    engine = open_engine(fake.url())
    fake.hold("WRITE")
    for page in range(1, SLOTS):
        write_pages(engine, page, marked(page))
    fake.wait_for(1, DEADLINE_S)
    closed = in_background(engine.close)
    with pytest.raises(TimeoutError):
        closed.result(1)
    held = len(fake.calls("WRITE"))
    fake.release()
    closed.result(DEADLINE_S)
    assert len(fake.calls("WRITE")) == held


def test_the_end_with_a_write_to_a_file_that_is_gone(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """It is given up, as without encryption, once the file has been gone for gone_limit."""
    engine = open_engine(fake.url(), gone_limit_ms=500)
    fake.hold("WRITE")
    for page in range(1, SLOTS):
        write_pages(engine, page, marked(page))
    fake.wait_for(1, DEADLINE_S)
    fake.fail("LOOKUP", NFS3ERR_NOENT)
    fake.expire_handles()
    fake.crash()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        in_background(engine.flush).result(DEADLINE_S)
    in_background(engine.close).result(DEADLINE_S)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_region_stays_as_it_was_made(
    fake: FakeNfsServer, open_engine: OpenEngine, region_fd: int, cipher: str, encrypted: bool
) -> None:
    """A worker of an earlier version has made it plain, or the setting has changed: what is on the server is read."""
    made = {"aes": 4, "xchacha20": 3}[cipher] if encrypted else 2
    first = open_engine(fake.url(), region_fd=region_fd, encrypt=encrypted)
    write_all(first, range(1, 300))
    first.close()
    assert shared_region.version_of(region_fd) == made
    other = {"aes": "xchacha20", "xchacha20": "aes"}[cipher]
    for encrypt in (True, not encrypted):
        open_engine(fake.url(), region_fd=region_fd, encrypt=encrypt, cipher=other).close()
    second = open_engine(fake.url(), region_fd=region_fd, encrypt=not encrypted, cipher=other)
    assert second.is_encrypted is encrypted
    write_pages_and_flush(second, 1, marked(1 + PAGES))
    assert [read_pages(second, page) for page in range(2, 300)] == [marked(page) for page in range(2, 300)]
    assert (MARKER in page_on_server(fake, 1)) is not encrypted


@pytest.mark.parametrize("version", [0, *shared_region.ENCRYPTED])
def test_a_cipher_is_warmed(version: int) -> None:
    """For a region of a version, or of any. What a standby calls before its memory is locked has to exist."""
    assert warm_cipher(version) is None
    with pytest.raises(TypeError):
        warm_cipher("aes")  # type: ignore[arg-type]


# Opens an engine, and closes it when a line comes.
HOLDER = """
import sys
from nbdnfs.engine import Engine
url, address, region_fd, cipher = sys.argv[1:]
engine = Engine(url, address, region_fd=int(region_fd), region_pages=256, encrypt=True, cipher=cipher)
engine.pwrite(bytes(range(256)) * 16, 4096)
engine.flush()
print("open", flush=True)
sys.stdin.readline()
engine.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def test_keys_are_in_no_core_file(fake: FakeNfsServer, region_fd: int, cipher: str) -> None:
    """Neither they nor what they expand to, which begins with the key, lies in memory that a core file would have; and
    after the end none of it is in the process at all."""
    command = [sys.executable, "-P", "-c", HOLDER, fake.url(), LOOPBACK, str(region_fd), cipher]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[region_fd], text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        keys = os.pread(region_fd, 48, shared_region.KEYS_OFFSET)
        for key in (keys[:16], keys[16:]):
            places = mappings_with(process.pid, key)
            assert places
            assert all("dd" in flags for _, flags in places), "not marked with MADV_DONTDUMP"
        assert len(mappings_with(process.pid, keys[16:])) == (2 if cipher == "aes" else 1)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "closed\n"
        assert mappings_with(process.pid, keys[:16]) == mappings_with(process.pid, keys[16:]) == []
        process.stdin.close()
        process.wait(DEADLINE_S)


# A sanitizer has some that are larger than all of memory, for what it knows of the others.
LARGEST_MAPPING = 1 << 30


def mappings_with(pid: int, wanted: bytes) -> list[tuple[str, list[str]]]:
    """Of a process: each mapping with these bytes in it, and its flags (proc_pid_smaps(5))."""
    found: list[tuple[str, list[str]]] = []
    with open(f"/proc/{pid}/smaps") as smaps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in smaps:
            head, *rest = line.split()
            if not head.endswith(":"):
                addresses, mode = head, rest[0]
            elif head == "VmFlags:" and mode.startswith("rw"):
                start, end = (int(address, 16) for address in addresses.split("-"))
                if end - start > LARGEST_MAPPING:
                    continue
                memory.seek(start)
                if wanted in memory.read(end - start):
                    found.append((addresses, rest))
    return found


def test_forgotten_keys(fake: FakeNfsServer, open_engine: OpenEngine, region_fd: int) -> None:
    """Once the device is down, the region has no keys any more, but all else. Not while a worker has it."""
    engine = open_engine(fake.url(), region_fd=region_fd)
    keys = os.pread(region_fd, shared_region.KEYS_BYTES, shared_region.KEYS_OFFSET)
    shared_region.forget_keys(region_fd)
    assert os.pread(region_fd, len(keys), shared_region.KEYS_OFFSET) == keys
    engine.close()
    made = os.pread(region_fd, os.fstat(region_fd).st_size, 0)
    shared_region.forget_keys(region_fd)
    found = os.pread(region_fd, len(made), 0)
    begin, end = shared_region.KEYS_OFFSET, shared_region.KEYS_OFFSET + shared_region.KEYS_BYTES
    assert any(made[begin:end])
    assert found == made[:begin] + bytes(shared_region.KEYS_BYTES) + made[end:]


def test_the_file_is_recognised(fake: FakeNfsServer, open_engine: OpenEngine) -> None:
    """The server has another number and handle for it after its boot: its pages decide, decrypted. A file that has
    other bytes under these numbers is not written to."""
    engine = open_engine(fake.url(), silence_ms=300, connect_timeout_s=1)
    write_all(engine, range(1, 300))
    fake.replace(fake.content, fake.fileid + 1)
    assert in_background(read_pages, engine, 7).result(DEADLINE_S) == marked(7)
    write_pages(engine, 7, marked(7 + PAGES))
    in_background(engine.flush).result(DEADLINE_S)
    kept, fileid = fake.content, fake.fileid
    before = os.urandom(PAGES * PAGE)
    fake.replace(before, fileid + 1)
    write_pages(engine, 8, marked(8 + PAGES))
    flushed = in_background(engine.flush)
    with pytest.raises(TimeoutError):
        flushed.result(1.5)
    assert fake.content == before
    fake.replace(kept, fileid)
    flushed.result(DEADLINE_S)
    assert read_pages(engine, 8) == marked(8 + PAGES)
