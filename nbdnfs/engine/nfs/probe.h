/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * probe: is a silent server alive? A connection of its own, one NULL call (RFC 5531), one answer. Without libnfs, so
 * that it can be made beside a context that is waiting, and without allocating. No lock: the owner's thread alone.
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
	uint32_t nfs_version;
};

void probe_init(struct probe *probe, uint32_t nfs_version);

/* Begin anew, with the server at the other end of `connected_fd`. */
void probe_start(struct probe *probe, int connected_fd);

/* What to poll `fd` for. */
short probe_events(const struct probe *probe);

/* After a poll(2) that had `revents` for `fd`. */
void probe_service(struct probe *probe, short revents);

/* Let go of the connection; the state is PROBE_NONE. */
void probe_end(struct probe *probe);

#endif
