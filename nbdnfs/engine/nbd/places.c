/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where requests and their data lie: a place for each request, and pieces of one arena, side by side, for its data. */
#include "nbd/internal.h"

void nbd_places_init(struct nbd_loop *loop)
{
	for (unsigned i = 0; i < REQUESTS; i++) {
		loop->requests[i].loop = loop;
		queue_push(&loop->free, &loop->requests[i]);
	}
	loop->free_count = REQUESTS;
}

static uint64_t bits(unsigned first, unsigned count)
{
	return (count == PIECES ? UINT64_MAX : (UINT64_C(1) << count) - 1) << first;
}

/* The first of `count` free pieces side by side, PIECES where there are none. */
static unsigned find_pieces(const struct nbd_loop *loop, unsigned count)
{
	for (unsigned first = 0; first + count <= PIECES; first++)
		if ((loop->taken_pieces & bits(first, count)) == 0)
			return first;
	return PIECES;
}

struct request *nbd_place_take(struct nbd_loop *loop, uint32_t length_bytes)
{
	unsigned pieces = (length_bytes + PIECE_BYTES - 1) / PIECE_BYTES, first = 0;
	struct request *request;

	assert(length_bytes <= REQUEST_BYTES_MAX);
	if (loop->free.head == NULL)
		return NULL;
	if (pieces > 0) {
		first = find_pieces(loop, pieces);
		if (first == PIECES)
			return NULL;
		loop->taken_pieces |= bits(first, pieces);
	}
	request = queue_pop(&loop->free);
	loop->free_count--;
	*request = (struct request){
		.loop = loop,
		.first_piece = first,
		.pieces = pieces,
		.data = pieces > 0 ? loop->arena + (size_t)first * PIECE_BYTES : NULL,
	};
	request->step.reqs = loop->reqs + (size_t)first * (PIECE_BYTES / PAGE_BYTES);
	return request;
}

void nbd_place_free(struct nbd_loop *loop, struct request *request)
{
	if (request->pieces > 0) {
		uint64_t its = bits(request->first_piece, request->pieces);

		assert((loop->taken_pieces & its) == its);
		loop->taken_pieces &= ~its;
	}
	queue_push(&loop->free, request);
	loop->free_count++;
	assert(loop->free_count <= REQUESTS);
}

void nbd_receive_no_more(struct nbd_loop *loop)
{
	loop->ended = true;
	if (loop->filling != NULL)
		nbd_place_free(loop, loop->filling); /* the rest of it does not come any more */
	loop->filling = NULL;
}

void nbd_client_left(struct nbd_loop *loop)
{
	loop->gone = true;
	nbd_receive_no_more(loop);
}
