# SPDX-License-Identifier: LGPL-2.1-or-later
"""An administrator who does the wrong thing at the wrong time, while a program swaps and checks every page."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from support.nfs_server import Ganesha
from test_keeper import finish, start_hog, swapped_out, swapping, worker_of
from vmtest import host
from vmtest.guest import Guest, seen_from_guest
from vmtest.journal import refuse_tracebacks
from vmtest.machine import Result

_UNIT = "nbdnfs@swap0"
_TRAP = "/root/trap"
# For one command, under an emulated CPU of a busy machine.
_SLOW_S = 400
# Drop-ins for printf(1): the wait for a start ends after 20 s, and a stop takes longer than that.
_SOON = r"[Service]\nExecStart=\nExecStart=/bin/sh /usr/local/lib/nbdnfs/start-timeout nbdnfs@%%i.service 20\n"
_SLOW_STOP = r"[Service]\nExecStop=\nExecStop=/bin/sleep 40\nExecStop=/usr/local/bin/nbdnfs down --service %%i\n"
_DM = "/dev/mapper/crypt0"
# dm-crypt's own self-test is the kernel's business: any key will do
_TABLE = "crypt aes-cbc-plain64 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f 0 /dev/nbd0 0"


def main_pid(guest: Guest) -> int:
    return int(guest.run(f"systemctl show -p MainPID --value {_UNIT}", _SLOW_S).stdout)


def state_of(guest: Guest) -> str:
    """The unit's, in systemd's words."""
    return guest.run(f"systemctl is-active {_UNIT}", _SLOW_S, check=False).stdout.strip()


def devices(guest: Guest) -> list[str]:
    """The devices with swap0's backend."""
    return guest.run("grep -lx nbdnfs:swap0 /sys/block/nbd*/backend", _SLOW_S).stdout.split()


def refused(result: Result, *words: str) -> None:
    """The command has ended with EX_TEMPFAIL, and has said why."""
    print(result.stderr)
    assert result.status == os.EX_TEMPFAIL, result.stderr
    for word in words:
        assert word in result.stderr


def keeper_of(guest: Guest) -> int:
    """By its record; 0 while there is none that runs."""
    command = "read -r pid rest < /run/nbdnfs/swap0/keeper && [ -e /proc/$pid ] && echo $pid || echo 0"
    return int(guest.run(command, _SLOW_S).stdout)


def one_keeper_of_two(guest: Guest, by_hand: str) -> None:
    """Kill the unit's, and start one by hand while systemd starts the next. Either is faster; the one by hand is
    refused, or the unit's waits until it has ended."""
    killed = main_pid(guest)
    guest.run(f"kill -KILL {killed}")
    job = guest.start(by_hand.replace("nbdnfs", "exec nbdnfs"), 600)
    guest.wait_until(lambda: keeper_of(guest) not in (0, killed), _SLOW_S, "a keeper of the unit, or by hand")
    is_units = keeper_of(guest) == main_pid(guest)
    print(f"the keeper is {'that of the unit' if is_units else 'by hand'}")
    if is_units:
        refused(job.wait(), "already has a keeper")
        return
    assert job.running, job.stderr
    job.kill()
    guest.wait_until(
        lambda: state_of(guest) == "active" and keeper_of(guest) == main_pid(guest), _SLOW_S, "the unit's keeper"
    )


@pytest.mark.timeout(4800)
def test_two_keepers(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """`nbdnfs run` by hand beside the unit, also while the unit's keeper is stopped; another name for the same file;
    both keepers started at the same moment. There is one keeper and one device, and no page is wrong. What lies in the
    current directory does not run."""
    with swapping(boot, ganesha) as guest:
        guest.run(f"mkdir -p {_TRAP}/nbdnfs && echo 'import os; os._exit(99)' > {_TRAP}/nbdnfs/__init__.py")
        hog = start_hog(guest, 40, 16, 4000)
        guest.wait_until(lambda: swapped_out(guest) > 1000, _SLOW_S, "the first pages to go out")
        pid = main_pid(guest)
        by_hand = f"cd {_TRAP} && nbdnfs run swap0"
        refused(
            guest.run(by_hand, _SLOW_S, check=False),
            f"swap0 already has a keeper, or is being taken down: process {pid}",
        )
        guest.run(f"systemctl service-watchdogs no && kill -STOP {pid}", _SLOW_S)
        refused(guest.run(by_hand, _SLOW_S, check=False), f"process {pid}")
        guest.run(f"kill -CONT {pid}; sleep 2; systemctl service-watchdogs yes", _SLOW_S)

        guest.run("cp /etc/nbdnfs/swap0.toml /etc/nbdnfs/other.toml && echo 'owner = false' >> /etc/nbdnfs/other.toml")
        other = guest.run(f"cd {_TRAP} && nbdnfs run other", _SLOW_S, check=False)
        refused(other, "is the file of swap0 on this machine", "nbdnfs down swap0")
        assert len(devices(guest)) == 1

        for _ in range(3):
            one_keeper_of_two(guest, by_hand)
            assert len(devices(guest)) == 1
        moved = swapped_out(guest)
        guest.wait_until(lambda: swapped_out(guest) > moved + 1000, 120, "pages that go out")
        verdict = finish(guest, hog, 1500)
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")


@pytest.mark.timeout(4800)
def test_dm_crypt_on_top(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """Swap on dm-crypt on the device, with pages in it. `down`, a stop, a restart, SIGTERM for the keeper and a dead
    worker leave it alone; what refuses says what is on top, and has changed nothing."""
    with swapping(boot, ganesha) as guest:
        guest.run("swapoff /dev/nbd0 && modprobe dm-crypt")
        guest.run(f'dmsetup create crypt0 --table "0 $(blockdev --getsz /dev/nbd0) {_TABLE}"', _SLOW_S)
        guest.run(f"mkswap {_DM} && swapon --priority 100 {_DM}", _SLOW_S)
        hog = start_hog(guest, 40, 16, 4000)
        guest.wait_until(lambda: swapped_out(guest) > 1000, _SLOW_S, "the first pages to go out")
        first = worker_of(guest)
        for command in ("nbdnfs down swap0", "nbdnfs up swap0"):
            refused(
                guest.run(command, _SLOW_S, check=False),
                "/dev/nbd0 is in use by dm-0, which is swapped on",
                "swapoff /dev/",
            )
        guest.run(f"systemctl restart {_UNIT}", _SLOW_S)
        guest.run(f"systemctl stop {_UNIT}", _SLOW_S, check=False)
        guest.wait_until(
            lambda: state_of(guest) == "active",
            _SLOW_S,
            "the keeper to return",
        )
        guest.run(f"kill -TERM {main_pid(guest)}")
        guest.wait_until(lambda: state_of(guest) == "active", _SLOW_S, "the next keeper")
        assert worker_of(guest).pid == first.pid
        guest.run(f"kill -KILL {first.pid}")
        moved = swapped_out(guest)
        guest.wait_until(lambda: swapped_out(guest) > moved + 1000, _SLOW_S, "pages that go out")
        assert worker_of(guest).pid != first.pid
        verdict = finish(guest, hog, 1500)
        print(f"{verdict.checked} pages checked, {verdict.wrong} wrong")

        guest.run(f"swapoff {_DM}", _SLOW_S)
        refused(guest.run("nbdnfs down swap0", _SLOW_S, check=False), "/dev/nbd0 is in use by dm-0", "dm-0 down first")
        guest.run("dmsetup remove crypt0", _SLOW_S)
        guest.run("nbdnfs down swap0", _SLOW_S)
        host.run(["/sbin/mkswap", ganesha.export_path / "swap0.swap"], what="mkswap", timeout_s=30)
        guest.run(f"systemctl start {_UNIT}", _SLOW_S)


@pytest.mark.timeout(4800)
def test_up(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """Without systemd: `up` lets a pipe go, shows progress, and turns swap on again after `swapoff -a`. With systemd,
    where the start takes longer than systemd waits: status 75, and the start goes on until the server is there. A stop
    may take longer than that."""
    url = ganesha.url("swap0.swap")
    with boot(project=True, allow={"nbd", "slow"}) as guest:
        guest.settle()
        guest.run(
            f"mkdir -p /etc/nbdnfs && printf '%s\\n' 'url = \"{seen_from_guest(url)}\"' 'size = \"16M\"'"
            " > /etc/nbdnfs/swap0.toml",
            _SLOW_S,
        )
        up = guest.run("nbdnfs up swap0 2>&1 | cat", _SLOW_S)
        print(up.stdout)
        assert "nbdnfs: swap0: creating the backing file: " in up.stdout
        assert "nbdnfs: swap0: swap is on: /dev/nbd0" in guest.run("dmesg").stdout
        assert swaps(guest) == ["/dev/nbd0"]
        refused(guest.run("nbdnfs up swap0", _SLOW_S, check=False), "swap0 is already up: its keeper is process")
        guest.run("swapoff -a", _SLOW_S)
        guest.run("nbdnfs up swap0", _SLOW_S)
        assert swaps(guest) == ["/dev/nbd0"]
        guest.run("nbdnfs down swap0", _SLOW_S)
        assert swaps(guest) == []

        guest.run(
            "nbdnfs install-units && cd /run/systemd/system && mkdir nbdnfs-start-timeout@.service.d nbdnfs@.service.d"
            f" && printf '{_SOON}' > nbdnfs-start-timeout@.service.d/soon.conf"
            f" && printf '{_SLOW_STOP}' > nbdnfs@.service.d/slow.conf && systemctl daemon-reload",
            _SLOW_S,
        )
        ganesha.kill()
        refused(guest.run("nbdnfs up swap0", _SLOW_S, check=False), "swap0 is still starting, and goes on: ")
        ganesha.start()
        guest.wait_until(lambda: swaps(guest) == ["/dev/nbd0"], _SLOW_S, "swap, once the server is back")
        guest.run("swapoff -a", _SLOW_S)
        guest.run("nbdnfs up swap0", _SLOW_S)
        assert swaps(guest) == ["/dev/nbd0"]
        guest.run("nbdnfs down swap0", _SLOW_S)
        refuse_tracebacks(guest)


def swaps(guest: Guest) -> list[str]:
    return guest.run("tail -n +2 /proc/swaps | cut -d' ' -f1").stdout.split()
