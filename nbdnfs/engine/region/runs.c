/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing back: which pages may travel, which travel together, and what their slots are afterwards. */
#include "region/cache_internal.h"

void cache_hold(struct cache *cache, uint64_t first_page, uint64_t count, uint64_t until)
{
	struct hold *hold = &cache->holds[cache->hold_count];

	if (cache->hold_count < HOLDS) {
		cache->hold_count++;
	} else {
		hold = &cache->holds[0];
		first_page = 0;
		count = cache->region->page_count;
		for (unsigned i = 0; i < HOLDS; i++)
			if (cache->holds[i].until > until)
				until = cache->holds[i].until;
	}
	*hold = (struct hold){ first_page, count, until };
}

bool cache_end_holds(struct cache *cache, uint64_t now)
{
	for (unsigned i = 0; i < cache->hold_count;)
		if (cache->holds[i].until <= now)
			cache->holds[i] = cache->holds[--cache->hold_count];
		else
			i++;
	return cache->hold_count > 0;
}

static bool is_held(const struct cache *cache, uint64_t page)
{
	for (unsigned i = 0; i < cache->hold_count; i++)
		if (page - cache->holds[i].first_page < cache->holds[i].count)
			return true;
	return false;
}

/* The slot of the oldest dirty page that is not held; NO_SLOT when there is none. */
static uint32_t oldest_takable(const struct cache *cache)
{
	uint32_t index = cache->lists[ON_DIRTY].head;

	while (index != NO_SLOT && is_held(cache, cache->slots[index].page))
		index = cache->slots[index].next;
	return index;
}

static bool is_takable(const struct cache *cache, uint64_t page)
{
	uint32_t index = slot_find(cache, page);

	return index != NO_SLOT && cache->slots[index].list == ON_DIRTY && !is_held(cache, page);
}

/* The run around the oldest dirty page that is not held. Returns its length and *first, 0 when there is none. */
static uint32_t find_run(const struct cache *cache, uint32_t most, uint64_t *first)
{
	uint32_t oldest = oldest_takable(cache), count = 1;

	if (oldest == NO_SLOT)
		return 0;
	*first = cache->slots[oldest].page;
	while (count < most && *first > 0 && is_takable(cache, *first - 1)) {
		--*first;
		count++;
	}
	while (count < most && is_takable(cache, *first + count))
		count++;
	return count;
}

uint32_t cache_next_page_run(const struct cache *cache, uint32_t most)
{
	uint64_t first;

	return find_run(cache, most, &first);
}

bool cache_take_page_run(struct cache *cache, uint32_t most, struct page_run *run, uint8_t *data)
{
	assert(most <= RUN_PAGES_MAX);
	run->count = find_run(cache, most, &run->first_page);
	if (run->count == 0)
		return false;
	for (uint32_t i = 0; i < run->count; i++) {
		uint32_t index = slot_find(cache, run->first_page + i);

		assert(index != NO_SLOT && cache->slots[index].list == ON_DIRTY && !cache->slots[index].writing);
		slot_list_drop(cache, index);
		cache->slots[index].writing = true;
		cache->slots[index].rewritten = 0;
		memcpy(data + (size_t)i * PAGE_BYTES, data_of(cache, index), PAGE_BYTES);
		run->slots[i] = index;
	}
	cache->writing_count += run->count;
	return true;
}

/*
 * The write-back of a slot has ended. Returns true when the page was neither written nor trimmed meanwhile: the caller
 * gives the slot its next state.
 */
static bool came_back(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	assert(index < cache->region->slot_count && slot->writing && cache->writing_count > 0);
	slot->writing = false;
	cache->writing_count--;
	if (slot->rewritten != 0) {
		slot->since = slot->rewritten;
		slot->rewritten = 0;
		slot_list_move(cache, ON_DIRTY, index);
		return false;
	}
	if (slot->since == 0) {
		slot_release(cache, index);
		return false;
	}
	return true;
}

void cache_page_run_stable(struct cache *cache, const struct page_run *run)
{
	for (uint32_t i = 0; i < run->count; i++)
		if (came_back(cache, run->slots[i]))
			slot_became_clean(cache, run->slots[i]);
}

void cache_page_run_uncommitted(struct cache *cache, const struct page_run *run, uint64_t verifier)
{
	for (uint32_t i = 0; i < run->count; i++) {
		if (!came_back(cache, run->slots[i]))
			continue;
		cache->slots[run->slots[i]].verifier = verifier;
		slot_list_add(cache, ON_UNCOMMITTED, run->slots[i]);
	}
}

void cache_page_run_failed(struct cache *cache, const struct page_run *run)
{
	for (uint32_t i = 0; i < run->count; i++) {
		struct slot *slot = &cache->slots[run->slots[i]];
		uint64_t since = slot->since;

		if (came_back(cache, run->slots[i]))
			slot_list_add(cache, ON_DIRTY, run->slots[i]);
		else if (since != 0 && slot->list == ON_DIRTY)
			slot->since = since; /* the NAS does not have the older write either */
	}
}

uint32_t cache_commit_begin(struct cache *cache)
{
	for (uint32_t index = cache->lists[ON_UNCOMMITTED].head; index != NO_SLOT; index = cache->slots[index].next)
		cache->slots[index].in_commit = true;
	return cache->lists[ON_UNCOMMITTED].count;
}

uint32_t cache_commit_done(struct cache *cache, uint64_t verifier)
{
	uint32_t rewrite = 0, next;

	for (uint32_t index = cache->lists[ON_UNCOMMITTED].head; index != NO_SLOT; index = next) {
		struct slot *slot = &cache->slots[index];

		next = slot->next;
		if (!slot->in_commit)
			continue;
		if (slot->verifier == verifier) {
			slot_became_clean(cache, index);
		} else {
			slot->in_commit = false;
			slot_list_move(cache, ON_DIRTY, index);
			rewrite++;
		}
	}
	return rewrite;
}

void cache_commit_failed(struct cache *cache)
{
	for (uint32_t index = cache->lists[ON_UNCOMMITTED].head; index != NO_SLOT; index = cache->slots[index].next)
		cache->slots[index].in_commit = false;
}

uint64_t cache_oldest_dirty(const struct cache *cache)
{
	uint32_t index = oldest_takable(cache);

	return index == NO_SLOT ? 0 : cache->slots[index].since;
}

uint32_t cache_dirty_count(const struct cache *cache)
{
	return cache->lists[ON_DIRTY].count;
}

uint32_t cache_uncommitted_count(const struct cache *cache)
{
	return cache->lists[ON_UNCOMMITTED].count;
}

uint32_t cache_unstable_count(const struct cache *cache)
{
	return cache->lists[ON_DIRTY].count + cache->lists[ON_UNCOMMITTED].count + cache->writing_count;
}
