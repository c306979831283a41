/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Create and destroy, and what requests ask of the cache. */
#include "region/cache_internal.h"

#include <stdlib.h>

uint64_t cache_proof(const struct cache *cache, uint64_t page)
{
	return known_proof(cache, page);
}

bool cache_known_page(const struct cache *cache, uint64_t from, uint64_t *page, uint64_t *proof)
{
	if (!page_set_next(&cache->known, from, page) && !page_set_next(&cache->known, 0, page))
		return false;
	*proof = known_proof(cache, *page);
	assert(*proof != NO_PROOF);
	return true;
}

static bool is_one_word(const uint8_t *data)
{
	return memcmp(data, data + 4, SLOT_BYTES - 4) == 0;
}

/* What can be computed from the region is kept beside it. All of its pages are looked at this once. */
static bool make_sets(struct cache *cache)
{
	uint64_t pages = cache->region->page_count, words = (pages + 63) / 64;

	if (!page_set_init(&cache->known, pages) || !page_set_init(&cache->filled_words, words))
		return false;
	for (uint64_t word = 0; word < words; word++) {
		uint64_t bits = atomic_load_explicit(&cache->region->filled[word], memory_order_relaxed);

		cache->filled_count += (uint64_t)__builtin_popcountll(bits);
		if (bits != 0)
			page_set_put(&cache->filled_words, word, true);
	}
	for (uint64_t page = 0; page < pages; page++)
		if (tells_the_file(cache, page))
			page_set_put(&cache->known, page, true);
	return true;
}

/* The last worker's slots. Clean ones are dropped: the worker may have been killed while it reused one. */
static void take_over_slots(struct cache *cache)
{
	struct region *region = cache->region;

	for (uint32_t index = 0; index < region->slot_count; index++) {
		uint64_t value = atomic_load(&region->slots[index]);
		uint64_t page = slot_page(value);

		if (slot_content(value) != SLOT_DIRTY || page >= region->page_count ||
		    slot_find(cache, page) != NO_SLOT) {
			slot_init_free(cache, index);
			continue;
		}
		/* the slot is right: the worker may have been killed before it set these */
		set_filled(cache, page, false);
		set_entry(cache, page, proof_of(region, data_of(cache, index)));
		cache->sequence++;
		slot_init_page(cache, index, page);
		slot_became_dirty(cache, index);
	}
}

struct cache *cache_create(struct region *region)
{
	static const uint8_t zeros[SLOT_BYTES];
	struct cache *cache = calloc(1, sizeof(*cache));
	uint32_t buckets = 1;

	assert(region->slot_count <= REGION_SLOTS_MAX && region->page_count > 0);
	while (buckets < region->slot_count * 2)
		buckets *= 2;
	if (cache == NULL)
		return NULL;
	cache->region = region;
	cache->proof_of_zeros = proof_of(region, zeros);
	cache->bucket_mask = buckets - 1;
	cache->slots = calloc(region->slot_count, sizeof(*cache->slots));
	cache->buckets = malloc(buckets * sizeof(*cache->buckets));
	if (cache->slots == NULL || cache->buckets == NULL || !make_sets(cache)) {
		cache_destroy(cache);
		return NULL;
	}
	memset(cache->buckets, 0xff, buckets * sizeof(*cache->buckets));
	for (int name = 0; name < LIST_COUNT; name++)
		cache->lists[name].head = cache->lists[name].tail = NO_SLOT;
	cache->oldest_write = cache->newest_write = NO_SLOT;
	take_over_slots(cache);
	return cache;
}

void cache_destroy(struct cache *cache)
{
	page_set_deinit(&cache->known);
	page_set_deinit(&cache->filled_words);
	free(cache->slots);
	free(cache->buckets);
	free(cache);
}

bool cache_take_changed(struct cache *cache)
{
	bool changed = cache->changed;

	cache->changed = false;
	return changed;
}

/* False when a page was trimmed while it is being written: the slot only waits for the end of that. */
static bool has_bytes(const struct slot *slot)
{
	return slot->list == ON_CLEAN || since_of(slot) != 0 || rewritten_of(slot) != 0;
}

enum cache_lookup cache_read(struct cache *cache, uint64_t page, uint8_t *data)
{
	uint32_t index = slot_find(cache, page);
	struct slot *slot = index != NO_SLOT ? &cache->slots[index] : NULL;

	if (slot != NULL && slot->fetching)
		return CACHE_WAIT;
	if (slot != NULL && has_bytes(slot)) {
		memcpy(data, data_of(cache, index), SLOT_BYTES);
		slot_used(cache, index);
		return CACHE_HIT;
	}
	if (is_filled(cache, page)) {
		fill(data, (uint32_t)entry_of(cache, page));
		return CACHE_HIT;
	}
	return CACHE_MISS;
}

/* The page is not in a slot any more, or is not read from there: a write-back keeps the slot until it ends. */
static void forget(struct cache *cache, uint64_t page)
{
	uint32_t index = slot_find(cache, page);

	page_set_put(&cache->known, page, false);
	if (index != NO_SLOT)
		slot_forget(cache, index);
}

/* Put bytes into the page's slot, or a new one. Returns false when there is none. */
static bool store(struct cache *cache, uint64_t page, const uint8_t *data, uint64_t proof)
{
	uint32_t index = slot_find(cache, page);

	if (index == NO_SLOT) {
		index = slot_take(cache, page);
		if (index == NO_SLOT)
			return false;
	} else {
		slot_overwrite(cache, index);
	}
	memcpy(data_of(cache, index), data, SLOT_BYTES);
	slot_became_dirty(cache, index);
	/* if killed here: the slot is right, see cache_create() */
	set_filled(cache, page, false);
	set_entry(cache, page, proof);
	return true;
}

enum cache_store cache_write(struct cache *cache, uint64_t page, const uint8_t *data, uint64_t proof, bool may_fill)
{
	uint32_t word;

	cache->sequence++;
	if (!may_fill || !is_one_word(data))
		return store(cache, page, data, proof) ? CACHE_STORED : CACHE_FULL;
	memcpy(&word, data, sizeof(word));
	/* if killed after the first of these: the page on the NAS does not match, which is EIO, not wrong bytes */
	set_entry(cache, page, word);
	set_filled(cache, page, true);
	forget(cache, page);
	return CACHE_FILLED;
}

void cache_trim(struct cache *cache, uint64_t page)
{
	set_entry(cache, page, NO_PROOF);
	set_filled(cache, page, false);
	forget(cache, page);
}

uint64_t cache_sequence(const struct cache *cache)
{
	return cache->sequence;
}

bool cache_is_stable(const struct cache *cache, uint64_t sequence)
{
	uint32_t oldest = cache->oldest_write;

	return oldest == NO_SLOT || slot_write(cache, oldest)->sequence > sequence;
}

bool cache_page_is_stable(const struct cache *cache, uint64_t page, uint64_t sequence)
{
	uint32_t index = slot_find(cache, page);

	if (index == NO_SLOT)
		return true;
	const struct slot *slot = &cache->slots[index];

	return (since_of(slot) == 0 || since_of(slot) > sequence) &&
	       (rewritten_of(slot) == 0 || rewritten_of(slot) > sequence);
}

uint64_t cache_filled_count(const struct cache *cache)
{
	return cache->filled_count;
}

enum cache_materialise cache_materialise(struct cache *cache, uint64_t *page, uint32_t most)
{
	uint64_t word;
	uint8_t data[SLOT_BYTES];

	for (uint32_t done = 0; page_set_next(&cache->filled_words, *page / 64, &word);) {
		uint64_t first = word > *page / 64 ? word * 64 : *page;
		uint64_t bits = atomic_load_explicit(&cache->region->filled[word], memory_order_relaxed);

		bits >>= first % 64;
		if (bits == 0) {
			*page = (word + 1) * 64;
			continue;
		}
		*page = first + (uint64_t)__builtin_ctzll(bits);
		if (done++ == most)
			return CACHE_MORE;
		fill(data, (uint32_t)entry_of(cache, *page));
		cache->sequence++;
		if (!store(cache, *page, data, proof_of(cache->region, data)))
			return CACHE_NO_SLOT;
	}
	return CACHE_MATERIALISED;
}
