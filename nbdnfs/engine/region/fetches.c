/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading ahead: slots for pages that are being fetched. */
#include "region/cache_internal.h"

uint32_t cache_fetch_begin(struct cache *cache, uint64_t first_page, uint32_t count, uint64_t fetch, uint64_t *proofs)
{
	uint32_t taken;

	for (taken = 0; taken < count; taken++) {
		uint64_t page = first_page + taken;
		uint32_t index;

		if (page >= cache->region->page_count || slot_find(cache, page) != NO_SLOT || is_filled(cache, page))
			break;
		index = slot_take(cache, page);
		if (index == NO_SLOT)
			break;
		slot_begin_fetch(cache, index, fetch);
		proofs[taken] = known_proof(cache, page);
	}
	return taken;
}

void cache_fetch_done(struct cache *cache, uint64_t first_page, uint32_t count, uint64_t fetch, const uint8_t *data,
		      const bool *are_right)
{
	for (uint32_t i = 0; i < count; i++) {
		uint32_t index = slot_find(cache, first_page + i);
		bool is_right = data != NULL && are_right[i];

		if (index == NO_SLOT || !cache->slots[index].fetching || cache->slots[index].fetch != fetch)
			continue; /* written or trimmed meanwhile */
		if (is_right)
			memcpy(data_of(cache, index), data + (size_t)i * SLOT_BYTES, SLOT_BYTES);
		slot_end_fetch(cache, index, is_right);
	}
}

static uint32_t take_count(uint32_t *counter)
{
	uint32_t taken = *counter;

	*counter = 0;
	return taken;
}

uint32_t cache_take_wasted(struct cache *cache)
{
	return take_count(&cache->wasted);
}

uint32_t cache_take_used(struct cache *cache)
{
	return take_count(&cache->used);
}
