# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a keeper, or `serve`, and its workers agree on: name, descriptors, messages, exit status. Imports nothing.

A worker of a keeper is started as a *standby*: nbdkit with all of its memory in place, but without a connection to the
server and without the region. The two talk over the *control socket*, a stream socketpair:

    standby ▸ keeper   READY                    it waits
    keeper ▸ standby   ACTIVATE [address]       connect, map the region, serve
    keeper ▸ standby   end of file              exit with status 0

A worker of `serve` says over a pipe which clients it has, CLIENT_CAME and CLIENT_WENT; its end is the worker's end.

Nothing follows ACTIVATE. The worker closes its end once it has the file open and the region mapped; from then on its
NBD connection says whether it lives. A keeper meets workers that the version before it has started: these values stay
as they are.
"""

# argv[0] of every worker. systemd spares processes whose name begins with "@" when it kills what is left at shutdown
# (https://systemd.io/ROOT_STORAGE_DAEMONS): the swap of a machine that is going down may still need this one.
PROCESS_NAME = "@nbdkit"

# Where a worker finds what it inherits. nbdkit -s speaks NBD on 0 and 1. These are far above every descriptor that a
# keeper has open, so that putting one in its place never overwrites another.
REGION_FD = 200
CONTROL_FD = 201

READY = b"r"
ACTIVATE = b"g"
MESSAGE_BYTES_MAX = 128

# To `serve`: a client may send requests from here on, or has gone.
CLIENT_CAME = b"+"
CLIENT_WENT = b"-"

# How a worker of a keeper exits when another machine has taken its file: not a status of sysexits(3). The keeper then
# lets the kernel's requests fail, because no other worker can serve them.
STOLEN_STATUS = 80


def activation(address: str = "") -> bytes:
    """The message that activates a standby. `address` is the server's, where it differs from the plugin's setting."""
    return ACTIVATE + address.encode()


def is_activation(message: bytes) -> bool:
    """Whether `message` activates; an end of file ("no bytes") does not."""
    return message[:1] == ACTIVATE


def address_in(message: bytes) -> str:
    """The server's address in an activation; "" where it is the one in the plugin's settings."""
    return message[1:].decode()
