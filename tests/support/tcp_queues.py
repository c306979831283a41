# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much is in the queues of a TCP connection over loopback, of whatever processes: sock_diag(7)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from types import TracebackType
from typing import Self

from support.nfs_server import LOOPBACK

# include/uapi/linux/netlink.h, sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_NO_COOKIE = (0xFFFF_FFFF, 0xFFFF_FFFF)
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_REQUEST = struct.Struct("=BBBxI")  # inet_diag_req_v2, up to its id
_ID = struct.Struct("!HH16s16s")  # inet_diag_sockid: the ports, the addresses ...
_ID_END = struct.Struct("=III")  # ... interface, cookie
_QUEUES_AT = _HEADER.size + 4 + _ID.size + _ID_END.size + 4  # in inet_diag_msg


class TcpQueues:
    """Asks the kernel, which takes about 10 us. For one thread."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def of(self, own_port: int, peer_port: int) -> tuple[int, int]:
        """For the end with `own_port`: received bytes that were not read, and sent bytes that were not acknowledged.

        Zeros when there is no such connection.
        """
        address = socket.inet_aton(LOOPBACK)
        request = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0xFFFF_FFFF)
        request += _ID.pack(own_port, peer_port, address, address) + _ID_END.pack(0, *_NO_COOKIE)
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
        self._socket.send(header + request)
        answer = self._socket.recv(4096)
        if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
            (error,) = struct.unpack_from("=i", answer, _HEADER.size)
            if -error != errno.ENOENT:
                raise OSError(-error, os.strerror(-error))
            return 0, 0
        unread, unacknowledged = struct.unpack_from("=II", answer, _QUEUES_AT)
        return unread, unacknowledged
