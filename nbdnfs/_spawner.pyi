# SPDX-License-Identifier: LGPL-2.1-or-later
def prepare() -> None: ...
def submit(
    program: bytes,
    argv: list[bytes],
    environment: list[bytes],
    moves: list[tuple[int, int]],
    answer: int,
    new_session: bool,
    ordinary_priority: bool,
    /,
) -> None: ...
