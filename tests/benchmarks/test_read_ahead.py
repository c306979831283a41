# SPDX-License-Identifier: LGPL-2.1-or-later
"""Traces of a guest's requests, and what the engine's read-ahead makes of them in bench/read_ahead.c."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from pathlib import Path

import pytest
import read_ahead
import vm_trace

ENGINE = Path(__file__).parents[2] / "nbdnfs/engine"

KERNELS = b"""\
             hog-412     [000] d..1.    95.314876: block_rq_issue: 43,0 W 131072 () 157864 + 256 [hog]
         kswapd0-25      [000] d..1.    95.330424: block_rq_issue: 43,0 RA 32768 () 157880 + 64 [kswapd0]
   a name [1]-413        [001] .....    95.331000: block_rq_issue: 254,0 R 4096 () 8 + 8 [a name [1]]
             hog-412     [000] d..1.    95.335461: block_rq_issue: 43,0 FF 0 () 0 + 0 [hog]
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with this tree's streams.c."""
    return read_ahead.build(ENGINE, tmp_path_factory.mktemp("read-ahead"))


def trace_of(pages: list[int]) -> str:
    """Reads of one page each."""
    return "".join(f"{at}.0 R {page} 1\n" for at, page in enumerate(pages))


_TRACE = gzip.compress(trace_of(list(range(100))).encode())


def test_lines_of_the_kernel() -> None:
    """Reads and writes of nbd devices, in pages; no other device, and no flush."""
    assert list(vm_trace.requests(KERNELS)) == ["95.314876 W 19733 32\n", "95.330424 R 19735 8\n"]


def test_what_was_written_is_there(program: Path) -> None:
    """Until the region's other slots have been taken."""
    text = "0.0 W 0 256\n" + trace_of([7, 300_000, 255])
    assert read_ahead.play(program, text, 1) == read_ahead.Guessed(3, 1, 0, 0, 0, 0)
    assert read_ahead.play(program, "0.0 W 0 256\n0.1 W 1000 256\n1.0 R 7 1\n", 1).waiting == 1


def test_patterns(program: Path) -> None:
    """A walk and a stride are guessed, and random reads are not."""
    draw = random.Random(1)
    walk = read_ahead.play(program, trace_of(list(range(2000))), 16)
    assert walk.waiting < 20
    assert walk.used >= 1980
    assert walk.fetches < 100
    stride = read_ahead.play(program, trace_of(list(range(0, 32_000, 16))), 16)
    assert stride.waiting < 20
    assert stride.fetched < 2020
    assert read_ahead.play(program, trace_of([draw.randrange(1 << 20) for _ in range(2000)]), 16).fetched < 100


@pytest.mark.parametrize(
    "text",
    [
        "0.0 R 16777216 1\n",
        "0.0 R 0 18446744073709551615\n",
        "hello\n",
        "0.0 R 1 1\n0.0 R 2\nhello\n",
        "0.0 R 2",
        "0 R 1 0\n",
    ],
)
def test_invalid_lines(program: Path, text: str) -> None:
    """Pages beyond every device, and lines that are not requests, are refused."""
    with pytest.raises(subprocess.CalledProcessError):
        read_ahead.play(program, text, 1)


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each trace, also for one without reads."""
    for name, text in (("walk.gz", trace_of(list(range(500)))), ("none.gz", "0.0 W 0 1\n")):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr(sys, "argv", ["read_ahead.py", str(tmp_path / "walk.gz"), str(tmp_path / "none.gz")])
    assert read_ahead.main() == 0
    _, walk, none = capsys.readouterr().out.splitlines()
    assert walk.split()[:2] == ["walk.gz", "500"]
    assert none.split() == ["none.gz", "0", "0", "0.000", "0", "0.00"]


@pytest.mark.parametrize(
    "content",
    [None, b"hello", gzip.compress(b"hello"), _TRACE[:-4], _TRACE[:12] + b"\xff" * 8 + _TRACE[20:]],
    ids=["missing", "no gzip", "no lines", "cut", "damaged"],
)
def test_invalid_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    """One line for the first of them."""
    if content is not None:
        (tmp_path / "a.gz").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["read_ahead.py", str(tmp_path / "a.gz")])
    assert read_ahead.main() == 65
    assert "a.gz is not a trace: record one" in capsys.readouterr().err


def test_an_engine_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line after the compiler's."""
    monkeypatch.setattr(sys, "argv", ["read_ahead.py", "--runs", "--engine", str(tmp_path)])
    assert read_ahead.main() == 69
    assert capsys.readouterr().err.splitlines()[-1].endswith("check --engine")
