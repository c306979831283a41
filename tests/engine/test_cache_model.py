# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache against a model: a dictionary of what was acknowledged, and a server that keeps, loses and delays."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from core_library import (
    AES,
    HIT,
    MISS,
    PAGE,
    PLAIN,
    WAIT,
    XCHACHA20,
    Cache,
    Identity,
    PageSetStruct,
    Region,
    RegionStruct,
    Run,
    build,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from nbdnfs import region as shared_region

DEVICE_PAGES = 12
SLOTS = 6
PAGES = st.integers(0, DEVICE_PAGES - 1)
KEYS_OFFSET = shared_region.KEYS_OFFSET
IDENTITY = Identity(DEVICE_PAGES * PAGE, 7, 8)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The parts without I/O, compiled once."""
    return build(tmp_path_factory.mktemp("core"))


def adopt(library: ctypes.CDLL, fd: int, path_hash: int = 8) -> tuple[int, bytes]:
    """region_adopt()'s status and the end of its message, after the last comma; what was mapped is let go of."""
    struct, message = RegionStruct(), ctypes.create_string_buffer(256)
    status = library.region_adopt(ctypes.byref(struct), fd, path_hash, message, len(message))
    if status == 0:
        library.region_unmap(ctypes.byref(struct))
    return status, message.value.rpartition(b", and ")[2]


@dataclass
class Server:
    """A file of pages; what is written unstably is lost by a crash, which changes the verifier."""

    stable: dict[int, bytes] = field(default_factory=lambda: {page: bytes(PAGE) for page in range(DEVICE_PAGES)})
    volatile: dict[int, bytes] = field(default_factory=dict)
    verifier: int = 1

    def read(self, page: int) -> bytes:
        """What a READ would answer."""
        return self.volatile.get(page, self.stable[page])

    def write(self, pages: dict[int, bytes], *, stable: bool) -> None:
        """A WRITE."""
        if stable:
            for page, data in pages.items():
                self.volatile.pop(page, None)
                self.stable[page] = data
        else:
            self.volatile.update(pages)

    def commit(self) -> None:
        """A COMMIT."""
        self.stable.update(self.volatile)
        self.volatile.clear()

    def crash(self) -> None:
        """All that was not stable is gone."""
        self.volatile.clear()
        self.verifier += 1


@dataclass
class Fetch:
    """A READ under way, with what the server will have answered."""

    number: int
    first: int
    pages: list[bytes]


@dataclass
class Waiter:
    """A thread of the engine that sleeps until `is_over()`. Then `promised` is on the server, stably: of each page
    these bytes, or some that were acknowledged later, which `later` has."""

    is_over: Callable[[], bool]
    promised: dict[int, bytes | None] = field(default_factory=dict)
    later: dict[int, list[bytes | None]] = field(default_factory=dict)


class CacheMachine(RuleBasedStateMachine):
    """Every rule is one thing that the engine, the server or a killer may do next."""

    library: ctypes.CDLL
    version = PLAIN

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.memfd_create("region")
        self.server = Server()
        # None: trimmed, may read as anything
        self.acknowledged: dict[int, bytes | None] = dict(self.server.stable)
        self.runs: list[Run] = []
        self.fetches: list[Fetch] = []
        self.waiters: list[Waiter] = []
        self.commit_under_way = False
        self.number = 0
        self.now = 0
        self.open()

    def open(self) -> None:
        """A new worker."""
        self.region = Region(self.library, self.fd, IDENTITY, SLOTS, version=self.version)
        self.cache = Cache(self.region)
        self.holds: list[tuple[range, int]] = []
        self.waiters = []

    def close(self) -> None:
        """Its end: nothing but the region stays."""
        self.cache.destroy()
        self.region.unmap()

    def teardown(self) -> None:
        """Let everything settle: the server must then have exactly what was acknowledged."""
        for run in self.runs:
            self.server.write(run.pages, stable=True)
            self.cache.run_stable(run)
        for fetch in self.fetches:
            self.cache.fetch_done(fetch.first, fetch.pages, fetch.number)
        if self.commit_under_way:
            self.cache.commit_failed()
        self.runs = []
        assert not self.cache.end_holds(1 << 32)
        materialised = False
        for _ in range(DEVICE_PAGES * 4):
            materialised = materialised or self.cache.materialise()
            while run := self.cache.take_run(4):
                self.server.write(run.pages, stable=True)
                self.cache.run_stable(run)
            if self.cache.commit_begin():
                self.server.commit()
                self.cache.commit_done(self.server.verifier)
        assert materialised
        assert self.cache.unstable_count() == 0
        self.those_that_wait_are_woken()
        assert self.waiters == []
        for page, data in self.acknowledged.items():
            assert self.has_stably(page, data)
        self.close()
        os.close(self.fd)

    # ---- the kernel

    def acknowledge(self, page: int, data: bytes | None) -> None:
        """From now on the page reads like this; None: as anything."""
        self.acknowledged[page] = data
        for waiter in self.waiters:
            waiter.later.setdefault(page, []).append(data)

    def wait(self, waiter: Waiter) -> None:
        """As a request does: it looks first, and sleeps until it is woken and finds that its wait is over."""
        if waiter.is_over():
            self.check_promise(waiter)
        else:
            self.waiters.append(waiter)

    def check_promise(self, waiter: Waiter) -> None:
        for page, data in waiter.promised.items():
            assert any(self.has_stably(page, allowed) for allowed in (data, *waiter.later.get(page, [])))

    def has_stably(self, page: int, data: bytes | None) -> bool:
        """Whether the server has the page for good as it goes there when `data` is written; None: anything will do.
        A page that was never written is zeros there."""
        if data is None or self.server.stable[page] == data == bytes(PAGE):
            return True
        return self.server.stable[page] == self.region.seal(page, self.cache.proof(data), data)

    def may_fill(self, page: int) -> bool:
        """As the engine decides: not where a FLUSH or FUA may wait for the page."""
        return not any(waiter.promised for waiter in self.waiters) or self.cache.page_is_stable(page, 2**64 - 1)

    @rule(page=PAGES, seed=st.integers(0, 2**32 - 1))
    def write(self, page: int, seed: int) -> None:
        data = random.Random(seed).randbytes(PAGE)
        if self.cache.write(page, data):
            self.acknowledge(page, data)
        else:
            self.wait(Waiter(self.cache.has_room))

    @rule(page=PAGES, word=st.sampled_from((0, 1, 0xFFFFFFFF)))
    def write_one_word(self, page: int, word: int) -> None:
        data = word.to_bytes(4, "little") * (PAGE // 4)
        assert self.cache.write(page, data, may_fill=self.may_fill(page)), "a filled page needs no slot"
        self.acknowledge(page, data)

    @rule(page=PAGES, seed=st.integers(0, 2**32 - 1))
    def write_fua(self, page: int, seed: int) -> None:
        data = random.Random(seed).randbytes(PAGE)
        if self.cache.write(page, data, may_fill=False):
            self.acknowledge(page, data)
            sequence = self.cache.sequence()
            self.wait(Waiter(lambda: self.cache.page_is_stable(page, sequence), {page: data}))

    @rule(page=PAGES)
    def trim(self, page: int) -> None:
        self.cache.trim(page)
        self.acknowledge(page, None)

    @rule(most=st.integers(1, DEVICE_PAGES))
    def materialise(self, most: int) -> None:
        """A FLUSH that has got so far, and gives the lock to others."""
        if not self.cache.materialise(most):
            self.wait(Waiter(self.cache.has_room))

    @rule()
    def flush(self) -> None:
        if self.cache.materialise():
            sequence = self.cache.sequence()
            self.wait(Waiter(lambda: self.cache.is_stable(sequence), dict(self.acknowledged)))

    # ---- the flusher

    @rule(most=st.integers(1, 8))
    def take_run(self, most: int) -> None:
        run = self.cache.take_run(most)
        if run is not None:
            under_way = {page for other in self.runs for page in other.pages}
            assert not under_way & set(run.pages), "two writes of a page under way"
            assert not any(set(pages) & set(run.pages) for pages, until in self.holds if until > self.now)
            assert len(run.pages) <= most
            self.runs.append(run)

    @rule(first=PAGES, count=st.integers(1, DEVICE_PAGES), length=st.integers(1, 5))
    def hold(self, first: int, count: int, length: int) -> None:
        self.cache.hold(first, count, self.now + length)
        self.holds.append((range(first, first + count), self.now + length))

    @rule(length=st.integers(1, 5))
    def time_passes(self, length: int) -> None:
        self.now += length
        self.holds = [(pages, until) for pages, until in self.holds if until > self.now]
        assert self.cache.end_holds(self.now) == bool(self.holds)

    @rule(start=PAGES)
    def known_page(self, start: int) -> None:
        """The server has the bytes of that page that were acknowledged."""
        found = self.cache.known_page(start)
        if found is not None:
            page, proof = found
            opened = self.cache.open_page(page, proof, self.server.read(page))
            assert opened is not None
            assert self.acknowledged[page] in (None, opened)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), stable=st.booleans())
    def run_arrives(self, data: st.DataObject, stable: bool) -> None:
        run = self.runs.pop(data.draw(st.integers(0, len(self.runs) - 1)))
        self.server.write(run.pages, stable=stable)
        if stable:
            self.cache.run_stable(run)
        else:
            self.cache.run_uncommitted(run, self.server.verifier)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), arrived=st.booleans())
    def run_fails(self, data: st.DataObject, arrived: bool) -> None:
        """No answer: the server may have taken it all the same."""
        run = self.runs.pop(data.draw(st.integers(0, len(self.runs) - 1)))
        if arrived:
            self.server.write(run.pages, stable=False)
        self.cache.run_failed(run)

    @precondition(lambda self: not self.commit_under_way)
    @rule()
    def commit_begin(self) -> None:
        self.commit_under_way = self.cache.commit_begin() > 0

    @precondition(lambda self: self.commit_under_way)
    @rule(answered=st.booleans())
    def commit_end(self, answered: bool) -> None:
        self.commit_under_way = False
        if answered:
            self.server.commit()
            self.cache.commit_done(self.server.verifier)
        else:
            self.cache.commit_failed()

    @rule()
    def server_crashes(self) -> None:
        self.server.crash()

    # ---- read-ahead

    @rule(first=PAGES, count=st.integers(1, 5))
    def fetch(self, first: int, count: int) -> None:
        self.number += 1
        covered = self.cache.fetch_begin(first, count, self.number)
        if covered:
            pages = [self.server.read(first + i) for i in range(covered)]
            self.fetches.append(Fetch(self.number, first, pages))
            self.wait(Waiter(lambda: self.cache.read(first)[0] != WAIT))

    @precondition(lambda self: self.fetches)
    @rule(data=st.data())
    def fetch_ends(self, data: st.DataObject) -> None:
        fetch = self.fetches.pop(data.draw(st.integers(0, len(self.fetches) - 1)))
        self.cache.fetch_done(fetch.first, fetch.pages, fetch.number)

    # ---- the killer

    @rule(arrived=st.booleans())
    def kill(self, arrived: bool) -> None:
        """A new worker takes the region over; what was under way has arrived, or has not."""
        for run in self.runs:
            if arrived:
                self.server.write(run.pages, stable=False)
        self.close()
        self.runs, self.fetches, self.commit_under_way = [], [], False
        self.open()

    # ---- what always holds

    @invariant()
    def what_is_quick_is_right(self) -> None:
        self.cache.check(DEVICE_PAGES)

    @invariant()
    def those_that_wait_are_woken(self) -> None:
        """When the wait of any is over, the cache says that something has happened. (Else there is no broadcast.)"""
        changed = self.cache.take_changed()
        for waiter in [waiter for waiter in self.waiters if waiter.is_over()]:
            assert changed
            self.check_promise(waiter)
            self.waiters.remove(waiter)

    @invariant()
    def reads_see_what_was_acknowledged(self) -> None:
        fetched = {fetch.first + i for fetch in self.fetches for i in range(len(fetch.pages))}
        for page, data in self.acknowledged.items():
            found, got = self.cache.read(page)
            if found == WAIT:
                assert page in fetched
            elif found == MISS:
                opened = self.cache.open_page(page, self.cache.known_proof(page), self.server.read(page))
                assert data is None or opened is not None
                got = opened or b""
            assert found == WAIT or data in (None, got)


class EncryptedMachine(CacheMachine):
    """The same with pages that are encrypted on the server, but for the first one."""

    version = AES

    @invariant()
    def nothing_is_readable_on_the_server(self) -> None:
        for page, data in self.acknowledged.items():
            if page > 0 and data is not None and data != bytes(PAGE):
                assert self.server.stable[page] != data
                assert self.server.read(page) != data


class XChaCha20Machine(EncryptedMachine):
    """As a processor without AES has them."""

    version = XCHACHA20


@pytest.mark.timeout(600)  # half a minute of one processor, which a loaded machine may not give it in two
@pytest.mark.parametrize(
    ("machine", "examples"), [(CacheMachine, 400), (EncryptedMachine, 100), (XChaCha20Machine, 50)]
)
def test_model(library: ctypes.CDLL, machine: type[CacheMachine], examples: int) -> None:
    """Random orders of writes, trims, runs, commits, crashes, fetches and kills lose and mix nothing."""
    machine.library = library
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@given(data=st.data(), limit=st.sampled_from((1, 63, 64, 65, 4096, 4097, 300_000)))
def test_page_set(library: ctypes.CDLL, data: st.DataObject, limit: int) -> None:
    """Against Python's own: after each change, the next member from anywhere on."""
    numbers = st.integers(0, limit - 1) | st.sampled_from((0, limit - 1))
    page_set, members, found = PageSetStruct(), set[int](), ctypes.c_uint64()
    assert library.page_set_init(ctypes.byref(page_set), limit)
    for number, is_member, start in data.draw(st.lists(st.tuples(numbers, st.booleans(), numbers), max_size=30)):
        library.page_set_put(ctypes.byref(page_set), number, is_member)
        (members.add if is_member else members.discard)(number)
        expected = min((member for member in members if member >= start), default=None)
        has_next = library.page_set_next(ctypes.byref(page_set), start, ctypes.byref(found))
        assert (found.value if has_next else None) == expected
    assert not library.page_set_next(ctypes.byref(page_set), limit, ctypes.byref(found))
    library.page_set_deinit(ctypes.byref(page_set))


def test_a_page_that_is_overtaken_each_time(library: ctypes.CDLL) -> None:
    """Its first write is stable once a later write-back is, and no COMMIT comes in time: the run says so."""
    fd = os.memfd_create("region")
    region = Region(library, fd, IDENTITY, SLOTS)
    cache = Cache(region)
    cache.write(0, os.urandom(PAGE))
    first, overtaken = cache.sequence(), []
    for _ in range(3):
        run = cache.take_run(1)
        assert run is not None
        overtaken.append(run.struct.is_overtaken)
        cache.write(0, os.urandom(PAGE))
        assert cache.page_is_stable(0, first - 1)
        assert not cache.page_is_stable(0, first)
        cache.run_uncommitted(run, 1)
        assert not cache.is_stable(first)
    assert overtaken == [False, True, True]
    run = cache.take_run(1)
    assert run is not None
    cache.write(0, os.urandom(PAGE))
    cache.run_stable(run)
    assert cache.is_stable(first)
    assert not cache.is_stable(cache.sequence())
    cache.destroy()
    region.unmap()
    os.close(fd)


def test_crc_is_crc32c(library: ctypes.CDLL) -> None:
    """RFC 3720, B.4: 32 bytes of zeros, of ones, and counting up; and the instruction agrees with the table."""
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        assert library.crc32c(data, 32) == library.crc32c_by_table(data, 32) == crc
    for length in (0, 1, 7, 9, 4079, 4080, 4081, 4095, 4096, 8159, 8160, 12_299):
        data = random.Random(length).randbytes(length)
        assert library.crc32c(data, length) == library.crc32c_by_table(data, length)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fileid": 9}, "another backing file"),
        ({"device_bytes": 2 * DEVICE_PAGES * PAGE}, "another backing file"),
    ],
)
def test_region_of_another_file_is_refused(library: ctypes.CDLL, change: dict[str, int], message: str) -> None:
    """A region is replayed into its own file or not at all."""
    fd = os.memfd_create("region")
    Region(library, fd, IDENTITY, SLOTS).unmap()
    with pytest.raises(OSError, match=message):
        Region(
            library, fd, Identity(**{"device_bytes": DEVICE_PAGES * PAGE, "fileid": 7, "path_hash": 8, **change}), SLOTS
        )
    os.close(fd)


def test_region_of_another_version_or_none_is_refused(library: ctypes.CDLL) -> None:
    """Never guessed at: a version that is not ours, and bytes that are no region."""
    fd = os.memfd_create("region")
    Region(library, fd, IDENTITY, SLOTS).unmap()
    for version in (0, 99):
        os.pwrite(fd, version.to_bytes(4, "little"), 8)
        with pytest.raises(OSError, match=f"version {version}, "):
            Region(library, fd, IDENTITY, SLOTS)
    os.pwrite(fd, b"garbage!", 0)
    with pytest.raises(OSError, match="not a region"):
        Region(library, fd, IDENTITY, SLOTS)
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (shared_region.REGION_BYTES_OFFSET, 8, 0),
        (shared_region.REGION_BYTES_OFFSET, 8, 2**63),
        (shared_region.SLOT_COUNT_OFFSET, 4, SLOTS + 1),
        (shared_region.SLOT_COUNT_OFFSET, 4, 2**28 + 1),
        (16, 8, 1 << 30),  # identity.device_bytes
        (16, 8, 2**48 + PAGE),
    ],
)
def test_a_header_that_does_not_fit(library: ctypes.CDLL, offset: int, size: int, value: int) -> None:
    """What it says of the region's parts is not followed out of the region, whoever asks for it."""
    fd = os.memfd_create("region")
    Region(library, fd, IDENTITY, SLOTS).unmap()
    os.pwrite(fd, value.to_bytes(size, sys.byteorder), offset)
    with pytest.raises(OSError, match="its header says otherwise"):
        Region(library, fd, IDENTITY, SLOTS)
    assert adopt(library, fd) == (-errno.EPROTO, b"its header says otherwise")
    os.close(fd)


@pytest.mark.parametrize("length", [1, PAGE // 2, 3 * PAGE])
def test_a_file_that_is_no_region(library: ctypes.CDLL, length: int) -> None:
    """Shorter than the header, or of another length than a new one has."""
    fd = os.memfd_create("region")
    for content in (b"x" * length, bytes(length)):
        os.pwrite(fd, content, 0)
        with pytest.raises(OSError, match="not a region"):
            Region(library, fd, IDENTITY, SLOTS)
        assert os.pread(fd, 2 * length, 0) == content
    os.pwrite(fd, b"x", 0)
    assert adopt(library, fd) == (-errno.EPROTO, b"the file is not a region")
    os.close(fd)


def test_a_region_that_is_adopted(library: ctypes.CDLL) -> None:
    """By its path alone; one for another path is refused, and a file without bytes is none yet."""
    fd = os.memfd_create("region")
    assert adopt(library, fd)[0] == -errno.ENOENT
    Region(library, fd, IDENTITY, SLOTS).unmap()
    assert adopt(library, fd) == (0, b"")
    assert adopt(library, fd, path_hash=9) == (-errno.EINVAL, b"the region belongs to another backing file")
    with pytest.raises(OSError, match="another backing file"):
        Region(library, fd, Identity(DEVICE_PAGES * PAGE, 7, 9), SLOTS)
    os.close(fd)


@pytest.mark.parametrize(("slots", "device_bytes"), [(2**28 + 1, DEVICE_PAGES * PAGE), (SLOTS, 2**48 + PAGE)])
def test_a_region_that_would_be_too_large(library: ctypes.CDLL, slots: int, device_bytes: int) -> None:
    """EFBIG, and nothing is made."""
    fd = os.memfd_create("region")
    with pytest.raises(OSError, match="at most") as caught:
        Region(library, fd, Identity(device_bytes, 7, 8), slots)
    assert caught.value.errno == errno.EFBIG
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_slots_that_are_damaged(library: ctypes.CDLL) -> None:
    """A slot for a page that the device does not have, and a second one for a page: dropped, the others stay."""
    fd = os.memfd_create("region")
    region = Region(library, fd, IDENTITY, SLOTS)
    cache = Cache(region)
    pages = [random.Random(n).randbytes(PAGE) for n in range(4)]
    for n in range(4):
        assert cache.write(n, pages[n])
    table = region.struct.slots - region.struct.header
    cache.destroy()
    region.unmap()
    words = [int.from_bytes(os.pread(fd, 8, table + 8 * slot), sys.byteorder) for slot in range(SLOTS)]
    one_page = abs(words[1] - words[0])
    for slot, word in ((2, words[0]), (3, words[0] + DEVICE_PAGES * one_page)):
        os.pwrite(fd, word.to_bytes(8, sys.byteorder), table + 8 * slot)
    region = Region(library, fd, IDENTITY, SLOTS)
    cache = Cache(region)
    cache.check(DEVICE_PAGES)
    assert cache.unstable_count() == 2
    found = {page: cache.read(page) for page in range(DEVICE_PAGES)}
    assert {page for page, (status, _) in found.items() if status == HIT} == {0, 1}
    assert all(found[page][1] in pages for page in (0, 1))
    cache.destroy()
    region.unmap()
    os.close(fd)


@pytest.mark.parametrize("length", [0, 1, 502, 503, 504, 2000])
def test_a_line_is_a_line(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str], length: int) -> None:
    """However long: one write, cut off where it is too long, with one line end."""
    library.log_line(b"%s %d", b"x" * length, ctypes.c_int(7))
    said = capfd.readouterr().err
    whole = f"nbdnfs: {'x' * length} 7"
    assert said == f"{whole[:510]}\n"


@given(us=st.integers(0, 2**64 - 1) | st.integers(0, 64).map(lambda bits: (1 << bits) - 1))
def test_histograms(library: ctypes.CDLL, us: int) -> None:
    """Bucket n counts what took less than 2^n microseconds, and the last one everything else."""
    buckets = (ctypes.c_uint64 * shared_region.HISTOGRAM_BUCKETS)()
    library.count_duration(buckets, us)
    counted = min(us.bit_length(), shared_region.HISTOGRAM_BUCKETS - 1)
    assert list(buckets) == [int(bucket == counted) for bucket in range(shared_region.HISTOGRAM_BUCKETS)]


@pytest.mark.parametrize(("version", "wish"), [*itertools.permutations((PLAIN, XCHACHA20, AES), 2)])
def test_region_keeps_its_version(library: ctypes.CDLL, version: int, wish: int) -> None:
    """The next worker reads what is on the server as the first one wrote it, whatever it would do itself: a region of
    an earlier version stays plain, and one with keys keeps them, and its cipher."""
    fd, encrypted, page = os.memfd_create("region"), version != PLAIN, os.urandom(PAGE)
    first = Region(library, fd, IDENTITY, SLOTS, version=version)
    made = os.pread(fd, PAGE, 0)
    sent = first.seal(1, 7, page)
    assert (sent != page) is encrypted
    first.unmap()
    second = Region(library, fd, IDENTITY, SLOTS, version=wish)
    found = os.pread(fd, PAGE, 0)
    assert found[:48] == made[:48]
    assert found[KEYS_OFFSET : KEYS_OFFSET + 72] == made[KEYS_OFFSET : KEYS_OFFSET + 72]
    assert bool(second.struct.cipher) is bool(second.struct.wide_entries) is encrypted
    assert second.seal(1, 7, page) == sent
    assert any(made[KEYS_OFFSET : KEYS_OFFSET + 72]) is encrypted
    second.unmap()
    os.close(fd)


def test_region_is_for_its_user_alone(library: ctypes.CDLL) -> None:
    """Mode 0600, and no process can truncate it under a worker."""
    fd = shared_region.create()
    Region(library, fd, IDENTITY, SLOTS).unmap()
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    for size in (PAGE, 1 << 30):
        with pytest.raises(PermissionError):
            os.truncate(fd, size)
    os.close(fd)


def test_region_has_one_user(library: ctypes.CDLL) -> None:
    """A second worker is refused while the first lives."""
    fd = os.memfd_create("region")
    first = Region(library, fd, IDENTITY, SLOTS)
    with pytest.raises(OSError, match="in use"):
        Region(library, fd, IDENTITY, SLOTS)
    first.unmap()
    Region(library, fd, IDENTITY, SLOTS).unmap()
    os.close(fd)


def test_full_of_dirty_pages(library: ctypes.CDLL) -> None:
    """Without a clean slot a write is refused and changes nothing; one run later it is taken."""
    region = Region(library, os.memfd_create("region"), IDENTITY, SLOTS)
    cache = Cache(region)
    pages = [random.Random(n).randbytes(PAGE) for n in range(SLOTS + 1)]
    for n in range(SLOTS):
        assert cache.write(n, pages[n])
    assert not cache.write(SLOTS, pages[SLOTS])
    assert cache.read(SLOTS)[0] == MISS
    run = cache.take_run(2)
    assert run is not None
    assert list(run.pages.values()) == pages[:2]
    cache.run_stable(run)
    assert cache.write(SLOTS, pages[SLOTS])
    assert cache.read(SLOTS) == (HIT, pages[SLOTS])


@pytest.mark.parametrize(
    ("steps", "displaced"),
    [
        ("stable", {0, 1}),
        ("stable read3 read1", {1, 3}),
        ("read2 stable", {2, 0}),
        ("stable read0 write0 stable", {1, 2}),
    ],
)
def test_what_was_read_gives_way_first(library: ctypes.CDLL, steps: str, displaced: set[int]) -> None:
    """The client has it in memory: two more pages displace what was read since it was written, and then the oldest."""
    fd = os.memfd_create("region")
    region = Region(library, fd, IDENTITY, SLOTS)
    cache = Cache(region)

    def write(page: int) -> None:
        assert cache.write(page, os.urandom(PAGE))

    def make_stable() -> None:
        while (run := cache.take_run(SLOTS)) is not None:
            cache.run_stable(run)

    for page in range(SLOTS):
        write(page)
    for step in steps.split():
        if step == "stable":
            make_stable()
        else:
            {"read": cache.read, "write": write}[step[:-1]](int(step[-1]))
    for page in (SLOTS, SLOTS + 1):
        write(page)
        make_stable()
    assert {page for page in range(SLOTS + 2) if cache.read(page)[0] == MISS} == displaced
    cache.destroy()
    region.unmap()
    os.close(fd)


def test_a_slot_forgets_that_it_was_read(library: ctypes.CDLL) -> None:
    """What is read ahead into the slot of a page that was read is not the next to give way."""
    fd = os.memfd_create("region")
    region = Region(library, fd, IDENTITY, SLOTS)
    cache = Cache(region)
    ahead = os.urandom(PAGE)
    for page in (SLOTS + 2, *range(SLOTS)):
        assert cache.write(page, ahead if page == SLOTS + 2 else os.urandom(PAGE))
        run = cache.take_run(SLOTS)
        assert run is not None
        cache.run_stable(run)
    cache.read(0)
    assert cache.fetch_begin(SLOTS + 2, 1, 1) == 1
    cache.fetch_done(SLOTS + 2, [ahead], 1)
    for page in (SLOTS, SLOTS + 1):
        assert cache.write(page, os.urandom(PAGE))
    assert cache.read(SLOTS + 2) == (HIT, ahead)
    assert [cache.read(page)[0] for page in range(3)] == [MISS, MISS, MISS]
    cache.destroy()
    region.unmap()
    os.close(fd)


def test_more_holds_than_are_remembered(library: ctypes.CDLL) -> None:
    """Beyond those nothing travels at all until the last of them ends: too much is held, never too little."""
    fd = os.memfd_create("region")
    region = Region(library, fd, Identity(100 * PAGE, 7, 8), SLOTS)
    cache = Cache(region)
    for number in range(40):
        cache.hold(number, 1, 10 + number)
    cache.write(90, os.urandom(PAGE))
    assert cache.take_run(1) is None
    assert cache.end_holds(48)
    assert cache.take_run(1) is None
    assert not cache.end_holds(49)
    run = cache.take_run(1)
    assert run is not None
    assert list(run.pages) == [90]
    cache.destroy()
    region.unmap()
    os.close(fd)
