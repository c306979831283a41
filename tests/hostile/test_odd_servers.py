# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each odd server: create, claim, serve a verified load, restart, and no page is wrong, nothing hangs."""

from __future__ import annotations

import pytest

from hostile import odd_servers


@pytest.mark.fake
@pytest.mark.parametrize("name", odd_servers.SERVERS)
def test_an_odd_server(name: str) -> None:
    """What cannot be used is refused, with the reason."""
    server = odd_servers.SERVERS[name]
    outcome = odd_servers.run_apart(name)
    print(outcome)
    assert not outcome.crash
    assert outcome.hung == []
    assert outcome.wrong_pages == 0
    assert outcome.errors == {}
    if server.refused_with:
        assert server.refused_with in outcome.error
    else:
        assert outcome.error == ""
        assert outcome.requests > 50
