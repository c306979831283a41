/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of the cache share; nothing else includes it. cache.h has the contract. Each part calls those above it
 * only.
 *
 * slots.c      lists, hash, and the life of a slot
 * cache.c      create and destroy, read, write and trim
 * runs.c       writing back: holds, runs of pages, COMMITs
 * fetches.c    reading ahead
 */
#ifndef NBDNFS_CACHE_INTERNAL_H
#define NBDNFS_CACHE_INTERNAL_H

#include "base/assert.h"
#include "region/cache.h"

#include <string.h>

/*
 * The list that a slot is on. CLEAN is in the order of last use, DIRTY and UNCOMMITTED with the oldest first. A slot
 * that is being written or fetched is on none.
 */
enum list_name { ON_NONE, ON_FREE, ON_CLEAN, ON_DIRTY, ON_UNCOMMITTED, LIST_COUNT };

struct slot {
	uint32_t prev, next;    /* of its list */
	uint32_t hash_next;
	enum list_name list;
	bool hashed;            /* slot_find() finds it */
	bool writing;           /* a copy of it is on its way to the NAS */
	bool fetching;
	bool read_ahead;        /* fetched, and not read yet */
	bool in_commit;         /* the COMMIT in flight covers it */
	uint64_t page;
	uint64_t fetch;         /* which fetch, while fetching */
	uint64_t verifier;      /* while UNCOMMITTED */
	uint64_t since;         /* the oldest write that the NAS may not have stably, 0: none */
	uint64_t rewritten;     /* the oldest write since `writing` made its copy, 0: none */
};

struct list {
	uint32_t head, tail, count;
};

struct hold {
	uint64_t first_page, count, until;
};

struct cache {
	struct region *region;
	struct slot *slots;
	uint32_t *buckets;
	uint32_t bucket_mask;
	struct list lists[LIST_COUNT];
	uint32_t writing_count;
	uint64_t sequence;
	uint32_t wasted, used;
	struct hold holds[HOLDS];
	unsigned hold_count;
};

static inline uint8_t *data_of(const struct cache *cache, uint32_t index)
{
	assert(index < cache->region->slot_count);
	return cache->region->data + (size_t)index * PAGE_BYTES;
}

static inline bool is_filled(const struct cache *cache, uint64_t page)
{
	assert(page < cache->region->page_count);
	return atomic_load_explicit(&cache->region->filled[page / 64], memory_order_relaxed) >> (page % 64) & 1;
}

static inline uint32_t word_of(const struct cache *cache, uint64_t page)
{
	assert(page < cache->region->page_count);
	return atomic_load_explicit(&cache->region->page_table[page], memory_order_relaxed);
}

static inline void set_filled(struct cache *cache, uint64_t page, bool filled)
{
	uint64_t bit = (uint64_t)1 << (page % 64);

	assert(page < cache->region->page_count);
	if (filled)
		atomic_fetch_or_explicit(&cache->region->filled[page / 64], bit, memory_order_release);
	else
		atomic_fetch_and_explicit(&cache->region->filled[page / 64], ~bit, memory_order_release);
}

static inline void set_word(struct cache *cache, uint64_t page, uint32_t word)
{
	assert(page < cache->region->page_count);
	atomic_store_explicit(&cache->region->page_table[page], word, memory_order_release);
}

static inline void fill(uint8_t *data, uint32_t word)
{
	for (size_t at = 0; at < PAGE_BYTES; at += 4)
		memcpy(data + at, &word, 4);
}

/* slots.c. An index is a slot's; NO_SLOT where there is none. */

void slot_list_add(struct cache *cache, enum list_name name, uint32_t index);
void slot_list_drop(struct cache *cache, uint32_t index);
void slot_list_move(struct cache *cache, enum list_name name, uint32_t index);
uint32_t slot_find(const struct cache *cache, uint64_t page);
void slot_hash_add(struct cache *cache, uint32_t index, uint64_t page);
void slot_publish(struct cache *cache, uint32_t index, enum slot_content content);
void slot_release(struct cache *cache, uint32_t index);
uint32_t slot_take(struct cache *cache, uint64_t page);
void slot_became_dirty(struct cache *cache, uint32_t index);
void slot_became_clean(struct cache *cache, uint32_t index);

#endif
