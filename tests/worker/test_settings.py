# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plugin's settings: what is understood, and what is refused."""

from __future__ import annotations

import pytest

from nbdnfs import defaults
from nbdnfs.errors import ConfigError
from nbdnfs.worker import settings

URL = "nfs://nas/export/box.swap"
BOOT = "0123456789abcdef" * 2


def test_defaults() -> None:
    """The URL alone: the C engine, memory locked where that is possible, and neither a keeper nor an owner record."""
    found = settings.parse({"url": URL})
    assert (found.url, found.address, found.engine, found.lock) == (URL, None, "c", "wanted")
    assert (found.without, found.control_fd, found.owner, found.loop) == ((), None, {}, False)
    assert found.clients_fd is None
    assert found.numbers == {"connections": defaults.CONNECTIONS}


def test_everything() -> None:
    """What a keeper gives."""
    found = settings.parse(
        {
            "url": URL,
            "address": "192.0.2.7",
            "lock": "required",
            "realtime": "no",
            "without": "oom,heap",
            "connections": "2",
            "encrypt": "1",
            "region_fd": "200",
            "control_fd": "201",
            "owner": f"{BOOT}/10000",
            "owner_record": ".box.swap.owner",
        }
    )
    assert (found.address, found.lock, found.control_fd) == ("192.0.2.7", "required", 201)
    assert found.without == ("oom", "heap", "realtime")
    assert found.numbers == {"connections": 2, "encrypt": 1, "region_fd": 200}
    assert found.owner == {
        "owner_path": "/.box.swap.owner",
        "owner_identity": f"\nboot {BOOT}\n",
        "owner_refresh_ms": 10000,
    }


def test_what_serve_gives() -> None:
    """A pipe for notes about clients."""
    assert settings.parse({"url": URL, "clients_fd": "10"}).clients_fd == 10
    with pytest.raises(ConfigError, match="clients_fd cannot be 'x'"):
        settings.parse({"url": URL, "clients_fd": "x"})


@pytest.mark.parametrize(
    ("query", "setting", "is_nfs4", "is_through_libnfs"),
    [
        ("", "wire", False, False),
        ("?version=3&uid=4", "wire", False, False),
        ("?uid=4&version=4", "wire", True, True),
        ("?version=3", "libnfs", False, True),
    ],
)
def test_transfers(query: str, setting: str, is_nfs4: bool, is_through_libnfs: bool) -> None:
    """NFSv4 goes through libnfs, NFSv3 on request."""
    found = settings.parse({"url": URL + query, "transport": setting})
    assert (found.is_nfs4, found.is_through_libnfs) == (is_nfs4, is_through_libnfs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": URL, "colour": "red"},
        {"lock": "off"},
        {"url": URL, "without": "luck"},
        {"url": URL, "connections": "0"},
        {"url": URL, "connections": "four"},
        {"url": URL, "region_fd": "-1"},
        {"url": URL, "encrypt": "yes"},
        {"url": URL, "encrypt": "1", "engine": "libnfs-python"},
        {"url": URL, "owner": "box/10000", "owner_record": ".x"},
        {"url": URL, "owner": f"{BOOT}/10000"},
        {"url": URL, "owner": f"{BOOT}/soon", "owner_record": ".x"},
    ],
)
def test_refused(wrong: dict[str, str]) -> None:
    """Each with what would have been right."""
    with pytest.raises(ConfigError) as caught:
        settings.parse(wrong)
    assert caught.value.hint
