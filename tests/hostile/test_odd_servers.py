# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each odd server: create, claim, serve a verified load, restart, and no page is wrong, nothing hangs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from hostile import odd_servers
from hostile.odd_servers import Outcome

SIDE_BY_SIDE = 4


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """The tests that were chosen, some at a time: they mostly wait."""
    chosen = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = [str(item.callspec.params["name"]) for item in chosen if item.function is test_an_odd_server]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {name: pool.submit(odd_servers.run_apart, name) for name in names}


@pytest.mark.fake
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", odd_servers.SERVERS)
def test_an_odd_server(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """What cannot be used is refused, with the reason."""
    server = odd_servers.SERVERS[name]
    outcome = outcomes[name].result()
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
