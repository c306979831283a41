/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Requests: how they are queued and issued, what their answers mean, and who receives these.
 *
 * NFSv3 transfers are raw READ and WRITE calls, libnfs's or our own (wire.h), so that the stability and the status of each are seen as the
 * server sent them. NFSv4 goes through libnfs's file API, which hides the state that v4 needs.
 */
#include "nfs/internal.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#define RETRY_LATER_MS 200
/* Over an idle NFSv4 connection something is read so often; leases are 10 s and longer. */
#define TOUCH_MS 4000
/* While a silent connection is looked into. */
#define SILENCE_TICK_MS 250

static void list_push(struct req_list *list, struct nfsio_req *req)
{
	req->next = NULL;
	req->prev = list->tail;
	if (list->tail != NULL)
		list->tail->next = req;
	else
		list->head = req;
	list->tail = req;
}

static void list_remove(struct req_list *list, struct nfsio_req *req)
{
	if (req->prev != NULL)
		req->prev->next = req->next;
	else
		list->head = req->next;
	if (req->next != NULL)
		req->next->prev = req->prev;
	else
		list->tail = req->prev;
}

/* Put all of `from` before what is in `to`: what was issued first is issued again first. */
void list_prepend(struct req_list *to, struct req_list *from)
{
	if (from->head == NULL)
		return;
	from->tail->next = to->head;
	if (to->head != NULL)
		to->head->prev = from->tail;
	else
		to->tail = from->tail;
	to->head = from->head;
	from->head = from->tail = NULL;
}

/* Have whoever is in poll() look again. */
static void kick(struct nfsio *io)
{
	uint64_t one = 1;

	(void)!write(io->wake_fd, &one, sizeof(one));
}

/*
 * The I/O thread has something to do. It may be in poll() although another receives: a waiter has taken its
 * place meanwhile, and has taken in what would have ended the poll.
 */
static void call_io_thread(struct nfsio *io)
{
	if (io->io_thread_polls)
		kick(io);
	else
		pthread_cond_signal(&io->io_work);
}

/* Have the I/O thread, and whoever receives in its place, look again. */
void wake_io_thread(struct nfsio *io)
{
	kick(io);
	pthread_cond_signal(&io->io_work);
}

/* ------------------------------------------------------------------ completions, lock held ------------- */

static void finish(struct req_list *list, struct nfsio_req *req, int error)
{
	struct nfsio_batch *batch = req->batch;

	list_remove(list, req);
	req->error = error;
	if (batch == NULL) {
		req->io->detached--;
		list_push(&req->io->finished, req);
	} else if (--batch->waiting == 0 && batch->sleeping) {
		pthread_cond_signal(&batch->all_done);
	}
}

void finish_all(struct req_list *list, int error)
{
	while (list->head != NULL)
		finish(list, list->head, error);
}

/* Is it time to give up? Never for write-backs: somebody has been told that they are done. */
static bool is_hopeless(const struct nfsio *io, const struct nfsio_req *req, int64_t now)
{
	if (req->op != NFSIO_READ && req->batch == NULL)
		return false;
	return io->state.lost ||
	       (io->options.soft_limit_ms > 0 && now - req->queued_at_ms >= io->options.soft_limit_ms);
}

/* Of what waits to be issued. */
void fail_hopeless(struct nfsio *io)
{
	struct req_list *lists[] = { &io->pending, &io->later };
	int64_t now = now_ms();

	for (size_t i = 0; i < 2; i++)
		for (struct nfsio_req *req = lists[i]->head, *next; req != NULL; req = next) {
			next = req->next;
			if (is_hopeless(io, req, now))
				finish(lists[i], req, io->state.lost ? -ESTALE : -EIO);
		}
}

/* A request under way is not to be waited for: libnfs takes none back, so all of them go on over another context. */
static void give_up_on_slow(struct nfsio *io)
{
	int64_t now = now_ms();

	for (struct nfsio_req *req = io->inflight.head; req != NULL && !io->broken; req = req->next)
		io->broken = is_hopeless(io, req, now);
}

static void try_later(struct nfsio *io, struct req_list *list, struct nfsio_req *req)
{
	list_remove(list, req);
	list_push(&io->later, req);
	io->later_at_ms = now_ms() + RETRY_LATER_MS;
}

/* `count` more bytes of an issued request have moved. */
static void moved(struct nfsio *io, struct nfsio_req *req, uint32_t count, bool end_of_file)
{
	if (count > req->length_bytes - req->moved_bytes) {
		io->broken = true; /* no server means that; the connection has lost its framing */
		return;
	}
	io->useful = true;
	req->moved_bytes += count;
	if (req->moved_bytes == req->length_bytes || end_of_file) {
		finish(&io->inflight, req, 0);
	} else if (count == 0) {
		finish(&io->inflight, req, -EIO); /* neither bytes nor an end: asking again would not end */
	} else {
		list_remove(&io->inflight, req);
		list_push(&io->pending, req); /* a short transfer: the I/O thread asks for the rest */
	}
}

static void refused3(struct nfsio *io, struct nfsio_req *req, int status)
{
	if (status == NFS3ERR_STALE || status == NFS3ERR_BADHANDLE) {
		io->broken = true; /* a new context looks the file up again */
		return;
	}
	io->useful = true;
	if (status == NFS3ERR_JUKEBOX)
		try_later(io, &io->inflight, req);
	else if (status == NFS3ERR_DQUOT)
		finish(&io->inflight, req, -EDQUOT); /* -ERANGE to libnfs (nfsstat3_to_errno) */
	else
		finish(&io->inflight, req, nfsstat3_to_errno(status) < 0 ? nfsstat3_to_errno(status) : -EIO);
}

/* The server says how large the file is. */
void note_size(struct nfsio *io, uint64_t bytes)
{
	if (io->opened_once && bytes < io->opened.size_bytes && bytes < atomic_load(&io->cut_bytes))
		atomic_store(&io->cut_bytes, bytes);
}

/* It says how many names the file has. */
static void note_links(struct nfsio *io, uint32_t links)
{
	if (links == 0)
		atomic_store(&io->unlinked, true);
}

static void note_attributes3(struct nfsio *io, const post_op_attr *attributes)
{
	if (!attributes->attributes_follow)
		return;
	note_size(io, attributes->post_op_attr_u.attributes.size);
	note_links(io, attributes->post_op_attr_u.attributes.nlink);
}

/* Before and after a write, which may have made a file long again that had been cut. */
static void note_wcc3(struct nfsio *io, const wcc_data *wcc)
{
	if (wcc->before.attributes_follow)
		note_size(io, wcc->before.pre_op_attr_u.attributes.size);
	note_attributes3(io, &wcc->after);
}

void heard(struct nfsio *io)
{
	io->said_at_ms = io->heard_at_ms = now_ms();
}

/* True when this answer counts: it came from the server, over the context in use. */
bool answered(struct nfsio *io, int rpc_status)
{
	if (io->discarding)
		return false;
	if (rpc_status != RPC_STATUS_SUCCESS) {
		io->broken = true;
		return false;
	}
	heard(io);
	return true;
}

static void wrote3(struct nfsio *io, struct nfsio_req *req, uint32_t count, bool stable, uint64_t verifier)
{
	if (req->op == NFSIO_WRITE && !stable) {
		finish(&io->inflight, req, -EPROTO); /* RFC 1813, 3.3.7: a FILE_SYNC write is answered as such */
	} else if (req->moved_bytes > 0 && !stable && verifier != req->verifier) {
		req->moved_bytes = 0; /* the server restarted between the pieces: all of it again */
		list_remove(&io->inflight, req);
		list_push(&io->pending, req);
	} else {
		req->verifier = verifier;
		req->stable = stable && (req->moved_bytes == 0 || req->stable);
		moved(io, req, count, false);
	}
}

static void committed3(struct nfsio *io, struct nfsio_req *req, uint64_t verifier)
{
	req->verifier = verifier;
	finish(&io->inflight, req, 0);
}

static void read3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct nfsio_req *req = arg;
	struct nfsio *io = req->io;
	READ3res *res = data;

	if (!answered(io, status))
		return;
	if (res->status != NFS3_OK) {
		refused3(io, req, res->status);
		return;
	}
	READ3resok *ok = &res->READ3res_u.resok;
	uint32_t count = ok->count;

	note_attributes3(io, &ok->file_attributes);

	if (!DATA_LANDS_IN_PLACE) {
		if (count > ok->data.data_len)
			count = ok->data.data_len;
		if (count <= req->length_bytes - req->moved_bytes)
			memcpy(req->data + req->moved_bytes, ok->data.data_val, count);
	}
	moved(io, req, count, ok->eof);
}

static uint64_t verifier_of(const char *bytes)
{
	uint64_t verifier;

	memcpy(&verifier, bytes, sizeof(verifier)); /* opaque: only ever compared */
	return verifier;
}

static void write3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct nfsio_req *req = arg;
	struct nfsio *io = req->io;
	WRITE3res *res = data;

	if (!answered(io, status))
		return;
	if (res->status != NFS3_OK) {
		refused3(io, req, res->status);
		return;
	}
	WRITE3resok *ok = &res->WRITE3res_u.resok;

	note_wcc3(io, &ok->file_wcc);
	wrote3(io, req, ok->count, ok->committed == FILE_SYNC, verifier_of(ok->verf));
}

static void commit3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct nfsio_req *req = arg;
	struct nfsio *io = req->io;
	COMMIT3res *res = data;

	if (!answered(io, status))
		return;
	if (res->status != NFS3_OK) {
		refused3(io, req, res->status);
		return;
	}
	committed3(io, req, verifier_of(res->COMMIT3res_u.resok.verf));
}

/* An answer that came without libnfs. */
static void wire_answered(struct nfsio *io, const struct wire_answer *answer)
{
	struct nfsio_req *req = (struct nfsio_req *)((char *)answer->call - offsetof(struct nfsio_req, call));

	if (answer->has_size_before)
		note_size(io, answer->size_before_bytes);
	if (answer->has_size) {
		note_size(io, answer->size_bytes);
		note_links(io, answer->links);
	}
	if (answer->status != NFS3_OK)
		refused3(io, req, (int)answer->status);
	else if (answer->call->procedure == WIRE_READ)
		moved(io, req, answer->count_bytes, answer->end_of_file);
	else if (answer->call->procedure == WIRE_WRITE)
		wrote3(io, req, answer->count_bytes, answer->stable, answer->verifier);
	else
		committed3(io, req, answer->verifier);
}

/* What the socket is ready for. */
static void serve_wire(struct nfsio *io, short revents)
{
	struct wire_answer answer;
	int status = 1;

	if (revents & POLLOUT && wire_flush(&io->wire) < 0)
		io->broken = true;
	while (!io->broken && (status = wire_receive(&io->wire, &answer)) > 0)
		wire_answered(io, &answer);
	if (io->wire.has_heard)
		heard(io);
	io->wire.has_heard = false;
	if (status < 0)
		io->broken = true;
	if (status == -EOPNOTSUPP)
		io->wire_failed = true;
}

static void refused4(struct nfsio *io, struct nfsio_req *req, int error)
{
	enum verdict4 verdict = error == -EAGAIN ? NOT_NOW4 : verdict4(io->nfs);

	if (verdict == STATE_LOST4 || error == -ESTALE) {
		io->broken = true; /* a new context opens the file again */
		return;
	}
	io->useful = true;
	if (verdict == NOT_NOW4)
		try_later(io, &io->inflight, req);
	else
		finish(&io->inflight, req, verdict == OVER_QUOTA4 ? -EDQUOT : error);
}

static void file_call_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct nfsio_req *req = arg;
	struct nfsio *io = req->io;

	if (!answered(io, is_transport_error(error) ? RPC_STATUS_ERROR : RPC_STATUS_SUCCESS))
		return;
	if (error < 0) {
		refused4(io, req, error);
	} else {
		if (!DATA_LANDS_IN_PLACE && req->op == NFSIO_READ &&
		    (uint32_t)error <= req->length_bytes - req->moved_bytes)
			memcpy(req->data + req->moved_bytes, data, error);
		req->stable = true; /* the file was opened with O_SYNC */
		/* a read that moves nothing has met the end; the file API does not pass eof on */
		moved(io, req, error, req->op == NFSIO_READ && error == 0);
	}
}

/* ------------------------------------------------------------------ issuing, lock held ----------------- */

static int issue_on_wire(struct nfsio *io, struct nfsio_req *req)
{
	static const enum wire_procedure procedures[] = {
		[NFSIO_READ] = WIRE_READ,
		[NFSIO_WRITE] = WIRE_WRITE,
		[NFSIO_WRITE_UNSTABLE] = WIRE_WRITE,
		[NFSIO_COMMIT] = WIRE_COMMIT,
	};

	req->call = (struct wire_call){
		.procedure = procedures[req->op],
		.offset_bytes = req->offset_bytes + req->moved_bytes,
		.length_bytes = req->length_bytes - req->moved_bytes,
		.data = req->data + req->moved_bytes,
		.stable = req->op == NFSIO_WRITE,
	};
	if (wire_send(&io->wire, &req->call) < 0)
		io->broken = true; /* it is under way all the same, until the connection has been thrown away */
	return 0;
}

static int issue(struct nfsio *io, struct nfsio_req *req)
{
	if (io->nfs == NULL)
		return issue_on_wire(io, req);

	uint64_t offset = req->offset_bytes + req->moved_bytes;
	uint32_t length = req->length_bytes - req->moved_bytes;
	uint8_t *data = req->data + req->moved_bytes;

	if (io->version != 3)
		return (req->op == NFSIO_READ ? call_pread : call_pwrite)(io->nfs, io->fh, data, length, offset,
									  file_call_done, req);
	if (req->op == NFSIO_READ) {
		READ3args args = { .file = io->fh3, .offset = offset, .count = length };

		return call_read3(nfs_get_rpc_context(io->nfs), read3_done, data, length, &args, req);
	}
	if (req->op == NFSIO_COMMIT) {
		COMMIT3args args = { .file = io->fh3 };

		return call_commit3(nfs_get_rpc_context(io->nfs), commit3_done, &args, req);
	}
	WRITE3args args = { .file = io->fh3, .offset = offset, .count = length };

	args.stable = req->op == NFSIO_WRITE ? FILE_SYNC : UNSTABLE;
	args.data.data_len = length;
	args.data.data_val = (char *)data;
	return call_write3(nfs_get_rpc_context(io->nfs), write3_done, &args, req);
}

static bool is_write(const struct nfsio_req *req)
{
	return req->op == NFSIO_WRITE || req->op == NFSIO_WRITE_UNSTABLE;
}

/* Send what waits, as far as the socket takes it. */
void issue_pending(struct nfsio *io)
{
	struct nfsio_req *req;

	if (!is_up(io) || io->broken)
		return;
	if (io->inflight.head == NULL && io->pending.head != NULL)
		io->heard_at_ms = now_ms();
	while ((req = io->pending.head) != NULL && !io->broken && (io->nfs != NULL || wire_has_room(&io->wire))) {
		int refused = is_write(req) && io->options.may_write != NULL ? io->options.may_write(io->options.judge) : 0;

		if (refused != 0 && refused != -EAGAIN) {
			finish(&io->pending, req, refused);
			continue;
		}
		if (refused != 0 || issue(io, req) < 0) {
			try_later(io, &io->pending, req);
			continue;
		}
		list_remove(&io->pending, req);
		list_push(&io->inflight, req);
		req->issued_at_ms = now_ms();
	}
	if (io->nfs != NULL && nfs_which_events(io->nfs) & POLLOUT && nfs_service(io->nfs, POLLOUT) < 0)
		io->broken = true;
}

/* What to poll the connection for. */
static short events_of(const struct nfsio *io)
{
	if (io->nfs != NULL)
		return (short)nfs_which_events(io->nfs);
	return wire_has_room(&io->wire) ? POLLIN : POLLIN | POLLOUT;
}

/* Give finished requests back. Lock held, dropped while their `done` runs: that may submit again. */
void give_back(struct nfsio *io)
{
	while (io->finished.head != NULL) {
		struct nfsio_req *req = io->finished.head, *next;

		io->finished.head = io->finished.tail = NULL;
		pthread_mutex_unlock(&io->lock);
		for (; req != NULL; req = next) {
			next = req->next; /* `done` may free or reuse the request */
			req->done(req);
		}
		pthread_mutex_lock(&io->lock);
	}
}

static void enqueue(struct nfsio *io, struct nfsio_req *req, struct nfsio_batch *batch)
{
	req->io = io;
	req->batch = batch;
	req->error = 0;
	req->moved_bytes = 0;
	req->stable = req->resent = false;
	req->queued_at_ms = now_ms();
	list_push(&io->pending, req);
}

static void touch_done(struct nfsio_req *req)
{
	pthread_mutex_lock(&req->io->lock);
	req->io->touching = false;
	pthread_mutex_unlock(&req->io->lock);
}

/*
 * An NFSv4 server forgets a client from which it hears nothing for a lease. What renews that is a call with the open
 * file's state id (RFC 7530, 9.5), such as READ; GETATTR has none.
 */
static void touch_lease(struct nfsio *io)
{
	if (io->version == 3 || io->touching || io->inflight.head != NULL || now_ms() - io->heard_at_ms < TOUCH_MS)
		return;
	io->touching = true;
	io->touch = (struct nfsio_req){ .op = NFSIO_READ, .length_bytes = 1, .data = &io->touch_byte, .done = touch_done };
	enqueue(io, &io->touch, NULL);
	io->detached++;
}

/* For how long a receiver may sleep. Requests that come meanwhile do not wake it. */
static int sleep_ms(const struct nfsio *io)
{
	int64_t ms = io->silence_ms;

	if (io->probe.state != PROBE_NONE)
		ms = SILENCE_TICK_MS;
	if (io->version != 3 && ms > TOUCH_MS / 4)
		ms = TOUCH_MS / 4;
	if (io->options.soft_limit_ms > 0 && ms > AWAY_TICK_MS)
		ms = AWAY_TICK_MS;
	if (io->later.head != NULL) {
		int64_t left_ms = io->later_at_ms - now_ms();

		if (left_ms < ms)
			ms = left_ms > 0 ? left_ms : 0;
	}
	return (int)ms;
}

/*
 * Wait for something to come over the connection and take it in. Lock held, dropped while waiting. Whoever
 * calls this is io->receiver; where somebody else is when the wait is over, what came is left to him.
 */
void receive(struct nfsio *io)
{
	enum receiver me = io->receiver;
	struct pollfd fds[3] = {
		{ .fd = socket_of(io), .events = events_of(io) },
		{ .fd = io->wake_fd, .events = POLLIN },
		{ .fd = io->probe.fd, .events = probe_events(&io->probe) },
	};
	int timeout_ms = sleep_ms(io);
	uint64_t kicks;

	if (io->finished.head != NULL)
		timeout_ms = 0; /* what was refused before it went out */
	if (me == THE_IO_THREAD)
		io->io_thread_polls = true;
	pthread_mutex_unlock(&io->lock);
	poll(fds, 3, timeout_ms);
	pthread_mutex_lock(&io->lock);
	if (me == THE_IO_THREAD)
		io->io_thread_polls = false;
	if (io->receiver != me)
		return;
	if (fds[1].revents != 0)
		(void)!read(io->wake_fd, &kicks, sizeof(kicks));
	if (fds[0].revents != 0 && io->nfs == NULL)
		serve_wire(io, fds[0].revents);
	else if (fds[0].revents != 0 && nfs_service(io->nfs, fds[0].revents) < 0)
		io->broken = true;
	if (io->later.head != NULL && now_ms() >= io->later_at_ms)
		list_prepend(&io->pending, &io->later);
	if (io->options.soft_limit_ms > 0) {
		fail_hopeless(io);
		give_up_on_slow(io);
	}
	if (io->probe.state == PROBE_WAITING && fds[2].fd == io->probe.fd && fds[2].revents != 0) {
		probe_service(&io->probe, fds[2].revents);
		if (io->probe.state != PROBE_WAITING)
			io->probed_at_ms = now_ms();
	}
	look_into_silence(io);
	touch_lease(io);
	issue_pending(io);
	give_back(io);
}

/* Whoever receives polls with what he knew: tell him where that has changed. */
static void wake_if_needed(struct nfsio *io)
{
	if (!is_up(io)) {
		if (io->finished.head != NULL)
			kick(io);
		return;
	}
	if (io->broken || io->later.head != NULL || io->finished.head != NULL || events_of(io) & POLLOUT)
		wake_io_thread(io);
	else if (io->detached > 0 && io->receiver == NOBODY)
		call_io_thread(io);
}

void nfsio_submit(struct nfsio *io, struct nfsio_req *req)
{
	pthread_mutex_lock(&io->lock);
	enqueue(io, req, NULL);
	io->detached++;
	if (io->state.lost)
		fail_hopeless(io);
	issue_pending(io);
	wake_if_needed(io);
	pthread_mutex_unlock(&io->lock);
}

void nfsio_batch_start(struct nfsio *io, struct nfsio_batch *batch, struct nfsio_req *reqs, size_t count)
{
	batch->io = io;
	batch->waiting = count;
	batch->sleeping = false;
	pthread_cond_init(&batch->all_done, NULL);
	if (count == 0)
		return;
	pthread_mutex_lock(&io->lock);
	io->batches++;
	for (size_t i = 0; i < count; i++)
		enqueue(io, &reqs[i], batch);
	if (io->state.lost)
		fail_hopeless(io);
	issue_pending(io);
	wake_if_needed(io);
	pthread_mutex_unlock(&io->lock);
}

void nfsio_batch_wait(struct nfsio_batch *batch)
{
	struct nfsio *io = batch->io;
	bool received = false;

	pthread_mutex_lock(&io->lock);
	while (batch->waiting > 0) {
		/* with others under way the I/O thread serves all of them better: no role to hand over */
		bool alone = io->batches == 1 && io->detached == 0;

		if (alone && io->receiver != A_WAITER && is_up(io) && !io->broken && !atomic_load(&io->stop)) {
			received = true;
			io->receiver = A_WAITER; /* the I/O thread, if it polls, finds out when it wakes up */
			receive(io);
			io->receiver = NOBODY;
		} else {
			if (received && io->receiver == NOBODY)
				call_io_thread(io);
			batch->sleeping = true;
			pthread_cond_wait(&batch->all_done, &io->lock);
			batch->sleeping = false;
		}
	}
	if (received)
		io->waited_at_ms = now_ms();
	if (--io->batches > 0 || io->detached > 0 || io->broken)
		if (io->receiver == NOBODY)
			call_io_thread(io);
	pthread_mutex_unlock(&io->lock);
	pthread_cond_destroy(&batch->all_done);
}

int nfsio_transfer(struct nfsio *io, struct nfsio_req *req)
{
	struct nfsio_batch batch;

	/* NFS has no open file: a server that lets us write does not know that we did not want to */
	if (io->options.read_only && req->op != NFSIO_READ)
		return -EBADF;
	nfsio_batch_start(io, &batch, req, 1);
	nfsio_batch_wait(&batch);
	return req->error;
}
