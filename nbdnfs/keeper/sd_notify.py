# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's notification protocol, sd_notify(3), with the file descriptor store (FDSTORE).

One datagram: assignments in lines, and descriptors beside them as SCM_RIGHTS (unix(7)). Nothing here waits: PID 1
may itself be waiting for the swap that its caller keeps alive, so a message that cannot go at once is dropped.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Mapping, Sequence

LISTEN_FDS_START = 3


class Notifier:
    """Sends to $NOTIFY_SOCKET; does nothing where that is not set. `watchdog_s` is how often to send WATCHDOG=1 at
    the least, from $WATCHDOG_USEC; None without a watchdog."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if path else None
        period_us = environment.get("WATCHDOG_USEC", "")
        is_meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(period_us) / 1e6 if period_us.isdigit() and int(period_us) and is_meant else None

    def send(self, *lines: str, descriptors: Sequence[int] = ()) -> bool:
        """Send assignments such as "READY=1". False when the message was dropped, or $NOTIFY_SOCKET is not set."""
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
    def is_enabled(self) -> bool:
        """Whether $NOTIFY_SOCKET is set."""
        return self._socket is not None

    def store(self, name: str, descriptor: int, *, until_hang_up: bool = False) -> bool:
        """Put a descriptor into the store under `name`, in place of what was there. `listen_fds` gives it to the next
        process of the unit. False as in `send`: nothing new is stored. What had the name may be.

        until_hang_up  systemd closes it by itself once the other end of it is closed
        """
        poll = [] if until_hang_up else ["FDPOLL=0"]
        # never without the first: systemd would have two of that name
        return self.remove(name) and self.send("FDSTORE=1", f"FDNAME={name}", *poll, descriptors=[descriptor])

    def remove(self, name: str) -> bool:
        """Have systemd close what it stores under `name`. False as in `send`."""
        return self.send("FDSTOREREMOVE=1", f"FDNAME={name}")


def listen_fds(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Name ▸ descriptor of what this process was started with, sd_listen_fds_with_names(3): here, what is stored.

    Children do not inherit them from here on. Of several with one name the last one counts; the others are closed.
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
