# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the parts of `make prove` have seen, in build/prove/PART.json: added to while the sources are the same."""

from __future__ import annotations

import ast
import contextlib
import datetime
import fcntl
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from simulator.build import ENGINE, PROJECT, ROOMS, engine_sources

FOLDER = PROJECT / "build" / "prove"
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|/\*.*?\*/|//[^\n]*', re.DOTALL)


def _code_of_c(text: str) -> str:
    """Without comments, and with one space between words."""
    bare = _STRING_OR_COMMENT.sub(lambda found: found[0] if found[0].startswith('"') else " ", text)
    return " ".join(bare.split())


def _code_of(path: Path) -> str:
    return ast.unparse(ast.parse(path.read_text())) if path.suffix == ".py" else _code_of_c(path.read_text())


def digest(paths: Iterable[Path]) -> str:
    """Of what these files say to a compiler: what a comment says does not matter."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(f"{path.relative_to(PROJECT)}\0{_code_of(path)}\0".encode())
    return whole.hexdigest()[:12]


def _engine_files() -> list[Path]:
    """As the simulator compiles them."""
    headers = (path for room in ROOMS for path in (ENGINE / room).glob("*.h"))
    return [*headers, *(ENGINE / name for name in engine_sources())]


def _keeper_files() -> list[Path]:
    package = PROJECT / "nbdnfs"
    rooms = (package / room for room in ("keeper", "kernel", "worker"))
    foundation = (path for path in package.iterdir() if path.suffix in {".py", ".c"})
    return [*foundation, *(path for room in rooms for path in room.rglob("*.py"))]


def _measured_files() -> list[Path]:
    return [*ENGINE.rglob("*.[ch]"), *_keeper_files()]


# In the order of the page: what each part is about.
PARTS = {
    "seeds": _engine_files,
    "points": _engine_files,
    "calls": _engine_files,
    "keeper-points": _keeper_files,
    "keeper-calls": _keeper_files,
    "mutants": _engine_files,
    "coverage": _measured_files,
}


@dataclass
class Part:
    """What was found is the part's own: prove.py writes it, page.py reads it. `runs` says when, and of which commit."""

    name: str
    sources: str
    runs: list[list[str]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        run = [datetime.date.today().isoformat(), commit()]
        if run not in self.runs:
            self.runs.append(run)
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = path_of(self.name).with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.rename(path_of(self.name))


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Nobody else runs this part meanwhile. SystemExit: somebody does."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"make prove: another process runs {name}\nmake prove: wait for it, or choose others with PARTS=")
        yield


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def commit() -> str:
    """Short, with a plus sign where files differ from it."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.check_output(describe, cwd=PROJECT, text=True).strip()


def load(name: str) -> Part:
    """What is kept of these sources; an empty part where there is nothing, or it is about others."""
    sources = digest(PARTS[name]())
    if path_of(name).exists():
        kept = Part(**json.loads(path_of(name).read_text()))
        if kept.sources == sources:
            return kept
    return Part(name, sources)
