# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test needs is found through fixtures, functions, classes and modules, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from support import nfs_server, small_filesystem
from support.fake_nfs import FakeNfsServer
from support.needs import NEEDS, _Finder
from support.nfs_server import FileOnServer


class _HasServer:
    def start(self) -> object:
        return nfs_server.Ganesha


def _through_a_class() -> object:
    return _HasServer()


def _through_a_module() -> object:
    return small_filesystem.small_filesystem


def _inside() -> object:
    return lambda: _through_a_class()


def _program() -> object:
    return subprocess.run([sys.executable, "-m", "nbdnfs", "serve", "nfs://nas/export/file"], check=False)


def _circle() -> object:
    return _other_way()


def _other_way() -> object:
    return _circle()


def _a_sentence_about_it() -> str:
    return "nbdkit serves"


@pytest.mark.parametrize("function", [_through_a_class, _through_a_module, _inside, _program])
def test_a_server_is_found(function: Callable[[], object]) -> None:
    """However it is named."""
    assert _Finder(NEEDS["server"]).needs(function)
    assert not _Finder(NEEDS["fake"]).needs(function)


@pytest.mark.parametrize("function", [_circle, _a_sentence_about_it, nfs_server.free_ports])
def test_nothing_else_is_found(function: Callable[[], object]) -> None:
    """Functions that call each other come to an end; a sentence does not name a program."""
    assert not _Finder(NEEDS["server"]).needs(function)


def test_a_fixture_is_followed(request: pytest.FixtureRequest, new_file: Callable[..., FileOnServer]) -> None:
    """A test with a file on the session's server needs that server."""
    assert request.node.get_closest_marker("server")
    assert not request.node.get_closest_marker("fake")


def test_a_fake_is_found(request: pytest.FixtureRequest) -> None:
    """A test that names a fake has the marker."""
    with FakeNfsServer(b""):
        assert request.node.get_closest_marker("fake")
