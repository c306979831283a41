/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The threads that do what waits, with the engine's functions that do. None of what they do waits for another request:
 * however many of them are busy, each ends when the NAS answers. A full NAS does not take writes, for as long as it is
 * full, but it answers reads: these have a waiter to themselves.
 */
#include "nbd/internal.h"
#include "nbd/protocol.h"

#include "base/thread.h"

#include <errno.h>
#include <unistd.h>

static int write_zeroes(struct nbd_loop *loop, struct request *request)
{
	request->step.payload = loop->zeros;
	return engine_finish_fill(loop->engine, &request->step, (request->flags & NBD_CMD_FLAG_FUA) != 0);
}

static int run(struct nbd_loop *loop, struct request *request)
{
	switch (request->type) {
	case NBD_CMD_READ:
		return engine_finish_read(loop->engine, &request->step);
	case NBD_CMD_WRITE:
		return engine_finish_write(loop->engine, &request->step, true);
	case NBD_CMD_FLUSH:
		return engine_finish_flush(loop->engine, &request->step);
	case NBD_CMD_TRIM:
		return engine_trim(loop->engine, request->offset_bytes, request->length_bytes);
	case NBD_CMD_WRITE_ZEROES:
		return write_zeroes(loop, request);
	default:
		return -EINVAL;
	}
}

static void wake(struct nbd_loop *loop)
{
	uint64_t one = 1;

	(void)!write(loop->wake_fd, &one, sizeof(one));
}

static void wait_on(struct nbd_loop *loop, struct request_queue *queue, pthread_cond_t *work)
{
	struct request *request;

	touch_stack();
	pthread_mutex_lock(&loop->lock);
	for (;;) {
		while (queue->head == NULL && !loop->stop)
			pthread_cond_wait(work, &loop->lock); /* for the next one, or the end */
		request = queue_pop(queue);
		if (request == NULL)
			break;
		pthread_mutex_unlock(&loop->lock);
		request->error = run(loop, request);
		pthread_mutex_lock(&loop->lock);
		queue_push(&loop->ended_elsewhere, request);
		wake(loop);
	}
	pthread_mutex_unlock(&loop->lock);
}

static void *waiter(void *arg)
{
	struct nbd_loop *loop = arg;

	wait_on(loop, &loop->waiting, &loop->work);
	return NULL;
}

static void *reads_waiter(void *arg)
{
	struct nbd_loop *loop = arg;

	wait_on(loop, &loop->waiting_reads, &loop->reads_work);
	return NULL;
}

int nbd_waiters_start(struct nbd_loop *loop)
{
	for (; loop->waiter_count < WAITERS; loop->waiter_count++) {
		int error = thread_start(&loop->waiters[loop->waiter_count],
					 loop->waiter_count == 0 ? reads_waiter : waiter, loop);

		if (error != 0)
			return error;
	}
	return 0;
}

void nbd_waiters_stop(struct nbd_loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	loop->stop = true;
	pthread_cond_broadcast(&loop->work);
	pthread_cond_broadcast(&loop->reads_work);
	pthread_mutex_unlock(&loop->lock);
	while (loop->waiter_count > 0)
		pthread_join(loop->waiters[--loop->waiter_count], NULL);
}

void nbd_leave_to_waiter(struct nbd_loop *loop, struct request *request)
{
	bool is_read = request->type == NBD_CMD_READ;

	pthread_mutex_lock(&loop->lock);
	queue_push(is_read ? &loop->waiting_reads : &loop->waiting, request);
	pthread_cond_signal(is_read ? &loop->reads_work : &loop->work);
	pthread_mutex_unlock(&loop->lock);
}

struct request_queue nbd_take_ended_elsewhere(struct nbd_loop *loop)
{
	struct request_queue ended;

	pthread_mutex_lock(&loop->lock);
	ended = loop->ended_elsewhere;
	loop->ended_elsewhere = (struct request_queue){ 0 };
	pthread_mutex_unlock(&loop->lock);
	return ended;
}

void nbd_note_answered(struct engine_request *step)
{
	struct request *request = (struct request *)step;
	struct nbd_loop *loop = request->loop;

	request->error = -EINPROGRESS; /* it has not ended yet: engine_read_end() is next */
	if (pthread_equal(loop->thread, pthread_self())) {
		queue_push(&loop->answered, request);
		return;
	}
	pthread_mutex_lock(&loop->lock);
	queue_push(&loop->ended_elsewhere, request);
	wake(loop); /* with the lock: the loop may be destroyed as soon as it has taken the request */
	pthread_mutex_unlock(&loop->lock);
}
