# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: the socket of systemd's journal, which a test reads, fills or takes away."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path

from nbdnfs.keeper.journal import Journal


class FakeJournal:
    """The socket of a journal, and a stderr that belongs to it."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "journal")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(self.path)
        self.stderr, self._writer = os.pipe()

    def open(self) -> Journal:
        """A Journal of a process whose stderr is this one's."""
        found = os.fstat(self._writer)
        environment = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        return Journal(environment, path=self.path, stderr=self._writer)

    def entry(self) -> dict[str, str]:
        """The fields of the next line, as journald parses them. BlockingIOError: there is none."""
        lines = self.socket.recv(1 << 16).decode().split("\n")
        assert lines.pop() == ""
        pairs = [line.split("=", 1) for line in lines]
        assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", key) for key, _ in pairs)
        return dict(pairs)

    def entries(self) -> list[dict[str, str]]:
        """All that have come since the last look."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.entry())
        return found

    def close(self) -> None:
        self.socket.close()
        os.close(self.stderr)
        os.close(self._writer)
