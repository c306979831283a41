# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pytest plugin: a test during which a sanitizer writes a report fails, and the failure has the report.

tools/run_sanitized.py names the folder of the reports in NBDNFS_SANITIZER_REPORTS. tests/conftest.py registers the
plugin when that is set.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

VARIABLE = "NBDNFS_SANITIZER_REPORTS"


class SanitizerReports:
    """The reports in a folder, and how much of each is known already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known_bytes: dict[Path, int] = {}

    def news(self) -> str:
        """What was written since the last call. One process appends to one file."""
        news = []
        for path in sorted(self._folder.glob("report.*")):
            text = path.read_bytes()
            news.append(text[self._known_bytes.get(path, 0) :].decode(errors="replace"))
            self._known_bytes[path] = len(text)
        return "".join(news)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note the test, for the case that the sanitizer ends this process in it."""
        current = self._folder / "test"
        current.write_text(item.nodeid)
        result = yield
        current.unlink()
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None]:
        """After all fixtures: what they close may be what is reported."""
        yield
        if news := self.news():
            pytest.fail(f"a sanitizer reported during this test:\n{news}", pytrace=False)


def register(config: pytest.Config) -> None:
    """Register the plugin if this is a run under a sanitizer."""
    if folder := os.environ.get(VARIABLE):
        config.pluginmanager.register(SanitizerReports(Path(folder)), "sanitizer-reports")


def pytest_configure(config: pytest.Config) -> None:
    """With `-p support.sanitizer_reports`."""
    register(config)
