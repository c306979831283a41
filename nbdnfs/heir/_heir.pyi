# SPDX-License-Identifier: LGPL-2.1-or-later
HAS_WORKER: int
HAS_STANDBY: int
END: int

def start(
    descriptors: tuple[int, int, int, int, int],
    backend: bytes,
    request: bytes,
    descriptor_at: int,
    option: bytes,
    command: bytes,
    label: bytes,
    heap: int,
    /,
) -> int: ...
