# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a keeper leaves in /run/nbdnfs/NAME, so that the next one, `down` and `status` need no configuration.

Small text files, each written whole and renamed into place. A process is named by its pid and its start time
(proc_pid_stat(5), field 22), so that another process with the same pid is not mistaken for it.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import name_lock
from nbdnfs.proc_stat import start_time_ticks

_FOLDER = name_lock.FOLDER
# What earlier versions wrote for STOLEN: a keeper of this one may come after one of those.
_STOLEN_BEFORE = "lost"


@dataclass(frozen=True)
class ProcessRecord:
    """A process, and the version of nbdnfs that it runs."""

    pid: int
    start_time_ticks: int
    version: str

    def is_alive(self, root: Path = Path("/")) -> bool:
        """Whether it runs; a zombie does not."""
        return start_time_ticks(self.pid, root) == self.start_time_ticks


class Records:
    """The records of the device `name`. Its constants are the keys, which are the files' names."""

    # processes
    KEEPER = "keeper"
    WORKER = "worker"
    STANDBY = "standby"
    # "nbd0"
    DEVICE = "device"
    # two lines: the URL in its canonical form, and the server's address
    ADDRESS = "address"
    # "yes" where the workers look after an owner record
    OWNER = "owner"
    # a step of the keeper, or STOLEN
    STATE = "state"

    # The state that a keeper leaves behind when another machine has taken the file.
    STOLEN = "stolen"

    def __init__(self, name: str, root: Path = Path("/"), *, run: Path | None = None) -> None:
        """`root` stands for "/"; `run` is another place for the records alone."""
        self.name = name
        self.root = root
        self.run = run
        self.path = (root / _FOLDER if run is None else run) / name

    def make(self) -> None:
        self.path.mkdir(mode=0o755, parents=True, exist_ok=True)

    def write(self, key: str, text: str) -> None:
        """OSError where it cannot be written: the caller says what that means."""
        new = self.path / f".{key}.new"
        new.write_text(text + "\n")
        new.rename(self.path / key)

    def read(self, key: str) -> str | None:
        """The text without its last newline; None without such a record."""
        try:
            text = (self.path / key).read_text().strip()
        except OSError:
            return None
        return self.STOLEN if key == self.STATE and text == _STOLEN_BEFORE else text

    def write_process(self, key: str, pid: int, version: str) -> None:
        """Record a living process. ProcessLookupError when it has ended."""
        started = start_time_ticks(pid, self.root)
        if started is None:
            raise ProcessLookupError(pid)
        self.write(key, f"{pid} {started} {version}")

    def process(self, key: str) -> ProcessRecord | None:
        """The recorded process, alive or not; None without a record."""
        words = (self.read(key) or "").split()
        if len(words) != 3 or not (words[0].isdigit() and words[1].isdigit()):
            return None
        return ProcessRecord(int(words[0]), int(words[1]), words[2])

    def living(self, key: str) -> ProcessRecord | None:
        """The recorded process if it runs."""
        record = self.process(key)
        return record if record is not None and record.is_alive(self.root) else None

    def remove(self) -> None:
        """All of them, and their folder; as far as possible."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            self.path.rmdir()

    def others(self) -> list[Records]:
        """The records of the other devices of this machine."""
        folder = self.path.parent
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        return [Records(name, self.root, run=self.run) for name in sorted(names) if name != self.name]

    # All devices. A refusal lies beside the records, which go when a device fails.

    @staticmethod
    def names(root: Path = Path("/")) -> list[str]:
        """The devices that have records."""
        folder = root / _FOLDER
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    @staticmethod
    def write_refusal(name: str, text: str | None, root: Path = Path("/")) -> None:
        """Why the device did not get its file, for `status`; None: it did."""
        path = root / _FOLDER / f"{name}.refused"
        try:
            if text is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text(text + "\n")
        except OSError:  # then it is in the journal only
            pass

    @staticmethod
    def refusal(name: str, root: Path = Path("/")) -> str | None:
        """What `write_refusal` has written."""
        try:
            return (root / _FOLDER / f"{name}.refused").read_text().strip()
        except OSError:
            return None
