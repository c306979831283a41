# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's notification protocol, sd_notify(3), with the file descriptor store (FDSTORE).

One datagram, assignments in lines, descriptors beside them as SCM_RIGHTS (unix(7)). Nothing here waits: PID 1
may itself be waiting for the swap that its caller keeps alive, so a message that cannot go at once is dropped.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Mapping, Sequence

LISTEN_FDS_START = 3


class Notifier:
    """Sends to $NOTIFY_SOCKET; does nothing where there is none. `watchdog_s` is how often to `tell` WATCHDOG=1 at
    the latest, from $WATCHDOG_USEC; None without a watchdog."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if path else None
        period_us = environment.get("WATCHDOG_USEC", "")
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(period_us) / 1e6 if period_us.isdigit() and int(period_us) and mine else None

    def tell(self, *lines: str, descriptors: Sequence[int] = ()) -> bool:
        """Send assignments such as "READY=1". False when it did not go, or there is nobody to tell."""
        if self._socket is None:
            return False
        # not socket.send_fds: in CPython 3.11 that drops flags and address
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._socket.sendmsg(["\n".join(lines).encode()], rights, socket.MSG_DONTWAIT, self._address)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    @property
    def is_heard(self) -> bool:
        """Whether there is anybody to tell."""
        return self._socket is not None

    def store(self, name: str, descriptor: int, *, until_hang_up: bool = False) -> bool:
        """Park a descriptor under `name`, in place of what was there. It comes back through `stored`.

        until_hang_up  the store closes it by itself once the other end of it is closed
        """
        self.forget(name)
        poll = [] if until_hang_up else ["FDPOLL=0"]
        return self.tell("FDSTORE=1", f"FDNAME={name}", *poll, descriptors=[descriptor])

    def forget(self, name: str) -> None:
        """Have the store close what it keeps under `name`."""
        self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")


def stored(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Name ▸ descriptor of what this process was started with, sd_listen_fds_with_names(3).

    They are not passed on to children from here on. Of several with one name the last one counts; the others
    are closed.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(environment.get("LISTEN_FDS", "0"))
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for descriptor in range(LISTEN_FDS_START, LISTEN_FDS_START + count):
        os.set_inheritable(descriptor, False)
        name = names[descriptor - LISTEN_FDS_START] if len(names) > descriptor - LISTEN_FDS_START else "unknown"
        if name in found:
            os.close(found[name])
        found[name] = descriptor
    return found
