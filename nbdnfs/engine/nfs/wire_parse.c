/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an answer says, from its xid to where its data begins. */
#include "base/assert.h"
#include "nfs/wire_internal.h"

#include <errno.h>

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
static bool get_handle(struct xdr_reader *reader, struct wire_head *head)
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

/*
 * The port in a universal address, "HOST.HIGH.LOW" (RFC 5665, 5.2.3.3). Returns false when it has none; "" is that of a
 * program that is not there, and has port 0.
 */
static bool get_port_of_address(struct xdr_reader *reader, struct wire_answer *answer)
{
	uint32_t bytes = xdr_get32(reader), number = 0, factor = 1, parts[2] = { 0 }, part = 0;
	const uint8_t *at;

	if (!reader->ran_out && bytes > ADDRESS_BYTES_MAX)
		return false;
	at = xdr_get(reader, reader->ran_out ? 0 : xdr_padded(bytes));
	if (reader->ran_out || bytes == 0)
		return true;
	for (uint32_t i = bytes; i > 0 && part < 2; i--) {
		if (at[i - 1] == '.' && factor > 1) {
			parts[part++] = number;
			number = 0;
			factor = 1;
		} else if (at[i - 1] >= '0' && at[i - 1] <= '9' && factor <= 100) {
			number += factor * (uint32_t)(at[i - 1] - '0');
			factor *= 10;
		} else {
			return false;
		}
	}
	answer->port = parts[1] << 8 | parts[0];
	return part == 2 && parts[0] < 256 && parts[1] < 256;
}

/* What every answer has after its status, be that good or bad. */
static void get_attributes_of(struct xdr_reader *reader, struct wire_answer *answer)
{
	switch (answer->call->procedure) {
	case WIRE_NULL:
	case WIRE_GETATTR:
	case WIRE_MNT:
	case WIRE_GETPORT:
	case WIRE_GETADDR:
		break;
	case WIRE_LOOKUP:
		if (answer->status != 0)
			skip_attributes(reader);
		break;
	case WIRE_READ:
	case WIRE_READLINK:
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
static int get_results(struct xdr_reader *reader, struct wire_head *head)
{
	struct wire_answer *answer = &head->answer;

	if (answer->call->procedure == WIRE_NULL)
		return 0;
	if (answer->call->procedure == WIRE_GETPORT) {
		answer->port = xdr_get32(reader);
		return answer->port <= UINT16_MAX ? 0 : -EPROTO;
	}
	if (answer->call->procedure == WIRE_GETADDR)
		return get_port_of_address(reader, answer) ? 0 : -EPROTO;
	answer->status = xdr_get32(reader);
	get_attributes_of(reader, answer);
	if (answer->status != 0)
		return 0;
	switch (answer->call->procedure) {
	case WIRE_NULL:
	case WIRE_GETPORT:
	case WIRE_GETADDR:
		break;
	case WIRE_MNT:
		/* what follows, the flavours of authentication, is not needed: AUTH_SYS is the only one here */
		if (!get_handle(reader, head))
			return -EPROTO;
		break;
	case WIRE_READLINK:
		head->data_bytes = answer->count_bytes = xdr_get32(reader);
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

/*
 * What RPC says instead of results: a status of NFS that means the same, or -errno. A server that restarts has not
 * registered its programs yet, or is short of something: the call is made again later. The others stay what they are.
 */
static int refusal(uint32_t accepted)
{
	return accepted == PROG_UNAVAIL || accepted == SYSTEM_ERR ? (int)WIRE_NOT_NOW : -EPROTO;
}

int wire_parse(const struct wire *wire, const uint8_t *at, uint32_t bytes, uint32_t message_bytes,
	       struct wire_head *head)
{
	struct xdr_reader reader = { .at = at, .end = at + (bytes < message_bytes ? bytes : message_bytes) };
	int ended = bytes < message_bytes ? 0 : -EPROTO; /* the result when there are no more bytes */
	uint32_t xid = xdr_get32(&reader), kind = xdr_get32(&reader), reply = xdr_get32(&reader), verifier_bytes;
	uint32_t accepted;

	*head = (struct wire_head){ 0 };
	if (reader.ran_out)
		return ended;
	head->answer.call = wire_find_call(wire, xid);
	/* not an answer, or to no call, or to one that is not sent whole yet */
	if (kind != REPLY || head->answer.call == NULL || (wire->out_bytes > 0 && head->answer.call == wire->last))
		return -EPROTO;
	if (reply != MSG_ACCEPTED) {
		uint32_t rejected = xdr_get32(&reader);

		return reader.ran_out ? ended : rejected == AUTH_ERROR ? -EACCES : -EPROTO;
	}
	xdr_get32(&reader); /* the verifier's flavor */
	verifier_bytes = xdr_get32(&reader);
	if (!reader.ran_out && verifier_bytes > MAX_AUTH_BYTES)
		return -EPROTO;
	xdr_get(&reader, reader.ran_out ? 0 : xdr_padded(verifier_bytes));
	accepted = xdr_get32(&reader);
	if (reader.ran_out)
		return ended;
	if (accepted != SUCCESS) {
		int status = refusal(accepted);

		if (status < 0)
			return status;
		head->answer.status = (uint32_t)status;
	} else if (get_results(&reader, head) < 0) {
		return -EPROTO;
	}
	if (reader.ran_out)
		return ended;
	head->head_bytes = (uint32_t)(reader.at - at);
	if (head->data_bytes > head->answer.call->length_bytes || head->data_bytes > message_bytes - head->head_bytes)
		return -EPROTO;
	if (head->answer.call->procedure == WIRE_READ && head->answer.count_bytes != head->data_bytes) {
		/* RFC 1813, 3.3.6: they are the same. No more than either has been read; nothing at all is no answer */
		if (head->answer.count_bytes == 0 || head->data_bytes == 0)
			return -EPROTO;
		if (head->answer.count_bytes > head->data_bytes)
			head->answer.count_bytes = head->data_bytes;
	}
	return 1;
}

void wire_keep_handle(struct wire *wire, struct wire_answer *answer)
{
	if (answer->handle == NULL)
		return;
	memcpy(wire->found_handle, answer->handle, answer->handle_bytes);
	answer->handle = wire->found_handle;
}

void wire_drop_in(struct wire *wire, uint32_t bytes)
{
	assert(bytes <= wire->in_bytes);
	wire->in_bytes -= bytes;
	memmove(wire->in, wire->in + bytes, wire->in_bytes);
}

void wire_place_data(struct wire *wire, struct wire_call *call, uint32_t head_bytes, uint32_t got_bytes)
{
	uint32_t guess_bytes = wire->read_head_bytes;

	assert(got_bytes <= call->length_bytes);
	if (head_bytes > guess_bytes) {
		memmove(call->data, call->data + (head_bytes - guess_bytes), got_bytes);
	} else if (head_bytes < guess_bytes) {
		uint32_t early_bytes = guess_bytes - head_bytes;

		if (early_bytes > got_bytes)
			early_bytes = got_bytes;
		memmove(call->data + early_bytes, call->data, got_bytes - early_bytes);
		memcpy(call->data, wire->in + head_bytes, early_bytes);
	}
}
