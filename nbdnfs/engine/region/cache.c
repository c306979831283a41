/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Create and destroy, and what requests ask of the cache. */
#include "region/cache_internal.h"

#include <stdlib.h>

#include "base/crc32c.h"

/* The table has 0 for "unknown": a page whose checksum happens to be 0 is not checked. */
uint32_t cache_checksum(const struct cache *cache, uint64_t page)
{
	return is_filled(cache, page) ? 0 : word_of(cache, page);
}

bool cache_known_page(const struct cache *cache, uint64_t from, uint64_t *page, uint32_t *crc)
{
	uint64_t count = cache->region->page_count;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t candidate = (from + i) % count;
		uint32_t index;

		*crc = cache_checksum(cache, candidate);
		if (*crc == 0)
			continue;
		index = slot_find(cache, candidate);
		if (index != NO_SLOT && cache->slots[index].list != ON_CLEAN)
			continue;
		*page = candidate;
		return true;
	}
	return false;
}

static bool is_one_word(const uint8_t *data)
{
	return memcmp(data, data + 4, PAGE_BYTES - 4) == 0;
}

struct cache *cache_create(struct region *region)
{
	struct cache *cache = calloc(1, sizeof(*cache));
	uint32_t buckets = 1;

	while (buckets < region->slot_count * 2)
		buckets *= 2;
	if (cache == NULL)
		return NULL;
	cache->region = region;
	cache->bucket_mask = buckets - 1;
	cache->slots = calloc(region->slot_count, sizeof(*cache->slots));
	cache->buckets = malloc(buckets * sizeof(*cache->buckets));
	if (cache->slots == NULL || cache->buckets == NULL) {
		cache_destroy(cache);
		return NULL;
	}
	memset(cache->buckets, 0xff, buckets * sizeof(*cache->buckets));
	for (int name = 0; name < LIST_COUNT; name++)
		cache->lists[name].head = cache->lists[name].tail = NO_SLOT;
	for (uint32_t index = 0; index < region->slot_count; index++) {
		uint64_t value = atomic_load(&region->slots[index]);
		uint64_t page = slot_page(value);

		/* clean slots are dropped: the worker may have been killed while it reused one */
		if (slot_content(value) != SLOT_DIRTY || page >= region->page_count ||
		    slot_find(cache, page) != NO_SLOT) {
			slot_publish(cache, index, SLOT_FREE);
			slot_list_add(cache, ON_FREE, index);
			continue;
		}
		/* the slot is right: the worker may have been killed before it set these */
		set_filled(cache, page, false);
		set_word(cache, page, crc32c(data_of(cache, index), PAGE_BYTES));
		cache->sequence++;
		slot_hash_add(cache, index, page);
		slot_became_dirty(cache, index);
	}
	return cache;
}

void cache_destroy(struct cache *cache)
{
	free(cache->slots);
	free(cache->buckets);
	free(cache);
}

/* False when a page was trimmed while it is being written: the slot only waits for the end of that. */
static bool has_bytes(const struct slot *slot)
{
	return slot->list == ON_CLEAN || slot->since != 0 || slot->rewritten != 0;
}

enum cache_lookup cache_read(struct cache *cache, uint64_t page, uint8_t *data)
{
	uint32_t index = slot_find(cache, page);
	struct slot *slot = index != NO_SLOT ? &cache->slots[index] : NULL;

	if (slot != NULL && slot->fetching)
		return CACHE_WAIT;
	if (slot != NULL && has_bytes(slot)) {
		memcpy(data, data_of(cache, index), PAGE_BYTES);
		if (slot->read_ahead)
			cache->used++;
		slot->read_ahead = false;
		if (slot->list == ON_CLEAN)
			slot_list_move(cache, ON_CLEAN, index); /* to the end: last used */
		return CACHE_HIT;
	}
	if (is_filled(cache, page)) {
		fill(data, word_of(cache, page));
		return CACHE_HIT;
	}
	return CACHE_MISS;
}

/* Take the page off its slot, if it has one; a write-back keeps the slot until it ends. */
static void forget(struct cache *cache, uint64_t page)
{
	uint32_t index = slot_find(cache, page);

	if (index == NO_SLOT)
		return;
	struct slot *slot = &cache->slots[index];

	slot->fetching = false;
	slot->in_commit = false;
	slot->rewritten = 0;
	slot->since = 0;
	if (slot->writing) {
		slot_publish(cache, index, SLOT_FREE);
		slot_list_move(cache, ON_NONE, index);
	} else {
		slot_release(cache, index);
	}
}

/* Put bytes into the page's slot, or a new one. Returns false when there is none. */
static bool store(struct cache *cache, uint64_t page, const uint8_t *data, uint32_t crc)
{
	uint32_t index = slot_find(cache, page);

	if (index == NO_SLOT) {
		index = slot_take(cache, page);
		if (index == NO_SLOT)
			return false;
	} else if (cache->slots[index].list == ON_CLEAN) {
		slot_publish(cache, index, SLOT_FREE); /* if killed while copying: the NAS has the old bytes */
	}
	cache->slots[index].fetching = false;
	memcpy(data_of(cache, index), data, PAGE_BYTES);
	slot_became_dirty(cache, index);
	/* if killed here: the slot is right, see cache_create() */
	set_filled(cache, page, false);
	set_word(cache, page, crc);
	return true;
}

enum cache_store cache_write(struct cache *cache, uint64_t page, const uint8_t *data, uint32_t crc, bool may_fill)
{
	uint32_t word;

	cache->sequence++;
	if (!may_fill || !is_one_word(data))
		return store(cache, page, data, crc) ? CACHE_STORED : CACHE_FULL;
	memcpy(&word, data, sizeof(word));
	/* if killed after the first of these: the page on the NAS does not match, which is EIO, not wrong bytes */
	set_word(cache, page, word);
	set_filled(cache, page, true);
	forget(cache, page);
	return CACHE_FILLED;
}

void cache_trim(struct cache *cache, uint64_t page)
{
	set_word(cache, page, 0);
	set_filled(cache, page, false);
	forget(cache, page);
}

uint64_t cache_sequence(const struct cache *cache)
{
	return cache->sequence;
}

static bool slot_is_stable(const struct slot *slot, uint64_t sequence)
{
	return (slot->since == 0 || slot->since > sequence) && (slot->rewritten == 0 || slot->rewritten > sequence);
}

bool cache_is_stable(const struct cache *cache, uint64_t sequence)
{
	for (uint32_t index = 0; index < cache->region->slot_count; index++)
		if (!slot_is_stable(&cache->slots[index], sequence))
			return false;
	return true;
}

bool cache_page_is_stable(const struct cache *cache, uint64_t page, uint64_t sequence)
{
	uint32_t index = slot_find(cache, page);

	return index == NO_SLOT || slot_is_stable(&cache->slots[index], sequence);
}

bool cache_materialise(struct cache *cache, uint64_t *page)
{
	uint8_t data[PAGE_BYTES];

	for (; *page < cache->region->page_count; (*page)++) {
		if (*page % 64 == 0 &&
		    atomic_load_explicit(&cache->region->filled[*page / 64], memory_order_relaxed) == 0) {
			*page += 63;
			continue;
		}
		if (!is_filled(cache, *page))
			continue;
		fill(data, word_of(cache, *page));
		cache->sequence++;
		if (!store(cache, *page, data, crc32c(data, PAGE_BYTES)))
			return false;
	}
	return true;
}
