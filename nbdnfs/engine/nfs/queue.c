/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where requests lie, how they end, and how threads that wait for them are woken. */
#include "nfs/internal.h"

#include <errno.h>
#include <unistd.h>

void req_list_push(struct req_list *list, struct nfsio_req *req)
{
	req->next = NULL;
	req->prev = list->tail;
	if (list->tail != NULL)
		list->tail->next = req;
	else
		list->head = req;
	list->tail = req;
}

void req_list_remove(struct req_list *list, struct nfsio_req *req)
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

/* Put all of `from` before what is in `to`: what was issued first is issued first again. */
void req_list_prepend(struct req_list *to, struct req_list *from)
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

static void write_to(int event_fd)
{
	uint64_t one = 1;

	(void)!write(event_fd, &one, sizeof(one));
}

/* There is a connection again, or the end is near: have the attendant look, which may poll other things only. */
void call_attendant(struct nfsio *io)
{
	assert_locked(&io->lock);
	if (io->attendant_fd >= 0)
		write_to(io->attendant_fd);
}

/* Have the thread that is in poll() look again: the attendant has a descriptor of its own for that. */
void wake_poller(struct nfsio *io)
{
	bool is_attended = io->receiver == RECEIVER_ATTENDANT;

	if (is_attended)
		call_attendant(io);
	if (!is_attended || io->io_thread_polls)
		write_to(io->wake_fd);
}

/*
 * The I/O thread has something to do. It may be in poll() although a waiter has taken its place meanwhile, and has
 * received what would have ended the poll.
 */
void call_io_thread(struct nfsio *io)
{
	if (io->io_thread_polls)
		wake_poller(io);
	else
		pthread_cond_signal(&io->io_work);
}

/* Have the I/O thread look again, and a waiter that receives in its place. */
void wake_io_thread(struct nfsio *io)
{
	wake_poller(io);
	pthread_cond_signal(&io->io_work);
}

/* Has any write to the file been sent on a connection that broke, and is not answered? */
static bool has_twins(const struct nfsio *io)
{
	const struct req_list *lists[] = { &io->inflight, &io->pending, &io->later };

	for (size_t i = 0; i < 3; i++)
		for (const struct nfsio_req *req = lists[i]->head; req != NULL; req = req->next)
			if (req->resent && req->handle == NULL)
				return true;
	return false;
}

void note_twins(struct nfsio *io)
{
	if (io->noted_twins_ms != NULL && has_twins(io))
		atomic_store(io->noted_twins_ms, NFSIO_TWINS_UNDER_WAY);
}

/* A write was answered that had been sent twice. */
static void note_twin_answered(struct nfsio *io)
{
	if (io->noted_twins_ms != NULL && !has_twins(io))
		atomic_store(io->noted_twins_ms, (uint64_t)now_ms() + io->twin_limit_ms);
}

void req_finish(struct req_list *list, struct nfsio_req *req, int error)
{
	struct nfsio_batch *batch = req->batch;

	assert(batch == NULL || batch->waiting > 0);
	assert_locked(&req->io->lock);
	req_list_remove(list, req);
	req->error = error;
	if (req->resent && req->handle == NULL && error != -ECANCELED)
		note_twin_answered(req->io);
	if (batch == NULL) {
		assert(req->io->detached > 0);
		req->io->detached--;
		req_list_push(&req->io->finished, req);
	} else if (--batch->waiting == 0 && batch->sleeping) {
		pthread_cond_signal(&batch->all_done);
	}
}

void req_finish_all(struct req_list *list, int error)
{
	while (list->head != NULL)
		req_finish(list, list->head, error);
}

/*
 * Has it waited too long? Returns 0, or the -errno that it fails with. Never for write-backs: their pages were
 * acknowledged.
 */
int is_hopeless(const struct nfsio *io, const struct nfsio_req *req, int64_t now)
{
	if (req->fail_at_ms != 0 && now >= req->fail_at_ms)
		return -ETIMEDOUT;
	if (req->handle != NULL)
		return 0;
	if (req->op != NFSIO_READ && req->batch == NULL)
		return 0;
	if (io->state.gone_too_long)
		return -ESTALE;
	return io->options.soft_limit_ms > 0 && now - req->waits_since_ms >= io->options.soft_limit_ms ? -EIO : 0;
}

/* Fail what has waited too long to be issued. */
void fail_hopeless(struct nfsio *io)
{
	struct req_list *lists[] = { &io->pending, &io->later };
	int64_t now = now_ms();

	for (size_t i = 0; i < 2; i++)
		for (struct nfsio_req *req = lists[i]->head, *next; req != NULL; req = next) {
			int error = is_hopeless(io, req, now);

			next = req->next;
			if (error != 0)
				req_finish(lists[i], req, error);
		}
}

void try_later(struct nfsio *io, struct req_list *list, struct nfsio_req *req)
{
	req_list_remove(list, req);
	if (io->later.head == NULL) /* a later one must not put off those that wait already */
		io->later_at_ms = now_ms() + RETRY_LATER_MS;
	req_list_push(&io->later, req);
}

/* Give finished requests back. Lock held; dropped while their `done` runs, which may submit again. */
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

void req_enqueue(struct nfsio *io, struct nfsio_req *req, struct nfsio_batch *batch)
{
	req->io = io;
	req->batch = batch;
	req->error = 0;
	req->moved_bytes = 0;
	req->stable = req->resent = false;
	if (req->waits_since_ms == 0)
		req->waits_since_ms = now_ms();
	req->refused = (struct nfsio_told){ 0 };
	req_list_push(&io->pending, req);
}
