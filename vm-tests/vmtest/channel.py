# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's end of the command channel: the frames of inside/agent.c, and the jobs that they are about."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from dataclasses import dataclass, field


@dataclass
class JobState:
    """What is known about one command in the guest. Guarded by `Channel.changed`."""

    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    status: int | None = None
    """Exit status, or minus the signal; None while it runs."""
    timed_out: bool = False
    stuck: bool = False
    """It was killed and has not ended: it hangs in the kernel."""


class Channel:
    """Sends requests and assigns the answers to jobs. A thread of its own reads; when it ends it wakes all waits.

    `changed` guards all state and is notified whenever something arrives.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.changed = threading.Condition()
        self.boot_id: str | None = None
        """Set once the agent has sent READY."""
        self.closed = False
        self.last_received_s = time.monotonic()
        self._jobs: dict[int, JobState] = {}
        self._ids = itertools.count(1)
        self._connection = connection
        self._reader = threading.Thread(target=self._read, name="guest-channel", daemon=True)
        self._reader.start()

    def close(self) -> None:
        """End the reader and wait for it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()

    def start(self, command: str, timeout_s: float) -> tuple[int, JobState]:
        """Ask for a command; the agent kills it after `timeout_s`. OSError when the guest has died."""
        data = command.encode()
        with self.changed:
            number = next(self._ids)
            state = self._jobs[number] = JobState()
        self._send(b"RUN %d %d %d\n%s" % (number, int(timeout_s * 1000), len(data), data))
        return number, state

    def kill(self, number: int) -> None:
        """Ask for the end of a job and all of its process group."""
        self._send(b"KILL %d\n" % number)

    def ping(self) -> None:
        """Ask for a sign of life; the answer updates `last_received_s`."""
        self._send(b"PING 0\n")

    def press_sysrq(self, keys: str) -> None:
        """Have the kernel print what these keys stand for to its log. OSError when the guest has died."""
        self._send(b"SYSRQ %s\n" % keys.encode())

    def _send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as frames:
                while line := frames.readline():
                    words = line.split()
                    payload = frames.read(int(words[2])) if words[0] in (b"OUT", b"ERR") else b""
                    with self.changed:
                        self._take(words, payload)
                        self.changed.notify_all()
        except (OSError, ValueError, IndexError):
            pass  # the guest died in the middle of a frame
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()

    def _take(self, words: list[bytes], payload: bytes) -> None:
        self.last_received_s = time.monotonic()
        kind = words[0]
        if kind == b"READY":
            self.boot_id = words[1].decode()
        job = self._jobs.get(int(words[1])) if kind in (b"OUT", b"ERR", b"EXIT", b"STUCK") else None
        if job is None:
            return
        if kind == b"OUT":
            job.stdout += payload
        elif kind == b"ERR":
            job.stderr += payload
        elif kind == b"STUCK":
            job.stuck = True
        elif kind == b"EXIT":
            job.status = os.waitstatus_to_exitcode(int(words[2]))
            job.timed_out = words[3] == b"1"
