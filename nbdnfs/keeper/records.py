# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a keeper leaves in /run/nbdnfs/NAME, so that the next one, `down` and `status` need no configuration.

Small text files. A process is named by its pid and its start time (proc_pid_stat(5), field 22), so that another process
with the same pid is not mistaken for it.

A record is rewritten in place: a file that has one byte has a page of the tmpfs, so that a record that `reserve` has
made once can be written while /run is full. The text and line ends up to the old length go out in one write, and the
file is truncated after that: whoever reads in between reads the new text, since line ends at its end do not count.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from nbdnfs import name_lock
from nbdnfs.errors import UnreadableError, is_of_want
from nbdnfs.proc_stat import start_time_ticks

_FOLDER = name_lock.FOLDER
# What earlier versions wrote for STOLEN: a keeper of this one may come after one of those.
_STOLEN_BEFORE = "lost"
_RECORD_BYTES_MAX = 64 * 1024
# Of a process: as many digits as a 64-bit number can have.
_DIGITS_MAX = 20


@dataclass(frozen=True)
class ProcessRecord:
    """A process, and the version of nbdnfs that it runs."""

    pid: int
    start_time_ticks: int
    version: str

    def is_alive(self, root: Path = Path("/")) -> bool:
        """Whether it runs; a zombie does not. UnreadableError: it is not known."""
        try:
            return start_time_ticks(self.pid, root) == self.start_time_ticks
        except OSError as error:
            raise UnreadableError(f"cannot look at process {self.pid}: {error.strerror}") from None


class Records:
    """The records of the device `name`. Its constants are the keys, which are the files' names."""

    # processes
    KEEPER = "keeper"
    WORKER = "worker"
    STANDBY = "standby"
    # "nbd0"
    DEVICE = "device"
    # which region the device has: region.identity
    REGION = "region"
    # two lines: the URL in its canonical form, and the server's address
    ADDRESS = "address"
    # "yes" where the workers look after an owner record
    OWNER = "owner"
    # a step of the keeper, or STOLEN
    STATE = "state"
    # the configuration that the device runs with: keeper/last_good.py
    CONFIG = "config"
    # a sentence: what is wrong with the configuration file, where the device runs with CONFIG instead
    CONFIG_ERROR = "config_error"
    # a sentence: what the keeper waits for before the device can come up
    WAITING = "waiting"
    # These two stay beside the folder when that goes. Their names begin with a dot, as no device's does.
    # what the keeper has reported already: keeper/reporter.py
    SAID = "said"
    # why the last keeper ended for good, in one line, and in another what to do
    REFUSED = "refused"

    KEYS = (
        *(KEEPER, WORKER, STANDBY, DEVICE, REGION, ADDRESS, OWNER),
        *(STATE, CONFIG, CONFIG_ERROR, WAITING, SAID, REFUSED),
    )
    _BESIDE = (SAID, REFUSED)

    # The state that a keeper leaves behind when another machine has taken the file.
    STOLEN = "stolen"

    def __init__(self, name: str, root: Path = Path("/"), *, run: Path | None = None) -> None:
        """`root` stands for "/"; `run` is another place for the records alone."""
        self.name = name
        self.root = root
        self.run = run
        self.path = (root / _FOLDER if run is None else run) / name
        self._latest: dict[str, str] = {}
        self._pending: dict[str, str] = {}
        self._reported: set[str] = set()

    def make(self) -> None:
        self.path.mkdir(mode=0o755, parents=True, exist_ok=True)

    def reserve(self) -> None:
        """Make the files of all records, each with a page of its own. OSError where there is no room."""
        self.make()
        for key in self.KEYS:
            descriptor = os.open(self._file(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(descriptor).st_size == 0:
                    os.pwrite(descriptor, b"\n", 0)
            finally:
                os.close(descriptor)

    def write(self, key: str, text: str) -> None:
        """OSError where it cannot be written, and the record is as it was: the caller says what that means."""
        data = (text + "\n").encode(errors="surrogateescape")
        descriptor = os.open(self._file(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            if len(data) > before:
                os.posix_fallocate(descriptor, before, len(data) - before)
            os.pwrite(descriptor, data.ljust(before, b"\n"), 0)
            os.ftruncate(descriptor, len(data))
        finally:
            os.close(descriptor)

    def put(self, key: str, text: str) -> None:
        """Write it, for a keeper, which goes on whatever becomes of it: what cannot be written is kept here, reported
        once, and written by `retry`."""
        self._pending[key] = self._latest[key] = text
        self.retry()

    def put_process(self, key: str, pid: int, version: str) -> bool:
        """`put` a living process. False when it has ended, or /proc cannot be read: whoever knows that it lives calls
        again."""
        started = None
        with contextlib.suppress(OSError):
            started = start_time_ticks(pid, self.root)
        if started is not None:
            self.put(key, f"{pid} {started} {version}")
        return started is not None

    def retry(self) -> None:
        """Write what `put` could not, and what has been removed since."""
        for key, text in self._latest.items():
            if not os.path.lexists(self._file(key)):
                self._pending[key] = text
        for key, text in list(self._pending.items()):
            try:
                self._file(key).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                self.write(key, text)
            except OSError as error:
                if key not in self._reported:
                    self._reported.add(key)
                    self._say(f"cannot write the record {self._file(key)}: {error.strerror}; trying again until it can")
            else:
                del self._pending[key]
                self._reported.discard(key)

    def read(self, key: str) -> str | None:
        """The text without blanks and line ends around it; None without such a record. One that is not text is
        reported once, and is as good as none. UnreadableError: for want of memory or descriptors."""
        try:
            data = self._read(key)
            text = data.strip(b"\0 \t\r\n").decode()
        except OSError as error:
            if is_of_want(error):
                raise UnreadableError(f"cannot read the record {self._file(key)}: {error.strerror}") from None
            return None
        except UnicodeDecodeError:
            if key not in self._reported:
                self._reported.add(key)
                self._say(f"the record {self._file(key)} is damaged, and is ignored")
            return None
        return self.STOLEN if key == self.STATE and text == _STOLEN_BEFORE else text or None

    def process(self, key: str) -> ProcessRecord | None:
        """The recorded process, alive or not; None without a record, and for what is not one. UnreadableError as
        `read`."""
        words = (self.read(key) or "").split()
        if len(words) != 3 or not all(word.isascii() and word.isdigit() for word in words[:2]):
            return None
        if max(map(len, words[:2])) > _DIGITS_MAX:
            return None
        return ProcessRecord(int(words[0]), int(words[1]), words[2])

    def living(self, key: str) -> ProcessRecord | None:
        """The recorded process if it runs. UnreadableError: it is not known."""
        record = self.process(key)
        return record if record is not None and record.is_alive(self.root) else None

    def remove(self, *, keep_said: bool = False) -> None:
        """All of them, with `keep_said` but those beside the folder, and the folder; as far as possible."""
        self._latest.clear()
        self._pending.clear()
        for key in () if keep_said else self._BESIDE:
            with contextlib.suppress(OSError):
                self._file(key).unlink()
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            self.path.rmdir()

    def _file(self, key: str) -> Path:
        return self.path.parent / f".{self.name}.{key}" if key in self._BESIDE else self.path / key

    def _read(self, key: str) -> bytes:
        """Twice the same, so that it is not half of one text and half of the next."""
        data, before = b"", None
        with open(self._file(key), "rb", buffering=0) as file:
            for _ in range(3):
                data = os.pread(file.fileno(), _RECORD_BYTES_MAX, 0)
                if data == before:
                    break
                before = data
        return data

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # stderr may be a pipe or a journal that waits
            os.write(2, f"nbdnfs: {self.name}: {text}\n".encode(errors="replace"))

    def others(self) -> list[Records]:
        """The records of the other devices of this machine."""
        folder = self.path.parent
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        return [Records(name, self.root, run=self.run) for name in sorted(names) if name != self.name]

    @staticmethod
    def names(root: Path = Path("/")) -> list[str]:
        """The devices that have records."""
        folder = root / _FOLDER
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
