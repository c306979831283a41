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
# For how long after a read has failed that is told.
FAILED_READ_S = 24 * 3600.0

STOLEN = "another machine has stolen the backing file: swap has ended here, reboot this machine"
_FILE_PROBLEMS = {
    region.FILE_DELETED: "the backing file was deleted on the server",
    region.FILE_REPLACED: "the backing file was replaced on the server: nothing is written to the new file",
    region.FILE_TRUNCATED: "the backing file was truncated on the server: the pages behind its end are lost",
}
_WAIT = "swap goes on by itself when the server answers: look at the server, and at the network to it"
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
    """What is wrong, in a sentence; for doctor what that is about, and what to do."""

    level: Level
    text: str
    subject: str = "status"
    advice: str = ""


def worst(levels: Iterable[Level]) -> Level:
    """The worst of them; OK where there is none."""
    return max(levels, key=_ORDER.index, default=Level.OK)


def restart(name: str) -> str:
    """The commands that start a device again on a new file. `down` reads back what the server still has."""
    return f"nbdnfs down {name}; nbdnfs up {name}; where down fails, end what uses the swap first"


def put_back(name: str) -> str:
    """What to do where the file is not under its name any more. Of a file that is deleted, nothing can be put back."""
    return f"was it renamed or moved? on the NAS, put it back under its name. Else, at once: {restart(name)}"


def of_region(reading: Reading, name: str) -> list[Problem]:
    """The problems that the worker of the device `name` shows in its region: those of the server and of the file."""
    found = reading.counters
    problems = _of_server(found, reading.waits)
    if number(found, "owner_state") == region.OWNER_STOLEN:
        problems.insert(0, stolen())
    if number(found, "owner_state") == region.OWNER_UNSURE:
        text = "the owner record cannot be checked: writes wait until it can"
        problems.append(Problem(Level.WARNING, text, "owner record", _WAIT))
    if file_state := number(found, "file_state"):
        unknown = f"the backing file is in the unknown state {file_state}"
        text = _FILE_PROBLEMS.get(file_state, unknown)
        can_return = file_state in region.FILE_GONE
        advice = put_back(name) if can_return else restart(name)
        problems.append(Problem(Level.CRITICAL, text, "backing file", advice))
    if write_back_error := number(found, "write_back_error"):
        text = f"the server rejects writes ({os.strerror(write_back_error)})"
        advice = "mend that on the server: the pages wait meanwhile"
        problems.append(Problem(Level.CRITICAL, text, "connection", advice))
    if (ago_s := reading.failed_read_s) is not None and ago_s < FAILED_READ_S:
        told = f"{number(found, 'failed_reads')}, the last {quantities.format_duration(ago_s)} ago"
        text = f"reads have failed ({told}): programs that needed those pages were killed, or got I/O errors"
        problems.append(Problem(Level.WARNING, text, "device", f"the journal says why: journalctl -u nbdnfs@{name}"))
    if number(found, "checksum_failures"):
        advice = "export 'sync', and see who else can write there; what could not be read is lost"
        problems.append(Problem(Level.CRITICAL, _WRONG_CHECKSUM, "backing file", advice))
    return problems


def stolen() -> Problem:
    """Another machine has the file."""
    return Problem(Level.CRITICAL, STOLEN, "owner record", "what was swapped out is lost: reboot")


def _of_server(found: Counters, waits: Waits | None) -> list[Problem]:
    """Is there an answer? The connection that is down, or else the server's silence, and the request's age, where it is
    more than that of the silence: a network may lose large packets alone."""
    duration = quantities.format_duration
    unheard_s = waits.unheard_s if waits is not None else 0.0
    request_s = waits.oldest_request_s if waits is not None else 0.0
    if number(found, "disconnected"):
        since = f", unheard for {duration(unheard_s)}" if unheard_s >= 1 else ""
        return [Problem(Level.CRITICAL, f"the server does not answer{since}", "connection", _WAIT)]
    problems = []
    if unheard_s >= UNHEARD_WARNING_S:
        level = Level.CRITICAL if unheard_s >= UNHEARD_CRITICAL_S else Level.WARNING
        text = f"the server is unheard for {duration(unheard_s)}, and answers are outstanding"
        problems.append(Problem(level, text, "connection", _WAIT))
    if request_s >= REQUEST_WARNING_S and (not problems or request_s > unheard_s + REQUEST_WARNING_S):
        level = Level.CRITICAL if request_s >= REQUEST_CRITICAL_S else Level.WARNING
        text = f"a request of the kernel has waited for {duration(request_s)}"
        advice = "see whether NFS write moves: nbdnfs top; the server may be busy or refuse, or large packets get lost"
        problems.append(Problem(level, text, "connection", advice))
    return problems
