# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults of the NAS and the network while a program in a guest swaps and checks every page: it waits, and lives."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from support.nfs_server import Ganesha, free_ports
from vmtest import counters, host, netem, swap
from vmtest.guest import Guest, seen_from_guest
from vmtest.verdict import Progress, Verdict

_FILE_MIB = 128
_AWAY_S = 10.0
# Small, so that what goes out has to be on the NAS soon, and what comes in is read from there.
_REGION_PAGES = 1024
# A program whose page is on a NAS that is away waits for as long as that takes, which is not an error of the kernel.
_PATIENT = ("sysctl.kernel.hung_task_timeout_secs=600",)
_NFS_PORT, _MOUNT_PORT = 2049, 20048
_EXPORT = "/srv/nas"

# What reaches the disk of this NAS is what NFS asks it to put there: it loses all else in a crash.
_SET_UP_NFS = f"""\
mkdir -p {_EXPORT} /etc/nfs.conf.d
echo '{_EXPORT} *(rw,sync,no_root_squash,insecure,no_subtree_check,fsid=1)' > /etc/exports
printf '[nfsd]\\nthreads=4\\nvers4=n\\n[mountd]\\nport={_MOUNT_PORT}\\n' > /etc/nfs.conf.d/test.conf
sync
"""
_START_NFS = "sysctl -q vm.dirty_writeback_centisecs=0 && systemctl start nfs-server"


@dataclass(frozen=True)
class Stressed:
    """What a stress run and its worker came to."""

    verdict: Verdict
    oom_kills: int
    counted: dict[str, int]

    def summary(self) -> str:
        passes = ", ".join(f"{one.order} {one.seconds:.0f}" for one in self.verdict.passes)
        shown = ("nfs_writes", "nfs_commits", "nfs_reads", "reconnects", "lost_uncommitted_pages", "write_errors")
        return (
            f"{self.verdict.seconds:.0f} s ({passes}); {self.verdict.checked} checks of {self.verdict.pages} pages,"
            f" {self.verdict.wrong} wrong; OOM kills {self.oom_kills}; "
            + ", ".join(f"{name} {self.counted[name]}" for name in shown)
        )


class Strikes:
    """`strike` once in each of these passes of the stress program, when a third of its pages are done.

    `happened` has the seconds that each took.
    """

    def __init__(self, strike: Callable[[], None], orders: Sequence[str] = ("fill", "random")) -> None:
        self._strike = strike
        self._left = list(orders)
        self.happened: list[float] = []

    def on_progress(self, progress: Progress) -> None:
        if self._left and progress.order == self._left[0] and progress.done > progress.pages // 3:
            print(f"{self._left.pop(0)}, {progress.done} of {progress.pages} pages: a strike", flush=True)
            started_s = time.monotonic()
            self._strike()
            self.happened.append(time.monotonic() - started_s)


def create(url: str) -> str:
    """A backing file; returns its URL as seen from a guest."""
    host.nbdnfs_create(url, _FILE_MIB, timeout_s=300)
    return seen_from_guest(url)


def stress(
    guest: Guest,
    worker: swap.Worker,
    *,
    size_mib: int,
    limit_mib: int,
    timeout_s: float,
    on_progress: Callable[[Progress], None] | None = None,
) -> Stressed:
    """The stress program in a cgroup. GuestFailedError or AssertionError for a wrong page or a kill."""
    with swap.limited(guest, limit_mib) as cgroup:
        verdict = swap.stress(guest, size_mib=size_mib, cgroup=cgroup, timeout_s=timeout_s, on_progress=on_progress)
        events = swap.memory_events(guest, cgroup)
    counted = counters.read(guest, worker.nbdkit_pid)
    found = Stressed(
        verdict, events["oom_kill"], {name: value for name, value in counted.items() if isinstance(value, int)}
    )
    print(found.summary(), flush=True)
    verdict.check()
    assert found.oom_kills == 0
    assert found.counted["checksum_failures"] == 0
    assert found.counted["nfs_reads"] > 0
    return found


@contextlib.contextmanager
def swapping(boot: Callable[..., Guest], url: str) -> Iterator[tuple[Guest, swap.Worker]]:
    """A guest that swaps to that file, with a small region, and its worker; shut down at the end."""
    with boot(project=True, arguments=_PATIENT, allow={"slow"}) as guest:
        guest.settle()
        settings = [f"region_pages={_REGION_PAGES}"]
        with swap.serving(guest, url, settings=settings) as worker, swap.swapping(guest, worker):
            yield guest, worker
        guest.shutdown()


@pytest.fixture
def nas(boot: Callable[..., Guest]) -> Iterator[tuple[Guest, str]]:
    """A guest that serves NFSv3 with its kernel from a directory on its disk, and the URL of that on the host."""
    nfs_port, mount_port = free_ports(2)
    forwards = {nfs_port: _NFS_PORT, mount_port: _MOUNT_PORT}
    with boot(name="nas", memory_mib=384, forwards=forwards) as guest:
        guest.run(_SET_UP_NFS)
        guest.run(_START_NFS, 240)
        yield guest, f"nfs://127.0.0.1{_EXPORT}/swap?version=3&nfsport={nfs_port}&mountport={mount_port}"


@pytest.mark.timeout(1500)
def test_a_nas_that_dies(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """Ganesha gets a SIGKILL while pages go out, and again while they come in, and is back ten seconds later."""
    url = create(ganesha.url("swap"))

    def die() -> None:
        ganesha.kill()
        threading.Timer(_AWAY_S, ganesha.start).start()

    strikes = Strikes(die)
    with swapping(boot, url) as (guest, worker):
        found = stress(guest, worker, size_mib=24, limit_mib=8, timeout_s=900, on_progress=strikes.on_progress)
        assert len(strikes.happened) == 2
        assert min(found.verdict.passes[0].seconds, found.verdict.passes[2].seconds) > _AWAY_S
        assert found.counted["reconnects"] >= 2


@pytest.mark.timeout(2400)
def test_a_nas_that_crashes(boot: Callable[..., Guest], nas: tuple[Guest, str]) -> None:
    """The kernel's nfsd: its machine crashes under the same load, what had not been committed is lost, and it boots
    again. What was lost is written once more."""
    server, url = nas
    url = create(url)

    def crash() -> None:
        server.check_kernel_log()
        server.crash()
        server.boot()
        server.run(_START_NFS, 240)

    strikes = Strikes(crash)
    with swapping(boot, url) as (guest, worker):
        found = stress(guest, worker, size_mib=24, limit_mib=8, timeout_s=1500, on_progress=strikes.on_progress)
        print(f"crash, boot and nfsd: {', '.join(f'{seconds:.0f} s' for seconds in strikes.happened)}")
        assert len(strikes.happened) == 2
        assert found.counted["lost_uncommitted_pages"] > 0


@pytest.mark.timeout(1500)
def test_a_network_that_loses_packets(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """Two of a hundred packets of the guest's are lost, and each of them is 50 ms on its way."""
    url = create(ganesha.url("swap"))
    with swapping(boot, url) as (guest, worker):
        # few pages: most that are read cost a round trip and more each
        with netem.delayed(guest, 50, loss_percent=2):
            stress(guest, worker, size_mib=12, limit_mib=5, timeout_s=900)
            shown = guest.run("tc -s qdisc show dev eth0").stdout
            print(shown)
        dropped = int(shown.partition("dropped ")[2].partition(",")[0])
        assert dropped > 0
