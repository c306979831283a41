/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "block/streams.h"

#include <string.h>

#define FIRST_WINDOW 8
#define STRIDE_AHEAD 8
/* Requests of one reader arrive through several threads, out of order. */
#define SLACK 32
/* The longest stride that is looked for. */
#define REACH 1024
/* A stream that was recognised keeps its place for so many requests, whatever others come. */
#define KEEP 512
#define STEPS_WANTED 1
#define STRIDES_WANTED 3
/* A walk is judged by about so many of its last pages. */
#define WALK_PAGES 128
/* Read-ahead is judged by so many pages. */
#define JUDGED_PAGES 64
/* A page costs little beside the round trip of a READ: so many may be wasted for one that is used. */
#define WASTED_PER_USED 3
/* After so many requests, read-ahead that was all in vain is tried again, and judged by fewer pages. */
#define ANOTHER_CHANCE 256
#define CHANCE_PAGES 16
/* Of so many new streams, any may be one that strides. */
#define NEW_STREAMS 16
/* A page that no device has, nor any page near it. */
#define NOWHERE (UINT64_MAX / 2)

void streams_init(struct streams *streams, uint32_t window_max)
{
	memset(streams, 0, sizeof(*streams));
	streams->window_max = streams->window_limit = window_max;
	streams->judged_pages = JUDGED_PAGES;
	for (unsigned i = 0; i < STREAMS; i++) {
		streams->end[i] = streams->stride_on[i] = NOWHERE;
		streams->of[i].older = (uint8_t)(i > 0 ? i - 1 : STREAMS);
		streams->of[i].newer = (uint8_t)(i + 1);
	}
	streams->newest = STREAMS - 1;
}

static uint64_t distance(uint64_t a, uint64_t b)
{
	return a > b ? a - b : b - a;
}

/* Put a stream at the end of the order in which they were used. */
static void note_used(struct streams *streams, unsigned number)
{
	struct stream *stream = &streams->of[number];

	stream->used_at = ++streams->clock;
	if (streams->newest == number)
		return;
	streams->of[stream->newer].older = stream->older;
	if (stream->older < STREAMS)
		streams->of[stream->older].newer = stream->newer;
	else
		streams->oldest = stream->newer;
	streams->of[streams->newest].newer = (uint8_t)number;
	stream->older = streams->newest;
	stream->newer = STREAMS;
	streams->newest = (uint8_t)number;
}

/*
 * The stream that a request goes on with: the one that ended nearest to it, or whose stride leads to it; after its
 * first request, any stride will do. STREAMS: none.
 */
static unsigned find(const struct streams *streams, uint64_t page)
{
	uint64_t nearest = SLACK + 1;
	unsigned found = STREAMS, strides = STREAMS;

	for (unsigned i = 0; i < STREAMS; i++) {
		if (page + SLACK - streams->end[i] <= (uint64_t)2 * SLACK) {
			if (distance(page, streams->end[i]) < nearest) {
				nearest = distance(page, streams->end[i]);
				found = i;
			}
		} else if (page == streams->stride_on[i]) {
			strides = i;
		}
	}
	if (found < STREAMS || strides < STREAMS)
		return found < STREAMS ? found : strides;
	for (unsigned i = streams->newest, tries = 0; i < STREAMS && tries < NEW_STREAMS; i = streams->of[i].older) {
		if (streams->of[i].is_new && distance(page, streams->of[i].last) <= REACH)
			return i;
		tries += streams->of[i].is_new;
	}
	return STREAMS;
}

/* The stream whose place a new one takes: the one that was used longest ago, but those that were recognised. */
static unsigned to_replace(const struct streams *streams)
{
	for (unsigned i = streams->oldest; i < STREAMS; i = streams->of[i].newer) {
		const struct stream *stream = &streams->of[i];
		bool is_recognised = stream->steps > STEPS_WANTED || stream->strides >= STRIDES_WANTED;

		if (!is_recognised || streams->clock - stream->used_at >= KEEP)
			return i;
	}
	return streams->oldest;
}

/* The number of the stream that the request goes on with, or of a new one. */
static unsigned stream_of(struct streams *streams, uint64_t page)
{
	unsigned number = find(streams, page);

	if (number < STREAMS) {
		streams->of[number].is_new = false;
	} else {
		struct stream *stream;

		number = to_replace(streams);
		stream = &streams->of[number];
		*stream = (struct stream){
			.last = page,
			.last_end = page,
			.walk_begin = page,
			.ahead = page,
			.window = FIRST_WINDOW,
			.is_new = true,
			.older = stream->older,
			.newer = stream->newer,
		};
		streams->end[number] = page;
	}
	note_used(streams, number);
	return number;
}

static uint32_t clipped(uint64_t first, uint64_t count, uint64_t device_pages)
{
	if (first >= device_pages)
		return 0;
	return (uint32_t)(count < device_pages - first ? count : device_pages - first);
}

static uint32_t smaller(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* The least that is read ahead. */
static uint32_t first_window(const struct streams *streams)
{
	return smaller(FIRST_WINDOW, streams->window_max);
}

/* All of it was in vain. */
static bool is_given_up(const struct streams *streams)
{
	return streams->window_limit < first_window(streams);
}

static bool walk_on(struct streams *streams, unsigned number, uint64_t device_pages, struct prefetch *prefetch)
{
	struct stream *stream = &streams->of[number];
	uint32_t window = smaller(stream->window, streams->window_limit);

	if (stream->ahead < streams->end[number])
		stream->ahead = streams->end[number];
	/* the next window is fetched while half of the last one is still unread */
	if (stream->ahead - streams->end[number] > stream->fetched / 2 || is_given_up(streams))
		return false;
	prefetch->first = stream->ahead;
	prefetch->count = clipped(stream->ahead, window, device_pages);
	prefetch->step = 0;
	prefetch->times = 1;
	prefetch->stream = number;
	stream->ahead += prefetch->count;
	stream->fetched = prefetch->count;
	if (stream->window < streams->window_max)
		stream->window *= 2;
	return prefetch->count > 0;
}

static bool stride_on(const struct streams *streams, const struct stream *stream, uint64_t page, uint32_t count,
		      uint64_t device_pages, struct prefetch *prefetch)
{
	uint32_t steps = smaller(STRIDE_AHEAD, streams->window_limit / count);
	int64_t last = (int64_t)page + stream->stride * (int64_t)steps, first;

	if (steps == 0 || is_given_up(streams))
		return false;
	/* the first time everything up to there, later one more each time */
	prefetch->times = stream->strides == STRIDES_WANTED ? steps : 1;
	first = last - stream->stride * (int64_t)(prefetch->times - 1);
	prefetch->step = stream->stride;
	prefetch->first = (uint64_t)first;
	prefetch->count = count;
	return first >= 0 && last >= 0 && clipped((uint64_t)first, count, device_pages) == count &&
	       clipped((uint64_t)last, count, device_pages) == count;
}

/*
 * Count pages that have been read before `end`. Returns whether the walk reads at least half of what it passes: else
 * most of what is read ahead would be in vain.
 */
static bool note_walked(struct stream *stream, uint64_t end, uint32_t pages)
{
	uint64_t passed = end - stream->walk_begin;

	stream->walked += pages;
	if (stream->walked > passed)
		stream->walked = (uint32_t)passed; /* some were read twice */
	if (passed > WALK_PAGES) {
		stream->walk_begin += passed / 2;
		stream->walked /= 2;
		passed -= passed / 2;
	}
	return 2 * (uint64_t)stream->walked >= passed;
}

static void note_stride(struct streams *streams, unsigned number, uint64_t page, uint32_t count)
{
	struct stream *stream = &streams->of[number];
	int64_t stride = (int64_t)(page - stream->last);

	if (stride != 0 && stride == stream->stride && page != stream->last_end)
		stream->strides++;
	else
		stream->strides = 0;
	stream->stride = stride;
	stream->last = page;
	stream->last_end = page + count;
	streams->stride_on[number] = stride != 0 ? page + (uint64_t)stride : NOWHERE;
}

bool streams_note(struct streams *streams, uint64_t page, uint32_t count, uint64_t device_pages,
		  struct prefetch *prefetch)
{
	struct stream *stream;
	unsigned number;

	if (streams->window_max == 0)
		return false;
	number = stream_of(streams, page);
	stream = &streams->of[number];
	if (streams->clock % ANOTHER_CHANCE == 0 && is_given_up(streams)) {
		streams->window_limit = first_window(streams);
		streams->judged_pages = CHANCE_PAGES;
		streams->used = streams->wasted = 0; /* of what was read ahead before */
	}
	note_stride(streams, number, page, count);
	if (distance(page, streams->end[number]) > SLACK) {
		stream->steps = 0;
		stream->window = FIRST_WINDOW;
		stream->fetched = 0;
		streams->end[number] = stream->ahead = page + count;
		stream->walk_begin = page;
		stream->walked = count;
	} else if (page + count <= streams->end[number]) {
		note_walked(stream, streams->end[number], count); /* out of order, or read twice */
	} else {
		streams->end[number] = page + count;
		stream->steps++;
		if (note_walked(stream, page + count, count) && stream->steps > STEPS_WANTED)
			return walk_on(streams, number, device_pages, prefetch);
	}
	return stream->strides >= STRIDES_WANTED && stride_on(streams, stream, page, count, device_pages, prefetch);
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
	streams->used += used;
	streams->wasted += wasted;
	if (streams->used + streams->wasted < streams->judged_pages)
		return;
	if (streams->wasted > WASTED_PER_USED * streams->used)
		streams->window_limit /= 2;
	else
		streams->window_limit = streams->window_limit * 2 + FIRST_WINDOW;
	if (streams->window_limit > streams->window_max)
		streams->window_limit = streams->window_max;
	streams->used = streams->wasted = 0;
	streams->judged_pages = JUDGED_PAGES;
}
