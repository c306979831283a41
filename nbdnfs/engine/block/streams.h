/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * streams: recognises readers that walk the device, and says what to fetch ahead for them. No I/O, no lock.
 */
#ifndef NBDNFS_STREAMS_H
#define NBDNFS_STREAMS_H

#include <stdbool.h>
#include <stdint.h>

#define STREAMS 8

struct stream {
	uint64_t last;          /* where its newest request began */
	uint64_t next;          /* where the highest one ended */
	uint64_t ahead;         /* up to where pages have been asked for */
	int64_t stride;         /* pages from the start of one request to the start of the next */
	uint32_t steps;         /* how many requests went on where the one before had ended */
	uint32_t strides;       /* how many had the same stride as the one before */
	uint32_t window;        /* pages to have ready */
	uint64_t used_at;
};

struct streams {
	struct stream of[STREAMS];
	uint64_t clock;
	uint32_t window_max;
	uint32_t window_limit;  /* less than window_max while what is read ahead is not wanted */
};

/* Pages to fetch: `count` at `first`, and so on at every `step` pages, `times` times in all. */
struct prefetch {
	uint64_t first;
	uint32_t count;
	int64_t step;
	uint32_t times;
};

void streams_init(struct streams *streams, uint32_t window_max);

/* A request for `count` pages from `page` on. Returns true and *prefetch when something is to be fetched. */
bool streams_note(struct streams *streams, uint64_t page, uint32_t count, uint64_t device_pages,
		  struct prefetch *prefetch);

/* What was read ahead since the last call: `used` pages were wanted, `wasted` were dropped unread. */
void streams_judge(struct streams *streams, uint32_t used, uint32_t wasted);

#endif
