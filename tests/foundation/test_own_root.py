# SPDX-License-Identifier: LGPL-2.1-or-later
"""The root that the thread of a keeper's loop has while swap is on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdnfs import _own_root
from nbdnfs.kernel import state
from nbdnfs.own_root import OwnRoot

FOLDERS = {"dev", "proc", "run", "sys"}


def in_a_thread(work: Callable[[], None]) -> None:
    """A thread that ends takes its root with it: nothing is left to the tests that follow."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def entered() -> OwnRoot:
    said: list[str] = []
    own = OwnRoot(said.append)
    own.enter()
    assert said == []
    return own


def test_it_has_the_kernels_own_file_systems_and_nothing_else() -> None:
    """What is there is what is there for all others; and all is back afterwards."""
    before = set(os.listdir("/"))
    identity = {name: os.stat(f"/{name}") for name in FOLDERS}

    def work() -> None:
        own = entered()
        assert set(os.listdir("/")) == FOLDERS
        assert os.getcwd() == "/"
        for name, found in identity.items():
            assert os.path.samestat(os.stat(f"/{name}"), found)
        own.leave()
        assert set(os.listdir("/")) == before
        own.leave()

    in_a_thread(work)


def test_other_threads_keep_theirs() -> None:
    """One that was there before, such as the one that starts programs."""
    found: list[set[str]] = []
    is_entered, is_looked = threading.Event(), threading.Event()

    def look() -> None:
        is_entered.wait(30)
        found.append(set(os.listdir("/")))
        is_looked.set()

    def work() -> None:
        entered()
        is_entered.set()
        assert is_looked.wait(30)

    other = threading.Thread(target=look)
    other.start()
    in_a_thread(work)
    other.join(30)
    assert found[0] > FOLDERS


def test_it_keeps_no_mount_busy() -> None:
    """Whatever else is mounted is not in its namespace, which would hold it after it has been unmounted elsewhere."""

    def work() -> None:
        entered()
        lines = Path("/proc/thread-self/mountinfo").read_text().splitlines()
        assert sorted(line.split()[4] for line in lines) == ["/", *(f"/{name}" for name in sorted(FOLDERS))]

    in_a_thread(work)


def test_what_is_mounted_outside_is_seen() -> None:
    """A keeper must not take down a device that is mounted, though the mount is not in its own namespace."""
    program = (
        "from nbdnfs.kernel import state; from nbdnfs.own_root import OwnRoot; own = OwnRoot(print);"
        " before = {mount.mount_point for mount in state.mounts()}; own.enter();"
        " print(sorted(before - {mount.mount_point for mount in state.mounts()}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n", done.stderr
    assert state.mounts()


def test_a_kernel_that_refuses_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper goes on with the root that it has."""

    def refuse() -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_own_root, "enter", refuse)
    said: list[str] = []
    own = OwnRoot(said.append)
    own.enter()
    own.leave()
    assert len(said) == 1
    assert "cannot leave the root file system (Operation not permitted)" in said[0]
