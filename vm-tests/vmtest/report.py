# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pytest plugin: a test whose guest was lost is reported as "lost", a category beside failed and passed.

The exit status is that of a failure all the same.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from vmtest.outcome import LostGuestError


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember in the report that the guest was lost."""
    report = yield
    report.lost = call.excinfo is not None and call.excinfo.errisinstance(LostGuestError)  # type: ignore[attr-defined]
    return report


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Category, letter and word for a lost guest; everything else is pytest's own."""
    if report.failed and getattr(report, "lost", False):
        return "lost", "L", "LOST"
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Lost guests at length: pytest does so for its own categories alone."""
    lost = terminalreporter.getreports("lost")
    if lost:
        terminalreporter.write_sep("=", "LOST GUESTS")
    for report in lost:
        terminalreporter.write_sep("_", report.nodeid)
        report.toterminal(terminalreporter._tw)
