# SPDX-License-Identifier: LGPL-2.1-or-later
"""Owners for tests: machines, claims with short times, the record beside the file, and engines that refresh it."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Literal

import pytest

from nbdnfs.engine import Engine, libnfs_version
from nbdnfs.nas import owner_record, ownership
from nbdnfs.nas.owner_record import Identity, Record, Timing
from support.nfs_server import LOOPBACK, FileOnServer
from support.waiting import DEADLINE_S, in_background

PAGE = 4096
PAGES = 1024  # of the fixture swap_file
# Not one 32-bit word again and again: such a page would not travel before a flush.
ONE, TWO = (bytes([byte]) * (PAGE - 1) + b"!" for byte in (1, 2))

# Short, so that tests are; the proportions are those of owner_record.TIMING.
QUICK = Timing(refresh_ms=300, in_flight_ms=300)
HOLDER = "keeper:swap0"

# libnfs 4.0 cannot write over NFSv4
each_version = pytest.mark.parametrize("version", (3, 4) if int(libnfs_version.split(".")[0]) >= 5 else (3,))


def machine(host: str) -> Identity:
    """A machine that has just been started. It has one PID namespace, and knows it."""
    machine_id, boot, hardware = (secrets.token_hex(16) for _ in range(3))
    return Identity(machine_id, boot, hardware, host, pid_namespace=0xEFFF_FFFC)


def record_path(file: FileOnServer) -> Path:
    """The path of the file's owner record."""
    return file.path.with_name(owner_record.name_of(file.name))


def beside(file: FileOnServer) -> list[Path]:
    """The record, and whatever else was left beside the file."""
    return sorted(file.path.parent.glob(f".{file.name}.*"))


def record_of(file: FileOnServer) -> Record:
    """The file's owner record, which must be valid."""
    record = owner_record.parse(record_path(file).read_bytes())
    assert record is not None
    return record


def claim(
    file: FileOnServer, me: Identity, *, steal: bool = False, holder: str = HOLDER, root: Path = Path("/")
) -> Record:
    """As ownership.claim, with short times."""
    return ownership.claim(file.url(), holder, me, steal=steal, report=lambda line: None, timing=QUICK, root=root)


def grow_old(file: FileOnServer, seconds: float = 600.0) -> None:
    """Make the record's last sign of life that long ago."""
    then = time.time() - seconds
    os.utime(record_path(file), (then, then))


class Held:
    """An engine of the machine `me`, which refreshes the record of a file that `me` owns."""

    def __init__(
        self,
        url: str,
        file: FileOnServer,
        me: Identity,
        timing: Timing = QUICK,
        transport: Literal["wire", "libnfs"] = "wire",
    ) -> None:
        self.engine = Engine(
            url,
            LOOPBACK,
            read_ahead_pages=0,
            owner_path=f"/{owner_record.name_of(file.name)}",
            owner_identity=f"\nboot {me.boot}\n",
            owner_refresh_ms=timing.refresh_ms,
            transport=transport,
        )

    @property
    def state(self) -> int:
        found = self.engine.counters()["owner_state"]
        assert isinstance(found, int)
        return found

    def write_until_it_fails(self) -> int:
        """Write all pages again and again, some of them stably; the errno that ends it."""
        at = 0
        while True:
            try:
                self.engine.pwrite(ONE, at * PAGE, at % 7 == 0)
            except OSError as error:
                return error.errno or 0
            at = (at + 1) % PAGES

    def close(self) -> None:
        in_background(self.engine.close).result(DEADLINE_S)
