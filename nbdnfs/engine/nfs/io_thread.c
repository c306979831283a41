/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The I/O thread: receives while no waiter does, throws a broken connection away, and tries to make a new one for as
 * long as it takes.
 */
#include "nfs/connecting.h"

#include "base/log.h"
#include "base/thread.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BACKOFF_FIRST_MS 50
/* The first request after the server's return waits for it. With jitter, up to half as much again. */
#define BACKOFF_LIMIT_MS 1000
#define CLOSE_LIMIT_MS 1000
/* The pause before the next of the first attempts, when the server has asked to come back later. */
#define FIRST_RETRY_MS 200
/* How much of the time the first attempt has: an answer that was lost is not waited for any longer. */
#define FIRST_ATTEMPT_PART 3
/* The time for connecting doubles each time that it was too short, up to this. */
#define PATIENCE_LIMIT_MS (10 * 60 * 1000)
/* How long after a waiter has received the I/O thread receives again. */
#define QUIET_MS 100

/*
 * Have close(2) reset the connection: else the kernel goes on sending what is left in the socket, which may reach the
 * server after its own repetition.
 */
static void drop_unsent(int fd)
{
	struct linger now = { .l_onoff = 1, .l_linger = 0 };

	if (fd >= 0)
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
}

/* Throw the connection away; what was in flight waits for the next one. Lock held. */
static void discard(struct nfsio *io)
{
	assert_locked(&io->lock);
	if (!is_up(io))
		return;
	assert(io->receiver == RECEIVER_NONE);
	if (io->broken)
		drop_unsent(io->transport->socket(io));
	for (struct nfsio_req *req = io->inflight.head; req != NULL; req = req->next)
		req->resent = req->op == NFSIO_WRITE || req->op == NFSIO_WRITE_UNSTABLE;
	if (!atomic_load(&io->stop))
		note_twins(io); /* before the connection is closed: this process may be killed at any time */
	io->discarding = true;
	io->transport->close(io);
	io->discarding = false;
	io->transport = NULL;
	io->broken = false;
	io->rest_has_pages = false;
	probe_end(&io->probe);
	req_list_prepend(&io->pending, &io->inflight);
	name_ops_interrupted(io);
}

/* Put a connection to use, and send what has waited for one. Lock held. */
static void publish(struct nfsio *io, const struct connection *made)
{
	assert(!is_up(io) && io->inflight.head == NULL);
	io->nfs = made->nfs;
	io->fh = made->fh;
	io->fh3 = made->fh3;
	io->transport = made->nfs != NULL ? &transport_libnfs : &transport_wire;
	if (made->place.handle_bytes != io->place.handle_bytes ||
	    memcmp(made->place.handle, io->place.handle, made->place.handle_bytes) != 0)
		io->handles++;
	io->place = made->place;
	io->fsid = made->fsid;
	io->fileid = made->st.fileid;
	io->read_max_bytes = made->read_max_bytes;
	io->write_max_bytes = made->write_max_bytes;
	io->refused_port = false;
	if (made->directory.length_bytes > 0) {
		io->directory = made->directory;
		io->directory_is_stale = false;
		io->directory_found = true;
	}
	io->connected_at_ms = now_ms();
	note_heard(io, io->connected_at_ms);
	io->deadline_ms = INT64_MAX;
	io->useful = false;
	io->state.condition = NFSIO_UP;
	io->state.gone_too_long = false;
	io->state.connects++;
	io->gone = (struct nfsio_told){ 0 };
	issue_pending(io);
	call_attendant(io);
}

/* Call nfsio_watch()'s callback. Lock held; dropped during the call. */
static void notify_watcher(struct nfsio *io)
{
	nfsio_changed_fn changed = io->changed;
	void *context = io->changed_context;

	pthread_mutex_unlock(&io->lock);
	if (changed != NULL)
		changed(context);
	pthread_mutex_lock(&io->lock);
}

/* There is no connection: note why. Without the lock. */
static void note_down(struct nfsio *io, enum nfsio_condition condition)
{
	int64_t gone_ms = condition == NFSIO_LINK_DOWN ? 0 : note_told(&io->gone);
	bool gone_too_long = io->options.gone_limit_ms > 0 && gone_ms >= io->options.gone_limit_ms;

	pthread_mutex_lock(&io->lock);
	if (io->state.condition != condition || io->state.gone_too_long != gone_too_long) {
		if (gone_too_long && !io->state.gone_too_long && !io->options.quiet)
			log_line("server %s: the file has been gone for %.0f s: requests that need it fail from now on",
				 io->address, (double)gone_ms / 1000);
		io->state.condition = condition;
		io->state.gone_too_long = gone_too_long;
		notify_watcher(io);
	}
	pthread_mutex_unlock(&io->lock);
}

/* Sleep; only nfsio_stop() ends it early. Without the lock. */
static void back_off(struct nfsio *io, int ms)
{
	int64_t until_ms = now_ms() + ms;
	uint64_t kicks;

	while (!atomic_load(&io->stop)) {
		struct pollfd fd = { .fd = io->wake_fd, .events = POLLIN };
		int64_t left_ms = until_ms - now_ms();

		if (left_ms <= 0)
			return;
		if (poll(&fd, 1, left_ms > AWAY_TICK_MS ? AWAY_TICK_MS : (int)left_ms) > 0)
			(void)!read(io->wake_fd, &kicks, sizeof(kicks));
		tend_waiting(io);
	}
}

/* An attempt to connect has failed: is the server not there, or the file? */
static enum nfsio_condition condition_of(const struct nfsio_failure *why)
{
	if (!is_of_the_file(why))
		return NFSIO_LINK_DOWN;
	switch (why->error) {
	case -ENOENT:
	case -ESTALE:
	case -ENOTDIR:
		return NFSIO_FILE_DELETED;
	case -EISDIR:
	case -EINVAL:
		return NFSIO_FILE_REPLACED;
	default:
		return NFSIO_LINK_DOWN;
	}
}

/*
 * An attempt has succeeded after `took_ms`: what the next ones may take. Not what the attempts before it were given: a
 * server that loses an answer now and then is not slow, and the next one that it loses is waited for as long.
 */
static int64_t patience_after(const struct nfsio *io, int64_t took_ms)
{
	int64_t first_ms = (int64_t)io->options.connect_timeout_s * 1000;

	return 2 * took_ms > first_ms ? 2 * took_ms : first_ms;
}

/* Connect again, for as long as it takes. Lock held; dropped meanwhile. */
static void reconnect(struct nfsio *io)
{
	int64_t since_ms = now_ms();
	unsigned seed = (unsigned)since_ms ^ (unsigned)getpid();
	struct nfsio_failure why = { 0 };
	int refused = io->refused;
	bool repeats = refused != 0 && io->refusal_logged;

	io->away_since_ms = since_ms;
	memset(io->logged, 0, sizeof(io->logged));
	/* a connection that broke at once, without any use, or over an answer, counts as a failed attempt */
	if (refused != 0)
		io->backoff_ms = io->backoff_ms == 0 ? BACKOFF_FIRST_MS : io->backoff_ms;
	else if (io->useful || since_ms - io->connected_at_ms > BACKOFF_LIMIT_MS)
		io->backoff_ms = 0;
	io->refused = 0;
	io->refusal_logged = refused != 0;
	pthread_mutex_unlock(&io->lock);
	if (refused != 0 && !repeats)
		log_line("server %s: %s: connecting again", io->address,
			 refused == -EACCES ? "it refused our credentials in an RPC answer"
					    : "it sent an answer that the protocol does not allow");
	note_down(io, NFSIO_LINK_DOWN);
	while (!atomic_load(&io->stop)) {
		struct connection made;
		enum nfsio_condition condition;
		int64_t attempt_ms;

		/* jitter: the clients of a server should not all come back in the same moment */
		if (io->backoff_ms > 0)
			back_off(io, io->backoff_ms / 2 + rand_r(&seed) % io->backoff_ms);
		io->backoff_ms = io->backoff_ms == 0 ? BACKOFF_FIRST_MS : io->backoff_ms * 2;
		if (io->backoff_ms > BACKOFF_LIMIT_MS)
			io->backoff_ms = BACKOFF_LIMIT_MS;
		attempt_ms = now_ms();
		if (connect_once(io, &made, &why)) {
			io->patience_ms = patience_after(io, now_ms() - attempt_ms);
			if (!io->options.quiet && !repeats)
				log_line("server %s: connected again after %.1f s", io->address,
					 (double)(now_ms() - since_ms) / 1000);
			pthread_mutex_lock(&io->lock);
			note_size(io, made.st.size_bytes);
			note_links(io, (uint32_t)made.st.nlink);
			publish(io, &made);
			notify_watcher(io);
			return;
		}
		condition = condition_of(&why);
		if (why.error == -ETIMEDOUT && io->patience_ms < PATIENCE_LIMIT_MS)
			io->patience_ms *= 2;
		if (atomic_load(&io->stop))
			break;
		log_down(io, condition, why.message[0] != '\0' ? why.message : strerror(-why.error));
		note_down(io, condition);
	}
	pthread_mutex_lock(&io->lock);
}

/*
 * Should the I/O thread receive now? It leaves that to the attendant, to a single waiter, and for a moment to the next
 * waiter, which may come soon. But it must receive what no waiter waits for, and notice a connection that ends while it
 * is idle.
 */
static bool is_mine_to_receive(const struct nfsio *io)
{
	if (io->receiver != RECEIVER_NONE || io->broken || io->attendant_fd >= 0)
		return false;
	return io->detached > 0 || io->batches > 0 || io->finished.head != NULL ||
	       now_ms() - io->waited_at_ms >= QUIET_MS;
}

/* Lock held; dropped while waiting. */
static void wait_for_io_work(struct nfsio *io)
{
	struct timespec until = time_after_ms(io->attendant_fd < 0 ? QUIET_MS : io->attended_tick_ms);
	pthread_cond_timedwait(&io->io_work, &io->lock, &until);
}

/*
 * The first attempts: one that the server puts off is repeated for a while. An answer that does not come is waited for
 * a part of the time only: libnfs does not repeat a call, so all of them are made again, over a new connection.
 */
static bool connect_first(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	int64_t patience_ms = io->patience_ms, deadline_ms = now_ms() + patience_ms, left_ms = patience_ms;
	bool connected, again;

	/* the server may have made the file, and put off what was asked next: only the caller knows whose it is then */
	if (io->options.create && io->options.exclusive)
		return connect_once(io, made, why);
	io->patience_ms = patience_ms / FIRST_ATTEMPT_PART;
	do {
		connected = connect_once(io, made, why);
		left_ms = deadline_ms - now_ms();
		again = !connected && left_ms > 0 && !atomic_load(&io->stop);
		if (again && why->error == -EAGAIN)
			back_off(io, FIRST_RETRY_MS);
		else if (again && why->error == -ETIMEDOUT)
			io->patience_ms = left_ms;
		else
			again = false;
	} while (again);
	io->patience_ms = patience_ms;
	return connected;
}

void *io_thread(void *arg)
{
	struct nfsio *io = arg;
	struct connection made;
	struct nfsio_failure why = { 0 };
	bool connected;

	touch_stack();
	connected = connect_first(io, &made, &why);
	pthread_mutex_lock(&io->lock);
	if (connected) {
		io->opened = made.st;
		io->opened_once = io->expects_file = true;
		io->max_transfer_bytes =
			made.read_max_bytes < made.write_max_bytes ? made.read_max_bytes : made.write_max_bytes;
		publish(io, &made);
	} else {
		*io->first_failure = why;
	}
	io->first_done = true;
	pthread_cond_signal(&io->settled);
	while (connected && !atomic_load(&io->stop)) {
		if (io->broken && io->receiver == RECEIVER_NONE)
			discard(io);
		if (!is_up(io)) {
			reconnect(io);
		} else if (is_mine_to_receive(io)) {
			io->receiver = RECEIVER_IO_THREAD;
			receive(io);
			if (io->receiver == RECEIVER_IO_THREAD)
				io->receiver = RECEIVER_NONE;
		} else {
			wait_for_io_work(io);
		}
	}
	while (io->receiver == RECEIVER_WAITER)
		wait_for_io_work(io); /* it has been woken, and still uses the connection */
	if (io->nfs != NULL && io->fh != NULL && !io->broken && io->version != 3) {
		/* the server keeps state for an open NFSv4 file: close it, but only wait a moment for that */
		struct step *step = new_step(io);

		step->insists = true;
		if (nfs_close_async(io->nfs, io->fh, step_done, step) == 0)
			pump(io, io->nfs, step, now_ms() + CLOSE_LIMIT_MS);
		io->fh = NULL;
	}
	discard(io);
	req_finish_all(&io->pending, -ECANCELED);
	req_finish_all(&io->later, -ECANCELED);
	name_ops_finish_all(io, -ECANCELED);
	give_back(io);
	pthread_mutex_unlock(&io->lock);
	return NULL;
}
