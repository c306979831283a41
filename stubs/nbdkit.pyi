# SPDX-License-Identifier: LGPL-2.1-or-later
# What nbdkit's Python plugin defines in its own process: nbdkit-python-plugin(3), plugins/python/modfunctions.c.
THREAD_MODEL_SERIALIZE_CONNECTIONS: int
THREAD_MODEL_SERIALIZE_ALL_REQUESTS: int
THREAD_MODEL_SERIALIZE_REQUESTS: int
THREAD_MODEL_PARALLEL: int
FLAG_MAY_TRIM: int
FLAG_FUA: int
FLAG_REQ_ONE: int
FLAG_FAST_ZERO: int
FUA_NONE: int
FUA_EMULATE: int
FUA_NATIVE: int
CACHE_NONE: int
CACHE_EMULATE: int
CACHE_NATIVE: int
EXTENT_HOLE: int
EXTENT_ZERO: int

def debug(message: str, /) -> None: ...
def set_error(errno: int | None, /) -> None: ...
def shutdown() -> None: ...
