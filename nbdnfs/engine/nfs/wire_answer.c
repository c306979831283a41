/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Answers: received, and put where they belong. */
#include "base/assert.h"
#include "nfs/wire_internal.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

/*
 * Parse the head of the answer at `at`, where its mark is. Returns 1 and *head, 0 when not all of it is there yet,
 * -EINPROGRESS when the record has several fragments, or another -errno.
 */
static int parse_record(const struct wire *wire, const uint8_t *at, uint32_t bytes, struct wire_head *head)
{
	struct xdr_reader reader = { .at = at, .end = at + bytes };
	uint32_t mark = xdr_get32(&reader), record_bytes = mark & ~LAST_FRAGMENT;
	int status;

	if (bytes < 4)
		return 0;
	if (record_bytes > WIRE_RECORD_BYTES_MAX)
		return -EPROTO;
	if (!(mark & LAST_FRAGMENT))
		return -EINPROGRESS;
	status = wire_parse(wire, at + 4, bytes - 4, record_bytes, head);
	if (status > 0) {
		head->tail_bytes = record_bytes - head->head_bytes - head->data_bytes;
		head->head_bytes += 4;
	}
	return status;
}

/* The data of a READ is being received; `got_bytes` of it are in place. */
static void begin_data(struct wire *wire, const struct wire_head *head, uint32_t got_bytes)
{
	assert(!wire->reading && got_bytes <= head->data_bytes && head->data_bytes <= head->answer.call->length_bytes);
	wire->answer = head->answer;
	wire->reading = true;
	wire->data_bytes = head->data_bytes;
	wire->data_left_bytes = head->data_bytes - got_bytes;
	wire->read_head_bytes = head->head_bytes <= WIRE_IN_BYTES / 2 ? head->head_bytes : READ_HEAD_BYTES;
}

/* An answer is whole. Returns false when it is the wire's own. */
static bool deliver(struct wire *wire, const struct wire_answer *whole, struct wire_answer *answer)
{
	wire_forget_call(wire, whole->call);
	*answer = *whole;
	return whole->call != &wire->null;
}

/* Parse what was received, up to the next answer. Returns 1 and *answer, 0 when that needs more, or -errno. */
static int digest(struct wire *wire, struct wire_answer *answer)
{
	for (;;) {
		uint32_t bytes;
		struct wire_head head;
		int status;

		if (wire->reading) {
			if (wire->data_left_bytes > 0)
				return 0;
			wire->reading = false;
			if (deliver(wire, &wire->answer, answer))
				return 1;
		}
		if (wire->fragmented) {
			status = wire_digest_fragments(wire);
			if (status <= 0)
				return status;
			if (deliver(wire, &wire->answer, answer))
				return 1;
			continue;
		}
		bytes = wire->skip_bytes < wire->in_bytes ? wire->skip_bytes : wire->in_bytes;
		wire->skip_bytes -= bytes;
		wire_drop_in(wire, bytes);
		if (wire->in_bytes == 0)
			return 0;
		status = parse_record(wire, wire->in, wire->in_bytes, &head);
		if (status == -EINPROGRESS) {
			wire_begin_fragments(wire);
			continue;
		}
		if (status == 0 && wire->in_bytes == WIRE_IN_BYTES)
			return -EPROTO;
		if (status <= 0)
			return status;
		wire_keep_handle(wire, &head.answer);
		wire_drop_in(wire, head.head_bytes);
		wire->skip_bytes = head.tail_bytes;
		if (head.data_bytes > 0) {
			bytes = head.data_bytes < wire->in_bytes ? head.data_bytes : wire->in_bytes;
			memcpy(head.answer.call->data, wire->in, bytes);
			wire_drop_in(wire, bytes);
			begin_data(wire, &head, bytes);
		} else if (deliver(wire, &head.answer, answer)) {
			return 1;
		}
	}
}

/*
 * `bytes` of the only answer that is due were received: read_head_bytes of them into `in`, the others to where the data
 * belongs if the head is as long as the last one's. Put them where they belong. Returns 0 or -errno.
 */
static int sort_only_answer(struct wire *wire, struct wire_call *call, uint32_t bytes)
{
	uint32_t guess_bytes = wire->read_head_bytes, beyond_bytes, copied_bytes, got_bytes;
	struct wire_head head;
	int status;

	wire->in_bytes = bytes < guess_bytes ? bytes : guess_bytes;
	beyond_bytes = bytes - wire->in_bytes;
	copied_bytes = beyond_bytes < WIRE_IN_BYTES - guess_bytes ? beyond_bytes : WIRE_IN_BYTES - guess_bytes;
	memcpy(wire->in + wire->in_bytes, call->data, copied_bytes);
	wire->in_bytes += copied_bytes;
	if (copied_bytes == beyond_bytes)
		return 0; /* everything is in `in`, for digest() */
	status = parse_record(wire, wire->in, wire->in_bytes, &head);
	if (status == -EINPROGRESS)
		return wire_sort_fragments(wire, call, bytes);
	if (status < 0)
		return status;
	if (status == 0 || head.answer.call != call || head.data_bytes < guess_bytes)
		return -EPROTO; /* larger than such an answer can be */
	got_bytes = bytes - head.head_bytes;
	if (got_bytes > head.data_bytes + head.tail_bytes)
		return -EPROTO; /* more than one answer, and only one is due */
	wire->skip_bytes = head.tail_bytes;
	if (got_bytes > head.data_bytes) {
		wire->skip_bytes -= got_bytes - head.data_bytes;
		got_bytes = head.data_bytes;
	}
	wire_place_data(wire, call, head.head_bytes, got_bytes);
	wire->in_bytes = 0;
	begin_data(wire, &head, got_bytes);
	return 0;
}

/* Receive what there is. Returns 1, 0 when there is nothing, or -errno. */
static int fill(struct wire *wire)
{
	struct iovec parts[2] = {
		{ .iov_base = wire->in + wire->in_bytes, .iov_len = WIRE_IN_BYTES - wire->in_bytes },
	};
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 1 };
	/* with one answer due, and nothing of it received yet, it is known where its data belongs */
	struct wire_call *only = !wire->reading && !wire->fragmented && wire->in_bytes == 0 && wire->skip_bytes == 0 &&
						 wire->first != NULL && wire->first == wire->last &&
						 wire->first->procedure == WIRE_READ
					 ? wire->first
					 : NULL;
	ssize_t came;
	uint32_t bytes, in_place_bytes = 0;

	if (wire->reading || wire_fragment_has_data(wire)) {
		struct wire_call *call = wire->answer.call;

		parts[1] = parts[0];
		parts[0].iov_base = call->data + (wire->data_bytes - wire->data_left_bytes);
		parts[0].iov_len = wire->data_left_bytes;
		if (wire->fragmented && parts[0].iov_len > wire->fragment_left_bytes)
			parts[0].iov_len = wire->fragment_left_bytes;
		in_place_bytes = (uint32_t)parts[0].iov_len;
		message.msg_iovlen = 2;
	} else if (only != NULL) {
		parts[0].iov_len = wire->read_head_bytes;
		parts[1] = (struct iovec){ .iov_base = only->data, .iov_len = only->length_bytes };
		message.msg_iovlen = 2;
	}
	do
		came = recvmsg(wire->fd, &message, MSG_DONTWAIT);
	while (came < 0 && errno == EINTR);
	if (came < 0)
		return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
	if (came == 0)
		return -ECONNRESET;
	wire->has_received = true;
	bytes = (uint32_t)came;
	wire->drained = only != NULL || bytes < parts[0].iov_len + (message.msg_iovlen > 1 ? parts[1].iov_len : 0);
	if (only != NULL) {
		int status = sort_only_answer(wire, only, bytes);

		return status == 0 ? 1 : status;
	}
	if (in_place_bytes > bytes)
		in_place_bytes = bytes;
	wire->data_left_bytes -= in_place_bytes;
	if (wire->fragmented)
		wire->fragment_left_bytes -= in_place_bytes;
	wire->in_bytes += bytes - in_place_bytes;
	assert(wire->in_bytes <= WIRE_IN_BYTES);
	return 1;
}

int wire_receive(struct wire *wire, struct wire_answer *answer)
{
	for (;;) {
		int status = digest(wire, answer);

		if (status != 0)
			return status;
		if (wire->drained) {
			wire->drained = false;
			return 0;
		}
		status = fill(wire);
		if (status <= 0)
			return status;
	}
}
