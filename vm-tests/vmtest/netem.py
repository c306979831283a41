# SPDX-License-Identifier: LGPL-2.1-or-later
"""A poorer network, in a guest: tc-netem(8)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vmtest.guest import Guest


@contextlib.contextmanager
def delayed(guest: Guest, delay_ms: float, *, loss_percent: float = 0) -> Iterator[None]:
    """Every packet that leaves the guest waits so long first: that much more for each round trip. Some are lost."""
    if not delay_ms and not loss_percent:
        yield
        return
    loss = f" loss {loss_percent:g}%" if loss_percent else ""
    guest.run(f"tc qdisc add dev eth0 root netem delay {delay_ms:g}ms limit 10000{loss}")
    yield
    guest.run("tc qdisc del dev eth0 root")
