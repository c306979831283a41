/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "nfs/probe.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#define NFS_PROGRAM 100003u
#define LAST_FRAGMENT 0x80000000u

void probe_init(struct probe *probe, uint32_t nfs_version)
{
	*probe = (struct probe){ .state = PROBE_NONE, .fd = -1, .nfs_version = nfs_version };
}

static void finish(struct probe *probe, enum probe_state state)
{
	if (probe->fd >= 0)
		close(probe->fd);
	probe->fd = -1;
	probe->state = state;
}

void probe_end(struct probe *probe)
{
	finish(probe, PROBE_NONE);
}

void probe_start(struct probe *probe, int connected_fd)
{
	struct sockaddr_storage peer;
	socklen_t length = sizeof(peer);

	probe_end(probe);
	probe->sent = false;
	probe->state = PROBE_FAILED;
	if (getpeername(connected_fd, (struct sockaddr *)&peer, &length) < 0)
		return;
	probe->fd = socket(peer.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (probe->fd < 0)
		return;
	probe->opened++;
	if (connect(probe->fd, (struct sockaddr *)&peer, length) < 0 && errno != EINPROGRESS)
		finish(probe, PROBE_FAILED);
	else
		probe->state = PROBE_WAITING;
}

short probe_events(const struct probe *probe)
{
	return probe->sent ? POLLIN : POLLOUT;
}

void probe_service(struct probe *probe, short revents)
{
	if (probe->state != PROBE_WAITING || revents == 0)
		return;
	if (!probe->sent) {
		/* xid, CALL, RPC version 2, program, version, NULL, and no credentials or verifier */
		uint32_t call[] = {
			LAST_FRAGMENT | 40, 0x6e626421, 0, 2, NFS_PROGRAM, probe->nfs_version, 0, 0, 0, 0, 0,
		};

		for (unsigned i = 0; i < sizeof(call) / sizeof(call[0]); i++)
			call[i] = htonl(call[i]);
		/* a new connection takes so few bytes at once, or it is not up */
		if (send(probe->fd, call, sizeof(call), MSG_NOSIGNAL) != (ssize_t)sizeof(call))
			finish(probe, PROBE_FAILED);
		probe->sent = true;
	} else {
		char answer[64];

		/* any answer is enough: a server that refuses is alive */
		finish(probe, recv(probe->fd, answer, sizeof(answer), 0) > 0 ? PROBE_ANSWERED : PROBE_FAILED);
	}
}
