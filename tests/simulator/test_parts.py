# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make prove` keeps between its runs, and when it forgets that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulator import parts
from simulator.coverage import Branches
from simulator.page import page_of, ranges_of, seed_rows
from simulator.parts import PARTS, Part, digest, load
from simulator.prove import counted


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one C file and one Python file, which all parts are about."""
    (tmp_path / "a.c").write_text("int a = 1; /* one */\n")
    (tmp_path / "b.py").write_text("b = 1  # one\n")
    monkeypatch.setattr(parts, "PROJECT", tmp_path)
    monkeypatch.setattr(parts, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(parts, "commit", lambda: "c0ffee")
    both = [tmp_path / "a.c", tmp_path / "b.py"]
    monkeypatch.setattr(parts, "PARTS", {name: lambda: both for name in PARTS})
    return tmp_path


def piece(first: int, seeds: int, **more: Any) -> dict[str, Any]:
    sums = ("simulated_s", "seconds", "page_ops", "requests", "worker_crashes", "nas_crashes", "connections")
    return {"first_seed": first, "seeds": seeds, "failures": [], **dict.fromkeys(sums, 10), **more}


def test_a_part_goes_on(sources: Path) -> None:
    """What was saved is there again, with the day and the commit."""
    part = load("seeds")
    part.found["pieces"] = [piece(1, 5)]
    part.save()
    again = load("seeds")
    assert again.found == part.found
    assert [commit for _, commit in again.runs] == ["c0ffee"]


def test_comments_do_not_matter(sources: Path) -> None:
    """Neither in C nor in Python; a string that looks like one does."""
    before = digest([sources / "a.c", sources / "b.py"])
    (sources / "a.c").write_text("// two\nint  a = 1;\n")
    (sources / "b.py").write_text("# two\nb = 1\n")
    assert digest([sources / "a.c", sources / "b.py"]) == before
    (sources / "a.c").write_text('int a = 1; char *b = "/* one */";\n')
    with_string = digest([sources / "a.c"])
    (sources / "a.c").write_text('int a = 1; char *b = "/* two */";\n')
    assert digest([sources / "a.c"]) != with_string


@pytest.mark.parametrize(("name", "text"), [("a.c", "int a = 2;\n"), ("b.py", "b = 2\n")])
def test_other_code_begins_anew(sources: Path, name: str, text: str) -> None:
    part = load("mutants")
    part.found["a fault"] = {"found_s": 1.0}
    part.save()
    (sources / name).write_text(text)
    assert load("mutants").found == {}


def test_seeds_add_up() -> None:
    """Those of several runs, as ranges; a failing one ends the bound."""
    pieces = [piece(1, 10), piece(21, 5), piece(11, 10)]
    assert ranges_of(pieces) == "1 to 25"
    assert ranges_of([piece(1, 10), piece(1001, 1000)]) == "1 to 10, 1,001 to 2,000"
    assert "| page operations | 30 |" in seed_rows(pieces)
    assert any("at most" in row for row in seed_rows(pieces))
    assert not any("at most" in row for row in seed_rows([piece(1, 10, failures=[{"seed": 3}])]))


def test_the_page_says_what_is_missing() -> None:
    """A part that was not run has no row; one that was ended half-way says so; a failure is shown and counts."""
    found = {name: Part(name, "abc") for name in PARTS}
    text, is_right = page_of(found)
    assert is_right
    assert "not run with these sources" in text
    assert "keepers killed" not in text
    scene = {"there_are": 10, "done": [1, 2], "tried": 2, "ended": 0, "wrong": []}
    found["keeper-points"].found["attach"] = scene
    text, is_right = page_of(found)
    assert is_right
    assert "2 of 2; 2 of 10 steps have been tried" in text
    found["keeper-points"].found["attach"] = {**scene, "wrong": ["it hangs"]}
    text, is_right = page_of(found)
    assert not is_right
    assert "it hangs" in text


def test_branches_are_kept(sources: Path) -> None:
    """What was counted is on the page after it was saved and read."""
    part = load("coverage")
    file = Branches(taken=9, of=12)
    file.miss("receive")
    file.miss("receive", 2)
    part.found = counted(30, {"engine": 0, "keeper and kernel": 1}, {"nbd/loop.c": file}, {"kernel/use.py": file})
    part.save()
    text, _ = page_of({name: load(name) for name in PARTS})
    assert "| engine/nbd | 12 | 9 | 75.0% |" in text
    assert "| engine/nbd/loop.c | 3 | `receive` | - |" in text
    assert "Some tests failed while the branches of keeper and kernel were counted." in text
