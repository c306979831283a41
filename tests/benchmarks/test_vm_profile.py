# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose the instructions are that a plugin of QEMU counted by address."""

from __future__ import annotations

from collections import Counter

import pytest
import vm_profile
from vmtest.outcome import HarnessError

KALLSYMS = """\
ffffffff81000000 T _stext
ffffffff81000100 T tcp_sendmsg
ffffffff81000200 t schedule
ffffffff81000300 d not_a_function
ffffffff81000400 t shrink_folio_list
ffffffff81000500 t __handle_mm_fault
ffffffff81000600 t handle_edge_irq
ffffffff81000700 t do_sys_poll
ffffffffc0000000 t nbd_queue_rq\t[nbd]
ffffffffc0000100 t rpc_call_sync\t[sunrpc]
"""
WORKER = """\
555500000000-555500001000 r--p 00000000 08:01 7 /usr/sbin/nbdkit
555500001000-555500003000 r-xp 00001000 08:01 7 /usr/sbin/nbdkit
7f0000000000-7f0000010000 r-xp 00000000 08:01 8 /usr/lib/libc.so.6
7fff00000000-7fff00002000 r-xp 00000000 00:00 0
"""


def test_a_kernel_function_is_told_by_its_name_or_its_module() -> None:
    """From its start to the next function's; data do not count."""
    symbols = vm_profile.kernel_symbols(KALLSYMS)
    assert symbols.at(0xFFFFFFFF810001FF) == ("tcp_sendmsg", "network")
    assert symbols.at(0xFFFFFFFF81000300) == ("schedule", "scheduler, timers, interrupts")
    assert symbols.at(0xFFFFFFFF81000410)[1] == "memory management, others of the kernel"
    assert symbols.at(0xFFFFFFFF81000500)[1] == "memory management, others of the kernel"
    assert symbols.at(0xFFFFFFFF81000600)[1] == "scheduler, timers, interrupts"
    assert symbols.at(0xFFFFFFFF81000700)[1] == "system calls"
    assert symbols.at(0xFFFFFFFFC0000000)[1] == "nbd of the kernel"
    assert symbols.at(0xFFFFFFFFC0000200)[1] == "NFS and RPC of the kernel"


def test_user_space_is_told_by_process_and_file() -> None:
    """By executable mappings; what lies in none of them is another program's."""
    symbols = vm_profile.user_symbols({"nbdkit 12": WORKER})
    assert symbols.at(0x555500001000) == ("nbdkit", "nbdkit: nbdkit")
    assert symbols.at(0x7F0000000FFF) == ("libc.so.6", "nbdkit: libc.so.6")
    assert symbols.at(0x7FFF00000000) == ("memory", "nbdkit: memory")
    for outside in (0x1000, 0x555500000800, 0x555500003000, 0x7FFF00002000):
        assert symbols.at(outside)[1] == "other programs"


def test_programs_at_the_same_addresses() -> None:
    """An address that two of them share counts for neither; the rest counts for the program it belongs to."""
    maps = {
        "agent 5": "401000-497000 r-xp 00000000 08:01 9 /usr/local/bin/agent\n",
        "python3 6": "41f000-6d2000 r-xp 00000000 08:01 10 /usr/bin/python3.11\n",
        "python3 7": "41f000-6d2000 r-xp 00000000 08:01 10 /usr/bin/python3.11\n",
    }
    symbols = vm_profile.user_symbols(maps)
    assert symbols.at(0x402000)[1] == "the stress program"
    assert symbols.at(0x420000)[1] == "several programs"
    assert symbols.at(0x4A0000)[1] == "python3: python3.11"


def test_the_table_needs_pages() -> None:
    """Nothing was swapped: an error, and no figure."""
    with pytest.raises(HarnessError, match="nothing was swapped to b"):
        vm_profile.table("title", {"a": (Counter(), 1, 0), "b": (Counter(), 0, 0)}, top=1)


def test_the_table_is_for_each_page() -> None:
    """Each column is divided by its own pages; the sum counts what has no row, too."""
    columns = {"a": (Counter({"x": 1000, "y": 200}), 10, 5), "b": (Counter({"x": 50}), 5, 20)}
    lines = vm_profile.table("title", columns, top=1).splitlines()
    assert lines[0] == "title"
    assert [line.split()[-2:] for line in lines[1:]] == [["a", "b"], ["100", "10"], ["120", "10"], ["0.50", "4.00"]]
