# SPDX-License-Identifier: LGPL-2.1-or-later
"""What $NBDNFS_TEST_SETTINGS adds to the guests' configurations."""

from __future__ import annotations

import pytest
from vmtest import more_settings

pytestmark = pytest.mark.meta


def test_none() -> None:
    """Nothing is added where it is not set, or empty."""
    for environment in ({}, {"NBDNFS_TEST_SETTINGS": " "}):
        assert more_settings.lines(environment) == ""
        assert not more_settings.has_loop(environment)


def test_some() -> None:
    """Lines of TOML as they are; one of them may have the engine's loop serve."""
    environment = {"NBDNFS_TEST_SETTINGS": "loop = true\nthreads = 4"}
    assert more_settings.lines(environment) == "loop = true\nthreads = 4\n"
    assert more_settings.has_loop(environment)
    assert not more_settings.has_loop({"NBDNFS_TEST_SETTINGS": "loop = false"})
