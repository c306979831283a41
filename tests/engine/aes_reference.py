# SPDX-License-Identifier: LGPL-2.1-or-later
"""AES in counter mode and UMAC-64 in plain Python, from their standards: what the engine's cipher is compared with.

AES: FIPS 197. Counter mode: NIST SP 800-38A. UMAC: RFC 4418, for messages of at most 16 MiB in whole bytes.
"""

from __future__ import annotations

import struct
from functools import cache

_64 = 2**64 - 1
# UMAC makes a tag of so many parts of 32 bits.
_PARTS = 2
_PRIME_36, _PRIME_64 = 2**36 - 5, 2**64 - 59


def _doubled(byte: int) -> int:
    return (byte << 1 ^ (0x11B if byte & 0x80 else 0)) & 0xFF


def _product(a: int, b: int) -> int:
    """In the field of 256 elements."""
    result = 0
    while b:
        result ^= a if b & 1 else 0
        a, b = _doubled(a), b >> 1
    return result


def _substitute(byte: int) -> int:
    inverse = next((other for other in range(256) if _product(byte, other) == 1), 0)
    rotated = [(inverse << count | inverse >> 8 - count) & 0xFF for count in range(5)]
    return rotated[0] ^ rotated[1] ^ rotated[2] ^ rotated[3] ^ rotated[4] ^ 0x63


_SBOX = [_substitute(byte) for byte in range(256)]
_TWICE = [_doubled(byte) for byte in range(256)]


@cache
def _round_keys(key: bytes) -> list[bytes]:
    """16 bytes for the beginning and for each round: 10 with a key of 16 bytes, 14 with 32."""
    length = len(key) // 4
    words = [key[at : at + 4] for at in range(0, len(key), 4)]
    constant = 1
    for number in range(length, 4 * (length + 7)):
        word = words[-1]
        if number % length == 0:
            word = bytes(_SBOX[byte] for byte in word[1:] + word[:1])
            word = bytes([word[0] ^ constant]) + word[1:]
            constant = _doubled(constant)
        elif length > 6 and number % length == 4:
            word = bytes(_SBOX[byte] for byte in word)
        words.append(bytes(a ^ b for a, b in zip(word, words[-length], strict=True)))
    return [b"".join(words[at : at + 4]) for at in range(0, len(words), 4)]


def aes_block(key: bytes, block: bytes) -> bytes:
    """16 bytes, encrypted."""
    first, *middle, last = _round_keys(key)
    state = [a ^ b for a, b in zip(block, first, strict=True)]
    for round_key in (*middle, last):
        state = [_SBOX[state[(at + 4 * (at % 4)) % 16]] for at in range(16)]
        if round_key is not last:
            for at in range(0, 16, 4):
                column = state[at : at + 4]
                whole = column[0] ^ column[1] ^ column[2] ^ column[3]
                state[at : at + 4] = [column[i] ^ whole ^ _TWICE[column[i] ^ column[(i + 1) % 4]] for i in range(4)]
        state = [a ^ b for a, b in zip(state, round_key, strict=True)]
    return bytes(state)


def aes_ctr(key: bytes, counter: bytes, data: bytes) -> bytes:
    """`data` with the key stream that begins at `counter`, 16 bytes that are counted up as a big-endian number."""
    number = int.from_bytes(counter, "big")
    blocks = range((len(data) + 15) // 16)
    stream = b"".join(aes_block(key, ((number + i) % 2**128).to_bytes(16, "big")) for i in blocks)
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))


def _derived(key: bytes, index: int, length: int) -> bytes:
    """RFC 4418, 3.2.1."""
    blocks = range(1, (length + 15) // 16 + 1)
    return b"".join(aes_block(key, struct.pack(">QQ", index, i)) for i in blocks)[:length]


def _nh(words: tuple[int, ...], message: bytes) -> int:
    """5.2.2, and the length of the message in bits."""
    padded = message + bytes(-len(message) % 32 if message else 32)
    total = 0
    for at in range(0, len(padded), 32):
        m, k = struct.unpack_from("<8I", padded, at), words[at // 4 : at // 4 + 8]
        for i in range(4):
            total += (m[i] + k[i] & 0xFFFFFFFF) * (m[i + 4] + k[i + 4] & 0xFFFFFFFF)
    return (total + 8 * len(message)) & _64


def _poly_64(key: int, hashed: list[int]) -> int:
    """5.3.2, over 64 bits: words from 2**64 - 2**32 on are marked."""
    y = 1
    for word in hashed:
        if word >= 2**64 - 2**32:
            y = (key * y + _PRIME_64 - 1) % _PRIME_64
            word -= 59
        y = (key * y + word) % _PRIME_64
    return y


def umac_64(key: bytes, nonce: bytes, message: bytes) -> bytes:
    """The tag, 8 bytes; `nonce` has 1 to 16 bytes."""
    first = struct.unpack(f">{256 + 4 * (_PARTS - 1)}I", _derived(key, 1, 1024 + 16 * (_PARTS - 1)))
    second = _derived(key, 2, 24 * _PARTS)
    third = struct.unpack(f">{8 * _PARTS}Q", _derived(key, 3, 64 * _PARTS))
    fourth = struct.unpack(f">{_PARTS}I", _derived(key, 4, 4 * _PARTS))
    pieces = [message[at : at + 1024] for at in range(0, len(message), 1024)] or [b""]
    parts = []
    for part in range(_PARTS):
        hashed = [_nh(first[4 * part : 4 * part + 256], piece) for piece in pieces]
        if len(message) <= 1024:
            whole = hashed[0]
        else:
            mask = 0x01FFFFFF01FFFFFF
            whole = _poly_64(int.from_bytes(second[24 * part : 24 * part + 8], "big") & mask, hashed)
        words = struct.unpack(">8H", whole.to_bytes(16, "big"))
        keys = [word % _PRIME_36 for word in third[8 * part : 8 * part + 8]]
        total = sum(word * one for word, one in zip(words, keys, strict=True)) % _PRIME_36
        parts.append(total % 2**32 ^ fourth[part])
    low = nonce[-1] & 1
    padded = (nonce[:-1] + bytes([nonce[-1] - low])).ljust(16, b"\0")
    pad = aes_block(_derived(key, 0, 16), padded)[8 * low : 8 * low + 8]
    return bytes(a ^ b for a, b in zip(struct.pack(">2I", *parts), pad, strict=True))
