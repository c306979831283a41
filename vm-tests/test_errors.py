# SPDX-License-Identifier: LGPL-2.1-or-later
"""A device that cannot work logs why in one line and what to do in another, and is not started again and again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.nfs_server import Ganesha
from vmtest import host
from vmtest.guest import Guest, seen_from_guest

# Enough for one start, under an emulated CPU.
_START_TIMEOUT_S = 240
# nbdnfs@.service does not start the keeper again after these: sysexits(3).
_EX_OSFILE, _EX_TEMPFAIL, _EX_NOPERM, _EX_CONFIG = 72, 75, 77, 78
_NO_PERMISSION = "[Service]\nCapabilityBoundingSet=~CAP_SYS_ADMIN\n"


def said(guest: Guest, name: str) -> list[str]:
    """What the keeper and its children have logged; without systemd's own lines."""
    return guest.run(f"journalctl -o cat --no-pager _SYSTEMD_UNIT=nbdnfs@{name}.service", 90).stdout.splitlines()


def fails(guest: Guest, name: str, config: str, status: int) -> list[str]:
    """Start a device that cannot work; returns its log. It fails with that exit status and is not restarted."""
    guest.run(f"cat > /etc/nbdnfs/{name}.toml <<'.'\n{config}.")
    assert guest.run(f"systemctl start nbdnfs@{name}", _START_TIMEOUT_S, check=False).status != 0
    shown = guest.run(f"systemctl show -p ActiveState,ExecMainStatus,NRestarts nbdnfs@{name}").stdout.split()
    lines = said(guest, name)
    print("\n".join([f"{name}: {' '.join(shown)}", *lines]))
    assert set(shown) == {"ActiveState=failed", f"ExecMainStatus={status}", "NRestarts=0"}
    assert "/dev/nbd" not in guest.run(f"grep -l nbdnfs:{name} /sys/block/nbd*/backend", check=False).stdout
    return lines


def drop_in(guest: Guest, name: str, text: str) -> None:
    """In /run, or none with no `text`."""
    folder = f"/run/systemd/system/nbdnfs@{name}.service.d"
    guest.run(f"rm -rf {folder}")
    if text:
        guest.run(f"mkdir -p {folder} && cat > {folder}/test.conf <<'.'\n{text}.")
    guest.run("systemctl daemon-reload", 90)


@pytest.mark.timeout(1500)
def test_what_cannot_work(boot: Callable[..., Guest], ganesha: Ganesha) -> None:
    """A misspelt key, no kernel module, no permission, a device in use: two lines and an end. No permission any more,
    with swap in use: one line, and when it is back, all goes on."""
    url = ganesha.url("swap.swap")
    other_url = ganesha.url("other.swap")
    for one in (url, other_url):
        host.nbdnfs_create(one, 64, timeout_s=120)
    host.run(["/sbin/mkswap", ganesha.export_path / "swap.swap"], what="mkswap", timeout_s=30)
    config = f'url = "{seen_from_guest(url)}"\n'
    with boot(project=True, allow={"nbd", "slow"}) as guest:
        guest.settle()
        guest.run("nbdnfs install-units", 90)

        wrong, remedy = fails(guest, "misspelt", config + 'siez = "64M"\n', _EX_CONFIG)
        assert wrong.startswith("nbdnfs: /etc/nbdnfs/misspelt.toml:2: ")
        assert "'siez'" in wrong
        assert "'size'" in remedy

        guest.run("echo 'install nbd /bin/false' > /etc/modprobe.d/no-nbd.conf")
        wrong, remedy = fails(guest, "no-module", config, _EX_OSFILE)
        assert wrong.startswith("nbdnfs: the kernel's nbd driver is not there: ")
        assert remedy == "nbdnfs: use a kernel that has CONFIG_BLK_DEV_NBD"
        guest.run("rm /etc/modprobe.d/no-nbd.conf")

        drop_in(guest, "forbidden", _NO_PERMISSION)
        wrong, remedy = fails(guest, "forbidden", config, _EX_NOPERM)
        assert wrong.startswith("nbdnfs: cannot attach ")
        assert wrong.endswith(": Operation not permitted")
        assert remedy == "nbdnfs: this needs CAP_SYS_ADMIN: run it as root"

        guest.run(f"cat > /etc/nbdnfs/swap0.toml <<'.'\n{config}.")
        guest.run("systemctl start nbdnfs@swap0", _START_TIMEOUT_S)
        device = guest.run("cat /run/nbdnfs/swap0/device").stdout.strip()
        wrong, remedy = fails(guest, "same-file", config, _EX_TEMPFAIL)[:2]
        assert wrong.endswith(" is the file of swap0 on this machine")
        assert remedy == "nbdnfs: give same-file a file of its own, or take the other one down: nbdnfs down swap0"
        other = f'url = "{seen_from_guest(other_url)}"\ndevice = "/dev/{device}"\n'
        wrong, remedy = fails(guest, "in-use", other, _EX_TEMPFAIL)
        assert wrong.startswith(f"nbdnfs: /dev/{device} is already attached, by process ")
        assert wrong.endswith(" to nbdnfs:swap0")
        assert remedy.endswith(f"detach it first: nbdnfs detach /dev/{device}")

        _lose_permission_and_get_it_back(guest, device)
        guest.run("systemctl stop nbdnfs@swap0", _START_TIMEOUT_S)
        assert "nbd" not in guest.run("cat /proc/swaps").stdout


def _lose_permission_and_get_it_back(guest: Guest, device: str) -> None:
    drop_in(guest, "swap0", _NO_PERMISSION)
    guest.run("systemctl restart nbdnfs@swap0", _START_TIMEOUT_S)
    before = len(said(guest, "swap0"))
    guest.run("read -r pid rest < /run/nbdnfs/swap0/worker && kill -KILL $pid")
    # one after the other takes its place, and is refused
    guest.run(
        'last= count=0; while [ $count -lt 5 ]; do pid=$(pgrep -o -x nbdkit) && [ $pid != "$last" ]'
        " && last=$pid count=$((count + 1)); sleep 0.1; done",
        _START_TIMEOUT_S,
    )
    lines = said(guest, "swap0")[before:]
    print("\n".join(lines))
    ended, refused = lines
    assert ended.endswith(" has ended")  # it was the child of the keeper before
    assert refused.startswith(f"nbdnfs: swap0: /dev/{device}: cannot ")
    assert refused.endswith(": Operation not permitted")

    drop_in(guest, "swap0", "")
    guest.run("systemctl restart nbdnfs@swap0", _START_TIMEOUT_S)
    guest.run("nbdnfs status swap0")
