# SPDX-License-Identifier: LGPL-2.1-or-later
"""Twenty random acts of an administrator under verified load; vm-tests/random_acts.py does more of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from random_acts import EXPECTED, GUEST_MIB
from support.nfs_server import Ganesha
from vmtest.acts import ACTS, Run
from vmtest.guest import Guest
from vmtest.wheels import wheel

_SEED = 14


@pytest.mark.timeout(3600)
def test_twenty_acts(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """No wrong page, no traceback, and after each act the state is the one that is stated, and the one it must be."""
    with boot(project=True, memory_mib=GUEST_MIB, allow=EXPECTED) as guest:
        failures = Run(guest, ganesha, wheel, _SEED, list(ACTS)).do(20, stop=True)
    assert not failures, f"python vm-tests/random_acts.py --seed {_SEED} --acts 20\n" + "\n".join(failures)
