/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * reserved_port: a local port below 1024, which many servers ask for ("secure" in exports(5)). It is never one that a
 * daemon on this machine may want, however long the connection lasts; and looking for one reads no file, in a process
 * that must not wait for one.
 */
#ifndef NBDNFS_RESERVED_PORT_H
#define NBDNFS_RESERVED_PORT_H

/*
 * Bind an unconnected TCP socket of `family` to one, where the process may do that and one is free. Else the kernel
 * chooses another port when the socket is connected.
 */
void reserved_port_bind(int fd, int family);

#endif
