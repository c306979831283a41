# SPDX-License-Identifier: LGPL-2.1-or-later
"""Suites that Debian does not package. Whoever runs them builds them, in the guest's Debian, and names the folder.

Nothing of theirs is here, and nothing here builds them.
"""

from __future__ import annotations

from world.benches import Place


def missing(place: Place, name: str, found_by: str) -> str:
    """Why the suite `name` cannot run; empty if it can. `found_by`: a file that its folder has."""
    folder = place.extras.get(name)
    if folder is None:
        return f"no folder was given: make world {name.upper()}=FOLDER"
    return "" if (folder / found_by).exists() else f"its folder has no {found_by}"
