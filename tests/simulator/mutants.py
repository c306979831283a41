# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults put into the engine on purpose (mutants.toml). Each must be found by the simulator."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """One fault: (file, old text, new text) for each replacement, and words for the simulator's command line."""

    name: str
    promise: str
    edits: tuple[tuple[str, str, str], ...]
    words: dict[str, str]
    bounded: tuple[int, dict[str, str]] | None = None  # a seed and words of a run that is stopped everywhere
    why: str = ""  # of one that breaks nothing

    def apply(self, engine: Path) -> dict[str, str]:
        """The texts of the changed files, by their path in the engine's folder. AssertionError: the code changed."""
        changed: dict[str, str] = {}
        for path, old, new in self.edits:
            text = changed.get(path, (engine / path).read_text())
            assert text.count(old) == 1, f"{self.name}: {path} has this {text.count(old)} times: {old!r}"
            changed[path] = text.replace(old, new)
        return changed


def _words(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


def _mutant(table: dict[str, Any]) -> Mutant:
    edits = tuple((edit["file"], edit["old"], edit["new"]) for edit in table["edits"])
    seed, _, rest = table.get("bounded", "").partition(" ")
    bounded = (int(seed), _words(rest)) if seed else None
    return Mutant(table["name"], table["promise"], edits, _words(table.get("words", "")), bounded, table.get("why", ""))


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
# Faults that the engine had once, faults that are made up, and changes that turned out to be none.
KNOWN = tuple(map(_mutant, _TABLES["known"]))
SEEDED = tuple(map(_mutant, _TABLES["seeded"]))
EQUIVALENT = tuple(map(_mutant, _TABLES.get("equivalent", ())))
