/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "block/streams.h"

#include <string.h>

#define FIRST_WINDOW 8
#define STRIDE_AHEAD 4
/* Requests of one reader arrive through several threads, out of order. */
#define SLACK 32
/* The longest stride that is looked for. */
#define REACH 1024
/* A stream that was recognised keeps its place for so many requests, whatever others come. */
#define KEEP 512
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

/* Does the request begin about where the stream's last one ended? */
static bool is_next(const struct stream *stream, uint64_t page)
{
	return stream->used_at > 0 && distance(page, stream->next) <= SLACK;
}

/* Is it as far from the last one as that was from the one before? After the first of a stream, any stride will do. */
static bool is_a_stride_on(const struct stream *stream, uint64_t page)
{
	if (stream->used_at == 0)
		return false;
	if (stream->is_new)
		return distance(page, stream->last) <= REACH;
	return stream->stride != 0 && page == stream->last + (uint64_t)stream->stride;
}

/* The stream whose place a new one takes: the one that was used longest ago, but those that were recognised. */
static struct stream *oldest_stream(struct streams *streams)
{
	struct stream *oldest = NULL, *oldest_of_all = streams->of;

	for (struct stream *stream = streams->of; stream < streams->of + STREAMS; stream++) {
		bool is_recognised = stream->steps > STEPS_WANTED || stream->strides >= STRIDES_WANTED;

		if (stream->used_at < oldest_of_all->used_at)
			oldest_of_all = stream;
		if (is_recognised && streams->clock - stream->used_at < KEEP)
			continue;
		if (oldest == NULL || stream->used_at < oldest->used_at)
			oldest = stream;
	}
	return oldest != NULL ? oldest : oldest_of_all;
}

/* The stream that the request goes on with, or a new one. */
static struct stream *stream_of(struct streams *streams, uint64_t page)
{
	struct stream *found = NULL;

	for (struct stream *stream = streams->of; stream < streams->of + STREAMS; stream++) {
		bool is_nearer = found == NULL || distance(page, stream->next) < distance(page, found->next);

		if (is_next(stream, page) && (is_nearer || !is_next(found, page)))
			found = stream;
		else if (found == NULL && is_a_stride_on(stream, page))
			found = stream;
	}
	if (found == NULL) {
		found = oldest_stream(streams);
		*found = (struct stream){
			.last = page, .next = page, .ahead = page, .window = FIRST_WINDOW, .is_new = true
		};
	} else {
		found->is_new = false;
	}
	found->used_at = ++streams->clock;
	return found;
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
	prefetch->stream = (unsigned)(stream - streams->of);
	stream->ahead += prefetch->count;
	if (stream->window < streams->window_max)
		stream->window *= 2;
	return prefetch->count > 0;
}

static bool stride_on(const struct streams *streams, const struct stream *stream, uint64_t page, uint32_t count,
		      uint64_t device_pages, struct prefetch *prefetch)
{
	int64_t last = (int64_t)page + stream->stride * STRIDE_AHEAD, first;

	/* the first time everything up to there, later one more each time */
	prefetch->times = stream->strides == STRIDES_WANTED ? STRIDE_AHEAD : 1;
	first = last - stream->stride * (int64_t)(prefetch->times - 1);
	prefetch->step = stream->stride;
	prefetch->first = (uint64_t)first;
	prefetch->count = count;
	return streams->window_limit >= FIRST_WINDOW && first >= 0 && last >= 0 &&
	       clipped((uint64_t)first, count, device_pages) == count &&
	       clipped((uint64_t)last, count, device_pages) == count;
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

void streams_not_fetched(struct streams *streams, const struct prefetch *prefetch, uint32_t count)
{
	struct stream *stream;

	if (prefetch->step != 0)
		return;
	stream = &streams->of[prefetch->stream];
	/* unless it has gone on meanwhile, or is another one */
	if (stream->ahead == prefetch->first + prefetch->count)
		stream->ahead -= count;
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
