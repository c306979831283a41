# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reader of the kernel's page-fault trace, on what Linux 6.1 prints."""

from __future__ import annotations

import pytest
from vmtest import faulttrace

pytestmark = pytest.mark.meta

_MAPS = """\
55d000000000-55d000021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000040000 rw-p 00000000 00:00 0
7f0000040000-7f0000050000 r-xp 00001000 fe:00 1234                       /usr/lib/x86_64-linux-gnu/libc.so.6
"""
_TRACE = """\
 nbdkit-812 [001] .....   101.250000: page_fault_user: address=0x55d000003010 ip=0x7f0000041000 error_code=0x6
 nbdkit-812 [001] .....   101.250001: <user stack trace>
 => <00007f0000041000>
 nbdkit-815 [000] d....   102.500000: page_fault_kernel: address=0x7f0000050000 ip=copy_user_enhanced error_code=0x2
"""


def test_a_recorded_trace() -> None:
    """Thread, address, and the mapping that has it, or none."""
    assert faulttrace.described(_TRACE, _MAPS) == [
        "101.250000 thread 812: page_fault_user at 0x55d000003010 (rw-p [heap] + 0x3010), ip 0x7f0000041000,"
        " error code 0x6",
        "102.500000 thread 815: page_fault_kernel at 0x7f0000050000 (nothing is mapped there any more),"
        " ip copy_user_enhanced, error code 0x2",
    ]
