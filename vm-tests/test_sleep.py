# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sleep with swap in use: hibernation is refused, whoever asks; suspend to RAM works or fails, and swap goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.nfs_server import Ganesha
from test_keeper import finish, start_hog, swapped_out
from vmtest import kept
from vmtest.guest import Guest, seen_from_guest
from vmtest.journal import refuse_tracebacks

# systemd 252 does not tell a configuration from a machine that cannot; 257 does.
_CANNOT = ("na", "no")
_HIBERNATION = ("hibernate", "hybrid-sleep", "suspend-then-hibernate")
_DROP_IN = "/run/systemd/sleep.conf.d/nbdnfs@swap0.conf"
_SWAPPED_BYTES = 64 << 20
# At once: no job was started that freezes anything. An emulated CPU takes seconds for systemctl itself.
_AT_ONCE_S = 30.0


def _first_word(guest: Guest, method: str) -> str:
    bus = "org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager"
    return guest.run(f"busctl call {bus} {method}").stdout.split()[1].strip('"')


def _drop_in_decides(guest: Guest) -> None:
    """logind's answer with and without the drop-in, everything else being as on a machine that can hibernate to the
    device. Neither Debian's cloud kernel nor one with secret memory can: a /sys/power made for this test says that they
    can. Nothing hibernates, since nobody is asked to."""
    guest.run(
        "mount -t tmpfs power /sys/power && cd /sys/power && echo freeze mem disk > state"
        " && echo '[platform] shutdown' > disk && echo 's2idle [deep]' > mem_sleep"
        " && cp /sys/block/nbd0/dev resume && echo 0 > resume_offset"
    )
    aside = "/root/drop-in"
    try:
        assert _first_word(guest, "CanHibernate") in _CANNOT
        refused = guest.run("systemctl hibernate", 60, check=False)
        assert refused.status != 0
        guest.run(f"mv {_DROP_IN} {aside}")
        assert _first_word(guest, "CanHibernate") == "yes"
        guest.run(f"mv {aside} {_DROP_IN}")
        assert _first_word(guest, "CanHibernate") in _CANNOT
    finally:
        guest.run(f"[ ! -e {aside} ] || mv {aside} {_DROP_IN}; umount /sys/power")


@pytest.mark.timeout(2400)
def test_sleep(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """The drop-in is what makes systemd refuse. With 64 MiB swapped out, each way to hibernation is refused at once,
    and the machine goes on. The kernel refuses by itself where it has secret memory. A suspend to RAM ends, either way.
    After `down` all is as it was."""
    url = seen_from_guest(ganesha.url("swap0.swap"))
    with boot(project=True, memory_mib=384, allow={"slow", "nbd"}) as guest:
        guest.settle()
        guest.run("nbdnfs install-units && systemctl daemon-reload", 120)
        guest.run(f'printf \'url = "{url}"\\nsize = "96M"\\n\' > /etc/nbdnfs/swap0.toml')
        before = [_first_word(guest, method) for method in ("CanHibernate", "CanSuspend")]
        kept.start(guest, "swap0")
        _drop_in_decides(guest)
        hog = start_hog(guest, 80, 12, 1800, "fill," + ",".join(["sequential"] * 63))
        pages = _SWAPPED_BYTES // int(guest.run("getconf PAGESIZE").stdout)
        guest.wait_until(lambda: swapped_out(guest) > pages, 300, "64 MiB in swap")
        for verb in _HIBERNATION:
            started_s = time.monotonic()
            refused = guest.run(f"systemctl {verb}", 60, check=False)
            print(f"systemctl {verb}: {refused.stderr.strip()}, after {time.monotonic() - started_s:.1f} s")
            assert refused.status != 0
            assert "Sleep verb" in refused.stderr
            assert time.monotonic() - started_s < _AT_ONCE_S
        assert guest.run("/lib/systemd/systemd-sleep hibernate", 60, check=False).status != 0
        assert _first_word(guest, "CanHibernate") in _CANNOT
        if guest.run("cat /sys/module/secretmem/parameters/enable", check=False).stdout == "Y\n":
            assert guest.run("echo disk > /sys/power/state", check=False).status != 0
        assert "ok   hibernation" in guest.run("nbdnfs doctor swap0", 120, check=False).stdout
        assert _first_word(guest, "CanSuspend") == before[1]
        suspended = guest.run("rtcwake -m mem -s 5 2>&1", 240, check=False)
        print(f"suspend to RAM under load: {suspended.status}, {suspended.stdout}")
        moved = swapped_out(guest)
        guest.wait_until(lambda: swapped_out(guest) > moved + 100, 120, "swap moves again")
        verdict = finish(guest, hog, 900)
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")
        guest.run("systemctl stop nbdnfs@swap0", 300)
        assert _first_word(guest, "CanHibernate") == before[0]
        assert guest.run("ls /run/systemd/sleep.conf.d", check=False).stdout == ""
        refuse_tracebacks(guest)
