/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "block/streams.h"

#include <string.h>

#define FIRST_WINDOW 8
#define STRIDE_AHEAD 4
/* Requests of one reader arrive through several threads, out of order. */
#define SLACK 32
/* Two requests that are further apart belong to different readers. */
#define REACH 1024
#define STEPS_WANTED 2
#define STRIDES_WANTED 3
/* After so many requests, read-ahead is tried again. */
#define ANOTHER_CHANCE 256

void streams_init(struct streams *streams, uint32_t window_max)
{
	memset(streams, 0, sizeof(*streams));
	streams->window_max = streams->window_limit = window_max;
}

static uint64_t distance(uint64_t a, uint64_t b)
{
	return a > b ? a - b : b - a;
}

/* The stream whose last request was nearest, or a new one in the place of the oldest. */
static struct stream *stream_of(struct streams *streams, uint64_t page)
{
	struct stream *nearest = NULL, *oldest = &streams->of[0];

	for (struct stream *stream = streams->of; stream < streams->of + STREAMS; stream++) {
		if (stream->used_at < oldest->used_at)
			oldest = stream;
		if (stream->used_at == 0 || distance(page, stream->last) > REACH)
			continue;
		if (nearest == NULL || distance(page, stream->next) < distance(page, nearest->next))
			nearest = stream;
	}
	if (nearest == NULL) {
		nearest = oldest;
		*nearest = (struct stream){ .last = page, .next = page, .ahead = page, .window = FIRST_WINDOW };
	}
	nearest->used_at = ++streams->clock;
	return nearest;
}

static uint32_t clipped(uint64_t first, uint64_t count, uint64_t device_pages)
{
	if (first >= device_pages)
		return 0;
	return (uint32_t)(count < device_pages - first ? count : device_pages - first);
}

static bool walk_on(struct streams *streams, struct stream *stream, uint64_t device_pages, struct prefetch *prefetch)
{
	uint32_t window = stream->window < streams->window_limit ? stream->window : streams->window_limit;

	if (stream->ahead < stream->next)
		stream->ahead = stream->next;
	/* the next window is fetched while half of the last one is still unread */
	if (stream->ahead - stream->next > window / 2 || window < FIRST_WINDOW)
		return false;
	prefetch->first = stream->ahead;
	prefetch->count = clipped(stream->ahead, window, device_pages);
	prefetch->step = 0;
	prefetch->times = 1;
	stream->ahead += prefetch->count;
	if (stream->window < streams->window_max)
		stream->window *= 2;
	return prefetch->count > 0;
}

static bool stride_on(const struct streams *streams, const struct stream *stream, uint64_t page, uint32_t count,
		      uint64_t device_pages, struct prefetch *prefetch)
{
	int64_t first = (int64_t)page + stream->stride * STRIDE_AHEAD;

	/* the first time everything up to there, later one more each time */
	prefetch->times = stream->strides == STRIDES_WANTED ? STRIDE_AHEAD : 1;
	first -= stream->stride * (int64_t)(prefetch->times - 1);
	prefetch->step = stream->stride;
	prefetch->first = (uint64_t)first;
	prefetch->count = count;
	return streams->window_limit >= FIRST_WINDOW && first >= 0 &&
	       clipped((uint64_t)first, count, device_pages) == count;
}

bool streams_note(struct streams *streams, uint64_t page, uint32_t count, uint64_t device_pages,
		  struct prefetch *prefetch)
{
	struct stream *stream;
	int64_t stride;

	if (streams->window_max == 0)
		return false;
	stream = stream_of(streams, page);
	if (streams->clock % ANOTHER_CHANCE == 0 && streams->window_limit < FIRST_WINDOW)
		streams->window_limit = FIRST_WINDOW;
	stride = (int64_t)(page - stream->last);
	stream->last = page;
	if (stride != 0 && stride == stream->stride)
		stream->strides++;
	else
		stream->strides = 0;
	stream->stride = stride;
	if (distance(page, stream->next) <= SLACK) {
		if (page + count <= stream->next)
			return false; /* out of order, or read twice */
		stream->next = page + count;
		if (++stream->steps > STEPS_WANTED)
			return walk_on(streams, stream, device_pages, prefetch);
		return false;
	}
	stream->steps = 0;
	stream->window = FIRST_WINDOW;
	stream->next = stream->ahead = page + count;
	if (stream->strides >= STRIDES_WANTED)
		return stride_on(streams, stream, page, count, device_pages, prefetch);
	return false;
}

void streams_judge(struct streams *streams, uint32_t used, uint32_t wasted)
{
	if (wasted > used)
		streams->window_limit /= 2;
	else if (used > 0 && streams->window_limit < streams->window_max)
		streams->window_limit = streams->window_limit * 2 + FIRST_WINDOW;
	if (streams->window_limit > streams->window_max)
		streams->window_limit = streams->window_max;
}
