/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The time-outs of everything that is outstanding on a connection, in one place. Two rules:
 *
 * A connection over which nothing is received, while anything is outstanding, is tested: a server may be slow without
 * limit, but a connection can die without TCP noticing (a middlebox forgets it and still acknowledges). A NULL call
 * goes over it, and a probe over a new one. If only the probe is answered, the connection is given up.
 *
 * A call that alone is not answered, while others are, was dropped by the server: the connection is given up at the
 * call's deadline. Some calls have a limit besides, at which it is given up whatever else is answered
 * (give_up_on_slow() of exchange.c): operations on names, and those of a "soft" file.
 *
 * What was outstanding on a connection that is given up is sent again over a new one, but for operations on names that
 * must not be done twice. All limits double each time that one costs a connection, so that a server that is merely slow
 * gets through; up to a limit, so that no call waits for ever.
 */
#include "nfs/internal.h"

#include "base/log.h"

/* How long a server that answers the probe may stay silent on the connection. */
#define SILENCE_GRACE_MS 5000
/* A transfer that is not answered while others are gives up the connection after so many times silence_ms. */
#define REPEAT_FACTOR 4
/* The limits double until they are so many times what they were at first ... */
#define DOUBLED_LIMIT 8
/* ... and are reset when none has cost a connection for so long. */
#define CALM_MS (15 * 60 * 1000)
/* How often a connection is looked at while it is tested. */
#define SILENCE_TICK_MS 250

/*
 * A call has been sent. Returns when it is to be taken for dropped: after repeat_after_ms (0: that of a transfer),
 * doubled as often as silence_ms is. It may not be outstanding after limit_at_ms. Lock held.
 */
int64_t note_outstanding(struct nfsio *io, int64_t now, int64_t repeat_after_ms, int64_t limit_at_ms)
{
	int64_t factor = io->silence_ms / io->options.silence_ms;
	int64_t at_ms = now + (repeat_after_ms == 0 ? REPEAT_FACTOR * io->silence_ms : repeat_after_ms * factor);

	if (at_ms < io->deadline_ms)
		io->deadline_ms = at_ms;
	if (limit_at_ms < io->deadline_ms)
		io->deadline_ms = limit_at_ms;
	if (io->deadline_ms < io->polls_until_ms)
		wake_poller(io); /* it knew of later ones; never for a transfer */
	return at_ms;
}

/* How long to wait for an answer before look_into_silence() is called again. Lock held. */
int silence_sleep_ms(const struct nfsio *io, int64_t now)
{
	int64_t ms = io->silence_ms;

	if (io->inflight.head != NULL || io->name_ops != NULL)
		ms -= now - io->silent_since_ms; /* it may have begun while this thread slept for other reasons */
	if (io->deadline_ms != INT64_MAX && io->deadline_ms - now < ms)
		ms = io->deadline_ms - now;
	if (io->probe.state != PROBE_NONE || ms < SILENCE_TICK_MS)
		ms = ms > 0 && ms < SILENCE_TICK_MS ? ms : SILENCE_TICK_MS;
	return (int)ms;
}

static int64_t earlier(int64_t one_ms, int64_t other_ms)
{
	return one_ms < other_ms ? one_ms : other_ms;
}

/*
 * Has anything been outstanding for too long? What is outstanding is gone through only when the earliest deadline that
 * was noted has come, which most calls do not live to see.
 */
static bool is_overdue(struct nfsio *io, int64_t now)
{
	int64_t give_up_at_ms = INT64_MAX, limit_at_ms = INT64_MAX;

	if (now < io->deadline_ms)
		return false;
	for (const struct nfsio_req *req = io->inflight.head; req != NULL; req = req->next) {
		give_up_at_ms = earlier(give_up_at_ms, req->give_up_at_ms);
		if (req->fail_at_ms != 0)
			limit_at_ms = earlier(limit_at_ms, req->fail_at_ms);
	}
	for (const struct name_op *op = io->name_ops; op != NULL; op = op->next) {
		give_up_at_ms = earlier(give_up_at_ms, op->give_up_at_ms);
		limit_at_ms = earlier(limit_at_ms, op->limit_at_ms);
	}
	io->deadline_ms = earlier(give_up_at_ms, limit_at_ms);
	return now >= give_up_at_ms;
}

static void give_up_connection(struct nfsio *io, const char *why)
{
	log_line("server %s: %s: sending all requests again over a new connection", io->address, why);
	if (io->silence_ms < DOUBLED_LIMIT * (int64_t)io->options.silence_ms)
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

/* Something is received, or nothing is outstanding. */
static void note_no_silence(struct nfsio *io, int64_t now)
{
	if (io->probe.state != PROBE_NONE)
		probe_end(&io->probe);
	if (io->given_up_at_ms != 0 && now - io->given_up_at_ms > CALM_MS) {
		io->silence_ms = io->options.silence_ms;
		io->given_up_at_ms = 0;
	}
	if (!io->broken && is_overdue(io, now))
		give_up_connection(io, "a request was not answered in time");
}

/* Apply both rules. Called whenever something was received, and after silence_sleep_ms(). */
void look_into_silence(struct nfsio *io, int64_t now)
{
	bool is_silent = is_suspect(io) || now - io->silent_since_ms >= io->silence_ms;

	if (io->broken || (io->inflight.head == NULL && io->name_ops == NULL) || !is_silent) {
		note_no_silence(io, now);
		return;
	}
	switch (io->probe.state) {
	case PROBE_NONE:
		if (io->transport->send_null(io) != 0)
			return;
		probe_start(&io->probe, io->transport->socket(io));
		io->probed_at_ms = now;
		break;
	case PROBE_ANSWERED:
		if (now - io->probed_at_ms >= SILENCE_GRACE_MS) {
			io->state.silent_since_ms = io->silent_since_ms;
			give_up_connection(io, "the connection is silent, and the server is not");
		}
		break;
	case PROBE_WAITING: /* its answer may have been dropped, too */
	case PROBE_FAILED: /* the server does not answer there either: wait, and try again now and then */
		if (now - io->probed_at_ms >= (io->probe.state == PROBE_WAITING ? io->silence_ms : SILENCE_GRACE_MS)) {
			probe_start(&io->probe, io->transport->socket(io));
			io->probed_at_ms = now;
		}
		break;
	}
}
