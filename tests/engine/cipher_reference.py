# SPDX-License-Identifier: LGPL-2.1-or-later
"""SipHash-2-4 and XChaCha20 in plain Python, from their papers: what the engine's cipher is compared with.

SipHash: Aumasson, Bernstein, "SipHash: a fast short-input PRF" (2012). ChaCha20: RFC 8439. HChaCha20 and XChaCha20:
draft-irtf-cfrg-xchacha-03. libsodium's XChaCha20 counts its blocks in 64 bits and has an 8-byte nonce left over.
"""

from __future__ import annotations

import struct

_32, _64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def siphash24(key: bytes, data: bytes) -> int:
    """64 bits, as the little-endian number that the paper prints."""
    k0, k1 = struct.unpack("<2Q", key)
    v0, v1, v2, v3 = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573

    def rounds(count: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0, v2 = v0 + v1 & _64, v2 + v3 & _64
            v1, v3 = _rotate(v1, 13, 64) ^ v0, _rotate(v3, 16, 64) ^ v2
            v0 = _rotate(v0, 32, 64)
            v2, v0 = v2 + v1 & _64, v0 + v3 & _64
            v1, v3 = _rotate(v1, 17, 64) ^ v2, _rotate(v3, 21, 64) ^ v0
            v2 = _rotate(v2, 32, 64)

    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 0xFF])
    for (word,) in struct.iter_unpack("<Q", padded):
        v3 ^= word
        rounds(2)
        v0 ^= word
    v2 ^= 0xFF
    rounds(4)
    return v0 ^ v1 ^ v2 ^ v3


def _rotate(word: int, count: int, bits: int) -> int:
    return (word << count | word >> bits - count) & (_64 if bits == 64 else _32)


def _chacha_rounds(state: list[int]) -> list[int]:
    """The twenty rounds, without the addition at their end."""
    s = list(state)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, count in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = s[x] + s[y] & _32
            s[z] = _rotate(s[z] ^ s[x], count, 32)

    for _ in range(10):
        for column in range(4):
            quarter(column, column + 4, column + 8, column + 12)
        for diagonal in range(4):
            quarter(diagonal, 4 + (diagonal + 1) % 4, 8 + (diagonal + 2) % 4, 12 + (diagonal + 3) % 4)
    return s


def _state(key: bytes, rest: bytes) -> list[int]:
    return list(struct.unpack("<16I", b"expand 32-byte k" + key + rest))


def chacha20_block(key: bytes, rest: bytes) -> bytes:
    """64 bytes of key stream; `rest` is counter and nonce, 16 bytes."""
    state = _state(key, rest)
    return struct.pack("<16I", *(a + b & _32 for a, b in zip(state, _chacha_rounds(state), strict=True)))


def hchacha20(key: bytes, nonce: bytes) -> bytes:
    """A key of 32 bytes from a key and 16 bytes of nonce."""
    mixed = _chacha_rounds(_state(key, nonce))
    return struct.pack("<8I", *mixed[:4], *mixed[12:])


def xchacha20_xor(key: bytes, nonce: bytes, data: bytes) -> bytes:
    """`data` with the key stream of 24 bytes of nonce."""
    subkey = hchacha20(key, nonce[:16])
    blocks = range((len(data) + 63) // 64)
    stream = b"".join(chacha20_block(subkey, struct.pack("<Q", number) + nonce[16:]) for number in blocks)
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))
