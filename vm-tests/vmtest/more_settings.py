# SPDX-License-Identifier: LGPL-2.1-or-later
"""$NBDNFS_TEST_SETTINGS: lines for the configuration of the guests' devices, such as `loop = true`.

Tests whose device has a configuration of its own, and is not about its contents, add them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping


def lines(environment: Mapping[str, str] = os.environ) -> str:
    """As they are to be added, each with its newline; none where the variable is not set."""
    text = environment.get("NBDNFS_TEST_SETTINGS", "").strip()
    return f"{text}\n" if text else ""


def has_loop(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the engine's loop serves: `loop = true`. ValueError where the lines are no TOML."""
    return tomllib.loads(lines(environment)).get("loop", False) is True
