# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has a device open, and whose processes they are, on golden trees and on the running kernel."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from nbdnfs.errors import UnreadableError
from nbdnfs.kernel import openers


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_openers(tmp_path: Path) -> None:
    """Processes whose descriptors lead to the device; others, and processes that ended, are passed over."""
    write(tmp_path, {"proc/12/comm": "dd\n", "proc/13/comm": "sh\n", "proc/5/comm": "gone\n", "proc/uptime": "1 1\n"})
    for pid, target in ((12, "/dev/nbd0"), (13, "/dev/nbd01")):
        (tmp_path / f"proc/{pid}/fd").mkdir()
        (tmp_path / f"proc/{pid}/fd/0").symlink_to("/dev/null")
        (tmp_path / f"proc/{pid}/fd/3").symlink_to(target)
    assert openers.openers("/dev/nbd0", tmp_path) == [(12, "dd")]


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOENT, errno.EACCES])
def test_a_descriptor_that_cannot_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """For want of memory it is not known where it leads; otherwise it was closed meanwhile, or is another user's."""
    write(tmp_path, {"proc/12/comm": "dd\n", "proc/12/fd/0": ""})

    def fail(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "readlink", fail)
    if number == errno.ENOMEM:
        with pytest.raises(UnreadableError, match=os.strerror(number)):
            openers.openers("/dev/nbd0", tmp_path)
    else:
        assert openers.openers("/dev/nbd0", tmp_path) == []


def test_an_open_file_has_us_as_opener(tmp_path: Path) -> None:
    """On the running kernel: the pid of this process for a file that it holds open."""
    with (tmp_path / "x").open("w") as file:
        assert os.getpid() in [pid for pid, _ in openers.openers(file.name)]


def test_descendants(tmp_path: Path) -> None:
    """Children and theirs; other processes, whatever their names look like, do not belong to them."""
    for pid, parent in ((1, 0), (10, 1), (11, 10), (12, 11), (20, 1)):
        write(tmp_path, {f"proc/{pid}/stat": f"{pid} (a) S 10 b) S {parent} 1 1"})
    write(tmp_path, {"proc/30/stat": ""})
    assert openers.descendants(10, tmp_path) == {10, 11, 12}
    assert openers.descendants(99, tmp_path) == {99}


def test_a_child_descends_from_this_process() -> None:
    """On the running kernel."""
    with subprocess.Popen(["/bin/sleep", "60"]) as child:
        assert {os.getpid(), child.pid} <= openers.descendants(os.getpid())
        child.kill()
