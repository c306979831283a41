/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What goes on while there is no connection, and what all connections have in common. */
#include "nfs/internal.h"

#include "base/log.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

/* How long to wait for an answer to a SYN before a new attempt: the kernel's own pauses between repetitions double. */
#define SYN_LIMIT_MS 2500
#define FIRST_SYN_LIMIT_MS 15000
/* An attempt that takes so long is logged before it has failed. */
#define LOG_AFTER_MS 2000

/*
 * The kernel notices a peer that has vanished. A server may be as slow as it likes, but must accept some data:
 * TCP_USER_TIMEOUT also ends a connection to a peer that acknowledges probes and keeps its window closed.
 */
#define KEEPALIVE_IDLE_S 5
#define KEEPALIVE_INTERVAL_S 5
#define KEEPALIVE_PROBES 4
#define UNACKED_LIMIT_MS 25000

/* The most that one request moves, and what it moves where the server names no limit (over NFSv4 libnfs knows none). */
#define TRANSFER_LIMIT_BYTES (1024 * 1024)
#define TRANSFER_UNKNOWN_BYTES (128 * 1024)

/* Log why there is no connection: once for each condition, until there is one again. For the I/O thread. */
void log_down(struct nfsio *io, enum nfsio_condition condition, const char *reason)
{
	static const char *const gone[] = {
		[NFSIO_FILE_DELETED] = "the file was deleted on the server",
		[NFSIO_FILE_REPLACED] = "the file was replaced by another on the server",
	};

	if (io->logged[condition] || io->options.quiet)
		return;
	io->logged[condition] = true;
	if (condition == NFSIO_LINK_DOWN)
		log_line("server %s: no connection (%s), waiting for one", io->address, reason);
	else
		log_line("server %s: %s: writing nothing, waiting for the old file", io->address, gone[condition]);
}

/* While there is no connection: fail requests that have waited too long. Without the lock. */
void tend_waiting(struct nfsio *io)
{
	bool logged = io->logged[NFSIO_LINK_DOWN] || io->logged[NFSIO_FILE_DELETED] || io->logged[NFSIO_FILE_REPLACED];

	if (io->opened_once && !logged && now_ms() - io->away_since_ms >= LOG_AFTER_MS)
		log_down(io, NFSIO_LINK_DOWN, "no answer");
	pthread_mutex_lock(&io->lock);
	fail_hopeless(io);
	fail_late_names(io);
	note_waiting(io);
	give_back(io);
	pthread_mutex_unlock(&io->lock);
}

int syn_limit_ms(const struct nfsio *io)
{
	return io->opened_once ? SYN_LIMIT_MS : FIRST_SYN_LIMIT_MS;
}

void tune_socket(int fd)
{
	int on = 1, idle_s = KEEPALIVE_IDLE_S, interval_s = KEEPALIVE_INTERVAL_S, probes = KEEPALIVE_PROBES;
	unsigned unacked_ms = UNACKED_LIMIT_MS;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
	setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unacked_ms, sizeof(unacked_ms));
}

uint32_t transfer_limit(uint64_t servers)
{
	if (servers == 0)
		return TRANSFER_UNKNOWN_BYTES;
	return servers < TRANSFER_LIMIT_BYTES ? (uint32_t)servers : TRANSFER_LIMIT_BYTES;
}
