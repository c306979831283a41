/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * streams: recognises readers that walk the device, and says what to read ahead for them. No I/O, no lock.
 */
#ifndef NBDNFS_STREAMS_H
#define NBDNFS_STREAMS_H

#include <stdbool.h>
#include <stdint.h>

/* Readers that are followed at once. */
#define STREAMS 48

struct stream {
	uint64_t last, last_end; /* the first page of its newest request, and the one after it */
	uint64_t walk_begin;    /* where it began to walk, or later: note_walked() */
	uint64_t ahead;         /* the page after those that were read ahead */
	int64_t stride;         /* pages from the start of one request to the start of the next */
	uint32_t walked;        /* pages that were read since walk_begin, between there and its end */
	uint32_t steps;         /* requests in a row that began where the last one ended */
	uint32_t strides;       /* requests in a row with the same stride */
	uint32_t window;        /* pages to have ready */
	uint32_t fetched;       /* pages that were read ahead last */
	uint64_t used_at;       /* by `clock` */
	bool is_new;            /* it has had one request */
	uint8_t older, newer;   /* those that were used before and after it; STREAMS: none */
};

struct streams {
	uint32_t window_max;
	uint32_t window_limit;  /* less than window_max while pages are read ahead in vain */
	uint32_t used, wasted;  /* of the pages that were read ahead, since window_limit was last set */
	uint32_t judged_pages;  /* it is set again after so many of them */
	uint64_t clock;         /* requests */
	uint8_t oldest, newest;
	struct stream of[STREAMS];
	/* what each request is compared with, of all streams side by side */
	uint64_t end[STREAMS];  /* the page after the stream's highest request */
	uint64_t stride_on[STREAMS]; /* where its stride leads */
};

/* Pages to fetch: `count` at `first`, and again every `step` pages, `times` times in all. */
struct prefetch {
	uint64_t first;
	uint32_t count;
	int64_t step;
	uint32_t times;
	unsigned stream;        /* whose */
};

void streams_init(struct streams *streams, uint32_t window_max);

/* A request for `count` pages from `page` on. Returns true and *prefetch when something is to be fetched. */
bool streams_note(struct streams *streams, uint64_t page, uint32_t count, uint64_t device_pages,
		  struct prefetch *prefetch);

/* The last `count` of these pages could not be fetched now: they are named again. Of pages in a row only. */
void streams_not_fetched(struct streams *streams, const struct prefetch *prefetch, uint32_t count);

/* Of what was read ahead, `used` pages were read since the last call, and `wasted` were dropped unread. */
void streams_judge(struct streams *streams, uint32_t used, uint32_t wasted);

#endif
