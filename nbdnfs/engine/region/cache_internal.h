/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of the cache share; nothing else includes it. cache.h has the contract. Each part calls those above it
 * only.
 *
 * page_set.[ch]  sets of pages, which find their next member quickly
 * slots.c        lists, hash, and the life of a slot: the one place where its state changes
 * cache.c        create and destroy, read, write and trim
 * runs.c         writing back: holds, runs of pages, COMMITs
 * fetches.c      reading ahead
 *
 * No function walks all slots or all pages of the device, but cache_create(). Those of COMMIT walk the slots that wait
 * for one, those of holds the slots that are held.
 */
#ifndef NBDNFS_CACHE_INTERNAL_H
#define NBDNFS_CACHE_INTERNAL_H

#include "base/assert.h"
#include "region/cache.h"
#include "region/page_set.h"
#include "region/proof.h"

#include <string.h>

/*
 * The list that a slot is on. CLEAN are in the order in which they give way, DIRTY and UNCOMMITTED begin with the
 * oldest. HELD are the dirty ones that a hold of their page keeps from being taken. A slot that is being written or
 * fetched is on none.
 */
enum list_name { ON_NONE, ON_FREE, ON_CLEAN, ON_DIRTY, ON_HELD, ON_UNCOMMITTED, LIST_COUNT };

/*
 * A write that the NAS may not have stably, by its sequence number. All of them are on one list, in their order: its
 * head answers whether everything up to a number is stable. They are added at its end, and never move.
 */
struct unstable_write {
	uint64_t sequence;      /* 0: it is not on the list */
	uint32_t prev, next;    /* as slot_write() takes them */
};

struct slot {
	uint32_t prev, next;    /* of its list */
	uint32_t hash_next;
	uint8_t list;           /* enum list_name */
	bool hashed;            /* slot_find() finds it */
	bool writing;           /* a copy of it is on its way to the NAS */
	bool fetching;
	bool read_ahead;        /* fetched, and not read yet */
	bool was_read;          /* since it was written */
	bool in_commit;         /* the COMMIT in flight covers it */
	bool overtaken;         /* written again before the NAS had the oldest write stably */
	uint8_t oldest;         /* which of `writes` is since_of() */
	uint64_t page;
	union {
		uint64_t fetch;    /* which fetch, while fetching */
		uint64_t verifier; /* while UNCOMMITTED */
	};
	struct unstable_write writes[2];
};

/* The oldest write that the NAS may not have stably, 0: none. */
static inline uint64_t since_of(const struct slot *slot)
{
	return slot->writes[slot->oldest].sequence;
}

/* The oldest write since `writing` made its copy, 0: none. */
static inline uint64_t rewritten_of(const struct slot *slot)
{
	return slot->writes[!slot->oldest].sequence;
}

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
	uint32_t oldest_write, newest_write; /* of the list of unstable writes; NO_SLOT: it is empty */
	uint32_t writing_count;
	bool changed;           /* since cache_take_changed() */
	uint64_t sequence;
	uint32_t wasted, used;
	struct page_set known;  /* the pages that cache_known_page() finds */
	uint64_t proof_of_zeros;
	struct page_set filled_words; /* those words of the region's bitmap that are not 0 */
	uint64_t filled_count;  /* the pages that it has */
	struct hold holds[HOLDS];
	unsigned hold_count;
	uint64_t all_held_until; /* all pages are held, 0: only those of `holds` */
};

static inline uint8_t *data_of(const struct cache *cache, uint32_t index)
{
	assert(index < cache->region->slot_count);
	return cache->region->data + (size_t)index * SLOT_BYTES;
}

static inline bool is_filled(const struct cache *cache, uint64_t page)
{
	assert(page < cache->region->page_count);
	return atomic_load_explicit(&cache->region->filled[page / 64], memory_order_relaxed) >> (page % 64) & 1;
}

/* Of the page table: the page's proof, or the word that it repeats where it is filled. */
static inline uint64_t entry_of(const struct cache *cache, uint64_t page)
{
	assert(page < cache->region->page_count);
	return region_entry(cache->region, page);
}

static inline void set_filled(struct cache *cache, uint64_t page, bool filled)
{
	uint64_t bit = (uint64_t)1 << (page % 64);
	_Atomic uint64_t *word = &cache->region->filled[page / 64];
	uint64_t before;

	assert(page < cache->region->page_count);
	if (filled)
		before = atomic_fetch_or_explicit(word, bit, memory_order_release);
	else
		before = atomic_fetch_and_explicit(word, ~bit, memory_order_release);
	if (((before & bit) != 0) != filled)
		cache->filled_count += filled ? 1 : (uint64_t)-1;
	page_set_put(&cache->filled_words, page / 64, atomic_load_explicit(word, memory_order_relaxed) != 0);
}

static inline void set_entry(struct cache *cache, uint64_t page, uint64_t entry)
{
	assert(page < cache->region->page_count);
	region_set_entry(cache->region, page, entry);
}

/* An unstable write by its number on the list: twice its slot's, and one more for the second of a slot. */
static inline struct unstable_write *slot_write(const struct cache *cache, uint32_t number)
{
	return &cache->slots[number / 2].writes[number % 2];
}

/* The proof of what was last written to the page. */
static inline uint64_t known_proof(const struct cache *cache, uint64_t page)
{
	return is_filled(cache, page) ? NO_PROOF : entry_of(cache, page);
}

/* Is it known what the NAS has of the page, and does that tell the file from others? A new file is zeros, too. */
static inline bool tells_the_file(const struct cache *cache, uint64_t page)
{
	uint64_t proof = known_proof(cache, page);

	return proof != NO_PROOF && (proof != cache->proof_of_zeros || proof_is_sealed(cache->region, page));
}

static inline void fill(uint8_t *data, uint32_t word)
{
	for (size_t at = 0; at < SLOT_BYTES; at += 4)
		memcpy(data + at, &word, 4);
}

/*
 * slots.c. An index is a slot's; NO_SLOT where there is none. Each of these changes leaves `cache->changed` set where
 * it may end a wait: a slot is free or clean, a write is not unstable any more, or a fetch has ended.
 */

uint32_t slot_find(const struct cache *cache, uint64_t page);
/* For cache_create(): the slot holds nothing, and is on no list. */
void slot_init_free(struct cache *cache, uint32_t index);
/* For cache_create(): the slot holds this page, and is on no list. slot_became_dirty() comes next. */
void slot_init_page(struct cache *cache, uint32_t index, uint64_t page);
/* A slot for `page`, on no list: a free one, or the first of the clean ones (list_clean() of slots.c). */
uint32_t slot_take(struct cache *cache, uint64_t page);
/* The bytes of a clean slot are about to be replaced. */
void slot_overwrite(struct cache *cache, uint32_t index);
/* The page of a slot was read. */
void slot_used(struct cache *cache, uint32_t index);
/* Write number cache->sequence has changed the slot's bytes. */
void slot_became_dirty(struct cache *cache, uint32_t index);
/* Its page is not wanted any more: the slot is free, or will be when its write-back ends. */
void slot_forget(struct cache *cache, uint32_t index);

/* It is dirty, and a copy of its bytes goes to the NAS. */
void slot_begin_write(struct cache *cache, uint32_t index);
/* That write-back has ended. `verifier` is for WRITE_UNCOMMITTED. */
enum write_end { WRITE_STABLE, WRITE_UNCOMMITTED, WRITE_FAILED };
void slot_end_write(struct cache *cache, uint32_t index, enum write_end end, uint64_t verifier);
/* The COMMIT that covers it was successful, with its verifier or with another one. */
void slot_committed(struct cache *cache, uint32_t index);
void slot_lost(struct cache *cache, uint32_t index);
/* Its page is held now, or is not any more. */
void slot_hold(struct cache *cache, uint32_t index);
void slot_unhold(struct cache *cache, uint32_t index);

/* A slot just taken waits for fetch number `fetch`. */
void slot_begin_fetch(struct cache *cache, uint32_t index, uint64_t fetch);
/* With `has_bytes`, what was fetched is in the slot and is right; without, its page has no slot any more. */
void slot_end_fetch(struct cache *cache, uint32_t index, bool has_bytes);

#endif
