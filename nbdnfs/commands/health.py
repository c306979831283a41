# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verdict on a device: which problems it has, and how bad each is. docs/monitoring.md has the table.

What is found is given, nothing is read here: `status` and other reports share it.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from dataclasses import dataclass

from nbdnfs import quantities, region
from nbdnfs.commands.counters import Counters, Reading, Waits, number

# How long the server may owe an answer without sending anything, and how long a request of the kernel may take. A
# connection that is silent for longer than the second is tested by the worker (engine/nfs/silence.c).
UNHEARD_WARNING_S, UNHEARD_CRITICAL_S = 5.0, 15.0
REQUEST_WARNING_S, REQUEST_CRITICAL_S = 10.0, 30.0

STOLEN = "another machine has stolen the backing file: swap has ended here, reboot this machine"
_FILE_PROBLEMS = {
    region.FILE_DELETED: "the backing file was deleted on the server",
    region.FILE_REPLACED: "the backing file was replaced on the server: nothing is written to the new file",
    region.FILE_TRUNCATED: "the backing file was truncated on the server: the pages behind its end are lost",
}
_WRONG_CHECKSUM = (
    "pages had a wrong checksum: the server lost writes that it had confirmed (is the export 'async'?),"
    " or something else writes to the file"
)


class Level(enum.IntEnum):
    """How bad it is. The value is the exit status of `nbdnfs status`, as monitoring plugins have it."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


# An unknown state may be a critical one.
_ORDER = (Level.OK, Level.WARNING, Level.UNKNOWN, Level.CRITICAL)


@dataclass(frozen=True)
class Problem:
    """What is wrong, in a sentence."""

    level: Level
    text: str


def worst(levels: Iterable[Level]) -> Level:
    """The worst of them; OK where there is none."""
    return max(levels, key=_ORDER.index, default=Level.OK)


def of_region(reading: Reading) -> list[Problem]:
    """The problems that a worker shows in its region: those of the server and of the file."""
    found = reading.counters
    problems = _of_server(found, reading.waits)
    if number(found, "owner_state") == region.OWNER_STOLEN:
        problems.insert(0, Problem(Level.CRITICAL, STOLEN))
    if number(found, "owner_state") == region.OWNER_UNSURE:
        problems.append(Problem(Level.WARNING, "the owner record cannot be checked: writes wait until it can"))
    if file_state := number(found, "file_state"):
        unknown = f"the backing file is in the unknown state {file_state}"
        problems.append(Problem(Level.CRITICAL, _FILE_PROBLEMS.get(file_state, unknown)))
    if write_back_error := number(found, "write_back_error"):
        problems.append(Problem(Level.CRITICAL, f"the server rejects writes ({os.strerror(write_back_error)})"))
    if number(found, "checksum_failures"):
        problems.append(Problem(Level.CRITICAL, _WRONG_CHECKSUM))
    return problems


def _of_server(found: Counters, waits: Waits | None) -> list[Problem]:
    """Is there an answer? The connection that is down, or else the server's silence, or else the request's age."""
    duration = quantities.format_duration
    unheard_s = waits.unheard_s if waits is not None else 0.0
    request_s = waits.oldest_request_s if waits is not None else 0.0
    if number(found, "disconnected"):
        since = f", unheard for {duration(unheard_s)}" if unheard_s >= 1 else ""
        return [Problem(Level.CRITICAL, f"the server does not answer{since}")]
    if unheard_s >= UNHEARD_WARNING_S:
        level = Level.CRITICAL if unheard_s >= UNHEARD_CRITICAL_S else Level.WARNING
        return [Problem(level, f"the server is unheard for {duration(unheard_s)}, and answers are outstanding")]
    if request_s >= REQUEST_WARNING_S:
        level = Level.CRITICAL if request_s >= REQUEST_CRITICAL_S else Level.WARNING
        return [Problem(level, f"a request of the kernel has waited for {duration(request_s)}")]
    return []
