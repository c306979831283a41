/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The I/O thread: receives while no waiter does, throws a broken connection away, and tries to make a new one for as
 * long as it takes.
 */
#include "nfs/internal.h"

#include "base/log.h"
#include "base/thread.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define TRANSFER_LIMIT_BYTES (1024 * 1024)
#define TRANSFER_UNKNOWN_BYTES (128 * 1024)
#define BACKOFF_FIRST_MS 50
/* The first request after the server's return waits for it. With jitter, up to half as much again. */
#define BACKOFF_LIMIT_MS 1000
#define CLOSE_LIMIT_MS 1000
/* The time for mounting and opening doubles each time that it was too short, up to this. */
#define PATIENCE_LIMIT_MS (10 * 60 * 1000)
/*
 * What libnfs allocates for everything that an engine's connections have in flight: as LIBNFS_HEAP_BYTES of memlock.py,
 * which is for connections that begin with libnfs. All connections touch the same heap.
 */
#define LIBNFS_HEAP_BYTES (5 * 1024 * 1024 / 2)
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
	io->discarding = true;
	io->transport->close(io);
	io->discarding = false;
	io->transport = NULL;
	io->broken = false;
	probe_end(&io->probe);
	req_list_prepend(&io->pending, &io->inflight);
	name_ops_interrupted(io);
}

/* Fault in what libnfs will allocate for calls in flight: memory may be short later. */
static void touch_heap(size_t bytes)
{
	volatile char *heap = malloc(bytes);

	for (size_t i = 0; heap != NULL && i < bytes; i += 4096)
		heap[i] = 0;
	free((void *)(uintptr_t)heap);
}

/* Go on with libnfs's socket, without libnfs. Returns false when that is not possible. Lock held. */
static bool take_over(struct nfsio *io, const struct connection *made)
{
	int fd = fcntl(nfs_get_fd(made->nfs), F_DUPFD_CLOEXEC, 0);

	if (fd < 0)
		return false;
	wire_open(&io->wire, fd, url_number(io->url, "uid=", getuid()), url_number(io->url, "gid=", getgid()));
	assert(made->fh3.data.data_len > 0 && made->fh3.data.data_len <= sizeof(io->handle3));
	io->handle3_bytes = made->fh3.data.data_len;
	memcpy(io->handle3, made->fh3.data.data_val, io->handle3_bytes);
	libnfs_destroy(made->nfs, made->fh);
	io->transport = &transport_wire;
	return true;
}

/* Put a connection to use, and send what has waited for one. Lock held. */
static void publish(struct nfsio *io, const struct connection *made)
{
	assert(!is_up(io) && io->inflight.head == NULL);
	if (io->wire_failed && io->next_transport == NFSIO_OVER_WIRE) {
		log_line("server %s: its answers are unusual, using libnfs from now on", io->address);
		io->next_transport = NFSIO_OVER_LIBNFS;
		touch_heap(LIBNFS_HEAP_BYTES);
	}
	if (io->next_transport == NFSIO_OVER_LIBNFS || !take_over(io, made)) {
		io->nfs = made->nfs;
		io->fh = made->fh;
		io->fh3 = made->fh3;
		io->transport = &transport_libnfs;
	}
	if (made->directory.length_bytes > 0) {
		io->directory = made->directory;
		io->directory_is_stale = false;
		io->directory_at_ms = now_ms();
	}
	io->last_received_ms = io->connected_at_ms = now_ms();
	io->deadline_ms = INT64_MAX;
	io->useful = false;
	io->state.condition = NFSIO_UP;
	io->state.gone_too_long = false;
	io->state.connects++;
	io->gone_since_ms = 0;
	issue_pending(io);
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
	int64_t now = now_ms();
	bool gone_too_long = false;

	if (condition != NFSIO_LINK_DOWN) {
		if (io->gone_since_ms == 0)
			io->gone_since_ms = now;
		gone_too_long = io->options.gone_limit_ms > 0 && now - io->gone_since_ms >= io->options.gone_limit_ms;
	}
	pthread_mutex_lock(&io->lock);
	if (io->state.condition != condition || io->state.gone_too_long != gone_too_long) {
		if (gone_too_long && !io->state.gone_too_long && !io->options.quiet)
			log_line("server %s: the file has been gone for %.0f s: requests that need it fail from now on",
				 io->address, (double)(now - io->gone_since_ms) / 1000);
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
	if (why->phase != NFSIO_OPEN)
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

/* Connect again, for as long as it takes. Lock held; dropped meanwhile. */
static void reconnect(struct nfsio *io)
{
	int64_t since_ms = now_ms();
	unsigned seed = (unsigned)since_ms ^ (unsigned)getpid();
	struct nfsio_failure why = { 0 };

	io->away_since_ms = since_ms;
	memset(io->logged, 0, sizeof(io->logged));
	/* a connection that broke at once, without any use, counts as a failed attempt */
	if (io->useful || since_ms - io->connected_at_ms > BACKOFF_LIMIT_MS)
		io->backoff_ms = 0;
	pthread_mutex_unlock(&io->lock);
	note_down(io, NFSIO_LINK_DOWN);
	while (!atomic_load(&io->stop)) {
		struct connection made;
		enum nfsio_condition condition;

		/* jitter: the clients of a server should not all come back in the same moment */
		if (io->backoff_ms > 0)
			back_off(io, io->backoff_ms / 2 + rand_r(&seed) % io->backoff_ms);
		io->backoff_ms = io->backoff_ms == 0 ? BACKOFF_FIRST_MS : io->backoff_ms * 2;
		if (io->backoff_ms > BACKOFF_LIMIT_MS)
			io->backoff_ms = BACKOFF_LIMIT_MS;
		if (connect_once(io, &made, &why)) {
			int same = is_same_file(io, &made);

			if (same > 0) {
				if (!io->options.quiet)
					log_line("server %s: connected again after %.1f s", io->address,
						 (double)(now_ms() - since_ms) / 1000);
				pthread_mutex_lock(&io->lock);
				note_size(io, made.st.size_bytes);
				publish(io, &made);
				notify_watcher(io);
				return;
			}
			if (same < 0)
				set_failure(&why, NFSIO_CONNECT, same, nfs_get_error(made.nfs));
			libnfs_destroy(made.nfs, made.fh);
			condition = same < 0 ? NFSIO_LINK_DOWN : NFSIO_FILE_REPLACED;
		} else {
			condition = condition_of(&why);
			if (why.error == -ETIMEDOUT && io->patience_ms < PATIENCE_LIMIT_MS)
				io->patience_ms *= 2;
		}
		if (atomic_load(&io->stop))
			break;
		log_down(io, condition, why.message[0] != '\0' ? why.message : strerror(-why.error));
		note_down(io, condition);
	}
	pthread_mutex_lock(&io->lock);
}

/*
 * Should the I/O thread receive now? It leaves that to a single waiter, and for a moment to the next one, which may
 * come soon. But it must receive what no waiter waits for, and notice a connection that ends while it is idle.
 */
static bool is_mine_to_receive(const struct nfsio *io)
{
	if (io->receiver != RECEIVER_NONE || io->broken)
		return false;
	return io->detached > 0 || io->batches > 0 || io->finished.head != NULL ||
	       now_ms() - io->waited_at_ms >= QUIET_MS;
}

/* Lock held; dropped while waiting. */
static void wait_for_io_work(struct nfsio *io)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += QUIET_MS * 1000000L;
	if (until.tv_nsec >= 1000000000L) {
		until.tv_nsec -= 1000000000L;
		until.tv_sec++;
	}
	pthread_cond_timedwait(&io->io_work, &io->lock, &until);
}

/* `servers` is what libnfs knows of the server's limit: 0 over NFSv4. */
static uint32_t smaller_limit(uint32_t limit, uint64_t servers)
{
	if (servers == 0)
		servers = TRANSFER_UNKNOWN_BYTES;
	return servers < limit ? (uint32_t)servers : limit;
}

void *io_thread(void *arg)
{
	struct nfsio *io = arg;
	struct connection made;
	struct nfsio_failure why = { 0 };
	bool connected;

	touch_stack();
	connected = connect_once(io, &made, &why);
	pthread_mutex_lock(&io->lock);
	if (connected) {
		io->opened = made.st;
		io->opened_once = true;
		remember_handle(io, &made);
		io->max_transfer_bytes = smaller_limit(TRANSFER_LIMIT_BYTES, nfs_get_readmax(made.nfs));
		io->max_transfer_bytes = smaller_limit(io->max_transfer_bytes, nfs_get_writemax(made.nfs));
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
	if (io->nfs != NULL && !io->broken && io->version != 3) {
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
