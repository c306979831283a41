# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that an earlier version named with the machine id: renamed, and never taken from anything that uses one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.nfs_server import Ganesha
from support.owner_records import HOLDER, machine

from nbdnfs import specifiers
from nbdnfs.errors import ConfigError, OwnedError
from nbdnfs.nas import backing_file, old_name, ownership

MIB = 1 << 20
MACHINE_ID = "3d1219c7c4c5404aaa1f6d2a48adfda4"
FILE_ID = "b9e750d45d3b47a2b82a46fe5dd6e8df"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with that id."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text(MACHINE_ID + "\n")
    return tmp_path


@pytest.fixture
def names(ganesha: Ganesha) -> Iterator[Path]:
    """The session server's folder; what this test's names leave there is removed at the end."""
    yield ganesha.export_path
    for path in [*ganesha.export_path.glob(f"*{MACHINE_ID}*"), *ganesha.export_path.glob(f"*{FILE_ID}*")]:
        path.rmdir() if path.is_dir() else path.unlink()


def left(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if MACHINE_ID in name or FILE_ID in name}


def test_the_file_is_renamed(ganesha: Ganesha, names: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with a line; the same file, and no record of its old name. A file that is there is left alone."""
    backing_file.create(ganesha.url(f"{MACHINE_ID}.swap"), MIB)
    inode = (names / f"{MACHINE_ID}.swap").stat().st_ino
    url = ganesha.url(f"{FILE_ID}.swap")
    old_name.adopt(url, HOLDER, root=root)
    assert left(names) == {f"{FILE_ID}.swap"}
    assert (names / f"{FILE_ID}.swap").stat().st_ino == inode
    assert f"{FILE_ID}.swap now" in caplog.text
    backing_file.create(ganesha.url(f"{MACHINE_ID}.swap"), MIB)
    old_name.adopt(url, HOLDER, root=root)
    assert left(names) == {f"{FILE_ID}.swap", f"{MACHINE_ID}.swap"}


def test_nothing_to_rename(ganesha: Ganesha, names: Path, root: Path) -> None:
    """Neither is there; the URL has no %m; or the machine has no id."""
    backing_file.create(ganesha.url(f"{MACHINE_ID}.swap"), MIB)
    old_name.adopt(ganesha.url("other.swap"), HOLDER, root=root)
    old_name.adopt(ganesha.url(f"{FILE_ID}.swap"), HOLDER, root=root / "none")
    old_name.adopt(ganesha.url(f"{FILE_ID}.swap2"), HOLDER, root=root)
    assert left(names) == {f"{MACHINE_ID}.swap"}


def test_a_file_in_use(ganesha: Ganesha, names: Path, root: Path) -> None:
    """A clone of this machine swaps to it: refused."""
    backing_file.create(ganesha.url(f"{MACHINE_ID}.swap"), MIB)
    ownership.claim(ganesha.url(f"{MACHINE_ID}.swap"), HOLDER, machine("clone"))
    with pytest.raises(OwnedError, match="clone"):
        old_name.adopt(ganesha.url(f"{FILE_ID}.swap"), HOLDER, root=root)
    assert left(names) == {f"{MACHINE_ID}.swap", f".{MACHINE_ID}.swap.owner"}


def test_a_directory_with_the_old_name(ganesha: Ganesha, names: Path, root: Path) -> None:
    """It may have other files: a person renames it."""
    (names / MACHINE_ID).mkdir()
    backing_file.create(ganesha.url(f"{MACHINE_ID}/a.swap"), MIB)
    try:
        with pytest.raises(ConfigError) as caught:
            old_name.adopt(ganesha.url(f"{FILE_ID}/a.swap"), HOLDER, root=root)
    finally:
        (names / MACHINE_ID / "a.swap").unlink()
    assert f"mv {names}/{MACHINE_ID} {names}/{FILE_ID}" in caught.value.hint


def test_the_ids_of_this_test(root: Path) -> None:
    """As specifiers has them."""
    assert (specifiers.machine_id(root), specifiers.raw_machine_id(root)) == (FILE_ID, MACHINE_ID)
