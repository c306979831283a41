# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of others came to: kept in a file from one run to the next, and put into a page as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = ("passed", "failed", "lost", "not run")
"""As in vmtest.outcome; *not run*: it cannot run there, or its time did not come. It has a reason."""

PAGE = Path(__file__).parents[2] / "docs/proof.md"
_BEGIN, _END = "<!-- begin: make world -->\n", "<!-- end: make world -->"
_LONGEST_REASON = 160
_MOST_NAMES = 24


@dataclass(frozen=True)
class Outcome:
    """Of one test. `part` is what the suite ran on: a file system, for example. `why` is empty if it passed."""

    suite: str
    part: str
    test: str
    result: str
    seconds: float = 0.0
    why: str = ""
    pages_out: int = 0
    """That the guest wrote to swap meanwhile."""
    on: str = ""
    """The image and its kernel."""
    date: str = ""

    def __post_init__(self) -> None:
        if self.result not in RESULTS:
            raise ValueError(f"no such result: {self.result}")
        if bool(self.why) == (self.result == "passed"):
            raise ValueError(f"{self.test} {self.result}: a reason is for what did not pass")


def load(path: Path) -> list[Outcome]:
    """Those of earlier runs, none where there is no file yet."""
    return [Outcome(**fields) for fields in json.loads(path.read_text())] if path.exists() else []


def save(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Whole or not at all: a run may end at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps([dataclasses.asdict(one) for one in outcomes], indent=1) + "\n")
    new.replace(path)


def merged(old: Iterable[Outcome], new: Sequence[Outcome], *, whole: bool) -> list[Outcome]:
    """`old` and `new`, without those of `old` that ran again: the same tests, or the same parts where they ran
    `whole`."""

    def key(one: Outcome) -> tuple[str, ...]:
        return (one.suite, one.part, one.on) if whole else (one.suite, one.part, one.on, one.test)

    again = {key(one) for one in new}
    return [one for one in old if key(one) not in again] + list(new)


def page_of(outcomes: Sequence[Outcome], suites: Iterable[str] = ()) -> str:
    """Two tables: each part of a suite with its counts, and what did not pass, with the reason. Of `suites`, those that
    never ran are among the latter."""
    parts = list(dict.fromkeys((one.suite, one.part, one.on) for one in outcomes))
    lines = [
        "| suite | on | guest | date | tests | passed | failed | lost | not run | pages to swap |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part in parts:
        mine = [one for one in outcomes if (one.suite, one.part, one.on) == part]
        counts = [sum(one.result == result for one in mine) for result in RESULTS]
        words = [*part, max(one.date for one in mine), f"{len(mine)}", *(f"{count:,}" for count in counts)]
        lines.append(f"| {' | '.join(words)} | {sum(one.pages_out for one in mine):,} |")
    lines += ["", "| did not pass | on | tests | why |", "| --- | --- | --- | --- |"]
    reasons: dict[tuple[str, str, str, str], list[str]] = {}
    for one in outcomes:
        if one.result != "passed":
            reasons.setdefault((one.suite, one.part, one.result, one.why), []).append(one.test)
    lines += [
        f"| {suite}, {result} | {part} | {_names(tests)} | {_one_line(why)} |"
        for (suite, part, result, why), tests in reasons.items()
    ]
    known = {one.suite for one in outcomes}
    lines += [f"| {suite}, not run |  | all | it has not been run yet |" for suite in suites if suite not in known]
    return "\n".join(lines) + "\n"


def put_page(text: str, page: Path = PAGE) -> None:
    """Between the two marks."""
    before, begin, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} does not have the lines {_BEGIN.strip()} and {_END}")
    page.write_text(f"{before}{begin}{text}{end}{after}")


def _names(tests: Iterable[str]) -> str:
    """The names, once each; of very many the first ones, and how many more there are."""
    names = list(dict.fromkeys(tests))
    rest = len(names) - _MOST_NAMES
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:_MOST_NAMES])} and {rest:,} more"


def _one_line(why: str) -> str:
    text = " ".join(why.split()).replace("|", "\\|")
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
