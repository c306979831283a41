# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reader of the kernel's allocation histogram, on what Linux 6.1 prints."""

from __future__ import annotations

import pytest
from vmtest import allocations
from vmtest.outcome import GuestFailedError

pytestmark = pytest.mark.meta

_RECORDED = """\
# event histogram
#
# trigger info: hist:keys=stacktrace,gfp_flags.hex:vals=hitcount:sort=hitcount:size=8192 if common_pid == 303 [active]
#

{ stacktrace:
         __napi_alloc_skb+0x162/0x1c0
         page_to_skb+0x207/0x4e0 [virtio_net]
         receive_buf+0x448/0x20e0 [virtio_net]
, gfp_flags: 20a20} hitcount:          1
{ stacktrace:
         alloc_skb_with_frags+0xc2/0x200
         sock_alloc_send_pskb+0x243/0x280
         unix_stream_sendmsg+0x1c5/0x5c0
         __sock_sendmsg+0x5c/0x70
         __sys_sendto+0x122/0x170
         entry_SYSCALL_64_after_hwframe+0x6e/0xd8
, gfp_flags: 400c00} hitcount:        348

Totals:
    Hits: 349
    Entries: 2
    Dropped: 3
"""


def test_a_recorded_histogram() -> None:
    """Sites with their functions, flags and hits, the most frequent first; what the kernel dropped."""
    histogram = allocations.parse(_RECORDED)
    assert [(site.hits, site.flags) for site in histogram.sites] == [(348, 0x400C00), (1, 0x20A20)]
    assert histogram.dropped == 3
    assert histogram.sites[1].functions == ("__napi_alloc_skb", "page_to_skb", "receive_buf")
    assert histogram.sites[0].flag_names == "DIRECT_RECLAIM|KSWAPD"
    assert not any(site.may_enter_io for site in histogram.sites)
    assert "alloc_skb_with_frags < sock_alloc_send_pskb < unix_stream_sendmsg < __sock_sendmsg" in histogram.table()


@pytest.mark.parametrize("flags", ["400cc0", "400c40", "400c80"])
def test_io_and_fs_are_told(flags: str) -> None:
    """GFP_KERNEL has both, GFP_NOFS one of them."""
    histogram = allocations.parse(_RECORDED.replace("400c00", flags))
    assert [site.hits for site in histogram.sites if site.may_enter_io] == [348]


def test_what_is_not_understood() -> None:
    """An entry of another shape, or no totals, is an error and not an empty table."""
    for text in ("", _RECORDED.replace("gfp_flags: ", "gfp: ")):
        with pytest.raises(GuestFailedError, match="not understood"):
            allocations.parse(text)
