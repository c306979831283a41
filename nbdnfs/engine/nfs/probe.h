/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * probe: is a silent server alive? A connection of its own, one NULL call (RFC 5531), one answer. Without libnfs, which
 * cannot do that beside a context that waits, and without allocating. No lock: the caller serialises all calls.
 */
#ifndef NBDNFS_PROBE_H
#define NBDNFS_PROBE_H

#include <stdbool.h>
#include <stdint.h>

enum probe_state { PROBE_NONE, PROBE_WAITING, PROBE_ANSWERED, PROBE_FAILED };

struct probe {
	enum probe_state state;
	int fd;                 /* -1 unless PROBE_WAITING */
	bool sent;
	uint32_t opened;        /* how many sockets there have been */
	uint32_t nfs_version;
};

void probe_init(struct probe *probe, uint32_t nfs_version);

/* Start again, with the server at the other end of `connected_fd`. */
void probe_start(struct probe *probe, int connected_fd);

/* What to poll `fd` for. */
short probe_events(const struct probe *probe);

/* After a poll(2) that had `revents` for `fd`. */
void probe_service(struct probe *probe, short revents);

/* Close the connection; the state is PROBE_NONE. */
void probe_end(struct probe *probe);

#endif
