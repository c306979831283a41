/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Create, run, destroy. */
#include "nbd/internal.h"

#include "base/thread.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* How long to wait where the kernel has no memory. */
#define MEMORY_PAUSE_US 10000

/* Memory that is there, not only promised. */
static void *allocate(size_t bytes)
{
	size_t whole_pages = (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	void *memory = aligned_alloc(PAGE_BYTES, whole_pages);

	if (memory != NULL)
		memset(memory, 0, whole_pages);
	return memory;
}

int nbd_loop_create(struct engine *engine, int fd, uint32_t tick_ms, struct nbd_loop **out)
{
	struct nbd_loop *loop = allocate(sizeof(*loop));
	int error = 0;

	if (loop == NULL)
		return -ENOMEM;
	loop->engine = engine;
	loop->fd = fd;
	loop->tick_ms = tick_ms;
	loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (loop->wake_fd < 0)
		error = -errno;
	loop->watch_fd = epoll_create1(EPOLL_CLOEXEC);
	for (unsigned i = 0; i < POLLED; i++)
		loop->watched[i].fd = -1;
	pthread_mutex_init(&loop->lock, NULL);
	pthread_cond_init(&loop->work, NULL);
	pthread_cond_init(&loop->reads_work, NULL);
	loop->arena = allocate((size_t)PIECES * PIECE_BYTES);
	loop->zeros = allocate(PAGE_BYTES);
	loop->received = allocate(RECEIVED_BYTES);
	loop->reqs = allocate(sizeof(struct nfsio_req) * PIECES * (PIECE_BYTES / PAGE_BYTES));
	if (loop->arena == NULL || loop->zeros == NULL || loop->received == NULL || loop->reqs == NULL)
		error = -ENOMEM;
	nbd_places_init(loop);
	if (error == 0)
		error = nbd_waiters_start(loop);
	if (error != 0)
		nbd_loop_destroy(loop);
	else
		*out = loop;
	return error;
}

void nbd_loop_destroy(struct nbd_loop *loop)
{
	nbd_waiters_stop(loop);
	pthread_cond_destroy(&loop->work);
	pthread_cond_destroy(&loop->reads_work);
	pthread_mutex_destroy(&loop->lock);
	if (loop->wake_fd >= 0)
		close(loop->wake_fd);
	nbd_watch_stop(loop);
	free(loop->arena);
	free(loop->zeros);
	free(loop->received);
	free(loop->reqs);
	free(loop);
}

/* `due`, or when the first that waits may not any more: those behind it came later, and may wait for longer. */
static uint64_t earlier_us(uint64_t due, const struct request_queue *waiting)
{
	if (waiting->head == NULL || waiting->head->step.wait_until_ms >= due / 1000)
		return due;
	return waiting->head->step.wait_until_ms * 1000;
}

/* When what waits for the engine is to be looked at, although that has not called: NO_TIME where nothing waits. */
static uint64_t due_us(const struct nbd_loop *loop)
{
	uint64_t due = loop->looked_at_us + (uint64_t)loop->tick_ms * 1000;

	if (loop->fetches.head == NULL && loop->writes.head == NULL)
		return NO_TIME;
	return earlier_us(earlier_us(due, &loop->fetches), &loop->writes);
}

static bool is_due(const struct nbd_loop *loop)
{
	uint64_t due = due_us(loop);

	return due != NO_TIME && nbd_now_us() >= due;
}

/* When waiting is to end at the latest, given that the engine allows for `timeout_ms`. */
static uint64_t wait_until_us(const struct nbd_loop *loop, uint64_t now, int timeout_ms)
{
	uint64_t until = due_us(loop);

	if (loop->answered.head != NULL || nbd_can_receive(loop))
		return now;
	if (timeout_ms >= 0 && now + (uint64_t)timeout_ms * 1000 < until)
		until = now + (uint64_t)timeout_ms * 1000;
	if ((loop->send_lacks_memory || loop->receive_lacks_memory) && now + MEMORY_PAUSE_US < until)
		until = now + MEMORY_PAUSE_US;
	if (nbd_gathers(loop) && loop->gather_until_us < until)
		until = loop->gather_until_us;
	return until;
}

/* Wait until there is something to do, and take in what has come. */
static void take_in(struct nbd_loop *loop)
{
	struct pollfd fds[POLLED];
	uint32_t opened;
	int timeout_ms = engine_before_poll(loop->engine, fds + 2, &opened);
	uint64_t kicks, now = nbd_now_us();
	bool gathers = nbd_gathers(loop);

	fds[1] = (struct pollfd){ .fd = loop->wake_fd, .events = POLLIN };
	if (!nbd_watch(loop, fds, opened, now, wait_until_us(loop, now, timeout_ms)))
		return; /* by a signal, which is another thread's business */
	loop->send_lacks_memory = loop->receive_lacks_memory = false;
	if (fds[1].revents != 0)
		(void)!read(loop->wake_fd, &kicks, sizeof(kicks)); /* before what it may be about is looked at */
	engine_after_poll(loop->engine, fds + 2);
	if (fds[1].revents != 0)
		nbd_end_requests(loop, nbd_take_ended_elsewhere(loop));
	if (nbd_can_receive(loop) || (gathers && (loop->has_left || nbd_now_us() >= loop->gather_until_us)))
		nbd_receive(loop);
	else if (loop->has_left && !gathers)
		nbd_client_left(loop); /* it is not received from now, and would never be seen to have left */
}

static void serve(struct nbd_loop *loop)
{
	/* all places are free: nothing is under way */
	while (!loop->ended || loop->free_count < REQUESTS) {
		struct request_queue answered;

		take_in(loop);
		answered = loop->answered;
		loop->answered = (struct request_queue){ 0 };
		nbd_end_requests(loop, answered);
		if (engine_take_progress(loop->engine) || is_due(loop)) {
			loop->looked_at_us = nbd_now_us();
			nbd_go_on(loop);
		}
		do
			nbd_send_replies(loop);
		while (loop->lacks_place && nbd_take_requests(loop));
	}
}

int nbd_loop_run(struct nbd_loop *loop)
{
	int error;

	touch_stack();
	loop->thread = pthread_self();
	error = nbd_handshake(loop->fd, engine_size_bytes(loop->engine));
	if (error != 0)
		return error == -EPROTO ? error : 0;
	nbd_watch_start(loop);
	engine_attend(loop->engine, loop->wake_fd, loop->tick_ms);
	serve(loop);
	if (loop->peeked_bytes > 0)
		nbd_take_out(loop); /* what is left in it when it is closed would reset the client, which may receive */
	engine_leave(loop->engine);
	return loop->broke_protocol ? -EPROTO : 0;
}
