# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random reads and writes through a worker's socket, each read compared with what was written there last."""

from __future__ import annotations

import hashlib
import random
import struct
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from support.nbd_client import NbdClient, SharedClient

from nbdnfs.errors import NbdnfsError

PAGE = 4096
EXTENT_PAGES = 32
PATIENCE_S = 300.0


class VerifiedLoad:
    """Threads, each with what `connect` returns, from `start` until `stop`; all use may come from one other thread.

    A thread owns every n-th extent of 32 pages, so that it knows what must be read there, while the runs that travel to
    the server have pages of several. `failures` are texts: a wrong page, an error, a connection that ended.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[NbdClient | SharedClient]],
        device_bytes: int,
        *,
        seed: int,
        threads: int = 6,
    ) -> None:
        self._connect = connect
        self._device_bytes = device_bytes
        self._extents = device_bytes // (EXTENT_PAGES * PAGE)
        self._seed = seed
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number, threads), daemon=True) for number in range(threads)
        ]
        # each entry is touched by the thread that owns its page alone
        self._versions: dict[int, int] = {}
        self._done = [0] * threads
        self._begun_s = [0.0] * threads
        self.longest_s = [0.0] * threads
        self.failures: list[str] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, deadline_s: float) -> None:
        """End after the requests that are under way; one that does not end is a failure."""
        self._stop.set()
        deadline = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.failures.append(f"a request has not ended {deadline_s:g} s after the last fault")

    @property
    def requests(self) -> int:
        """How many have been done."""
        return sum(self._done)

    def content(self, page: int) -> bytes:
        """What the page must have."""
        version = self._versions.get(page, 0)
        if version == 0:
            return bytes(PAGE)
        digest = hashlib.blake2b(f"{self._seed}/{page}/{version}".encode(), digest_size=64).digest()
        if version % 16 == 0:
            return digest[:4] * (PAGE // 4)  # a page of one word, which does not travel before a flush
        return digest * (PAGE // 64)

    def verify(self) -> int:
        """Read all of the device, compare, and return the number of wrong pages."""
        wrong = 0
        with self._connect() as client:
            client.flush()
            for extent in range(self._extents):
                first = extent * EXTENT_PAGES
                wrong += self._wrong_pages(first, client.read(first * PAGE, EXTENT_PAGES * PAGE))
        return wrong

    def verify_file(self, path: Path) -> int:
        """The same for the file behind the server, after a flush."""
        with path.open("rb") as file:
            return sum(
                self._wrong_pages(extent * EXTENT_PAGES, file.read(EXTENT_PAGES * PAGE))
                for extent in range(self._extents)
            )

    def _wrong_pages(self, first: int, data: bytes) -> int:
        return sum(
            data[at : at + PAGE] != self.content(first + at // PAGE) for at in range(0, EXTENT_PAGES * PAGE, PAGE)
        )

    # A thread

    def _run(self, number: int, threads: int) -> None:
        draw = random.Random(f"{self._seed}/{number}")
        try:
            with self._connect() as client:
                while not self._stop.is_set() and not self.failures:
                    begun_s = time.monotonic()
                    self._request(client, draw, number, threads)
                    self.longest_s[number] = max(self.longest_s[number], time.monotonic() - begun_s)
                    self._done[number] += 1
        except (OSError, NbdnfsError, struct.error) as error:
            self.failures.append(f"thread {number}: {type(error).__name__}: {error}")

    def _request(self, client: NbdClient | SharedClient, draw: random.Random, number: int, threads: int) -> None:
        extent = draw.randrange(number, self._extents, threads)
        count = draw.choice((1, 1, 1, 2, 4, 8, 16, 32))
        first = extent * EXTENT_PAGES + draw.randrange(EXTENT_PAGES - count + 1)
        kind = draw.choices(("read", "write", "fua", "flush"), (44, 52, 3, 1))[0]
        if kind == "flush":
            client.flush()
        elif kind == "read":
            data = client.read(first * PAGE, count * PAGE)
            for at in range(count):
                if data[at * PAGE : (at + 1) * PAGE] != self.content(first + at):
                    version = self._versions.get(first + at, 0)
                    self.failures.append(f"page {first + at} is wrong: it should have its version {version}")
        else:
            for page in range(first, first + count):
                self._versions[page] = self._versions.get(page, 0) + 1
            data = b"".join(self.content(page) for page in range(first, first + count))
            client.write(first * PAGE, data, fua=kind == "fua")
