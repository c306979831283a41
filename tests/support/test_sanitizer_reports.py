# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a sanitizer reports in a test reaches the terminal, with the test's name, and fails the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 60.0

FAULTY_C = r"""
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static int shared;

static void *increment(void *context) {
    for (int i = 0; i < 1000; i++)
        shared++;
    return context;
}

void race(void) {
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], 0, increment, 0);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], 0);
}

int overflow(int size) {
    char *buffer = malloc(size);
    memset(buffer, 1, size);
    int past_the_end = buffer[size];
    free(buffer);
    return past_the_end;
}

int shift(int bits) {
    return 1 << bits;
}
"""

TESTS = """
import ctypes
import subprocess
import sys

def test_before():
    pass

def test_faulty():
    {statement}

def test_after():
    pass
"""


RUNS_IN_A_CHILD = "subprocess.run([sys.executable, '-c', {statement!r}])"
FLAGS = {
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fsanitize-undefined-trap-on-error"],
}


def run_sanitized(folder: Path, kind: str, call: str, how: str = "{statement}") -> subprocess.CompletedProcess[str]:
    """Run three tests, the second of which calls the library, under the sanitizer."""
    statement = how.format(statement=f"import ctypes; ctypes.CDLL('./faulty.so').{call}")
    (folder / "faulty.c").write_text(FAULTY_C)
    (folder / "test_three.py").write_text(TESTS.format(statement=statement))
    subprocess.run(
        ["gcc", *FLAGS[kind], "-g", "-fPIC", "-shared", "-pthread", "-o", "faulty.so", "faulty.c"],
        cwd=folder,
        check=True,
        timeout=DEADLINE_S,
    )
    run_under_sanitizer = [str(REPOSITORY / "tools/run_sanitized.py"), kind, str(folder / "reports")]
    pytest_options = ["-p", "support.sanitizer_reports", "-p", "no:cacheprovider", "-c", os.devnull]
    return subprocess.run(
        [
            *(sys.executable, *run_under_sanitizer),
            *(sys.executable, "-m", "pytest", *pytest_options, f"--rootdir={folder}", "test_three.py"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")},
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def test_a_race_fails_the_test_it_is_in(tmp_path: Path) -> None:
    """ThreadSanitizer goes on: the one test has an error with the report, its neighbours pass."""
    done = run_sanitized(tmp_path, "thread", "race()")
    assert done.returncode != 0
    assert "ERROR at teardown of test_faulty" in done.stdout
    assert "data race" in done.stdout
    assert "increment" in done.stdout
    assert "3 passed, 1 error" in done.stdout
    assert "data race" in done.stderr


@pytest.mark.parametrize(
    ("call", "words"), [("overflow(8)", "heap-buffer-overflow"), ("shift(99)", "AddressSanitizer: ILL")]
)
def test_what_ends_the_process_names_its_test(tmp_path: Path, call: str, words: str) -> None:
    """Memory errors and undefined behaviour end the process: the report and the test's name come after that."""
    done = run_sanitized(tmp_path, "address", call)
    assert done.returncode != 0
    assert words in done.stderr
    assert "the run ended during test_three.py::test_faulty" in done.stderr


def test_without_reports_nothing_changes(tmp_path: Path) -> None:
    """A clean run passes."""
    done = run_sanitized(tmp_path, "thread", "shift(3)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_a_report_of_a_child_counts(tmp_path: Path) -> None:
    """A report of a process that a test started fails the run even if the test does not look at its status."""
    done = run_sanitized(tmp_path, "address", "overflow(8)", RUNS_IN_A_CHILD)
    assert done.returncode != 0
    assert "ERROR at teardown of test_faulty" in done.stdout
    assert "heap-buffer-overflow" in done.stderr
