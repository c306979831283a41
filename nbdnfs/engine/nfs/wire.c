/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "nfs/wire.h"

#include <endian.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* RFC 5531 */
#define LAST_FRAGMENT 0x80000000u
#define CALL 0u
#define REPLY 1u
#define RPC_VERSION 2u
#define MSG_ACCEPTED 0u
#define SUCCESS 0u
#define AUTH_NONE 0u
#define AUTH_SYS 1u
#define MAX_AUTH_BYTES 400u
/* RFC 1813 */
#define NFS_PROGRAM 100003u
#define NFS_VERSION 3u
#define UNSTABLE 0u
#define FILE_SYNC 2u
#define SIZE_OF_FATTR3 84u
#define SIZE_OF_WCC_ATTR 24u

#define MACHINE_NAME "nbdnfs\0" /* with its padding */
#define MACHINE_NAME_BYTES 6u

#define XID_AT 4
#define PROCEDURE_AT 24
/* An answer to READ with attributes: mark, reply, verifier, status, attributes, count, eof, length of the data. */
#define READ_HEAD_BYTES 132u
/* What a record may be at most: no READ asks for more, and the rest of an answer is small. */
#define RECORD_BYTES_MAX (1024u * 1024 + 4096)

/* ------------------------------------------------------------------ XDR ------------------------------- */

static uint8_t *put32(uint8_t *at, uint32_t value)
{
	value = htobe32(value);
	memcpy(at, &value, sizeof(value));
	return at + sizeof(value);
}

static uint8_t *put64(uint8_t *at, uint64_t value)
{
	value = htobe64(value);
	memcpy(at, &value, sizeof(value));
	return at + sizeof(value);
}

static uint32_t padded(uint32_t bytes)
{
	return (bytes + 3) & ~3u;
}

/* Reads on from `at`; where less is left than is asked for, `ran_out` is set, and what it returns means nothing. */
struct reader {
	const uint8_t *at, *end;
	bool ran_out;
};

static const uint8_t *get(struct reader *reader, uint32_t bytes)
{
	const uint8_t *at = reader->at;

	if ((size_t)(reader->end - at) < bytes) {
		reader->ran_out = true;
		return NULL;
	}
	reader->at += bytes;
	return at;
}

static uint32_t get32(struct reader *reader)
{
	const uint8_t *at = get(reader, 4);
	uint32_t value = 0;

	if (at != NULL)
		memcpy(&value, at, sizeof(value));
	return be32toh(value);
}

static uint64_t get64(struct reader *reader)
{
	uint64_t high = get32(reader);

	return high << 32 | get32(reader);
}

/* ------------------------------------------------------------------ start and end ---------------------- */

void wire_init(struct wire *wire)
{
	*wire = (struct wire){ .fd = -1 };
}

static uint32_t first_xid(void)
{
	uint32_t xid;
	struct timespec now;

	/*
	 * A server knows repeated calls by address, port and xid: what another connection from the same port has sent
	 * lately must not look like ours.
	 */
	if (getrandom(&xid, sizeof(xid), GRND_NONBLOCK) == (ssize_t)sizeof(xid))
		return xid;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint32_t)now.tv_nsec ^ (uint32_t)now.tv_sec << 16 ^ (uint32_t)getpid() << 20;
}

void wire_start(struct wire *wire, int fd, const uint8_t *handle, uint32_t handle_bytes, uint32_t uid, uint32_t gid)
{
	uint8_t *at = wire->begin;

	wire_init(wire);
	wire->fd = fd;
	wire->next_xid = first_xid();
	wire->read_head_bytes = READ_HEAD_BYTES;
	at = put32(at, 0); /* the record's mark */
	at = put32(at, 0); /* xid */
	at = put32(at, CALL);
	at = put32(at, RPC_VERSION);
	at = put32(at, NFS_PROGRAM);
	at = put32(at, NFS_VERSION);
	at = put32(at, 0); /* procedure */
	at = put32(at, AUTH_SYS);
	at = put32(at, 5 * 4 + padded(MACHINE_NAME_BYTES));
	at = put32(at, 0); /* stamp: arbitrary */
	at = put32(at, MACHINE_NAME_BYTES);
	memcpy(at, MACHINE_NAME, padded(MACHINE_NAME_BYTES));
	at += padded(MACHINE_NAME_BYTES);
	at = put32(at, uid);
	at = put32(at, gid);
	at = put32(at, 0); /* no further groups */
	at = put32(at, AUTH_NONE);
	at = put32(at, 0);
	wire->null_bytes = (uint32_t)(at - wire->begin);
	at = put32(at, handle_bytes);
	memcpy(at, handle, handle_bytes); /* what pads it is zero already */
	at += padded(handle_bytes);
	wire->begin_bytes = (uint32_t)(at - wire->begin);
}

void wire_end(struct wire *wire)
{
	if (wire->fd >= 0)
		close(wire->fd);
	wire_init(wire);
}

/* ------------------------------------------------------------------ calls ------------------------------ */

static void await_answer(struct wire *wire, struct wire_call *call)
{
	call->next = NULL;
	call->prev = wire->last;
	if (wire->last != NULL)
		wire->last->next = call;
	else
		wire->first = call;
	wire->last = call;
}

static void forget(struct wire *wire, struct wire_call *call)
{
	if (call->prev != NULL)
		call->prev->next = call->next;
	else
		wire->first = call->next;
	if (call->next != NULL)
		call->next->prev = call->prev;
	else
		wire->last = call->prev;
}

static struct wire_call *find(const struct wire *wire, uint32_t xid)
{
	struct wire_call *call = wire->first;

	while (call != NULL && call->xid != xid)
		call = call->next;
	return call;
}

/* What is left of a part when `done_bytes` of it and of those before it are gone; takes its own share off those. */
static struct iovec rest_of(const void *part, uint32_t bytes, uint32_t *done_bytes)
{
	uint32_t gone_bytes = *done_bytes < bytes ? *done_bytes : bytes;

	*done_bytes -= gone_bytes;
	return (struct iovec){ .iov_base = (uint8_t *)(uintptr_t)part + gone_bytes, .iov_len = bytes - gone_bytes };
}

int wire_flush(struct wire *wire)
{
	static const uint8_t zeros[3];

	while (wire->out_bytes > 0) {
		uint32_t done_bytes = wire->out_done_bytes;
		struct iovec parts[3];
		struct msghdr message = { .msg_iov = parts, .msg_iovlen = wire->out_data_bytes > 0 ? 3 : 1 };
		ssize_t sent;

		parts[0] = rest_of(wire->out, wire->out_bytes, &done_bytes);
		parts[1] = rest_of(wire->out_data, wire->out_data_bytes, &done_bytes);
		parts[2] = rest_of(zeros, wire->out_pad_bytes, &done_bytes);
		sent = sendmsg(wire->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
		wire->out_done_bytes += (uint32_t)sent;
		if (wire->out_done_bytes == wire->out_bytes + wire->out_data_bytes + wire->out_pad_bytes)
			wire->out_bytes = 0;
	}
	return 0;
}

int wire_send(struct wire *wire, struct wire_call *call)
{
	uint8_t *at = wire->out;
	uint32_t begin_bytes = call->procedure == WIRE_NULL ? wire->null_bytes : wire->begin_bytes;

	if (!wire_has_room(wire))
		return -EBUSY;
	call->xid = wire->next_xid++;
	memcpy(at, wire->begin, begin_bytes);
	put32(at + XID_AT, call->xid);
	put32(at + PROCEDURE_AT, call->procedure);
	at += begin_bytes;
	wire->out_data = at; /* of no bytes */
	wire->out_data_bytes = wire->out_pad_bytes = 0;
	switch (call->procedure) {
	case WIRE_NULL:
		break;
	case WIRE_READ:
		at = put64(at, call->offset_bytes);
		at = put32(at, call->length_bytes);
		break;
	case WIRE_WRITE:
		at = put64(at, call->offset_bytes);
		at = put32(at, call->length_bytes);
		at = put32(at, call->stable ? FILE_SYNC : UNSTABLE);
		at = put32(at, call->length_bytes);
		wire->out_data = call->data;
		wire->out_data_bytes = call->length_bytes;
		wire->out_pad_bytes = padded(call->length_bytes) - call->length_bytes;
		break;
	case WIRE_COMMIT:
		at = put64(at, 0); /* all of the file */
		at = put32(at, 0);
		break;
	}
	wire->out_bytes = (uint32_t)(at - wire->out);
	wire->out_done_bytes = 0;
	put32(wire->out, LAST_FRAGMENT | (wire->out_bytes - 4 + wire->out_data_bytes + wire->out_pad_bytes));
	await_answer(wire, call);
	return wire_flush(wire);
}

int wire_send_null(struct wire *wire)
{
	if (!wire_has_room(wire) || find(wire, wire->null.xid) == &wire->null)
		return 0;
	wire->null = (struct wire_call){ .procedure = WIRE_NULL };
	return wire_send(wire, &wire->null);
}

/* ------------------------------------------------------------------ answers ---------------------------- */

/* An answer's head, as far as it has been understood. */
struct head {
	struct wire_answer answer;
	uint32_t head_bytes;    /* up to the data */
	uint32_t data_bytes;
	uint32_t tail_bytes;    /* of the record, behind the data */
};

static void get_attributes(struct reader *reader, struct wire_answer *answer)
{
	if (get32(reader) == 0)
		return;
	get(reader, 8); /* type, mode */
	answer->links = get32(reader);
	get(reader, 8); /* uid, gid */
	answer->size_bytes = get64(reader);
	get(reader, SIZE_OF_FATTR3 - 28);
	answer->has_size = !reader->ran_out;
}

static void get_wcc(struct reader *reader, struct wire_answer *answer)
{
	if (get32(reader) != 0) {
		answer->size_before_bytes = get64(reader);
		get(reader, SIZE_OF_WCC_ATTR - 8);
		answer->has_size_before = !reader->ran_out;
	}
	get_attributes(reader, answer);
}

static uint64_t get_verifier(struct reader *reader)
{
	const uint8_t *at = get(reader, 8);
	uint64_t verifier = 0;

	if (at != NULL)
		memcpy(&verifier, at, sizeof(verifier)); /* opaque: only ever compared */
	return verifier;
}

static void get_results(struct reader *reader, struct head *head)
{
	struct wire_answer *answer = &head->answer;

	if (answer->call->procedure == WIRE_NULL)
		return;
	answer->status = get32(reader);
	if (answer->call->procedure == WIRE_READ)
		get_attributes(reader, answer);
	else
		get_wcc(reader, answer);
	if (answer->status != 0)
		return;
	switch (answer->call->procedure) {
	case WIRE_NULL:
		break;
	case WIRE_READ:
		answer->count_bytes = get32(reader);
		answer->end_of_file = get32(reader) != 0;
		head->data_bytes = get32(reader);
		break;
	case WIRE_WRITE:
		answer->count_bytes = get32(reader);
		answer->stable = get32(reader) == FILE_SYNC;
		answer->verifier = get_verifier(reader);
		break;
	case WIRE_COMMIT:
		answer->verifier = get_verifier(reader);
		break;
	}
}

/* Returns 1 when these bytes hold an answer's whole head, 0 when more of it must come, or -errno. */
static int parse(const struct wire *wire, const uint8_t *at, uint32_t bytes, struct head *head)
{
	struct reader reader = { .at = at, .end = at + bytes };
	uint32_t mark = get32(&reader), record_bytes = mark & ~LAST_FRAGMENT, xid, verifier_bytes, reply, accepted;
	bool is_cut = bytes < 4 || record_bytes > bytes - 4; /* there is more of this record to come */

	*head = (struct head){ 0 };
	if (bytes < 4)
		return 0;
	if (record_bytes > RECORD_BYTES_MAX)
		return -EPROTO;
	if (!(mark & LAST_FRAGMENT))
		return -EOPNOTSUPP;
	if (!is_cut)
		reader.end = at + 4 + record_bytes;
	xid = get32(&reader);
	if (get32(&reader) != REPLY && !reader.ran_out)
		return -EPROTO;
	reply = get32(&reader);
	get32(&reader); /* the verifier's flavor */
	verifier_bytes = get32(&reader);
	if (reader.ran_out)
		return is_cut ? 0 : -EPROTO;
	if (reply != MSG_ACCEPTED || verifier_bytes > MAX_AUTH_BYTES)
		return -EOPNOTSUPP;
	get(&reader, padded(verifier_bytes));
	accepted = get32(&reader);
	if (reader.ran_out)
		return is_cut ? 0 : -EPROTO;
	if (accepted != SUCCESS)
		return -EOPNOTSUPP;
	head->answer.call = find(wire, xid);
	if (head->answer.call == NULL)
		return -EPROTO; /* nobody has asked */
	get_results(&reader, head);
	if (reader.ran_out)
		return is_cut ? 0 : -EPROTO;
	head->head_bytes = (uint32_t)(reader.at - at);
	if (head->data_bytes > head->answer.call->length_bytes ||
	    head->data_bytes > 4 + record_bytes - head->head_bytes)
		return -EPROTO;
	if (head->answer.count_bytes > head->data_bytes && head->answer.call->procedure == WIRE_READ)
		head->answer.count_bytes = head->data_bytes;
	head->tail_bytes = 4 + record_bytes - head->head_bytes - head->data_bytes;
	/* an answer to what has not been sent whole yet is none */
	if (wire->out_bytes > 0 && head->answer.call == wire->last)
		return -EPROTO;
	return 1;
}

/* So many bytes of the data lie where they belong. */
static void begin_data(struct wire *wire, const struct head *head, uint32_t got_bytes)
{
	wire->answer = head->answer;
	wire->reading = true;
	wire->data_bytes = head->data_bytes;
	wire->data_left_bytes = head->data_bytes - got_bytes;
	wire->read_head_bytes = head->head_bytes <= WIRE_IN_BYTES / 2 ? head->head_bytes : READ_HEAD_BYTES;
}

static void drop_in(struct wire *wire, uint32_t bytes)
{
	wire->in_bytes -= bytes;
	memmove(wire->in, wire->in + bytes, wire->in_bytes);
}

/* What has come, up to the next answer. Returns 1 and *answer, 0 when more must come, or -errno. */
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
			forget(wire, answer->call);
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
		drop_in(wire, head.head_bytes);
		wire->skip_bytes = head.tail_bytes;
		if (head.data_bytes > 0) {
			bytes = head.data_bytes < wire->in_bytes ? head.data_bytes : wire->in_bytes;
			memcpy(head.answer.call->data, wire->in, bytes);
			drop_in(wire, bytes);
			begin_data(wire, &head, bytes);
		} else {
			forget(wire, head.answer.call);
			if (head.answer.call != &wire->null) {
				*answer = head.answer;
				return 1;
			}
		}
	}
}

/*
 * `bytes` have come of the only answer that is due, read_head_bytes of them in `in`, the others where the data would
 * begin if its head were like the last one's. Puts them where they belong. Returns 0 or -errno.
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
		return 0; /* all of it is in `in`, for digest() */
	status = parse(wire, wire->in, wire->in_bytes, &head);
	if (status < 0)
		return status;
	if (status == 0 || head.answer.call != call || head.data_bytes < guess_bytes)
		return -EPROTO; /* too large for what it is */
	got_bytes = bytes - head.head_bytes;
	if (got_bytes > head.data_bytes + head.tail_bytes)
		return -EPROTO; /* nobody has asked for more */
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

/* Take in what there is. Returns 1, 0 when there is nothing, or -errno. */
static int fill(struct wire *wire)
{
	struct iovec parts[2] = { { .iov_base = wire->in + wire->in_bytes, .iov_len = WIRE_IN_BYTES - wire->in_bytes } };
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 1 };
	/* With one answer to come, and nothing of it here yet, it is known where its data will go. */
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
	wire->has_heard = true;
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
