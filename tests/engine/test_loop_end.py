# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of the loop, while another thread still works for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.preloaded import compiled, run_with

HERE = Path(__file__).parent


@pytest.mark.timeout(120)
def test_a_read_that_fails_elsewhere_as_the_client_leaves(tmp_path: Path) -> None:
    """The thread that it fails in does not touch the loop after the loop could have taken the request."""
    library = compiled(HERE / "late_wake.c", tmp_path)
    run_with(library, HERE / "late_wake.py", library)
