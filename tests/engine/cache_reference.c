/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What cache.h promises, computed by looking at every slot and every page, for test_cache_model.py: the cache itself
 * has lists, sums and sets for the same. With a count of the steps that the cache's own way takes.
 */
#include "region/cache_internal.h"

bool reference_is_stable(const struct cache *cache, uint64_t sequence)
{
	for (uint32_t index = 0; index < cache->region->slot_count; index++) {
		const struct slot *slot = &cache->slots[index];

		if (since_of(slot) != 0 && since_of(slot) <= sequence)
			return false;
		if (rewritten_of(slot) != 0 && rewritten_of(slot) <= sequence)
			return false;
	}
	return true;
}

static bool is_held(const struct cache *cache, uint64_t page)
{
	bool held = cache->all_held_until > 0;

	for (unsigned i = 0; i < cache->hold_count; i++)
		held |= page - cache->holds[i].first_page < cache->holds[i].count;
	return held;
}

static bool is_dirty(const struct slot *slot)
{
	return since_of(slot) != 0 && !slot->writing && slot->list != ON_UNCOMMITTED;
}

/* Whether `since` is that of a dirty page that is not held; 0: whether there is none. */
bool reference_is_takable(const struct cache *cache, uint64_t since)
{
	bool found = false, any = false;

	for (uint32_t index = 0; index < cache->region->slot_count; index++) {
		const struct slot *slot = &cache->slots[index];
		bool is_takable = is_dirty(slot) && !is_held(cache, slot->page);

		any |= is_takable;
		found |= is_takable && since_of(slot) == since;
	}
	return since == 0 ? !any : found;
}

static bool is_known(const struct cache *cache, uint64_t page)
{
	uint32_t index = slot_find(cache, page);
	const struct slot *slot = index != NO_SLOT ? &cache->slots[index] : NULL;

	return tells_the_file(cache, page) && (slot == NULL || slot->list == ON_CLEAN || slot->fetching);
}

/* As cache_known_page(). */
bool reference_known_page(const struct cache *cache, uint64_t from, uint64_t *page)
{
	for (uint64_t i = 0; i < cache->region->page_count; i++) {
		*page = (from + i) % cache->region->page_count;
		if (is_known(cache, *page))
			return true;
	}
	return false;
}

/* The first filled page from `from` on; the number of pages where there is none. */
uint64_t reference_filled_page(const struct cache *cache, uint64_t from)
{
	while (from < cache->region->page_count && !is_filled(cache, from))
		from++;
	return from;
}

bool reference_has_room(const struct cache *cache)
{
	return cache->lists[ON_FREE].count + cache->lists[ON_CLEAN].count > 0;
}

/* The lists, counts and sets agree with the slots. */
bool reference_agrees(const struct cache *cache)
{
	uint32_t counts[LIST_COUNT] = { 0 }, writing = 0, unstable = 0, linked = 0;
	uint64_t last = 0, filled = 0;

	for (uint64_t page = 0; page < cache->region->page_count; page++)
		filled += is_filled(cache, page);
	for (uint32_t index = 0; index < cache->region->slot_count; index++) {
		const struct slot *slot = &cache->slots[index];

		counts[slot->list]++;
		writing += slot->writing;
		unstable += (since_of(slot) != 0) + (rewritten_of(slot) != 0);
		if ((slot->list == ON_DIRTY || slot->list == ON_HELD || slot->list == ON_UNCOMMITTED) !=
		    (since_of(slot) != 0 && !slot->writing))
			return false;
		if (is_dirty(slot) && cache->all_held_until == 0 &&
		    (slot->list == ON_HELD) != is_held(cache, slot->page))
			return false;
		if (rewritten_of(slot) != 0 && (!slot->writing || rewritten_of(slot) < since_of(slot)))
			return false;
	}
	for (int name = ON_FREE; name < LIST_COUNT; name++)
		if (counts[name] != cache->lists[name].count)
			return false;
	for (uint32_t number = cache->oldest_write; number != NO_SLOT; number = slot_write(cache, number)->next) {
		if (slot_write(cache, number)->sequence < last)
			return false;
		last = slot_write(cache, number)->sequence;
		linked++;
	}
	return writing == cache->writing_count && linked == unstable && filled == cache_filled_count(cache);
}
