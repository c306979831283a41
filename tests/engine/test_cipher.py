# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ciphers of pages against implementations that have nothing of libsodium and nettle, and these against published
vectors."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from aes_reference import aes_block, aes_ctr, umac_64
from cipher_reference import chacha20_block, hchacha20, siphash24, xchacha20_xor
from core_library import PAGE, CipherKeys, build

KINDS = XCHACHA20, AES = range(2)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The parts without I/O, with the ciphers initialised."""
    return build(tmp_path_factory.mktemp("core"))


def keys_of(seed: int) -> CipherKeys:
    draw = random.Random(seed)
    return CipherKeys.from_buffer_copy(draw.randbytes(16) + draw.randbytes(32) + bytes(16))


class Cipher:
    """A cipher of a kind with these keys."""

    def __init__(self, library: ctypes.CDLL, kind: int, keys: CipherKeys) -> None:
        self._library = library
        self._keys = keys  # must stay
        self._pointer = library.cipher_begin(kind, ctypes.byref(keys))
        assert self._pointer
        weakref.finalize(self, library.cipher_end, self._pointer)

    def tag(self, data: bytes) -> int:
        """Of a page."""
        assert len(data) == PAGE
        return int(self._library.cipher_tag(self._pointer, data))

    def applied(self, page: int, tag: int, data: bytes) -> bytes:
        """Encrypted, or decrypted."""
        buffer = ctypes.create_string_buffer(data, PAGE)
        self._library.cipher_apply(self._pointer, page, tag, buffer)
        return buffer.raw


def native(number: bytes) -> int:
    return int.from_bytes(number, sys.byteorder)


def test_the_reference_of_xchacha20() -> None:
    """SipHash's paper, appendix A; RFC 8439, 2.3.2; draft-irtf-cfrg-xchacha-03, 2.2.1."""
    counting = bytes(range(32))
    assert siphash24(counting[:16], counting[:15]) == 0xA129CA6149BE45E5
    rest = bytes.fromhex("01000000 000000090000004a00000000")
    assert chacha20_block(counting, rest).hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    nonce = bytes.fromhex("000000090000004a0000000031415927")
    assert hchacha20(counting, nonce).hex() == "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"


def test_the_reference_of_aes() -> None:
    """FIPS 197, C.1 and C.3; NIST SP 800-38A, F.5.5."""
    counting, block = bytes(range(32)), bytes.fromhex("00112233445566778899aabbccddeeff")
    assert aes_block(counting[:16], block).hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"
    assert aes_block(counting, block).hex() == "8ea2b7ca516745bfeafc49904b496089"
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    data = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    assert aes_ctr(key, counter, data).hex() == "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"


@pytest.mark.parametrize(
    ("message", "tag"),
    [
        (b"", "6e155fad26900be1"),
        (b"aaa", "44b5cb542f220104"),
        (b"a" * 2**10, "26bf2f5d60118bd9"),
        (b"a" * 2**15, "27f8ef643b0d118d"),
        (b"abc", "d4d7b9f6bd4fbfcf"),
        (b"abc" * 500, "d4cf26ddefd5c01a"),
    ],
)
def test_the_reference_of_umac(message: bytes, tag: str) -> None:
    """RFC 4418, the appendix with test vectors."""
    assert umac_64(b"abcdefghijklmnop", b"bcdefghi", message).hex() == tag


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_pages_agree_with_the_reference(library: ctypes.CDLL, kind: int, seed: int) -> None:
    """Tag and ciphertext of random pages, at page numbers up to the largest; decrypted, they are as they were."""
    keys, draw = keys_of(seed), random.Random(seed + 100)
    cipher, data = Cipher(library, kind, keys), draw.randbytes(PAGE)
    page = (0, 1, 2**32, 2**36 - 1, draw.randrange(2**36))[seed]
    tag = cipher.tag(data)
    encrypted = cipher.applied(page, tag, data)
    tag_bytes = tag.to_bytes(8, sys.byteorder)
    if kind == AES:
        assert tag == native(umac_64(bytes(keys.tag), bytes(16), data))
        assert encrypted == aes_ctr(bytes(keys.stream), tag_bytes + struct.pack(">Q", page << 8), data)
    else:
        assert tag == native(siphash24(bytes(keys.tag), data).to_bytes(8, "little"))
        nonce = page.to_bytes(8, sys.byteorder) + tag_bytes + bytes(8)
        assert encrypted == xchacha20_xor(bytes(keys.stream), nonce, data)
    assert cipher.applied(page, tag, encrypted) == data
    assert cipher.tag(data) == tag, "a tag leaves nothing behind"


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_the_ciphertext(library: ctypes.CDLL, kind: int) -> None:
    """The page number, one bit of the page, either key, the kind: about half of all bits differ each time."""
    data = random.Random(1).randbytes(PAGE)
    changed = bytes([data[0] ^ 1]) + data[1:]

    def encrypted(keys: CipherKeys, page: int, data: bytes, kind: int = kind) -> int:
        cipher = Cipher(library, kind, keys)
        return int.from_bytes(cipher.applied(page, cipher.tag(data), data), "little")

    keys, other_stream, other_tag = keys_of(1), keys_of(1), keys_of(1)
    other_stream.stream[31] ^= 0x80
    other_tag.tag[0] ^= 1
    found = [
        encrypted(keys, 7, data),
        encrypted(keys, 8, data),
        encrypted(keys, 7, changed),
        encrypted(other_stream, 7, data),
        encrypted(other_tag, 7, data),
        encrypted(keys, 7, data, kind=1 - kind),
    ]
    for number, one in enumerate(found):
        for other in found[:number]:
            assert 0.45 < (one ^ other).bit_count() / (8 * PAGE) < 0.55


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_cipher(library: ctypes.CDLL, kind: int) -> None:
    """Each finds what one alone finds: a tag is of one page, and no thread sees another's."""
    cipher, draw = Cipher(library, kind, keys_of(1)), random.Random(2)
    pages = [draw.randbytes(PAGE) for _ in range(50)]
    expected = [cipher.tag(page) for page in pages]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(cipher.tag, pages * 40)) == expected * 40
        decrypted = pool.map(lambda page: cipher.applied(5, 7, cipher.applied(5, 7, page)), pages)
        assert list(decrypted) == pages


def test_the_best_cipher(library: ctypes.CDLL) -> None:
    """AES where the processor says that it has it."""
    with open("/proc/cpuinfo") as file:
        words = file.read().split()
    assert library.cipher_best() == (AES if "aes" in words and sys.maxsize > 2**32 else XCHACHA20)


def test_keys_are_random(library: ctypes.CDLL) -> None:
    """Two are different in both parts, and neither is zero."""
    made = [CipherKeys(), CipherKeys()]
    for keys in made:
        assert library.cipher_make_keys(ctypes.byref(keys)) == 0
    assert len({bytes(keys.tag) for keys in made} | {bytes(16)}) == 3
    assert len({bytes(keys.stream) for keys in made} | {bytes(32)}) == 3
    assert {bytes(keys.reserved) for keys in made} == {bytes(16)}
