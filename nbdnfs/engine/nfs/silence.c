/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A connection over which nothing is received: is the server slow, or the connection dead? */
#include "nfs/internal.h"

#include "base/log.h"

/* How long a server that answers the probe may stay silent on the connection. */
#define SILENCE_GRACE_MS 5000
/* A request that is not answered while others are gives up the connection after so many times silence_ms. */
#define REPEAT_FACTOR 4
/* Both limits double each time they cost a connection, until none was given up for so long. */
#define CALM_MS (15 * 60 * 1000)

static void give_up_connection(struct nfsio *io, const char *why)
{
	log_line("server %s: %s: sending all requests again over a new connection", io->address, why);
	io->silence_ms *= 2;
	io->given_up_at_ms = now_ms();
	io->broken = true;
}

/* Lock held. */
static bool is_suspect(const struct nfsio *io)
{
	return io->suspect_since_ms != 0 && io->last_received_ms <= io->suspect_since_ms;
}

void nfsio_suspect(struct nfsio *io, int64_t since_ms)
{
	pthread_mutex_lock(&io->lock);
	if (is_up(io) && !io->broken && io->last_received_ms <= since_ms) {
		io->suspect_since_ms = since_ms;
		/* no request waits: replace it now, so that the next one does not have to find out */
		if (io->inflight.head == NULL && io->name_ops == NULL)
			io->broken = true;
		wake_io_thread(io);
	}
	pthread_mutex_unlock(&io->lock);
}

/*
 * The time-outs. A server may be slow without limit; but a connection can die without TCP noticing (a middlebox
 * forgets it and still acknowledges), and a server may drop a request. So a silent connection is tested, with a NULL
 * call over it and a probe over a new one. If only the probe is answered, the connection is given up, and all
 * requests are sent again over a new one. The same happens when a single request stays unanswered while others are
 * answered. Both limits double each time, so that a server that is merely slow gets through.
 */
void look_into_silence(struct nfsio *io)
{
	int64_t now = now_ms();
	struct nfsio_req *oldest = io->inflight.head;
	bool is_silent = is_suspect(io) || now - io->silent_since_ms >= io->silence_ms;

	if (io->broken || (oldest == NULL && io->name_ops == NULL) || !is_silent) {
		if (io->probe.state != PROBE_NONE)
			probe_end(&io->probe);
		if (io->given_up_at_ms != 0 && now - io->given_up_at_ms > CALM_MS) {
			io->silence_ms = io->options.silence_ms;
			io->given_up_at_ms = 0;
		}
		if (!io->broken && oldest != NULL && now - oldest->issued_at_ms >= REPEAT_FACTOR * io->silence_ms)
			give_up_connection(io, "a request was not answered while others were");
		return;
	}
	switch (io->probe.state) {
	case PROBE_NONE:
		if (io->transport->send_null(io) != 0)
			return;
		probe_start(&io->probe, io->transport->socket(io));
		io->probed_at_ms = now;
		break;
	case PROBE_WAITING:
		break;
	case PROBE_ANSWERED:
		if (now - io->probed_at_ms >= SILENCE_GRACE_MS) {
			io->state.silent_since_ms = io->silent_since_ms;
			give_up_connection(io, "the connection is silent, and the server is not");
		}
		break;
	case PROBE_FAILED: /* the server does not answer there either: wait, and try again now and then */
		if (now - io->probed_at_ms >= SILENCE_GRACE_MS) {
			probe_start(&io->probe, io->transport->socket(io));
			io->probed_at_ms = now;
		}
		break;
	}
}
