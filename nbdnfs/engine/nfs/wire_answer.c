/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Answers: received, checked, and put where they belong. */
#include "base/assert.h"
#include "nfs/wire_internal.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* The longest record that is accepted: no READ asks for more data, and the rest of an answer is small. */
#define RECORD_BYTES_MAX (1024u * 1024 + 4096)

/* The head of an answer, parsed. */
struct head {
	struct wire_answer answer;
	uint32_t head_bytes;    /* up to the data */
	uint32_t data_bytes;
	uint32_t tail_bytes;    /* of the record, after the data */
};

/* fattr3 */
static void get_fattr(struct xdr_reader *reader, struct wire_answer *answer)
{
	answer->type = xdr_get32(reader);
	xdr_get(reader, 4); /* mode */
	answer->links = xdr_get32(reader);
	xdr_get(reader, 8); /* uid, gid */
	answer->size_bytes = xdr_get64(reader);
	xdr_get(reader, 16); /* used, rdev */
	answer->fsid = xdr_get64(reader);
	answer->fileid = xdr_get64(reader);
	xdr_get(reader, SIZE_OF_FATTR3 - 60);
	answer->has_attributes = !reader->ran_out;
}

/* post_op_attr */
static void get_attributes(struct xdr_reader *reader, struct wire_answer *answer)
{
	if (xdr_get32(reader) != 0)
		get_fattr(reader, answer);
}

/* post_op_attr of what nothing here asks about: a directory */
static void skip_attributes(struct xdr_reader *reader)
{
	if (xdr_get32(reader) != 0)
		xdr_get(reader, SIZE_OF_FATTR3);
}

/* wcc_data */
static void get_wcc(struct xdr_reader *reader, struct wire_answer *answer)
{
	if (xdr_get32(reader) != 0) {
		answer->size_before_bytes = xdr_get64(reader);
		xdr_get(reader, SIZE_OF_WCC_ATTR - 8);
		answer->has_size_before = !reader->ran_out;
	}
	get_attributes(reader, answer);
}

static uint64_t get_verifier(struct xdr_reader *reader)
{
	const uint8_t *at = xdr_get(reader, 8);
	uint64_t verifier = 0;

	if (at != NULL)
		memcpy(&verifier, at, sizeof(verifier)); /* opaque: only ever compared */
	return verifier;
}

/* Returns false when there is no handle that a server may send. */
static bool get_handle(struct xdr_reader *reader, struct head *head)
{
	uint32_t bytes = xdr_get32(reader);

	if (!reader->ran_out && (bytes == 0 || bytes > WIRE_HANDLE_BYTES_MAX))
		return false;
	head->answer.handle = xdr_get(reader, reader->ran_out ? 0 : xdr_padded(bytes));
	head->answer.handle_bytes = bytes;
	return true;
}

static void get_limits(struct xdr_reader *reader, struct wire_answer *answer)
{
	answer->read_max_bytes = xdr_get32(reader);
	answer->read_preferred_bytes = xdr_get32(reader);
	xdr_get(reader, 4); /* rtmult */
	answer->write_max_bytes = xdr_get32(reader);
	answer->write_preferred_bytes = xdr_get32(reader);
	xdr_get(reader, 4 + 4 + 8 + 8 + 4); /* wtmult, dtpref, maxfilesize, time_delta, properties */
}

/* What every answer has after its status, be that good or bad. */
static void get_attributes_of(struct xdr_reader *reader, struct wire_answer *answer)
{
	switch (answer->call->procedure) {
	case WIRE_NULL:
	case WIRE_GETATTR:
		break;
	case WIRE_LOOKUP:
		if (answer->status != 0)
			skip_attributes(reader);
		break;
	case WIRE_READ:
	case WIRE_FSINFO:
		get_attributes(reader, answer);
		break;
	case WIRE_WRITE:
	case WIRE_COMMIT:
		get_wcc(reader, answer);
		break;
	}
}

/* Returns 0, or -EPROTO. */
static int get_results(struct xdr_reader *reader, struct head *head)
{
	struct wire_answer *answer = &head->answer;

	if (answer->call->procedure == WIRE_NULL)
		return 0;
	answer->status = xdr_get32(reader);
	get_attributes_of(reader, answer);
	if (answer->status != 0)
		return 0;
	switch (answer->call->procedure) {
	case WIRE_NULL:
		break;
	case WIRE_GETATTR:
		get_fattr(reader, answer);
		break;
	case WIRE_LOOKUP:
		if (!get_handle(reader, head))
			return -EPROTO;
		get_attributes(reader, answer);
		skip_attributes(reader);
		break;
	case WIRE_READ:
		answer->count_bytes = xdr_get32(reader);
		answer->end_of_file = xdr_get32(reader) != 0;
		head->data_bytes = xdr_get32(reader);
		break;
	case WIRE_WRITE:
		answer->count_bytes = xdr_get32(reader);
		answer->stable = xdr_get32(reader) == FILE_SYNC;
		answer->verifier = get_verifier(reader);
		break;
	case WIRE_FSINFO:
		get_limits(reader, answer);
		break;
	case WIRE_COMMIT:
		answer->verifier = get_verifier(reader);
		break;
	}
	return 0;
}

/* Parse an answer's head. Returns 1 and *head, 0 when not all of it is there yet, or -errno. */
static int parse(const struct wire *wire, const uint8_t *at, uint32_t bytes, struct head *head)
{
	struct xdr_reader reader = { .at = at, .end = at + bytes };
	uint32_t mark = xdr_get32(&reader), record_bytes = mark & ~LAST_FRAGMENT, xid, verifier_bytes, reply, accepted;
	bool is_partial = bytes < 4 || record_bytes > bytes - 4; /* not all of this record is there yet */

	*head = (struct head){ 0 };
	if (bytes < 4)
		return 0;
	if (record_bytes > RECORD_BYTES_MAX)
		return -EPROTO;
	if (!(mark & LAST_FRAGMENT))
		return -EOPNOTSUPP;
	if (!is_partial)
		reader.end = at + 4 + record_bytes;
	xid = xdr_get32(&reader);
	if (xdr_get32(&reader) != REPLY && !reader.ran_out)
		return -EPROTO;
	reply = xdr_get32(&reader);
	xdr_get32(&reader); /* the verifier's flavor */
	verifier_bytes = xdr_get32(&reader);
	if (reader.ran_out)
		return is_partial ? 0 : -EPROTO;
	if (reply != MSG_ACCEPTED || verifier_bytes > MAX_AUTH_BYTES)
		return -EOPNOTSUPP;
	xdr_get(&reader, xdr_padded(verifier_bytes));
	accepted = xdr_get32(&reader);
	if (reader.ran_out)
		return is_partial ? 0 : -EPROTO;
	if (accepted != SUCCESS)
		return -EOPNOTSUPP;
	head->answer.call = wire_find_call(wire, xid);
	if (head->answer.call == NULL)
		return -EPROTO; /* an answer without a call */
	if (get_results(&reader, head) < 0)
		return -EPROTO;
	if (reader.ran_out)
		return is_partial ? 0 : -EPROTO;
	head->head_bytes = (uint32_t)(reader.at - at);
	if (head->data_bytes > head->answer.call->length_bytes ||
	    head->data_bytes > 4 + record_bytes - head->head_bytes)
		return -EPROTO;
	if (head->answer.count_bytes > head->data_bytes && head->answer.call->procedure == WIRE_READ)
		head->answer.count_bytes = head->data_bytes;
	head->tail_bytes = 4 + record_bytes - head->head_bytes - head->data_bytes;
	/* a call that is not sent whole yet cannot be answered */
	if (wire->out_bytes > 0 && head->answer.call == wire->last)
		return -EPROTO;
	return 1;
}

/* The data of a READ is being received; `got_bytes` of it are in place. */
static void begin_data(struct wire *wire, const struct head *head, uint32_t got_bytes)
{
	assert(!wire->reading && got_bytes <= head->data_bytes && head->data_bytes <= head->answer.call->length_bytes);
	wire->answer = head->answer;
	wire->reading = true;
	wire->data_bytes = head->data_bytes;
	wire->data_left_bytes = head->data_bytes - got_bytes;
	wire->read_head_bytes = head->head_bytes <= WIRE_IN_BYTES / 2 ? head->head_bytes : READ_HEAD_BYTES;
}

static void drop_in(struct wire *wire, uint32_t bytes)
{
	assert(bytes <= wire->in_bytes);
	wire->in_bytes -= bytes;
	memmove(wire->in, wire->in + bytes, wire->in_bytes);
}

/* The handle is in `in`, which is about to move. */
static void keep_handle(struct wire *wire, struct wire_answer *answer)
{
	if (answer->handle == NULL)
		return;
	memcpy(wire->found_handle, answer->handle, answer->handle_bytes);
	answer->handle = wire->found_handle;
}

/* Parse what was received, up to the next answer. Returns 1 and *answer, 0 when that needs more, or -errno. */
static int digest(struct wire *wire, struct wire_answer *answer)
{
	for (;;) {
		uint32_t bytes;
		struct head head;
		int status;

		if (wire->reading) {
			if (wire->data_left_bytes > 0)
				return 0;
			wire->reading = false;
			*answer = wire->answer;
			wire_forget_call(wire, answer->call);
			return 1;
		}
		bytes = wire->skip_bytes < wire->in_bytes ? wire->skip_bytes : wire->in_bytes;
		wire->skip_bytes -= bytes;
		drop_in(wire, bytes);
		if (wire->in_bytes == 0)
			return 0;
		status = parse(wire, wire->in, wire->in_bytes, &head);
		if (status == 0 && wire->in_bytes == WIRE_IN_BYTES)
			return -EPROTO;
		if (status <= 0)
			return status;
		keep_handle(wire, &head.answer);
		drop_in(wire, head.head_bytes);
		wire->skip_bytes = head.tail_bytes;
		if (head.data_bytes > 0) {
			bytes = head.data_bytes < wire->in_bytes ? head.data_bytes : wire->in_bytes;
			memcpy(head.answer.call->data, wire->in, bytes);
			drop_in(wire, bytes);
			begin_data(wire, &head, bytes);
		} else {
			wire_forget_call(wire, head.answer.call);
			if (head.answer.call != &wire->null) {
				*answer = head.answer;
				return 1;
			}
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
	struct head head;
	int status;

	wire->in_bytes = bytes < guess_bytes ? bytes : guess_bytes;
	beyond_bytes = bytes - wire->in_bytes;
	copied_bytes = beyond_bytes < WIRE_IN_BYTES - guess_bytes ? beyond_bytes : WIRE_IN_BYTES - guess_bytes;
	memcpy(wire->in + wire->in_bytes, call->data, copied_bytes);
	wire->in_bytes += copied_bytes;
	if (copied_bytes == beyond_bytes)
		return 0; /* everything is in `in`, for digest() */
	status = parse(wire, wire->in, wire->in_bytes, &head);
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
	if (head.head_bytes > guess_bytes) {
		memmove(call->data, call->data + (head.head_bytes - guess_bytes), got_bytes);
	} else if (head.head_bytes < guess_bytes) {
		uint32_t early_bytes = guess_bytes - head.head_bytes;

		memmove(call->data + early_bytes, call->data, got_bytes - early_bytes);
		memcpy(call->data, wire->in + head.head_bytes, early_bytes);
	}
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
	struct wire_call *only = !wire->reading && wire->in_bytes == 0 && wire->skip_bytes == 0 &&
						 wire->first != NULL && wire->first == wire->last &&
						 wire->first->procedure == WIRE_READ
					 ? wire->first
					 : NULL;
	ssize_t came;
	uint32_t bytes;

	if (wire->reading) {
		struct wire_call *call = wire->answer.call;

		parts[1] = parts[0];
		parts[0].iov_base = call->data + (wire->data_bytes - wire->data_left_bytes);
		parts[0].iov_len = wire->data_left_bytes;
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
	if (wire->reading) {
		uint32_t data_bytes = bytes < wire->data_left_bytes ? bytes : wire->data_left_bytes;

		wire->data_left_bytes -= data_bytes;
		bytes -= data_bytes;
	}
	wire->in_bytes += bytes;
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
