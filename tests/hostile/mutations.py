# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a hostile server does to its answers: each mutation takes an RPC message and returns what goes over TCP.

No mutation is a lie that no client can see through: the server does what it was asked, and an answer never claims in a
well-formed way that it did more than that, that the file is shorter, or that an owner record has other bytes.
Everything else may be wrong.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable

from support.fake_nas import NasCall, fragments
from support.nas_procedures import AFTER_FAILURE
from support.sunrpc import LAST_FRAGMENT, record, u32

# The words of a reply: xid, REPLY, MSG_ACCEPTED, the verifier's flavour and length, accept_stat; the results follow.
_XID, _KIND, _REPLY_STAT, _FLAVOUR, _VERIFIER_BYTES, _ACCEPT_STAT, _RESULTS = range(0, 28, 4)
_EXTREMES = (0, 1, 2, 3, 64, 65, 400, 401, 4096, 1 << 16, 1 << 20, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFF0, 0xFFFF_FFFF)
# nfsstat3, and some numbers that are none
_STATUSES = (
    1,
    2,
    5,
    6,
    13,
    20,
    21,
    22,
    27,
    28,
    30,
    66,
    69,
    70,
    10001,
    10002,
    10004,
    10005,
    10006,
    10008,
    3,
    77,
    1 << 31,
)
# In fattr3: the size. An answer that changes it alone is well-formed, and a client must believe it.
_LIES_IN_ATTRIBUTES = (5, 6)
# Where fattr3 begins in the results, in words; for LOOKUP with handles of 32 bytes.
_ATTRIBUTES_AT = {
    "READ": (2,),
    "WRITE": (9,),
    "COMMIT": (9,),
    "GETATTR": (1,),
    "LOOKUP": (11, 33),
    "ACCESS": (2,),
    "FSINFO": (2,),
}
# Where the results have a length, a count or the number of something, in words.
_LENGTHS_AT = {
    "MNT": (1, 10),
    "EXPORT": (0, 1),
    "LOOKUP": (1,),
    "READ": (23, 25),
    "WRITE": (30,),
    "FSINFO": (23, 24, 26, 27),
}
_WORDS_MUTATED = 44
_KEPT = 64


class Mutations:
    """`FakeNas.mutate` takes it. Of all answers, `chance` are mutated. `counts` says which mutations there were.

    Mutations after which a client may wait for an answer until its patience ends are `silent_chance` of all.
    """

    def __init__(self, draw: random.Random, chance: float, *, silent_chance: float = 0.0) -> None:
        self._draw = draw
        self._chance = chance
        self._silent_chance = silent_chance
        self._earlier: collections.deque[bytes] = collections.deque(maxlen=_KEPT)
        self._silent_kinds: tuple[Callable[[NasCall, bytes], bytes], ...] = (
            self._no_answer,
            self._unknown_xid,
            self._earlier_xid,
            self._wrong_mark,
            self._noise,
        )
        self._kinds: tuple[Callable[[NasCall, bytes], bytes], ...] = (
            self._head_word,
            self._denied,
            self._verifier,
            self._accept_stat,
            self._status,
            self._status_alone,
            self._word,
            self._word,
            self._word,
            self._length,
            self._length,
            self._truncated,
            self._fragmented,
            self._empty_fragments,
            self._longer,
            self._twice,
            self._other_results,
            self._data,
        )
        self.counts: collections.Counter[str] = collections.Counter()

    def __call__(self, call: NasCall, message: bytes) -> bytes | None:
        at = self._draw.random()
        mutated = None
        if at < self._chance + self._silent_chance:
            kind = self._draw.choice(self._kinds if at < self._chance else self._silent_kinds)
            mutated = kind(call, message)
            self.counts[kind.__name__.strip("_").replace("_", " ")] += 1
        self._earlier.append(message)
        return mutated

    def _with_word(self, message: bytes, at: int, value: int) -> bytes:
        return record(message[:at] + u32(value) + message[at + 4 :])

    def _extreme(self) -> int:
        return self._draw.choice((*_EXTREMES, self._draw.getrandbits(32)))

    # Each of these is one mutation.

    def _no_answer(self, call: NasCall, message: bytes) -> bytes:
        return b""

    def _unknown_xid(self, call: NasCall, message: bytes) -> bytes:
        return self._with_word(message, _XID, self._draw.getrandbits(32))

    def _earlier_xid(self, call: NasCall, message: bytes) -> bytes:
        """An answer that was given before, instead of this one."""
        return record(self._draw.choice(self._earlier)) if self._earlier else record(message)

    def _head_word(self, call: NasCall, message: bytes) -> bytes:
        at = self._draw.choice((_KIND, _REPLY_STAT, _FLAVOUR))
        return self._with_word(message, at, self._extreme())

    def _denied(self, call: NasCall, message: bytes) -> bytes:
        """RPC_MISMATCH or AUTH_ERROR."""
        rest = self._draw.choice((u32(0, 2, 2), u32(1, self._draw.randrange(1, 8))))
        return record(message[:_REPLY_STAT] + u32(1) + rest)

    def _verifier(self, call: NasCall, message: bytes) -> bytes:
        """Its length alone, or a verifier of that length, which RPC allows up to 400 bytes."""
        length = self._draw.choice((4, 40, 400, 404, 3, self._extreme()))
        there = self._draw.randbytes(length + -length % 4) if length <= 4096 and self._draw.random() < 0.5 else b""
        return record(message[:_VERIFIER_BYTES] + u32(length) + there + message[_ACCEPT_STAT:])

    def _accept_stat(self, call: NasCall, message: bytes) -> bytes:
        stat = self._draw.choice((1, 2, 3, 4, 5, 6, self._extreme()))
        if self._draw.random() < 0.5:
            return record(message[:_ACCEPT_STAT] + u32(stat) + (u32(2, 4) if stat == 2 else b""))
        return self._with_word(message, _ACCEPT_STAT, stat)

    def _status(self, call: NasCall, message: bytes) -> bytes:
        """A refusal as RFC 1813 has it."""
        return record(message[:_RESULTS] + u32(self._draw.choice(_STATUSES)) + AFTER_FAILURE.get(call.op, b""))

    def _status_alone(self, call: NasCall, message: bytes) -> bytes:
        """A refusal that is followed by the results of a success."""
        return self._with_word(message, _RESULTS, self._draw.choice(_STATUSES))

    def _word(self, call: NasCall, message: bytes) -> bytes:
        """A word of the results: a count, a length, a flag, an attribute, a handle, a verifier."""
        words = min(_WORDS_MUTATED, (len(message) - _RESULTS) // 4)
        forbidden = {at + lie for at in _ATTRIBUTES_AT.get(call.op, ()) for lie in _LIES_IN_ATTRIBUTES}
        if call.op == "READ":
            words = min(words, 26)  # the data begins there
            forbidden.add(0)  # the status
        if call.op in ("WRITE", "COMMIT"):
            forbidden |= {2, 3}  # the size before
        allowed = [word for word in range(words) if word not in forbidden]
        if not allowed:
            return record(message)
        word = self._draw.choice(allowed)
        value = self._extreme()
        if call.op == "WRITE" and word == 31 and value in (1, 2):
            value = 3  # it is not as stable as that
        return self._with_word(message, _RESULTS + 4 * word, value)

    def _length(self, call: NasCall, message: bytes) -> bytes:
        """The length or the count of something in the results."""
        at = _RESULTS + 4 * self._draw.choice(_LENGTHS_AT.get(call.op, (0,)))
        return self._with_word(message, at, self._extreme()) if at + 4 <= len(message) else record(message)

    def _truncated(self, call: NasCall, message: bytes) -> bytes:
        return record(message[: self._draw.randrange(len(message))])

    def _wrong_mark(self, call: NasCall, message: bytes) -> bytes:
        """The record mark names another length."""
        length = self._draw.choice((len(message) + 4, len(message) - 4, 0, self._extreme() & ~LAST_FRAGMENT))
        return u32(self._draw.choice((0, LAST_FRAGMENT)) | length) + message

    def _fragmented(self, call: NasCall, message: bytes) -> bytes:
        return fragments(message, self._draw)

    def _empty_fragments(self, call: NasCall, message: bytes) -> bytes:
        at = self._draw.randrange(len(message))
        empty = bytes(4 * self._draw.choice((1, 2, 50)))
        return empty + u32(at) + message[:at] + empty + record(message[at:])

    def _longer(self, call: NasCall, message: bytes) -> bytes:
        return record(message + self._draw.randbytes(self._draw.choice((4, 8, 100, 4096))))

    def _twice(self, call: NasCall, message: bytes) -> bytes:
        return record(message) * 2

    def _other_results(self, call: NasCall, message: bytes) -> bytes:
        """The results of an earlier answer, to whatever it was."""
        results = self._draw.choice(self._earlier)[_RESULTS:] if self._earlier else b""
        return record(message[:_RESULTS] + results)

    def _noise(self, call: NasCall, message: bytes) -> bytes:
        noise = self._draw.randbytes(self._draw.choice((4, 24, 400, 5000)))
        return self._draw.choice((record(message[:_KIND] + noise), record(message[:_RESULTS] + noise), noise))

    def _data(self, call: NasCall, message: bytes) -> bytes:
        """A bit of the data of a READ; the pages of the device have checksums, owner records have none."""
        if call.op != "READ" or call.count % 4096 != 0 or len(message) < 1024:
            return record(message)
        at = self._draw.randrange(len(message) - 512, len(message))
        return record(message[:at] + bytes([message[at] ^ 1 << self._draw.randrange(8)]) + message[at + 1 :])
