# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the stress program (inside/hog.c) writes to the verdict port: progress, and one verdict at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from vmtest.outcome import GuestFailedError


@dataclass(frozen=True)
class Pass:
    """One walk over all pages."""

    order: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """The last line of a hog that came to its end."""

    pages: int
    checked: int
    wrong: int
    seconds: float
    passes: tuple[Pass, ...]

    def check(self) -> Verdict:
        """Itself when every page was right and was looked at. GuestFailedError otherwise."""
        if self.wrong:
            raise GuestFailedError(f"{self.wrong} wrong pages (of {self.checked} checks of {self.pages} pages)")
        readings = sum(one.order != "fill" for one in self.passes)
        if not readings or self.checked != readings * self.pages:
            raise GuestFailedError(f"only {self.checked} of {readings * self.pages} checks were made")
        return self


@dataclass(frozen=True)
class Progress:
    """How far a hog has come in one pass."""

    order: str
    done: int
    pages: int
    wrong: int
    seconds: float


def parse(text: str) -> tuple[Progress | None, Verdict | None]:
    """The last progress and the verdict in what came over the port so far; a line not ended yet is left alone.

    GuestFailedError when the hog reports that it could not finish, or for a line that is not the hog's.
    """
    progress: Progress | None = None
    verdict: Verdict | None = None
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        try:
            event = json.loads(line)
            if event["event"] == "verdict":
                verdict = _verdict(event)
            elif event["event"] == "progress":
                progress = Progress(event["pass"], event["done"], event["pages"], event["wrong"], event["seconds"])
        except (ValueError, KeyError, TypeError):
            raise GuestFailedError(f"not a line of the stress program: {line.strip()!r}") from None
    return progress, verdict


def _verdict(event: Mapping[str, object]) -> Verdict:
    if not event["complete"]:
        raise GuestFailedError(f"the stress program did not finish: {event['reason']}")
    passes = event["passes"]
    assert isinstance(passes, list)
    return Verdict(
        pages=_int(event["pages"]),
        checked=_int(event["checked"]),
        wrong=_int(event["wrong"]),
        seconds=_float(event["seconds"]),
        passes=tuple(Pass(str(one["order"]), _float(one["seconds"])) for one in passes),
    )


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value


def _float(value: object) -> float:
    if not isinstance(value, int | float):
        raise TypeError
    return float(value)
