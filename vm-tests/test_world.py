# SPDX-License-Identifier: LGPL-2.1-or-later
"""The runner of the world's own tests, without a guest: no outcome goes missing, and none is better than it was."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vmtest.machine import Result
from vmtest.outcome import GuestFailedError, LostGuestError
from world import blktests, fio, ltp, stress_ng, xfstests
from world.outcomes import Outcome, load, merged, page_of, put_page, save
from world.run import run_suite
from world.suite import Bench, Judge, Part, Suite, Test

pytestmark = pytest.mark.meta


@dataclass
class FakeGuest:
    """Answers as it is told, by command: an exit status, or an error. `logs`: what a command adds to the kernel's."""

    answers: dict[str, int | Exception]
    logs: dict[str, str] = field(default_factory=dict)
    kernel_log: str = ""

    def run(self, command: str) -> Result:
        return Result(command, 0, "pswpin 0\npswpout 7\noom_kill 0\n", "")

    def start(self, command: str, timeout_s: float) -> FakeGuest:
        self.kernel_log += self.logs.get(command, "")
        self.command = command
        return self

    def wait(self) -> Result:
        answer = self.answers.get(self.command, 0)
        if isinstance(answer, Exception):
            raise answer
        return Result(self.command, answer, "", "it said so")


def ran(
    names: str, *, starts: Sequence[Exception | None] = (), at_end: Exception | None = None, **options: Any
) -> tuple[list[tuple[str, str]], list[str], int]:
    """Each test with its result, the reasons, and how many guests were booted. A test's name is its command."""
    guest_options = {name: options.pop(name) for name in ("answers", "logs") if name in options}
    boots = 0

    @contextlib.contextmanager
    def prepare() -> Iterator[Bench]:
        nonlocal boots
        boots += 1
        if boots <= len(starts) and (error := starts[boots - 1]):
            raise error
        yield Bench(FakeGuest(**{"answers": {}, **guest_options}))  # type: ignore[arg-type]
        if at_end:
            raise at_end

    tests = [Test(name, name, 1) for name in names.split()]
    part = Part("ext4", prepare, lambda _: tests, options.pop("inapplicable", {}))
    found = list(run_suite(Suite("suite", [part], options.pop("missing", "")), **options))
    return [(one.test, one.result) for one in found], [one.why for one in found if one.why], boots


def test_each_test_runs_once_in_one_guest() -> None:
    """What fails is told with its last words, and does not stop the rest."""
    found, why, boots = ran("a b c", answers={"b": 3})
    assert found == [("a", "passed"), ("b", "failed"), ("c", "passed")]
    assert why == ["exit status 3: it said so"]
    assert boots == 1


def test_a_lost_guest_costs_one_test() -> None:
    """The others run in another guest."""
    found, why, boots = ran("a b c", answers={"b": LostGuestError("silent")})
    assert found == [("a", "passed"), ("b", "lost"), ("c", "passed")]
    assert (why, boots) == (["silent"], 2)


def test_a_test_that_does_not_end_has_failed() -> None:
    """Its guest goes on."""
    found, why, boots = ran("a b", answers={"a": GuestFailedError("timed out: a\noutput")})
    assert found == [("a", "failed"), ("b", "passed")]
    assert (why, boots) == (["timed out: a"], 1)


def test_a_kernel_that_complains_has_failed() -> None:
    """Whatever the test's exit status is."""
    found, why, _ = ran("a b", logs={"a": "Buffer I/O error on dev nbd0\n"})
    assert found == [("a", "failed"), ("b", "passed")]
    assert "I/O error" in why[0]


def test_a_guest_that_does_not_come_up_is_tried_again_once() -> None:
    """And told. After the second one, each test of the part has its reason."""
    assert ran("a", starts=[LostGuestError("no boot")])[0] == [("at the start", "lost"), ("a", "passed")]
    found, why, boots = ran("a", starts=[LostGuestError("no boot")] * 2)
    assert (found, boots) == ([("at the start", "lost")] * 2 + [("all", "not run")], 2)
    assert why == ["no boot", "no boot", "no guest for it: no boot"]


def test_a_guest_that_does_not_come_up_in_the_middle_is_told() -> None:
    """Those that are left run in the next one."""
    found, why, boots = ran(
        "a b c", answers={"b": LostGuestError("silent")}, starts=[None, GuestFailedError("no worker"), None]
    )
    assert found == [("a", "passed"), ("b", "lost"), ("at the start", "failed"), ("c", "passed")]
    assert (why, boots) == (["silent", "no worker"], 3)


def test_an_end_that_fails_is_told() -> None:
    """A device that cannot be detached, for example."""
    assert ran("a", at_end=GuestFailedError("busy"))[0] == [("a", "passed"), ("at the end", "failed")]
    assert ran("a", at_end=LostGuestError("silent"))[0] == [("a", "passed"), ("at the end", "lost")]


@pytest.mark.parametrize("before", [0, 1])
def test_an_end_that_fails_is_told_when_time_is_up(before: int) -> None:
    """With tests left, whether one has run or none."""
    asked = iter([False] * (1 + before) + [True] * 9)
    found, why, boots = ran("a b", at_end=GuestFailedError("busy"), is_over=lambda: next(asked))
    ends = [("at the end", "failed")]
    assert found == [("a", "passed")][:before] + ends + [("a", "not run"), ("b", "not run")][before:]
    assert (why, boots) == (["busy", *["time was up"] * (2 - before)], 1)


def test_what_does_not_apply_and_what_has_no_time_is_not_run() -> None:
    """Each with its reason."""
    assert ran("a b", inapplicable={"b": "no such"})[0] == [("b", "not run"), ("a", "passed")]
    found, why, boots = ran("a", is_over=lambda: True)
    assert (found, why, boots) == ([("all", "not run")], ["time was up"], 0)
    assert ran("a", missing="no folder")[:2] == ([("all", "not run")], ["no folder"])
    assert ran("a1 b1", patterns=["b*"])[0] == [("b1", "passed")]
    assert ran("a", on=["ext?"])[0] == [("a", "passed")]
    assert ran("a", on=["xfs"])[::2] == ([], 0)


def test_tests_of_data_have_the_first_turns() -> None:
    """One of each group in turn, each test once, and none that was not asked for or is in no group."""
    groups = [["g/2", "g/4", "g/9"], ["g/4", "g/5"]]
    assert xfstests.in_turn(groups, ["g/1", "g/2", "g/3", "g/4", "g/5"]) == ["g/2", "g/4", "g/5"]


# Tests that pass, one that does not, one that hangs for ever, and one that ends it all. Each call leaves a line.
FAKE_CHECK = """#!/bin/sh
echo "$@" >> calls
echo "FSTYP -- ext4"
for name; do
    printf "%s " "$name"
    case $name in
        generic/3) echo "- output mismatch"; echo "    +wrong" ;;
        generic/4) [ -e was_hung ] || { touch was_hung; sleep 1000; }; echo " 4s" ;;
        generic/6) exit 1 ;;
        *) sleep 0.1; echo " 1s" ;;
    esac
done
echo "Ran: $*"
echo "Passed all tests"
"""


def test_one_check_runs_many_tests(tmp_path: Path) -> None:
    """Each call tells of its test alone. What hangs is killed with the call, and the next test has another `check`, as
    has the one after a `check` that ended by itself."""
    (tmp_path / "check").write_text(FAKE_CHECK)
    (tmp_path / "check").chmod(0o755)
    script = Path(__file__).parent / "inside/check_in_turn.sh"
    found: list[tuple[str, str] | None] = []
    names = [f"generic/{number}" for number in range(1, 9)]
    for name, row in xfstests.in_rows(names):
        command = ["sh", str(script), str(tmp_path), str(tmp_path / "work"), *row.split()]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=2 if name == "generic/4" else 60
            )
        except subprocess.TimeoutExpired:
            found.append(None)
        else:
            assert done.stderr == "", "what hung has been killed"
            found.append(xfstests.judged(Result("x", done.returncode, done.stdout, done.stderr)))
    failed = ("failed", "generic/3 - output mismatch +wrong")
    lost = ("failed", "generic/6")
    passed = ("passed", "")
    assert found == [passed, passed, failed, None, passed, lost, passed, passed]
    rows = [" ".join(names[at:]) for at in (0, 4, 6)]
    assert (tmp_path / "calls").read_text().splitlines() == rows


def test_rows_of_tests() -> None:
    """Ten for each `check`."""
    names = [str(number) for number in range(12)]
    rows = dict(xfstests.in_rows(names))
    assert rows["0"] == " ".join(names[:10])
    assert rows["7"] == "7 8 9"
    assert (rows["10"], rows["11"]) == ("10 11", "11")


def test_an_outcome_has_a_reason_unless_it_passed() -> None:
    """Nothing is skipped in silence."""
    with pytest.raises(ValueError, match="reason"):
        Outcome("fio", "ext4", "a", "not run")
    with pytest.raises(ValueError, match="no such result"):
        Outcome("fio", "ext4", "a", "skipped", why="x")


def test_outcomes_of_earlier_runs_are_kept(tmp_path: Path) -> None:
    """A part that runs again replaces all of its old ones, a test that runs alone its own."""
    old = [Outcome("fio", "ext4", "a", "passed"), Outcome("fio", "ext4", "b", "passed")]
    other = Outcome("fio", "xfs", "a", "passed")
    new = Outcome("fio", "ext4", "a", "failed", why="x")
    save(tmp_path / "build/world.json", [*old, other])
    kept = load(tmp_path / "build/world.json")
    assert merged(kept, [new], whole=True) == [other, new]
    assert merged(kept, [new], whole=False) == [old[1], other, new]


def test_the_page_has_every_reason_once(tmp_path: Path) -> None:
    """Tests with the same reason share a row, and what is outside of the marks stays."""
    found = [
        Outcome("ltp", "swap", "a", "passed", pages_out=1200, date="2026-01-02"),
        Outcome("ltp", "swap", "b", "not run", why="too | little", date="2026-01-02"),
        Outcome("ltp", "swap", "c", "not run", why="too | little", date="2026-01-02"),
    ]
    text = page_of(found, ["ltp", "fio"])
    assert "| fio, not run |  | all | it has not been run yet |" in text
    assert "| ltp | swap |  | 2026-01-02 | 3 | 1 | 0 | 0 | 2 | 1,200 |" in text
    assert "| ltp, not run | swap | b, c | too \\| little |" in text
    page = tmp_path / "proof.md"
    page.write_text("before\n<!-- begin: make world -->\nold\n<!-- end: make world -->\nafter\n")
    put_page(text, page)
    put_page(text, page)
    assert page.read_text() == f"before\n<!-- begin: make world -->\n{text}<!-- end: make world -->\nafter\n"


def test_the_page_counts_very_many_names() -> None:
    """Its row is to be read."""
    found = [Outcome("xfstests", "xfs", f"generic/{number:03}", "not run", why="time was up") for number in range(600)]
    (row,) = [line for line in page_of(found).splitlines() if "time was up" in line]
    assert "generic/000, generic/001," in row
    assert "generic/023 and 576 more |" in row
    assert "generic/023 |" in page_of(found[:24])


@pytest.mark.parametrize(
    ("judge", "status", "stdout", "expected"),
    [
        (fio.judged, 0, "world: (groupid=0, jobs=1): err= 0: pid=7", "passed"),
        (fio.judged, 0, "nothing ran", "failed"),
        (fio.judged, 1, "verify: bad header rand_seed, got 0", "failed"),
        (stress_ng.judged, 0, "stress-ng: info: successful run completed", "passed"),
        (stress_ng.judged, 4, "stress-ng: info: rdrand stressor will be skipped", "not run"),
        (stress_ng.judged, 1, "stress-ng: error: [9] No stress workers invoked", "not run"),
        (stress_ng.judged, 0, "stress-ng: info: [9] skipped: 0\nstress-ng: info: [9] passed: 1: vm (1)", "passed"),
        (stress_ng.judged, 0, "stress-ng: info: [9] skipped: 1: mlock (1)", "not run"),
        (stress_ng.judged, 2, "stress-ng: fail: vm: detected 3 bit errors", "failed"),
        (stress_ng.judged, 2, "stress-ng: info: [9] skipped: 1: mlock (1)\nstress-ng: info: [9] failed: 1", "failed"),
        (stress_ng.judged, 0, "stress-ng: fail: [8] vm: 3 errors\nstress-ng: info: [9] skipped: 1: mlock", "failed"),
        (stress_ng.judged, 3, "stress-ng: error: [8] vm: wrong\nstress-ng: info: [9] skipped: 1: mlock", "failed"),
        (stress_ng.judged, 2, "stress-ng: error: [9] No stress workers invoked", "failed"),
        (stress_ng.judged, 3, "stress-ng: info: [9] mlock: too little memory", "not run"),
        (stress_ng.judged, 1, "stress-ng: error: [9] unknown option", "failed"),
        (ltp.judged, 0, "swapon01.c:27: TPASS: fine", "passed"),
        (ltp.judged, 32, "tst.c:1: TCONF: no such file system", "not run"),
        (ltp.judged, 2, "tst.c:1: TBROK: Test killed!", "failed"),
        (blktests.judged, 0, "block/003 => nbd0 (trim)\nblock/003 => nbd0 (trim)  [passed]\n  runtime ...", "passed"),
        (blktests.judged, 0, "block/011 => nbd0 (disable PCI)  [not run]\n    no PCI device", "not run"),
        (blktests.judged, 1, "block/003 => nbd0 (trim)  [failed]\n    exited with 1", "failed"),
        (xfstests.judged, 0, "generic/001   12s", "passed"),
        (xfstests.judged, 0, "generic/001  11s ...  12s", "passed"),
        (xfstests.judged, 1, "generic/001   12s", "failed"),
        (xfstests.judged, 0, "generic/001  11s ... ", "failed"),
        (xfstests.judged, 0, "generic/001   12s\n_check_dmesg: something found in dmesg (see x)", "failed"),
        (xfstests.judged, 0, "generic/009  [not run] no fiemap", "not run"),
        (xfstests.judged, 0, "generic/013 - output mismatch (see x)\n    +lost", "failed"),
        (xfstests.judged, 1, "generic/009  [not run] no fiemap", "failed"),
        (xfstests.judged, 0, "", "failed"),
    ],
)
def test_a_suite_is_believed_only_in_its_own_words(judge: Judge, status: int, stdout: str, expected: str) -> None:
    """What it does not say in so many words has failed."""
    result, why = judge(Result("x", status, stdout, ""))
    assert result == expected
    assert bool(why) == (result != "passed")
