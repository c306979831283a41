/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The bytes of the client, and the requests in them. */
#include "nbd/internal.h"
#include "nbd/protocol.h"

#include "base/log.h"

#include <errno.h>
#include <sys/uio.h>

/*
 * The kernel sends a request in pieces, its head and each page with a send of its own, and each wakes this thread,
 * which takes the processor from the kernel where both have the same one: 33 times for 128 KiB. Therefore the rest of a
 * request is left to come for as long as the kernel may need to send it; with it come more requests. Where that was too
 * short, because the machine is slow, it is twice as long the next time, until the request is complete, and so it is
 * for the requests after it, until that was long enough several times. The last page is one send only: it is left to
 * come while others come with it. Where none did so often, that is tried now and then.
 */
#define GATHER_US 20
#define GATHER_BYTES_PER_US 2000
#define GATHER_LIMIT_US 500
#define SHIFT_LIMIT 4
#define ENOUGH 8
#define VAIN_TRIES 3
#define NOT_TRIED 16

static size_t received_bytes(const struct nbd_loop *loop)
{
	return loop->received_end - loop->received_begin;
}

static void end(struct nbd_loop *loop, bool broke_protocol)
{
	if (broke_protocol)
		log_line("the NBD client broke the protocol: serving ends");
	loop->broke_protocol |= broke_protocol;
	nbd_receive_no_more(loop);
}

/* The data of a write, as far as it has come. Returns whether all of it has. */
static bool fill(struct nbd_loop *loop)
{
	struct request *request = loop->filling;
	size_t wanted = request->length_bytes - loop->filled_bytes, have = received_bytes(loop);
	size_t now = have < wanted ? have : wanted;

	memcpy(request->data + loop->filled_bytes, loop->received + loop->received_begin, now);
	loop->received_begin += now;
	loop->filled_bytes += (uint32_t)now;
	if (now < wanted)
		return false;
	loop->filling = NULL;
	nbd_begin_request(loop, request, NULL);
	return true;
}

/* Returns whether there is nothing left to skip. */
static bool skip(struct nbd_loop *loop)
{
	size_t have = received_bytes(loop), now = have < loop->skip_bytes ? have : loop->skip_bytes;

	loop->received_begin += now;
	loop->skip_bytes -= (uint32_t)now;
	return loop->skip_bytes == 0;
}

/* A request whose head has come. Returns false where it finds no place: it stays where it is. */
static bool take_request(struct nbd_loop *loop)
{
	const uint8_t *at = loop->received + loop->received_begin;
	uint16_t type = be16_at(at + 6);
	uint32_t length_bytes = be32_at(at + 24);
	bool has_data = type == NBD_CMD_READ || type == NBD_CMD_WRITE;
	bool too_large = has_data && length_bytes > REQUEST_BYTES_MAX;
	struct request *request;

	if (be32_at(at) != NBD_REQUEST_MAGIC || type == NBD_CMD_DISC) {
		end(loop, type != NBD_CMD_DISC || be32_at(at) != NBD_REQUEST_MAGIC);
		return true;
	}
	request = nbd_place_take(loop, has_data && !too_large ? length_bytes : 0);
	loop->lacks_place = request == NULL;
	if (request == NULL)
		return false;
	request->type = type;
	loop->last_was_read = type == NBD_CMD_READ;
	request->flags = be16_at(at + 4);
	memcpy(&request->cookie, at + 8, sizeof(request->cookie));
	request->offset_bytes = be64_at(at + 16);
	request->length_bytes = length_bytes;
	loop->received_begin += NBD_REQUEST_BYTES;
	if (too_large) {
		loop->skip_bytes = type == NBD_CMD_WRITE ? length_bytes : 0;
		nbd_reply(loop, request, -EINVAL);
	} else if (type != NBD_CMD_WRITE) {
		nbd_begin_request(loop, request, NULL);
	} else if (received_bytes(loop) >= length_bytes) {
		nbd_begin_request(loop, request, loop->received + loop->received_begin);
		loop->received_begin += length_bytes;
	} else {
		loop->filling = request;
		loop->filled_bytes = 0;
	}
	return true;
}

bool nbd_take_requests(struct nbd_loop *loop)
{
	unsigned places_before = loop->free_count;

	while (!loop->ended) {
		if (loop->filling != NULL && !fill(loop))
			break;
		if (loop->skip_bytes > 0 && !skip(loop))
			break;
		if (received_bytes(loop) < NBD_REQUEST_BYTES || !take_request(loop))
			break;
	}
	if (received_bytes(loop) == 0)
		loop->received_begin = loop->received_end = 0;
	return loop->free_count < places_before;
}

/* How much of the request that is coming is still to come, as far as is known. */
static size_t missing_bytes(const struct nbd_loop *loop)
{
	if (loop->filling != NULL)
		return loop->filling->length_bytes - loop->filled_bytes;
	if (loop->skip_bytes > 0)
		return loop->skip_bytes;
	return received_bytes(loop) > 0 ? NBD_REQUEST_BYTES - received_bytes(loop) : 0;
}

/* A request of several pages was left to come: it has, or not. */
static void note_gathered(struct nbd_loop *loop, bool has_come)
{
	if (!has_come) {
		loop->gather_shift += loop->gather_shift < SHIFT_LIMIT;
		loop->gathered_enough = 0;
	} else if (loop->gather_shift > 0 && ++loop->gathered_enough == ENOUGH) {
		loop->gather_shift--;
		loop->gathered_enough = 0;
	}
}

/* Bytes have come, and complete requests have been taken. `is_the_same`: the one that is not has been waited for. */
static void gather(struct nbd_loop *loop, bool is_the_same)
{
	size_t missing = loop->lacks_place ? 0 : missing_bytes(loop);
	uint64_t us = GATHER_US + missing / GATHER_BYTES_PER_US;

	if (missing > PAGE_BYTES)
		us <<= loop->gather_shift;

	if (missing > 0 && missing <= PAGE_BYTES && loop->in_vain >= VAIN_TRIES) {
		missing = 0;
		if (++loop->in_vain == VAIN_TRIES + NOT_TRIED)
			loop->in_vain = VAIN_TRIES - 1; /* the next one is tried */
	}
	if (is_the_same && loop->gather_us > 0)
		us = 2 * (uint64_t)loop->gather_us;
	loop->gather_us = missing == 0 ? 0 : us < GATHER_LIMIT_US ? (uint32_t)us : GATHER_LIMIT_US;
	if (missing > 0)
		loop->gather_until_us = nbd_now_us() + loop->gather_us;
}

/* Is what comes next only to be peeked at? Not the rest of a request, nor a write: it would be copied twice. */
static bool is_to_peek(const struct nbd_loop *loop)
{
	return nbd_can_peek(loop) && loop->last_was_read && loop->received_end == 0;
}

void nbd_receive(struct nbd_loop *loop)
{
	struct iovec pieces[2];
	size_t count = 0, wanted = 0;
	struct request *filling = loop->filling;
	bool gathered = loop->gather_until_us > 0, peeks = is_to_peek(loop);
	ssize_t got;

	if (loop->received_begin > 0) {
		memmove(loop->received, loop->received + loop->received_begin, received_bytes(loop));
		loop->received_end -= loop->received_begin;
		loop->received_begin = 0;
	}
	if (loop->filling != NULL) {
		assert(loop->received_end == 0); /* all of it has gone into the request */
		wanted = loop->filling->length_bytes - loop->filled_bytes;
		pieces[count++] = (struct iovec){ loop->filling->data + loop->filled_bytes, wanted };
	}
	pieces[count++] = (struct iovec){ loop->received + loop->received_end,
					  peeks ? PEEK_BYTES : RECEIVED_BYTES - loop->received_end };
	loop->gather_until_us = 0;
	got = nbd_receive_pieces(loop, pieces, count, peeks);
	if (got < 0 && (errno == EAGAIN || errno == EINTR || nbd_lacks_memory(&loop->receive_lacks_memory, errno)))
		return;
	if (got <= 0) {
		end(loop, false);
		return;
	}
	if (gathered && wanted > PAGE_BYTES)
		note_gathered(loop, (size_t)got >= wanted);
	if (gathered && wanted > 0 && wanted <= PAGE_BYTES)
		loop->in_vain = (size_t)got > wanted ? 0 : loop->in_vain + 1;
	if ((size_t)got > wanted) {
		loop->filled_bytes += (uint32_t)wanted;
		loop->received_end += (size_t)got - wanted;
	} else {
		loop->filled_bytes += (uint32_t)got;
	}
	nbd_take_requests(loop);
	gather(loop, filling != NULL && loop->filling == filling);
}
