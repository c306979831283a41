/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing back: which pages may travel, which travel together, and what their slots are afterwards. */
#include "region/cache_internal.h"

static void hold_all(struct cache *cache, uint64_t until)
{
	if (until > cache->all_held_until)
		cache->all_held_until = until;
}

void cache_hold(struct cache *cache, uint64_t first_page, uint64_t count, uint64_t until)
{
	if (first_page == 0 && count >= cache->region->page_count) {
		hold_all(cache, until);
		return;
	}
	if (cache->hold_count == HOLDS) {
		for (unsigned i = 0; i < HOLDS; i++)
			hold_all(cache, cache->holds[i].until);
		hold_all(cache, until);
		return;
	}
	cache->holds[cache->hold_count++] = (struct hold){ first_page, count, until };
	if (count > cache->lists[ON_DIRTY].count) {
		for (uint32_t index = cache->lists[ON_DIRTY].head, next; index != NO_SLOT; index = next) {
			next = cache->slots[index].next;
			if (cache->slots[index].page - first_page < count)
				slot_hold(cache, index);
		}
		return;
	}
	for (uint64_t i = 0; i < count; i++) {
		uint32_t index = slot_find(cache, first_page + i);

		if (index != NO_SLOT)
			slot_hold(cache, index);
	}
}

bool cache_end_holds(struct cache *cache, uint64_t now)
{
	bool some_ended = false;

	if (cache->all_held_until <= now)
		cache->all_held_until = 0;
	for (unsigned i = 0; i < cache->hold_count;)
		if (cache->holds[i].until <= now) {
			cache->holds[i] = cache->holds[--cache->hold_count];
			some_ended = true;
		} else {
			i++;
		}
	if (some_ended) /* the youngest first, each before the one that is older */
		for (uint32_t index = cache->lists[ON_HELD].tail, prev; index != NO_SLOT; index = prev) {
			prev = cache->slots[index].prev;
			slot_unhold(cache, index);
		}
	return cache->hold_count > 0 || cache->all_held_until > 0;
}

/* The slot of the oldest dirty page that is not held; NO_SLOT when there is none. */
static uint32_t oldest_takable(const struct cache *cache)
{
	return cache->all_held_until > 0 ? NO_SLOT : cache->lists[ON_DIRTY].head;
}

static bool is_takable(const struct cache *cache, uint64_t page)
{
	uint32_t index = slot_find(cache, page);

	return index != NO_SLOT && cache->slots[index].list == ON_DIRTY;
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
	run->is_overtaken = false;
	for (uint32_t i = 0; i < run->count; i++) {
		uint32_t index = slot_find(cache, run->first_page + i);

		slot_begin_write(cache, index);
		run->is_overtaken |= cache->slots[index].overtaken;
		memcpy(data + (size_t)i * SLOT_BYTES, data_of(cache, index), SLOT_BYTES);
		run->proofs[i] = known_proof(cache, run->first_page + i);
		run->slots[i] = index;
	}
	return true;
}

static void end_run(struct cache *cache, const struct page_run *run, enum write_end end, uint64_t verifier)
{
	for (uint32_t i = 0; i < run->count; i++)
		slot_end_write(cache, run->slots[i], end, verifier);
}

void cache_page_run_stable(struct cache *cache, const struct page_run *run)
{
	end_run(cache, run, WRITE_STABLE, 0);
}

void cache_page_run_uncommitted(struct cache *cache, const struct page_run *run, uint64_t verifier)
{
	end_run(cache, run, WRITE_UNCOMMITTED, verifier);
}

void cache_page_run_failed(struct cache *cache, const struct page_run *run)
{
	end_run(cache, run, WRITE_FAILED, 0);
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
			slot_committed(cache, index);
		} else {
			slot_lost(cache, index);
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

	return index == NO_SLOT ? 0 : since_of(&cache->slots[index]);
}

uint32_t cache_dirty_count(const struct cache *cache)
{
	return cache->lists[ON_DIRTY].count + cache->lists[ON_HELD].count;
}

uint32_t cache_uncommitted_count(const struct cache *cache)
{
	return cache->lists[ON_UNCOMMITTED].count;
}

uint32_t cache_unstable_count(const struct cache *cache)
{
	return cache_dirty_count(cache) + cache->lists[ON_UNCOMMITTED].count + cache->writing_count;
}
