# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine's parts without I/O (region, cache, crc32c, cipher, log) as a shared library, called through ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_int,
    c_size_t,
    c_uint,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "nbdnfs" / "engine"
REFERENCE = Path(__file__).with_name("cache_reference.c")
BASE = [SOURCES / "base/crc32c.c", SOURCES / "base/cipher.c", SOURCES / "base/log.c"]
PAGE = 4096
HIT, MISS, WAIT = 0, 1, 2
PLAIN, XCHACHA20, AES = 2, 3, 4
STORED, FILLED, FULL = 0, 1, 2
MATERIALISED, MORE, NO_SLOT = 0, 1, 2


class Identity(Structure):
    """struct region_identity"""

    _fields_ = (("device_bytes", c_uint64), ("fileid", c_uint64), ("path_hash", c_uint64))


class CipherKeys(Structure):
    """struct cipher_keys"""

    _fields_ = (("tag", c_uint8 * 16), ("stream", c_uint8 * 32), ("reserved", c_uint8 * 16))


class RegionStruct(Structure):
    """struct region"""

    _fields_ = (
        ("fd", c_int),
        ("bytes", c_size_t),
        ("header", c_void_p),
        ("slots", c_void_p),
        ("narrow_entries", c_void_p),
        ("wide_entries", c_void_p),
        ("filled", c_void_p),
        ("data", c_void_p),
        ("slot_count", c_uint32),
        ("page_count", c_uint64),
        ("clear_pages", c_uint64),
        ("cipher", c_void_p),
    )


class RegionPlan(Structure):
    """struct region_plan"""

    _fields_ = (("slot_count", c_uint32), ("version", c_int), ("clear_bytes", c_uint64))


class RunStruct(Structure):
    """struct page_run"""

    _fields_ = (
        ("first_page", c_uint64),
        ("count", c_uint32),
        ("is_overtaken", c_bool),
        ("slots", c_uint32 * 32),
        ("proofs", c_uint64 * 32),
    )


class PageSetStruct(Structure):
    """struct page_set"""

    _fields_ = (("limit", c_uint64), ("level_count", c_uint), ("levels", c_void_p * 6), ("words", c_void_p))


def build(directory: Path) -> ctypes.CDLL:
    """Compile the library into `directory`, declare its functions, and initialise the cipher."""
    path = directory / "libcore.so"
    command = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fPIC", "-shared", "-pthread"]
    command += os.environ.get("NBDNFS_TEST_CFLAGS", "").split()  # simulator/coverage.py
    sources = [*sorted((SOURCES / "region").glob("*.c")), *BASE, REFERENCE]
    subprocess.run([*command, f"-I{SOURCES}", "-o", str(path), *map(str, sources), "-lsodium", "-lnettle"], check=True)
    library = ctypes.CDLL(str(path))
    signatures = {
        "crc32c": (c_uint32, c_char_p, c_size_t),
        "crc32c_by_table": (c_uint32, c_char_p, c_size_t),
        "cipher_init": (c_int, c_int),
        "cipher_best": (c_int,),
        "cipher_begin": (c_void_p, c_int, POINTER(CipherKeys)),
        "cipher_end": (None, c_void_p),
        "cipher_make_keys": (c_int, POINTER(CipherKeys)),
        "cipher_tag": (c_uint64, c_void_p, c_char_p),
        "cipher_apply": (None, c_void_p, c_uint64, c_uint64, c_char_p),
        "region_map": (c_int, POINTER(RegionStruct), c_int, POINTER(Identity), POINTER(RegionPlan), c_char_p, c_size_t),
        "region_adopt": (c_int, POINTER(RegionStruct), c_int, c_uint64, c_char_p, c_size_t),
        "region_unmap": (None, POINTER(RegionStruct)),
        "count_duration": (None, POINTER(c_uint64), c_uint64),
        "proof_of": (c_uint64, POINTER(RegionStruct), c_char_p),
        "proof_seal": (None, POINTER(RegionStruct), c_uint64, c_uint64, c_char_p),
        "proof_open": (c_bool, POINTER(RegionStruct), c_uint64, c_uint64, c_char_p),
        "cache_create": (c_void_p, POINTER(RegionStruct)),
        "cache_destroy": (None, c_void_p),
        "cache_read": (c_int, c_void_p, c_uint64, c_char_p),
        "cache_write": (c_int, c_void_p, c_uint64, c_char_p, c_uint64, c_bool),
        "cache_trim": (None, c_void_p, c_uint64),
        "cache_sequence": (c_uint64, c_void_p),
        "cache_is_stable": (c_bool, c_void_p, c_uint64),
        "cache_page_is_stable": (c_bool, c_void_p, c_uint64, c_uint64),
        "cache_materialise": (c_int, c_void_p, POINTER(c_uint64), c_uint32),
        "cache_proof": (c_uint64, c_void_p, c_uint64),
        "cache_take_page_run": (c_bool, c_void_p, c_uint32, POINTER(RunStruct), c_char_p),
        "cache_next_page_run": (c_uint32, c_void_p, c_uint32),
        "cache_page_run_stable": (None, c_void_p, POINTER(RunStruct)),
        "cache_page_run_uncommitted": (None, c_void_p, POINTER(RunStruct), c_uint64),
        "cache_page_run_failed": (None, c_void_p, POINTER(RunStruct)),
        "cache_commit_begin": (c_uint32, c_void_p),
        "cache_commit_done": (c_uint32, c_void_p, c_uint64),
        "cache_commit_failed": (None, c_void_p),
        "cache_dirty_count": (c_uint32, c_void_p),
        "cache_hold": (None, c_void_p, c_uint64, c_uint64, c_uint64),
        "cache_end_holds": (c_bool, c_void_p, c_uint64),
        "cache_known_page": (c_bool, c_void_p, c_uint64, POINTER(c_uint64), POINTER(c_uint64)),
        "cache_uncommitted_count": (c_uint32, c_void_p),
        "cache_unstable_count": (c_uint32, c_void_p),
        "page_set_init": (c_bool, POINTER(PageSetStruct), c_uint64),
        "page_set_deinit": (None, POINTER(PageSetStruct)),
        "page_set_put": (None, POINTER(PageSetStruct), c_uint64, c_bool),
        "page_set_next": (c_bool, POINTER(PageSetStruct), c_uint64, POINTER(c_uint64)),
        "cache_take_changed": (c_bool, c_void_p),
        "cache_oldest_dirty": (c_uint64, c_void_p),
        "reference_is_stable": (c_bool, c_void_p, c_uint64),
        "reference_is_takable": (c_bool, c_void_p, c_uint64),
        "reference_known_page": (c_bool, c_void_p, c_uint64, POINTER(c_uint64)),
        "reference_filled_page": (c_uint64, c_void_p, c_uint64),
        "reference_has_room": (c_bool, c_void_p),
        "reference_agrees": (c_bool, c_void_p),
        "cache_fetch_begin": (c_uint32, c_void_p, c_uint64, c_uint32, c_uint64, POINTER(c_uint64)),
        "cache_fetch_done": (None, c_void_p, c_uint64, c_uint32, c_uint64, c_char_p, POINTER(c_bool)),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    assert library.cipher_init(0) == library.cipher_init(1) == 0
    return library


class Region:
    """A mapped region; `fd` is the caller's memfd."""

    def __init__(
        self, library: ctypes.CDLL, fd: int, identity: Identity, slot_count: int, *, version: int = PLAIN
    ) -> None:
        self.library = library
        self.struct = RegionStruct()
        plan = RegionPlan(slot_count, version, PAGE)
        message = ctypes.create_string_buffer(256)
        status = library.region_map(byref(self.struct), fd, byref(identity), byref(plan), message, len(message))
        if status != 0:
            raise OSError(-status, message.value.decode() or os.strerror(-status))

    def unmap(self) -> None:
        """Let go of it, as a process does that ends."""
        self.library.region_unmap(byref(self.struct))

    def seal(self, page: int, proof: int, data: bytes) -> bytes:
        """A page as it goes to the server."""
        buffer = ctypes.create_string_buffer(data, PAGE)
        self.library.proof_seal(byref(self.struct), page, proof, buffer)
        return buffer.raw


class Run:
    """Pages on their way to the NAS, as it gets them."""

    def __init__(self, region: Region, struct: RunStruct, data: bytes) -> None:
        self.struct = struct
        self.first = struct.first_page
        self.pages = {
            self.first + i: region.seal(self.first + i, struct.proofs[i], data[i * PAGE : (i + 1) * PAGE])
            for i in range(struct.count)
        }


class Cache:
    """The functions of cache.h on one region."""

    def __init__(self, region: Region) -> None:
        self.library = region.library
        self.region = region
        self.fetch_proofs: dict[int, ctypes.Array[c_uint64]] = {}
        self.pointer = self.library.cache_create(byref(region.struct))
        assert self.pointer

    def destroy(self) -> None:
        """Forget all that is not in the region."""
        self.library.cache_destroy(self.pointer)

    def proof(self, data: bytes) -> int:
        """Of a page as it is written to the device."""
        return int(self.library.proof_of(byref(self.region.struct), data))

    def open_page(self, page: int, proof: int, data: bytes) -> bytes | None:
        """A page as the server has it becomes what was written; None where it does not agree with its proof."""
        buffer = ctypes.create_string_buffer(data, PAGE)
        is_right = self.library.proof_open(byref(self.region.struct), page, proof, buffer)
        return buffer.raw if is_right else None

    def read(self, page: int) -> tuple[int, bytes]:
        """HIT and the bytes, MISS, or WAIT."""
        buffer = ctypes.create_string_buffer(PAGE)
        return self.library.cache_read(self.pointer, page, buffer), buffer.raw

    def write(self, page: int, data: bytes, *, may_fill: bool = True) -> bool:
        """False: no slot."""
        return bool(self.library.cache_write(self.pointer, page, data, self.proof(data), may_fill) != FULL)

    def trim(self, page: int) -> None:
        """Forget the page."""
        self.library.cache_trim(self.pointer, page)

    def sequence(self) -> int:
        """Of the newest write."""
        return int(self.library.cache_sequence(self.pointer))

    def is_stable(self, sequence: int) -> bool:
        """Whether all up to `sequence` is on the NAS."""
        return bool(self.library.cache_is_stable(self.pointer, sequence))

    def materialise(self, most: int = 1 << 31) -> bool:
        """Whether all filled pages, or `most` of them, could be given slots. Each is the next one that is filled."""
        page = c_uint64(0)
        result = self.library.cache_materialise(self.pointer, byref(page), most)
        left = self.library.reference_filled_page(self.pointer, 0)
        assert result == MATERIALISED or page.value == left
        return bool(result != NO_SLOT)

    def take_changed(self) -> bool:
        """Whether something has happened that a wait may be for."""
        return bool(self.library.cache_take_changed(self.pointer))

    def page_is_stable(self, page: int, sequence: int) -> bool:
        """Whether all writes up to `sequence` to this page are on the NAS."""
        return bool(self.library.cache_page_is_stable(self.pointer, page, sequence))

    def has_room(self) -> bool:
        """Whether a write to a page without a slot would be taken."""
        return bool(self.library.reference_has_room(self.pointer))

    def check(self, page_count: int) -> None:
        """What the cache says quickly is what it would find by looking at every slot and page."""
        library, cache = self.library, self.pointer
        assert library.reference_agrees(cache)
        for sequence in range(self.sequence() + 1):
            assert library.cache_is_stable(cache, sequence) == library.reference_is_stable(cache, sequence)
        assert library.reference_is_takable(cache, library.cache_oldest_dirty(cache))
        for start in range(page_count):
            page, expected = c_uint64(), c_uint64()
            found = library.cache_known_page(cache, start, byref(page), byref(c_uint64()))
            assert found == library.reference_known_page(cache, start, byref(expected))
            assert not found or page.value == expected.value

    def known_proof(self, page: int) -> int:
        """0: unknown."""
        return int(self.library.cache_proof(self.pointer, page))

    def take_run(self, most: int) -> Run | None:
        """The run around the oldest dirty page; what was foretold of it holds."""
        struct, buffer = RunStruct(), ctypes.create_string_buffer(32 * PAGE)
        foretold = self.library.cache_next_page_run(self.pointer, most)
        if not self.library.cache_take_page_run(self.pointer, most, byref(struct), buffer):
            assert foretold == 0
            return None
        assert foretold == struct.count
        return Run(self.region, struct, buffer.raw)

    def hold(self, first: int, count: int, until: int) -> None:
        """None of these pages travels before `until`."""
        self.library.cache_hold(self.pointer, first, count, until)

    def end_holds(self, now: int) -> bool:
        """Whether there are others."""
        return bool(self.library.cache_end_holds(self.pointer, now))

    def known_page(self, start: int) -> tuple[int, int] | None:
        """A page that the NAS has, and its proof."""
        page, proof = c_uint64(), c_uint64()
        found = self.library.cache_known_page(self.pointer, start, byref(page), byref(proof))
        return (page.value, proof.value) if found else None

    def run_stable(self, run: Run) -> None:
        """The NAS has it."""
        self.library.cache_page_run_stable(self.pointer, byref(run.struct))

    def run_uncommitted(self, run: Run, verifier: int) -> None:
        """The NAS may forget it."""
        self.library.cache_page_run_uncommitted(self.pointer, byref(run.struct), verifier)

    def run_failed(self, run: Run) -> None:
        """The NAS may have some of it."""
        self.library.cache_page_run_failed(self.pointer, byref(run.struct))

    def commit_begin(self) -> int:
        """The number of pages it covers."""
        return int(self.library.cache_commit_begin(self.pointer))

    def commit_done(self, verifier: int) -> int:
        """The number of pages that were lost."""
        return int(self.library.cache_commit_done(self.pointer, verifier))

    def commit_failed(self) -> None:
        """No answer."""
        self.library.cache_commit_failed(self.pointer)

    def unstable_count(self) -> int:
        """Pages that the NAS does not have for good."""
        return int(self.library.cache_unstable_count(self.pointer))

    def fetch_begin(self, first: int, count: int, fetch: int) -> int:
        """How many pages it covers."""
        proofs = (c_uint64 * count)()
        self.fetch_proofs[fetch] = proofs
        return int(self.library.cache_fetch_begin(self.pointer, first, count, fetch, proofs))

    def fetch_done(self, first: int, pages: list[bytes], fetch: int) -> None:
        """The NAS's answer."""
        proofs = self.fetch_proofs.pop(fetch)
        opened = [self.open_page(first + i, proofs[i], page) for i, page in enumerate(pages)]
        are_right = (c_bool * len(pages))(*(page is not None for page in opened))
        data = b"".join(page or bytes(PAGE) for page in opened)
        self.library.cache_fetch_done(self.pointer, first, len(pages), fetch, data, are_right)
