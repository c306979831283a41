# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defaults that the configuration, the command line and the worker share. Imports nothing.

docs/decisions/0013 and 0017 say why these numbers.
"""

# nbdkit's threads for each connection: as many requests are under way at once.
THREADS = 12
# TCP connections to the NFS server.
CONNECTIONS = 4
