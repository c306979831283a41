/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What read-ahead makes of a trace: read_ahead SLOTS WINDOW_PAGES, with the trace on stdin (vm_trace.py).
 *
 * The engine's streams.c with a region of SLOTS slots, of which one that was read gives way first, and then the one
 * that was written or fetched longest ago. The NAS answers at once, and every fetch finds a buffer: what is counted is
 * how well the requests were guessed, not the time.
 */
#include "block/streams.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#define PAGES_MAX ((uint64_t)1 << 24)
#define NONE UINT32_MAX

struct slot {
	uint64_t page;
	uint32_t prev, next;
	bool has_page, is_ahead; /* fetched, and not read yet */
};

static struct slot *slots; /* slots[slot_count] is the list's head: next of it gives way first */
static uint32_t slot_count;
static uint32_t *slot_of;
static uint32_t used, wasted; /* since the last request */
static uint64_t used_in_all, wasted_in_all, fetched, fetches;

static void unlink_slot(uint32_t index)
{
	slots[slots[index].prev].next = slots[index].next;
	slots[slots[index].next].prev = slots[index].prev;
}

static void put_before(uint32_t index, uint32_t next)
{
	slots[index].prev = slots[next].prev;
	slots[index].next = next;
	slots[slots[index].prev].next = index;
	slots[next].prev = index;
}

static void drop(uint32_t index)
{
	wasted += slots[index].is_ahead;
	slots[index].is_ahead = false;
}

/* The page has its slot, which is the last to give way. */
static uint32_t take(uint64_t page)
{
	uint32_t index = slot_of[page];

	if (index == NONE) {
		index = slots[slot_count].next;
		drop(index);
		if (slots[index].has_page)
			slot_of[slots[index].page] = NONE;
		slots[index].page = page;
		slots[index].has_page = true;
		slot_of[page] = index;
	}
	unlink_slot(index);
	put_before(index, slot_count);
	return index;
}

static void fetch(const struct prefetch *prefetch)
{
	for (uint32_t turn = 0; turn < prefetch->times; turn++) {
		uint64_t first = prefetch->first + (uint64_t)(prefetch->step * (int64_t)turn);
		bool goes_on = false;

		for (uint64_t page = first; page < first + prefetch->count; page++) {
			bool is_there = slot_of[page] != NONE;

			if (!is_there)
				slots[take(page)].is_ahead = true;
			fetched += !is_there;
			fetches += !is_there && !goes_on;
			goes_on = !is_there;
		}
	}
}

/* Returns whether all of the pages were there. */
static bool read_pages(uint64_t page, uint64_t end)
{
	bool all = true;

	for (; page < end; page++) {
		uint32_t index = slot_of[page];

		all &= index != NONE;
		if (index == NONE)
			continue; /* it goes to the reader, and gets no slot */
		used += slots[index].is_ahead;
		slots[index].is_ahead = false;
		unlink_slot(index);
		put_before(index, slots[slot_count].next);
	}
	return all;
}

static void begin(uint32_t window)
{
	slots = calloc(slot_count + 1, sizeof(*slots));
	slot_of = malloc(PAGES_MAX * sizeof(*slot_of));
	if (slots == NULL || slot_of == NULL || window == 0 || slot_count == 0)
		exit(64);
	for (uint64_t page = 0; page < PAGES_MAX; page++)
		slot_of[page] = NONE;
	slots[slot_count].prev = slots[slot_count].next = slot_count;
	for (uint32_t index = 0; index < slot_count; index++)
		put_before(index, slot_count);
}

int main(int argc, char **argv)
{
	static struct streams streams;
	uint64_t page, count, reads = 0, waiting = 0;
	struct prefetch prefetch;
	double seconds;
	char kind;
	int fields;

	if (argc != 3) {
		fputs("usage: read_ahead SLOTS WINDOW_PAGES, with a trace on stdin\n", stderr);
		return 64;
	}
	slot_count = (uint32_t)atoi(argv[1]);
	begin((uint32_t)atoi(argv[2]));
	streams_init(&streams, (uint32_t)atoi(argv[2]));
	while ((fields = scanf("%lf %c %" SCNu64 " %" SCNu64, &seconds, &kind, &page, &count)) == 4) {
		if (count == 0 || count > PAGES_MAX || page > PAGES_MAX - count)
			return 65;
		if (kind == 'W') {
			for (uint64_t at = page; at < page + count; at++)
				drop(take(at));
			continue;
		}
		reads++;
		waiting += !read_pages(page, page + count);
		used_in_all += used;
		wasted_in_all += wasted;
		streams_judge(&streams, used, wasted);
		used = wasted = 0;
		if (streams_note(&streams, page, (uint32_t)count, PAGES_MAX, &prefetch))
			fetch(&prefetch);
	}
	if (fields != EOF)
		return 65; /* not a line of a trace */
	printf("{\"reads\": %" PRIu64 ", \"waiting\": %" PRIu64 ", \"fetched\": %" PRIu64 ", \"fetches\": %" PRIu64
	       ", \"used\": %" PRIu64 ", \"wasted\": %" PRIu64 "}\n",
	       reads, waiting, fetched, fetches, used_in_all, wasted_in_all);
	return 0;
}
