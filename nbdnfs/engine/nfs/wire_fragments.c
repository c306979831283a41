/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Answers in several fragments, which may split them anywhere (RFC 5531, 11). Servers that do this are rare, so it may
 * be slower: the head is put together in `message`, and parsed again with each piece.
 */
#include "base/assert.h"
#include "nfs/wire_internal.h"

#include <errno.h>

void wire_begin_fragments(struct wire *wire)
{
	assert(!wire->fragmented && !wire->reading && wire->skip_bytes == 0);
	wire->fragmented = true;
	wire->is_last_fragment = wire->has_head = false;
	wire->fragment_left_bytes = wire->record_bytes = wire->message_bytes = wire->data_left_bytes = 0;
}

/* The next fragment begins. Returns false where the record gets too long; fragments without bytes count, too. */
static bool begin_fragment(struct wire *wire, const uint8_t *at)
{
	uint32_t mark;

	memcpy(&mark, at, sizeof(mark));
	mark = be32toh(mark);
	wire->is_last_fragment = mark & LAST_FRAGMENT;
	wire->fragment_left_bytes = mark & ~LAST_FRAGMENT;
	if (wire->fragment_left_bytes > WIRE_RECORD_BYTES_MAX)
		return false;
	wire->record_bytes += 4 + wire->fragment_left_bytes;
	return wire->record_bytes <= WIRE_RECORD_BYTES_MAX;
}

static bool is_whole(const struct wire *wire)
{
	return wire->is_last_fragment && wire->fragment_left_bytes == 0;
}

static void note_head(struct wire *wire, const struct wire_head *head)
{
	wire->has_head = true;
	wire->answer = head->answer;
	wire_keep_handle(wire, &wire->answer);
	wire->data_bytes = wire->data_left_bytes = head->data_bytes;
}

/* Bytes behind the head: data, and then what nothing here needs. */
static void take_data(struct wire *wire, const uint8_t *at, uint32_t bytes)
{
	if (bytes > wire->data_left_bytes)
		bytes = wire->data_left_bytes;
	if (bytes > 0)
		memcpy(wire->answer.call->data + (wire->data_bytes - wire->data_left_bytes), at, bytes);
	wire->data_left_bytes -= bytes;
}

/* The next bytes of the message, which fragment_left_bytes does not count any more. Returns 0 or -errno. */
static int take(struct wire *wire, const uint8_t *at, uint32_t bytes)
{
	uint32_t room_bytes = (uint32_t)sizeof(wire->message) - wire->message_bytes;
	uint32_t copied_bytes = bytes < room_bytes ? bytes : room_bytes;
	struct wire_head head;
	int status;

	if (wire->has_head) {
		take_data(wire, at, bytes);
		return 0;
	}
	memcpy(wire->message + wire->message_bytes, at, copied_bytes);
	wire->message_bytes += copied_bytes;
	status = wire_parse(wire, wire->message, wire->message_bytes,
			    is_whole(wire) ? wire->message_bytes + bytes - copied_bytes : WIRE_LENGTH_UNKNOWN, &head);
	if (status == 0 && wire->message_bytes == sizeof(wire->message))
		return -EPROTO;
	if (status <= 0)
		return status;
	note_head(wire, &head);
	take_data(wire, wire->message + head.head_bytes, wire->message_bytes - head.head_bytes);
	take_data(wire, at + copied_bytes, bytes - copied_bytes);
	return 0;
}

int wire_digest_fragments(struct wire *wire)
{
	while (!is_whole(wire)) {
		uint32_t bytes = wire->in_bytes;
		int status;

		if (wire->fragment_left_bytes == 0) {
			if (wire->in_bytes < 4)
				return 0;
			if (!begin_fragment(wire, wire->in))
				return -EPROTO;
			wire_drop_in(wire, 4);
			continue;
		}
		if (bytes > wire->fragment_left_bytes)
			bytes = wire->fragment_left_bytes;
		if (bytes == 0)
			return 0;
		wire->fragment_left_bytes -= bytes;
		status = take(wire, wire->in, bytes);
		if (status < 0)
			return status;
		wire_drop_in(wire, bytes);
	}
	wire->fragmented = false;
	return wire->has_head && wire->data_left_bytes == 0 ? 1 : -EPROTO;
}

/* Byte `number` of what was received, of which read_head_bytes lie in `in`, the others from the call's data on. */
static uint8_t *received(struct wire *wire, struct wire_call *call, uint32_t number)
{
	return number < wire->read_head_bytes ? wire->in + number : call->data + (number - wire->read_head_bytes);
}

/* Close the gaps that the marks leave. Returns the length of what remains, or -EPROTO; *done_bytes have been read. */
static int strip_marks(struct wire *wire, struct wire_call *call, uint32_t bytes, uint32_t *done_bytes)
{
	uint32_t from = 0, to = 0;

	while (from < bytes) {
		if (is_whole(wire))
			return -EPROTO; /* more than one answer, and only one is due */
		if (wire->fragment_left_bytes == 0) {
			uint8_t mark[4];

			if (bytes - from < 4)
				break;
			for (unsigned i = 0; i < 4; i++)
				mark[i] = *received(wire, call, from++);
			if (!begin_fragment(wire, mark))
				return -EPROTO;
			continue;
		}
		*received(wire, call, to++) = *received(wire, call, from++);
		wire->fragment_left_bytes--;
	}
	*done_bytes = from;
	return (int)to;
}

int wire_sort_fragments(struct wire *wire, struct wire_call *call, uint32_t bytes)
{
	uint32_t done_bytes = 0, message_bytes, got_bytes, rest_bytes;
	uint8_t rest[4] = { 0 }; /* of a mark */
	struct wire_head head;
	int status;

	wire_begin_fragments(wire);
	status = strip_marks(wire, call, bytes, &done_bytes);
	if (status < 0)
		return status;
	message_bytes = (uint32_t)status;
	rest_bytes = bytes - done_bytes;
	assert(rest_bytes < sizeof(rest));
	for (uint32_t i = 0; i < rest_bytes; i++)
		rest[i] = *received(wire, call, done_bytes + i);
	while (wire->message_bytes < message_bytes && wire->message_bytes < sizeof(wire->message)) {
		wire->message[wire->message_bytes] = *received(wire, call, wire->message_bytes);
		wire->message_bytes++;
	}
	status = wire_parse(wire, wire->message, wire->message_bytes,
			    is_whole(wire) ? message_bytes : WIRE_LENGTH_UNKNOWN, &head);
	if (status == 0 && wire->message_bytes == sizeof(wire->message))
		return -EPROTO;
	if (status < 0)
		return status;
	if (status > 0) {
		note_head(wire, &head);
		got_bytes = message_bytes - head.head_bytes;
		if (got_bytes > head.data_bytes)
			got_bytes = head.data_bytes;
		wire_place_data(wire, call, head.head_bytes, got_bytes);
		wire->data_left_bytes -= got_bytes;
	}
	memcpy(wire->in, rest, rest_bytes);
	wire->in_bytes = rest_bytes;
	return 0;
}
