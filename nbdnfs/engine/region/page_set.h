/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * page_set: a set of numbers below a limit, as bits. Above them, each level has a bit for 64 of the level below, so
 * that the next member is found in as many steps as there are levels, however few members there are.
 *
 * All memory is allocated and touched by page_set_init(). No lock: the caller has one.
 */
#ifndef NBDNFS_PAGE_SET_H
#define NBDNFS_PAGE_SET_H

#include <stdbool.h>
#include <stdint.h>

/* 64 to the power of six: more than slot_value() can number. */
#define PAGE_SET_LEVELS 6

struct page_set {
	uint64_t limit;         /* members are below */
	unsigned level_count;
	uint64_t *levels[PAGE_SET_LEVELS]; /* the first has a bit for each number */
	uint64_t *words;        /* of all levels */
};

/* An empty set of numbers below `limit`, which is not 0. Returns false when there is no memory. */
bool page_set_init(struct page_set *set, uint64_t limit);
/* Also of a set that is all zeros. */
void page_set_deinit(struct page_set *set);

void page_set_put(struct page_set *set, uint64_t number, bool is_member);

/* The first member from `from` on. Returns false when there is none. */
bool page_set_next(const struct page_set *set, uint64_t from, uint64_t *member);

#endif
