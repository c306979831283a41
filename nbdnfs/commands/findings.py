# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a check of `nbdnfs doctor` yields, and how it reads the small files of /proc and /sys."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """The result of one check: its subject, whether that is good, what was found, and what to do ("": nothing)."""

    subject: str
    good: bool
    found: str
    advice: str = ""

    def text(self) -> str:
        """One line for a terminal, or two where there is advice."""
        line = f"{'ok ' if self.good else 'BAD'}  {self.subject}: {self.found}"
        return f"{line}\n     {self.advice}" if self.advice else line

    def to_json(self) -> dict[str, object]:
        """The fields by their names."""
        return asdict(self)


def judge(subject: str, good: bool, found: str, advice: str) -> Finding:
    """A finding with `advice` unless it is good."""
    return Finding(subject, good, found, "" if good else advice)


def read_text(path: Path) -> str | None:
    """A file's text without the final newline; None where the file does not exist or may not be read."""
    try:
        return path.read_text(errors="replace").rstrip("\n")
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """The decimal number in a file; None where there is none."""
    text = (read_text(path) or "").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None
