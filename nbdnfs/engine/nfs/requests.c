/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What callers submit and wait for. */
#include "nfs/internal.h"

#include <errno.h>
#include <poll.h>

/* A thread in poll() polls for what it knew then: wake it where that has changed. */
static void wake_if_needed(struct nfsio *io)
{
	if (!is_up(io)) {
		if (io->finished.head != NULL)
			wake_poller(io);
		return;
	}
	if (io->broken || io->later.head != NULL || io->finished.head != NULL || io->transport->events(io) & POLLOUT)
		wake_io_thread(io);
	else if (io->detached > 0 && io->receiver == RECEIVER_NONE)
		call_io_thread(io);
}

/* A waiter has stopped receiving, and no other thread has taken over yet. */
static void call_receiver(struct nfsio *io)
{
	call_io_thread(io); /* with an attendant it still throws a broken connection away */
	call_attendant(io);
}

/* Requests have been added to what waits. */
static void send_added(struct nfsio *io)
{
	if (!is_up(io))
		fail_hopeless(io); /* as one may be already: the file is gone, or a soft limit is over */
	issue_pending(io);
	wake_if_needed(io);
}

void submit(struct nfsio *io, struct nfsio_req *req)
{
	req_enqueue(io, req, NULL);
	io->detached++;
	send_added(io);
}

void nfsio_submit(struct nfsio *io, struct nfsio_req *req)
{
	pthread_mutex_lock(&io->lock);
	submit(io, req);
	pthread_mutex_unlock(&io->lock);
}

void nfsio_batch_start(struct nfsio *io, struct nfsio_batch *batch, struct nfsio_req *reqs, size_t count)
{
	assert(count > 0);
	batch->io = io;
	batch->waiting = count;
	batch->sleeping = false;
	pthread_cond_init(&batch->all_done, NULL);
	pthread_mutex_lock(&io->lock);
	io->batches++;
	for (size_t i = 0; i < count; i++)
		req_enqueue(io, &reqs[i], batch);
	send_added(io);
	pthread_mutex_unlock(&io->lock);
}

void nfsio_batch_wait(struct nfsio_batch *batch)
{
	struct nfsio *io = batch->io;
	bool received = false;

	pthread_mutex_lock(&io->lock);
	while (batch->waiting > 0) {
		/* with other requests in flight the I/O thread receives: the role need not be handed over */
		bool alone = io->batches == 1 && io->detached == 0 && io->attendant_fd < 0;

		if (alone && io->receiver != RECEIVER_WAITER && is_up(io) && !io->broken && !atomic_load(&io->stop)) {
			received = true;
			io->receiver = RECEIVER_WAITER; /* the I/O thread notices when its poll() ends */
			receive(io);
			io->receiver = RECEIVER_NONE;
		} else {
			if (received && io->receiver == RECEIVER_NONE)
				call_receiver(io);
			batch->sleeping = true;
			pthread_cond_wait(&batch->all_done, &io->lock);
			batch->sleeping = false;
		}
	}
	if (received)
		io->waited_at_ms = now_ms();
	assert(io->batches > 0);
	if (--io->batches > 0 || io->detached > 0 || io->broken || (received && io->attendant_fd >= 0))
		if (io->receiver == RECEIVER_NONE)
			call_receiver(io);
	pthread_mutex_unlock(&io->lock);
	pthread_cond_destroy(&batch->all_done);
}

int nfsio_transfer(struct nfsio *io, struct nfsio_req *req)
{
	struct nfsio_batch batch;

	/* NFSv3 has no open files: the server does not know that this one was opened to read */
	if ((io->options.read_only && req->op != NFSIO_READ) || io->options.names_only)
		return -EBADF;
	nfsio_batch_start(io, &batch, req, 1);
	nfsio_batch_wait(&batch);
	return req->error;
}
