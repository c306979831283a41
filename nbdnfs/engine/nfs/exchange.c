/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Sending what waits, and receiving. */
#include "nfs/internal.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

/* How often an idle NFSv4 client reads something: leases are 10 s and longer. */
#define TOUCH_MS 4000

/* The least time that the server has to answer, however late a request was sent: giving up ends the connection. */
#define ANSWER_TIME_MIN_MS 1000

/* A request in flight has waited too long, and the server has had the time to answer it. */
static bool is_given_up(const struct nfsio *io, const struct nfsio_req *req, int64_t now)
{
	int64_t least_ms = io->options.soft_limit_ms;

	if (least_ms > ANSWER_TIME_MIN_MS)
		least_ms = ANSWER_TIME_MIN_MS;
	return is_hopeless(io, req, now) != 0 && (req->fail_at_ms != 0 || now - req->sent_at_ms >= least_ms);
}

/* A call has been outstanding for too long. It cannot be cancelled, so all of them go over a new connection. */
static void give_up_on_slow(struct nfsio *io, int64_t now)
{
	for (struct name_op *op = io->name_ops; op != NULL && !io->broken; op = op->next)
		io->broken = now >= op->limit_at_ms;
	for (struct nfsio_req *req = io->inflight.head; req != NULL && !io->broken; req = req->next)
		io->broken = is_given_up(io, req, now);
}

/* Is it a WRITE to the file that is open? */
static bool writes_pages(const struct nfsio_req *req)
{
	return (req->op == NFSIO_WRITE || req->op == NFSIO_WRITE_UNSTABLE) && req->handle == NULL;
}

static int may_write(struct nfsio *io)
{
	return io->options.may_write != NULL ? io->options.may_write(io->options.may_write_context) : 0;
}

/* 0: send it; -EAGAIN: not yet; another -errno: it fails. */
static int may_send(struct nfsio *io, const struct nfsio_req *req, int64_t now)
{
	int hopeless = is_hopeless(io, req, now); /* else its deadline would end the connection */

	if (hopeless != 0)
		return hopeless;
	if (req->op == NFSIO_LOOKUP && req->handle->length_bytes == 0)
		return seek_directory(io) ? -EAGAIN : -EACCES;
	return writes_pages(req) ? may_write(io) : 0;
}

/*
 * What is left of a WRITE leaves while that is permitted, as its beginning did: the machine may have slept since. If it
 * is not, the connection ends: a server does nothing with a call that does not come whole.
 */
static void check_rest(struct nfsio *io)
{
	if (!io->rest_has_pages)
		return;
	io->rest_has_pages = (io->transport->events(io) & POLLOUT) != 0;
	if (io->rest_has_pages && may_write(io) != 0)
		io->broken = true;
}

/* Note whether anything waits for the server, and since when, for other processes. Lock held. */
void note_waiting(struct nfsio *io)
{
	bool waits = io->inflight.head != NULL || io->pending.head != NULL || io->later.head != NULL ||
		     io->name_ops != NULL || io->waiting_names != NULL;

	if (io->noted_waiting_ms == NULL || waits == io->waits)
		return;
	io->waits = waits;
	atomic_store_explicit(io->noted_waiting_ms, waits ? (uint64_t)now_ms() : 0, memory_order_relaxed);
}

/* Send what is pending, as far as the socket takes it. */
static void issue_requests(struct nfsio *io)
{
	int64_t now = now_ms();
	struct nfsio_req *req;

	if (io->inflight.head == NULL && io->name_ops == NULL)
		io->silent_since_ms = now; /* there was nothing to wait for */
	while ((req = io->pending.head) != NULL && !io->broken && io->transport->has_room(io)) {
		int refused = may_send(io, req, now);

		if (refused != 0 && refused != -EAGAIN) {
			req_finish(&io->pending, req, refused);
			continue;
		}
		if (refused != 0 || io->transport->issue(io, req) < 0) {
			try_later(io, &io->pending, req);
			continue;
		}
		req_list_remove(&io->pending, req);
		req_list_push(&io->inflight, req);
		io->rest_has_pages |= writes_pages(req);
		req->give_up_at_ms = note_outstanding(io, now, req->repeat_after_ms,
						      req->fail_at_ms != 0 ? req->fail_at_ms : INT64_MAX);
		if (io->options.soft_limit_ms > 0)
			req->sent_at_ms = now;
	}
}

/* Send what waits. */
void issue_pending(struct nfsio *io)
{
	assert_locked(&io->lock);
	note_waiting(io);
	if (!is_up(io) || io->broken)
		return;
	check_rest(io);
	if (io->pending.head != NULL || io->waiting_names != NULL) {
		issue_requests(io);
		issue_names(io);
		note_waiting(io); /* what may not be sent has ended */
	}
	if (io->transport->push != NULL && !io->broken)
		io->transport->push(io);
}

static void touch_done(struct nfsio_req *req)
{
	pthread_mutex_lock(&req->io->lock);
	req->io->touching = false;
	pthread_mutex_unlock(&req->io->lock);
}

/*
 * An NFSv4 server forgets a client that sends nothing for a lease. A call with the open file's state id renews it (RFC
 * 7530, 9.5), such as READ; GETATTR has none.
 */
static void touch_lease(struct nfsio *io, int64_t now)
{
	if (io->version == 3 || io->touching || io->inflight.head != NULL || now - io->silent_since_ms < TOUCH_MS)
		return;
	io->touching = true;
	io->touch = (struct nfsio_req){
		.op = NFSIO_READ,
		.length_bytes = 1,
		.data = &io->touch_byte,
		.done = touch_done,
	};
	req_enqueue(io, &io->touch, NULL);
	io->detached++;
}

/* How long a receiver may sleep. Requests that are submitted meanwhile do not wake it. */
static int sleep_ms(const struct nfsio *io, int64_t now)
{
	int64_t ms = silence_sleep_ms(io, now);

	if (io->version != 3 && ms > TOUCH_MS / 4)
		ms = TOUCH_MS / 4;
	if (io->options.soft_limit_ms > 0 && ms > AWAY_TICK_MS)
		ms = AWAY_TICK_MS;
	if (io->waiting_names != NULL && ms > RETRY_LATER_MS)
		ms = RETRY_LATER_MS;
	if (io->later.head != NULL) {
		int64_t left_ms = io->later_at_ms - now;

		if (left_ms < ms)
			ms = left_ms > 0 ? left_ms : 0;
	}
	return (int)ms;
}

int before_poll(struct nfsio *io, struct pollfd fds[NFSIO_POLLED])
{
	int64_t now = now_ms();
	int timeout_ms = sleep_ms(io, now);

	assert_locked(&io->lock);
	fds[0] = (struct pollfd){ .fd = io->transport->socket(io), .events = io->transport->events(io) };
	fds[1] = (struct pollfd){ .fd = io->receiver == RECEIVER_ATTENDANT ? -1 : io->wake_fd, .events = POLLIN };
	fds[2] = (struct pollfd){ .fd = io->probe.fd, .events = probe_events(&io->probe) };
	if (io->finished.head != NULL)
		timeout_ms = 0; /* give back at once what failed before it was sent */
	io->polls_until_ms = now + timeout_ms;
	return timeout_ms;
}

void after_poll(struct nfsio *io, const struct pollfd fds[NFSIO_POLLED])
{
	int64_t now = now_ms(); /* of before what is received here: nothing is late because of that */
	uint64_t kicks;

	assert(is_up(io)); /* only the I/O thread throws a connection away, and not while another thread receives */
	if (fds[1].revents != 0)
		(void)!read(io->wake_fd, &kicks, sizeof(kicks));
	check_rest(io);
	if (fds[0].revents != 0 && !io->broken)
		io->transport->serve(io, fds[0].revents);
	if (io->later.head != NULL && now >= io->later_at_ms)
		req_list_prepend(&io->pending, &io->later);
	if (io->options.soft_limit_ms > 0 || now >= io->deadline_ms) {
		fail_hopeless(io);
		give_up_on_slow(io, now);
	}
	if (io->probe.state == PROBE_WAITING && fds[2].fd == io->probe.fd && fds[2].revents != 0) {
		probe_service(&io->probe, fds[2].revents);
		if (io->probe.state != PROBE_WAITING)
			io->probed_at_ms = now;
	}
	look_into_silence(io, now);
	touch_lease(io, now);
	issue_pending(io);
	give_back(io);
}

/*
 * Wait until something can be received, and receive it. Called by the thread that is io->receiver; if another one is
 * when the wait is over, that one receives. Lock held; dropped while waiting, and while callbacks run.
 */
void receive(struct nfsio *io)
{
	enum receiver me = io->receiver;
	struct pollfd fds[NFSIO_POLLED];
	int timeout_ms = before_poll(io, fds);

	if (me == RECEIVER_IO_THREAD)
		io->io_thread_polls = true;
	pthread_mutex_unlock(&io->lock);
	poll(fds, NFSIO_POLLED, timeout_ms);
	pthread_mutex_lock(&io->lock);
	io->polls_until_ms = 0;
	if (me == RECEIVER_IO_THREAD)
		io->io_thread_polls = false;
	if (io->receiver == me)
		after_poll(io, fds);
}
