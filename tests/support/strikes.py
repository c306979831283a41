# SPDX-License-Identifier: LGPL-2.1-or-later
"""The faults of a fault-injection run: each method sets one, and returns its name and the function that ends it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from support.nfs_server import Ganesha
from support.proxy import TcpProxy

MIB = 1 << 20


class Strikes:
    """Faults of one server, of the proxy before it, and of the small file system under its export.

    `strike` sets a random fault and returns its name and the function that ends it; one is in force at a time.
    """

    def __init__(self, server: Ganesha, proxy: TcpProxy, draw: random.Random) -> None:
        self._server = server
        self._proxy = proxy
        self._draw = draw
        self._filler = server.export_path / "filler"

    def strike(self) -> tuple[str, Callable[[], None]]:
        kinds: list[Callable[[], tuple[str, Callable[[], None]]]] = [
            self._delay,
            self._throttle,
            self._cut,
            self._reset,
            self._reset_in_a_reply,
            self._half_close,
            self._silence,
            self._silence,
            self._black_hole,
            self._refuse,
            self._pause,
            self._kill,
            self._kill,
            self._fill_up,
        ]
        return self._draw.choice(kinds)()

    def _delay(self) -> tuple[str, Callable[[], None]]:
        self._proxy.delay_s = self._draw.uniform(0.01, 0.5)
        self._proxy.request_delay_s = self._draw.choice((0.0, 0.1))

        def mend() -> None:
            self._proxy.delay_s = self._proxy.request_delay_s = 0.0

        return "delay", mend

    def _throttle(self) -> tuple[str, Callable[[], None]]:
        self._proxy.throttle(
            requests_bytes_per_s=self._draw.choice((50e3, 500e3)), replies_bytes_per_s=self._draw.choice((50e3, 500e3))
        )
        return "throttle", self._proxy.throttle

    def _cut(self) -> tuple[str, Callable[[], None]]:
        self._proxy.cut()
        return "cut", _nothing

    def _reset(self) -> tuple[str, Callable[[], None]]:
        self._proxy.reset()
        return "reset", _nothing

    def _reset_in_a_reply(self) -> tuple[str, Callable[[], None]]:
        self._proxy.reset_after_reply_bytes(self._draw.randrange(1, 200_000))
        return "reset in a reply", _nothing

    def _half_close(self) -> tuple[str, Callable[[], None]]:
        toward = "client" if self._draw.random() < 0.5 else "server"
        if toward == "client":
            self._proxy.half_close("client")
        else:
            self._proxy.half_close("server")
        return f"half-close toward the {toward}", _nothing

    def _silence(self) -> tuple[str, Callable[[], None]]:
        self._proxy.silence()
        return "silence on old connections", _nothing

    def _black_hole(self) -> tuple[str, Callable[[], None]]:
        self._proxy.black_hole = True
        also = self._draw.choice((None, self._proxy.cut, self._proxy.reset))
        if also is not None:
            also()

        def mend() -> None:
            self._proxy.black_hole = False

        return f"black hole{'' if also is None else ' and ' + also.__name__}", mend

    def _refuse(self) -> tuple[str, Callable[[], None]]:
        self._proxy.refuse = True
        self._proxy.cut()

        def mend() -> None:
            self._proxy.refuse = False

        return "refuse", mend

    def _pause(self) -> tuple[str, Callable[[], None]]:
        self._server.pause()
        also = self._draw.choice((None, self._proxy.reset))
        if also is not None:
            also()
        return f"SIGSTOP{'' if also is None else ' and reset'}", self._server.resume

    def _kill(self) -> tuple[str, Callable[[], None]]:
        how = self._draw.choice(("SIGKILL", "restart"))
        (self._server.kill if how == "SIGKILL" else self._server.stop)()
        return f"{how} of the server", self._server.start

    def _fill_up(self) -> tuple[str, Callable[[], None]]:
        fill(self._filler)
        return "full file system", lambda: self._filler.unlink()


def fill(path: Path) -> None:
    """Take all blocks that the file system has left, with a new file."""
    left = os.statvfs(path.parent)
    piece = left.f_bfree * left.f_frsize
    with path.open("wb") as file:
        end = 0
        while piece >= left.f_frsize:
            try:
                os.posix_fallocate(file.fileno(), end, piece)
                end += piece
            except OSError:
                piece //= 2


def _nothing() -> None:
    pass
