# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ranks of the engine's C rooms: includes and calls go to the same or a lower rank, and files make no circle."""

from __future__ import annotations

import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ENGINE = Path(__file__).resolve().parents[2] / "nbdnfs" / "engine"

# Who may use what: a room includes and calls rooms of a lower rank, and itself. region and nfs do not know each other.
RANKS = {"base": 0, "region": 1, "nfs": 1, "block": 2, "nbd": 3, "binding": 4}

_INCLUDE = re.compile(r'^\s*#\s*include\s+["<]([^">]+)[">]', re.MULTILINE)


def room_of(name: str) -> str:
    """The first folder of a path relative to the engine's."""
    return name.partition("/")[0]


def may_use(user: str, used: str) -> bool:
    """Whether a file of one room may include or call one of another."""
    return user == used or RANKS[used] < RANKS[user]


def circle_in(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """Names that lead from one back to itself, [] when there are none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def files(pattern: str) -> list[str]:
    """Paths relative to the engine's folder."""
    return sorted(str(path.relative_to(ENGINE)) for path in ENGINE.rglob(pattern))


def includes() -> dict[str, set[str]]:
    """For each C file, the files of ours that it includes."""
    ours = set(files("*.h"))
    return {name: set(_INCLUDE.findall((ENGINE / name).read_text())) & ours for name in files("*.[ch]")}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """For each source, the sources that define what it calls or refers to, as nm(1) sees the objects."""
    folder = tmp_path_factory.mktemp("objects")
    flags = shlex.split(subprocess.check_output(["pkg-config", "--cflags", "libnfs"], text=True))
    python = sysconfig.get_path("include")

    def symbols(name: str) -> tuple[set[str], set[str]]:
        target = folder / (name.replace("/", "_") + ".o")
        command = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-DPy_LIMITED_API=0x030B0000", '-DLIBNFS_BUILT_WITH="0"', *flags]
        subprocess.run(
            [*command, f"-I{ENGINE}", f"-I{python}", "-O0", "-c", "-o", target, ENGINE / name], check=True, text=True
        )
        lines = subprocess.check_output(["nm", "-g", target], text=True).splitlines()
        return (
            {line.split()[-1] for line in lines if line.split()[-2] != "U"},
            {line.split()[-1] for line in lines if line.split()[-2] == "U"},
        )

    names = files("*.c")
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(names, pool.map(symbols, names), strict=True))
    home = {symbol: name for name, (defined, _) in found.items() for symbol in defined}
    return {name: {home[symbol] for symbol in used if symbol in home} - {name} for name, (_, used) in found.items()}


def test_every_file_lies_in_a_room() -> None:
    """No C file beside the rooms, and no room without a rank."""
    assert {room_of(name) for name in files("*.[ch]")} == set(RANKS)


def test_includes_go_down() -> None:
    """By full path from the engine's folder, to the same room or one of a lower rank."""
    wrong = [
        f"{name} includes {target}"
        for name, targets in includes().items()
        for target in targets
        if not (ENGINE / target).is_file() or not may_use(room_of(name), room_of(target))
    ]
    assert wrong == []


def test_includes_make_no_circle() -> None:
    """Of headers, within a room or across rooms."""
    assert circle_in(includes()) == []


def test_internal_headers_stay_in_their_room() -> None:
    """What a room shares with itself only, no other room includes."""
    wrong = [
        f"{name} includes {target}"
        for name, targets in includes().items()
        for target in targets
        if "internal" in target and room_of(name) != room_of(target)
    ]
    assert wrong == []


def test_calls_go_down(calls: dict[str, set[str]]) -> None:
    """Functions and objects of the same room or of one of a lower rank."""
    wrong = [
        f"{name} calls {target}"
        for name, targets in calls.items()
        for target in targets
        if not may_use(room_of(name), room_of(target))
    ]
    assert wrong == []


def test_calls_make_no_circle(calls: dict[str, set[str]]) -> None:
    """No two sources need each other, directly or through others."""
    assert circle_in(calls) == []


def test_a_circle_is_found() -> None:
    """The test's own eyes."""
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) == []
