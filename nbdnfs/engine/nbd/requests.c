/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a request has the engine do, and what follows when a step is over. */
#include "nbd/internal.h"
#include "nbd/protocol.h"

#include <errno.h>

/* A TRIM of more is left to a waiter: it takes milliseconds. */
#define SHORT_TRIM_BYTES (4u << 20)

static void read_step(struct nbd_loop *loop, struct request *request)
{
	int error = engine_read_step(loop->engine, &request->step);

	if (error == -EAGAIN)
		queue_push(&loop->fetches, request);
	else if (error != -EINPROGRESS)
		nbd_reply(loop, request, error);
}

static void read_end(struct nbd_loop *loop, struct request *request)
{
	int error = engine_read_end(loop->engine, &request->step);

	if (error == -EAGAIN)
		nbd_leave_to_waiter(loop, request);
	else
		nbd_reply(loop, request, error);
}

/* What the protocol allows of flags, and of a request without a range. The engine looks at all others' ranges. */
static bool is_valid(const struct request *request)
{
	unsigned known = NBD_CMD_FLAG_FUA | (request->type == NBD_CMD_WRITE_ZEROES ? NBD_CMD_FLAG_NO_HOLE : 0);
	bool has_range = request->offset_bytes != 0 || request->length_bytes != 0;

	return (request->flags & ~known) == 0 && (request->type != NBD_CMD_FLUSH || !has_range);
}

void nbd_begin_request(struct nbd_loop *loop, struct request *request, const uint8_t *payload)
{
	bool is_plain_write = request->type == NBD_CMD_WRITE && (request->flags & NBD_CMD_FLAG_FUA) == 0;
	int error = -EAGAIN;

	if (!is_valid(request)) {
		nbd_reply(loop, request, -EINVAL);
		return;
	}
	request->step.data = request->data;
	request->step.offset_bytes = request->offset_bytes;
	request->step.length_bytes = request->length_bytes;
	request->step.answered = nbd_note_answered;
	engine_note_request(loop->engine, &request->step);
	if (is_plain_write && loop->writes.head == NULL) { /* none overtakes those that wait for room */
		request->step.payload = payload != NULL ? payload : request->data;
		error = engine_write_step(loop->engine, &request->step);
	}
	if (error == -EAGAIN && payload != NULL)
		memcpy(request->data, payload, request->length_bytes);
	request->step.payload = request->data;
	if (error != -EAGAIN)
		nbd_reply(loop, request, error);
	else if (is_plain_write)
		queue_push(&loop->writes, request);
	else if (request->type == NBD_CMD_READ)
		read_step(loop, request);
	else if (request->type == NBD_CMD_TRIM && request->length_bytes <= SHORT_TRIM_BYTES)
		nbd_reply(loop, request, engine_trim(loop->engine, request->offset_bytes, request->length_bytes));
	else
		nbd_leave_to_waiter(loop, request);
}

void nbd_end_requests(struct nbd_loop *loop, struct request_queue ended)
{
	struct request *request;

	while ((request = queue_pop(&ended)) != NULL)
		if (request->error == -EINPROGRESS)
			read_end(loop, request);
		else
			nbd_reply(loop, request, request->error);
}

void nbd_go_on(struct nbd_loop *loop)
{
	struct request_queue fetches = loop->fetches;
	struct request *request;

	loop->fetches = (struct request_queue){ 0 };
	while ((request = queue_pop(&fetches)) != NULL)
		read_step(loop, request);
	while ((request = loop->writes.head) != NULL) {
		int error = engine_write_step(loop->engine, &request->step);

		if (error == -EAGAIN)
			break;
		queue_pop(&loop->writes);
		nbd_reply(loop, request, error);
	}
}
