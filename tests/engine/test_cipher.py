# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cipher of pages against published vectors, and against an implementation that has nothing of libsodium."""

from __future__ import annotations

import ctypes
import random
import sys

import pytest
from cipher_reference import chacha20_block, hchacha20, siphash24, xchacha20_xor
from core_library import PAGE, CipherKeys, build


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The parts without I/O, with the cipher initialised."""
    return build(tmp_path_factory.mktemp("core"))


def keys_of(seed: int) -> CipherKeys:
    draw = random.Random(seed)
    return CipherKeys.from_buffer_copy(draw.randbytes(16) + draw.randbytes(32) + bytes(16))


def tag_of(library: ctypes.CDLL, keys: CipherKeys, data: bytes) -> int:
    return int(library.cipher_tag(ctypes.byref(keys), data, len(data)))


def applied(library: ctypes.CDLL, keys: CipherKeys, page: int, tag: int, data: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(data, len(data))
    library.cipher_apply(ctypes.byref(keys), page, tag, buffer, len(data))
    return buffer.raw


def test_the_reference_has_the_published_values() -> None:
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


def test_tag_of_the_published_input(library: ctypes.CDLL) -> None:
    """SipHash's paper again, now libsodium's."""
    counting = bytes(range(16))
    keys = CipherKeys.from_buffer_copy(counting + bytes(48))
    assert tag_of(library, keys, counting[:15]) == int.from_bytes(
        (0xA129CA6149BE45E5).to_bytes(8, "little"), sys.byteorder
    )


@pytest.mark.parametrize("seed", range(5))
def test_pages_agree_with_the_reference(library: ctypes.CDLL, seed: int) -> None:
    """Tag and ciphertext of random pages, at page numbers up to the largest; decrypted, they are as they were."""
    keys, draw = keys_of(seed), random.Random(seed + 100)
    data = draw.randbytes(PAGE)
    page = (0, 1, 2**32, 2**36 - 1, draw.randrange(2**36))[seed]
    tag = tag_of(library, keys, data)
    assert tag == int.from_bytes(siphash24(bytes(keys.tag), data).to_bytes(8, "little"), sys.byteorder)
    encrypted = applied(library, keys, page, tag, data)
    nonce = page.to_bytes(8, sys.byteorder) + tag.to_bytes(8, sys.byteorder) + bytes(8)
    assert encrypted == xchacha20_xor(bytes(keys.stream), nonce, data)
    assert applied(library, keys, page, tag, encrypted) == data


def test_what_changes_the_ciphertext(library: ctypes.CDLL) -> None:
    """The page number, one bit of the page, either key: about half of all bits differ each time."""
    data = random.Random(1).randbytes(PAGE)
    changed = bytes([data[0] ^ 1]) + data[1:]

    def encrypted(keys: CipherKeys, page: int, data: bytes) -> int:
        return int.from_bytes(applied(library, keys, page, tag_of(library, keys, data), data), "little")

    keys, other_stream, other_tag = keys_of(1), keys_of(1), keys_of(1)
    other_stream.stream[31] ^= 0x80
    other_tag.tag[0] ^= 1
    found = [
        encrypted(keys, 7, data),
        encrypted(keys, 8, data),
        encrypted(keys, 7, changed),
        encrypted(other_stream, 7, data),
        encrypted(other_tag, 7, data),
    ]
    for number, one in enumerate(found):
        for other in found[:number]:
            assert 0.45 < (one ^ other).bit_count() / (8 * PAGE) < 0.55


def test_keys_are_random(library: ctypes.CDLL) -> None:
    """Two are different in both parts, and neither is zero."""
    made = [CipherKeys(), CipherKeys()]
    for keys in made:
        assert library.cipher_make_keys(ctypes.byref(keys)) == 0
    assert len({bytes(keys.tag) for keys in made} | {bytes(16)}) == 3
    assert len({bytes(keys.stream) for keys in made} | {bytes(32)}) == 3
    assert {bytes(keys.reserved) for keys in made} == {bytes(16)}
