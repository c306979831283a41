# SPDX-License-Identifier: LGPL-2.1-or-later
"""What keeper and worker agree on: values that outlive an upgrade, and a module that both can afford."""

from __future__ import annotations

import ast
from pathlib import Path

from nbdnfs.worker import protocol


def test_it_imports_nothing() -> None:
    """Neither the keeper nor the worker loads what only the other one needs."""
    tree = ast.parse(Path(protocol.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_values_of_earlier_versions() -> None:
    """A keeper meets workers of the version before it, which know these."""
    assert (protocol.PROCESS_NAME, protocol.REGION_FD, protocol.CONTROL_FD) == ("@nbdkit", 200, 201)
    assert (protocol.READY, protocol.ACTIVATE, protocol.STOLEN_STATUS) == (b"r", b"g", 80)


def test_activation() -> None:
    """With an address and without; an end of file is none, and the longest address of IPv6 fits."""
    assert protocol.is_activation(protocol.activation())
    assert protocol.address_in(protocol.activation()) == ""
    address = "fe80:1111:2222:3333:4444:5555:255.255.255.255%" + "i" * 15
    message = protocol.activation(address)
    assert len(message) <= protocol.MESSAGE_BYTES_MAX
    assert protocol.is_activation(message)
    assert protocol.address_in(message) == address
    assert not protocol.is_activation(b"")
