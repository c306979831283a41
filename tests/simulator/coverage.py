# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which branches of the engine's C, and of the rooms keeper and kernel, the simulator and the tests take.

C: gcc --coverage without optimisation, read by gcovr. A branch is an outcome of a condition: `a && b` has four. Those
of lines that only assert are left out, because they must never be taken; those of an inline function count once.
Counters of a process that is killed are lost, as are those of a forked one that ends without exit(3).

Python: coverage.py with branches.

uncovered.toml has a reason for each function with branches that nothing takes.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from simulator.build import BUILD, PROJECT, build
from simulator.runs import simulate

FOLDER = PROJECT / "build" / "coverage"
REASONS = Path(__file__).with_name("uncovered.toml")
ASSERTS = r"^\s*(_Static_)?assert(_locked)?\("
# Another server, another allocator, no network: what needs more than this program is left to the other tests.
ENGINE_TESTS = [
    *("tests/engine", "tests/plugin", "tests/worker", "tests/nas", "tests/hostile", "tests/commands"),
    "tests/foundation/test_region_layout.py",
]
PYTHON_TESTS = ["tests/keeper", "tests/kernel"]
ROOMS_OF_PYTHON = ("nbdnfs/keeper", "nbdnfs/kernel")
# Bounded runs, for what only a call that fails can reach.
FAILING = (
    (1, {"requests": 20, "threads": 3, "loop": 0}),
    (3, {"requests": 20, "threads": 3, "loop": 0}),
    (2, {"requests": 20, "threads": 3, "loop": 1}),
)


@dataclass
class Branches:
    """Of one file; `missed` are functions (or a line, in Python) with the number of outcomes that nothing takes."""

    taken: int = 0
    of: int = 0
    missed: dict[str, int] = field(default_factory=dict)  # no Counter: Python 3.11's asdict() spoils it

    def miss(self, name: str, count: int = 1) -> None:
        self.missed[name] = self.missed.get(name, 0) + count


def run_simulator(seconds: int) -> None:
    """Seeds, and each call of a bounded run failing."""
    program = build("coverage")
    simulate(program, 1, seconds=seconds, keep=1)
    for habit in (1, 2, 3):
        simulate(program, 1, seconds=max(1, seconds // 10), habit=habit, keep=1)
    for soft_ms in (1000, 4000):
        simulate(program, 1, seconds=max(1, seconds // 10), soft_ms=soft_ms, keep=1)
    for seed, words in FAILING:
        calls = simulate(program, seed, only="", **words).summary["failable"]
        simulate(program, seed, only="", fail_at=1, fail_end=calls, keep=1, **words)


def run_engine_tests() -> int:
    """tests/engine and others that use the engine, with a build that counts; the status of pytest. Tests that compile
    a part of the engine by themselves do that with NBDNFS_TEST_CFLAGS, below FOLDER, where counters are looked for."""
    flags = {"NBDNFS_CFLAGS": "--coverage -O0 -g -fprofile-update=atomic", "NBDNFS_LDFLAGS": "--coverage"}
    python = sys.executable
    command = [
        python,
        "-W",
        "ignore",
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(FOLDER),
        "--build-lib",
        str(FOLDER / "lib"),
    ]
    subprocess.run(command, cwd=PROJECT, env=os.environ | flags, check=True, stdout=subprocess.DEVNULL)
    # pytest as a program, not as a module: the checkout must not come before the build
    command = [str(Path(python).with_name("pytest")), "-q", "-p", "no:cacheprovider", "-n", "4", "--dist", "loadfile"]
    command += [f"--basetemp={FOLDER / 'tests'}", "--max-worker-restart", "0"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER / "lib"), "NBDNFS_TEST_CFLAGS": flags["NBDNFS_CFLAGS"]}
    return subprocess.run([*command, *ENGINE_TESTS], cwd=PROJECT, env=environment, check=False).returncode


def forget() -> None:
    """What was counted before, and objects of earlier sources: gcov(1) would have their lines, too."""
    shutil.rmtree(BUILD / "objects/coverage", ignore_errors=True)
    for root in (BUILD, FOLDER):
        for counters in root.rglob("*.gcda"):
            counters.unlink()


def read_engine() -> dict[str, Branches]:
    """By file, relative to nbdnfs/engine."""
    out = FOLDER / "engine.json"
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gcovr", "--root", str(PROJECT), "--filter", "nbdnfs/engine/", "--json", str(out)]
    command += ["--exclude-branches-by-pattern", ASSERTS, "--gcov-ignore-parse-errors=all"]
    command += ["--merge-mode-functions=merge-use-line-min"]
    subprocess.run([*command, str(BUILD), str(FOLDER)], cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Branches] = {}
    for file in json.loads(out.read_text())["files"]:
        branches = found.setdefault(file["file"].removeprefix("nbdnfs/engine/"), Branches())
        for line in file["lines"]:
            if line.get("gcovr/excluded") or line.get("gcovr/noncode"):
                continue
            for branch in line["branches"]:
                if branch.get("gcovr/excluded"):
                    continue
                branches.of += 1
                if branch["count"] > 0:
                    branches.taken += 1
                else:
                    branches.miss(line.get("function_name") or str(line["line_number"]))
    return found


def run_python() -> int:
    """The tests of both rooms; the status of pytest."""
    data = FOLDER / "python.data"
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "coverage", "run", "--branch", f"--data-file={data}"]
    command += [f"--source={','.join(ROOMS_OF_PYTHON)}", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *PYTHON_TESTS], cwd=PROJECT, check=False).returncode


def read_python() -> dict[str, Branches]:
    """By file, relative to nbdnfs."""
    out = FOLDER / "python.json"
    command = [sys.executable, "-m", "coverage", "json", "-q", f"--data-file={FOLDER / 'python.data'}", "-o", str(out)]
    subprocess.run(command, cwd=PROJECT, check=True)
    found: dict[str, Branches] = {}
    for name, file in json.loads(out.read_text())["files"].items():
        summary = file["summary"]
        found[name.removeprefix("nbdnfs/")] = branches = Branches(summary["covered_branches"], summary["num_branches"])
        for function, part in file.get("functions", {}).items():
            missing = len(part["missing_branches"])
            if missing:
                branches.miss(function or "(module)", missing)
    return found


@dataclass(frozen=True)
class Reason:
    """Why nothing takes some branches of these functions; "*" stands for all of a file's."""

    file: str
    functions: tuple[str, ...]
    reason: str


def reasons() -> list[Reason]:
    tables = tomllib.loads(REASONS.read_text()).get("reason", [])
    return [Reason(one["file"], tuple(one["functions"]), one["reason"]) for one in tables]


def reason_of(known: list[Reason], file: str, function: str) -> str:
    """ "" where there is none."""
    fitting = (one.reason for one in known if one.file == file and ("*" in one.functions or function in one.functions))
    return next(fitting, "")


def page_of(engine: dict[str, Branches], python: dict[str, Branches]) -> list[str]:
    """Lines of Markdown: by folder, and what is not taken."""
    known = reasons()
    lines = ["| folder | branches | taken | |", "| --- | ---: | ---: | ---: |"]
    for title, files in (("engine", engine), ("", python)):
        folders: dict[str, Branches] = {}
        for name, one in files.items():
            sum_of = folders.setdefault("/".join(filter(None, [title, name.split("/")[0]])), Branches())
            sum_of.taken += one.taken
            sum_of.of += one.of
        if title:
            everything = Branches(sum(one.taken for one in files.values()), sum(one.of for one in files.values()))
            folders[title] = everything
        lines += [
            f"| {name} | {one.of:,} | {one.taken:,} | {100 * one.taken / max(1, one.of):.1f}% |"
            for name, one in sorted(folders.items())
        ]
    lines += ["", "Branches that nothing takes:", "", "| file | branches | in | why |", "| --- | ---: | --- | --- |"]
    unexplained = 0
    for title, files in (("engine/", engine), ("", python)):
        for name, one in sorted(files.items()):
            groups: dict[str, collections.Counter[str]] = {}
            for function, count in one.missed.items():
                groups.setdefault(reason_of(known, title + name, function), collections.Counter())[function] += count
            for reason, functions in sorted(groups.items()):
                unexplained += functions.total() if not reason else 0
                names = ", ".join(f"`{function}`" for function in sorted(functions))
                lines.append(f"| {title}{name} | {functions.total()} | {names} | {reason or '-'} |")
    lines += ["", f"Without a reason: {unexplained}."]
    return lines


def main() -> int:
    """For one's own use: python -m simulator.coverage [SECONDS]."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    forget()
    run_simulator(seconds)
    status = run_engine_tests() | run_python()
    print("\n".join(page_of(read_engine(), read_python())))
    return status


if __name__ == "__main__":
    sys.exit(main())
