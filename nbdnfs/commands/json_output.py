# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports for programs: JSON on stdout."""

from __future__ import annotations

import json


def print_list(items: list[dict[str, object]]) -> None:
    """Print a JSON array, indented."""
    print(json.dumps(items, indent=2))
