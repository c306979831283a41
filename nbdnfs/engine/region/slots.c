/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The life of a slot: its list, its place in the hash, and its state in the region. */
#include "region/cache_internal.h"

void slot_list_add(struct cache *cache, enum list_name name, uint32_t index)
{
	struct list *list = &cache->lists[name];
	struct slot *slot = &cache->slots[index];

	assert(index < cache->region->slot_count && slot->list == ON_NONE && name != ON_NONE);
	slot->list = name;
	slot->next = NO_SLOT;
	slot->prev = list->tail;
	if (list->tail != NO_SLOT)
		cache->slots[list->tail].next = index;
	else
		list->head = index;
	list->tail = index;
	list->count++;
}

void slot_list_drop(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];
	struct list *list = &cache->lists[slot->list];

	if (slot->list == ON_NONE)
		return;
	assert(list->count > 0);
	if (slot->prev != NO_SLOT)
		cache->slots[slot->prev].next = slot->next;
	else
		list->head = slot->next;
	if (slot->next != NO_SLOT)
		cache->slots[slot->next].prev = slot->prev;
	else
		list->tail = slot->prev;
	list->count--;
	slot->list = ON_NONE;
}

void slot_list_move(struct cache *cache, enum list_name name, uint32_t index)
{
	slot_list_drop(cache, index);
	if (name != ON_NONE)
		slot_list_add(cache, name, index);
}

static uint32_t *bucket_of(const struct cache *cache, uint64_t page)
{
	return &cache->buckets[(page * 0x9e3779b97f4a7c15u >> 32) & cache->bucket_mask];
}

uint32_t slot_find(const struct cache *cache, uint64_t page)
{
	uint32_t index = *bucket_of(cache, page);

	while (index != NO_SLOT && cache->slots[index].page != page)
		index = cache->slots[index].hash_next;
	return index;
}

void slot_hash_add(struct cache *cache, uint32_t index, uint64_t page)
{
	uint32_t *bucket = bucket_of(cache, page);

	assert(page < cache->region->page_count && !cache->slots[index].hashed);
	cache->slots[index].page = page;
	cache->slots[index].hashed = true;
	cache->slots[index].hash_next = *bucket;
	*bucket = index;
}

static void hash_drop(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];
	uint32_t *at = bucket_of(cache, slot->page);

	if (!slot->hashed)
		return;
	while (*at != index) {
		assert(*at != NO_SLOT);
		at = &cache->slots[*at].hash_next;
	}
	*at = slot->hash_next;
	slot->hashed = false;
}

void slot_publish(struct cache *cache, uint32_t index, enum slot_content content)
{
	/* after a kill, the next worker must find the bytes where it finds the word that says so */
	assert(index < cache->region->slot_count);
	atomic_store_explicit(&cache->region->slots[index], slot_value(cache->slots[index].page, content),
			      memory_order_release);
}

/* The page has no slot any more. Not while the slot is being written or fetched. */
void slot_release(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	assert(!slot->writing && !slot->fetching);
	slot_publish(cache, index, SLOT_FREE);
	hash_drop(cache, index);
	if (slot->read_ahead)
		cache->wasted++;
	slot->read_ahead = false;
	slot->since = 0;
	slot_list_move(cache, ON_FREE, index);
}

/* A slot for `page`, on no list and hashed: a free one, or the least recently used clean one. */
uint32_t slot_take(struct cache *cache, uint64_t page)
{
	if (cache->lists[ON_FREE].head == NO_SLOT) {
		if (cache->lists[ON_CLEAN].head == NO_SLOT)
			return NO_SLOT;
		slot_release(cache, cache->lists[ON_CLEAN].head);
	}
	uint32_t index = cache->lists[ON_FREE].head;

	slot_list_drop(cache, index);
	slot_hash_add(cache, index, page);
	return index;
}

/* Write number cache->sequence has changed the slot's bytes. */
void slot_became_dirty(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	assert(cache->sequence > 0 && !slot->fetching);
	slot_publish(cache, index, SLOT_DIRTY);
	slot->in_commit = false;
	slot->read_ahead = false;
	if (slot->writing) {
		if (slot->rewritten == 0)
			slot->rewritten = cache->sequence;
	} else {
		if (slot->since == 0)
			slot->since = cache->sequence;
		if (slot->list != ON_DIRTY)
			slot_list_move(cache, ON_DIRTY, index);
	}
}

/* The NAS has the slot's bytes, stably. */
void slot_became_clean(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	assert(!slot->writing && !slot->fetching && slot->rewritten == 0);
	slot->since = 0;
	slot->in_commit = false;
	slot_publish(cache, index, SLOT_CLEAN);
	slot_list_move(cache, ON_CLEAN, index);
}
