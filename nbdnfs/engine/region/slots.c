/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The life of a slot: its list, its place in the hash, its unstable writes, and its state in the region. All changes of
 * a slot's state are here, so that none is without its note for those who wait (`cache->changed`) and for
 * cache_known_page().
 */
#include "region/cache_internal.h"

static void list_link(struct cache *cache, enum list_name name, uint32_t index, uint32_t prev, uint32_t next)
{
	struct list *list = &cache->lists[name];
	struct slot *slot = &cache->slots[index];

	assert(index < cache->region->slot_count && slot->list == ON_NONE && name != ON_NONE);
	slot->list = (uint8_t)name;
	slot->prev = prev;
	slot->next = next;
	*(prev != NO_SLOT ? &cache->slots[prev].next : &list->head) = index;
	*(next != NO_SLOT ? &cache->slots[next].prev : &list->tail) = index;
	list->count++;
}

static void list_add(struct cache *cache, enum list_name name, uint32_t index)
{
	list_link(cache, name, index, cache->lists[name].tail, NO_SLOT);
}

static void list_drop(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];
	struct list *list = &cache->lists[slot->list];

	if (slot->list == ON_NONE)
		return;
	assert(list->count > 0);
	*(slot->prev != NO_SLOT ? &cache->slots[slot->prev].next : &list->head) = slot->next;
	*(slot->next != NO_SLOT ? &cache->slots[slot->next].prev : &list->tail) = slot->prev;
	list->count--;
	slot->list = ON_NONE;
}

static void list_move(struct cache *cache, enum list_name name, uint32_t index)
{
	list_drop(cache, index);
	list_add(cache, name, index);
}

/*
 * The first of the clean slots is the next that another page takes. What was written has just left the client's memory,
 * and goes to the end; what was read is there now, so that it is not read again for a while.
 */
static void list_clean(struct cache *cache, uint32_t index)
{
	list_drop(cache, index);
	if (cache->slots[index].was_read)
		list_link(cache, ON_CLEAN, index, NO_SLOT, cache->lists[ON_CLEAN].head);
	else
		list_add(cache, ON_CLEAN, index);
}

/* ---- the hash ---- */

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

static void hash_add(struct cache *cache, uint32_t index, uint64_t page)
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

/* ---- unstable writes ---- */

/* Write number cache->sequence is unstable. */
static void unstable_add(struct cache *cache, uint32_t index, unsigned which)
{
	uint32_t number = index * 2 + which, last = cache->newest_write;
	struct unstable_write *write = slot_write(cache, number);

	assert(write->sequence == 0 && cache->sequence > 0);
	assert(last == NO_SLOT || slot_write(cache, last)->sequence <= cache->sequence);
	*write = (struct unstable_write){ .sequence = cache->sequence, .prev = last, .next = NO_SLOT };
	*(last != NO_SLOT ? &slot_write(cache, last)->next : &cache->oldest_write) = number;
	cache->newest_write = number;
}

/* It is stable, or of no interest any more. */
static void unstable_drop(struct cache *cache, uint32_t index, unsigned which)
{
	struct unstable_write *write = &cache->slots[index].writes[which];

	if (write->sequence == 0)
		return;
	*(write->prev != NO_SLOT ? &slot_write(cache, write->prev)->next : &cache->oldest_write) = write->next;
	*(write->next != NO_SLOT ? &slot_write(cache, write->next)->prev : &cache->newest_write) = write->prev;
	write->sequence = 0;
	cache->changed = true;
}

/* ---- states ---- */

static void publish(struct cache *cache, uint32_t index, enum slot_content content)
{
	/* after a kill, the next worker must find the bytes where it finds the word that says so */
	assert(index < cache->region->slot_count);
	atomic_store_explicit(&cache->region->slots[index], slot_value(cache->slots[index].page, content),
			      memory_order_release);
}

/* The NAS has stably what was last written to the page, as far as that is known. */
static void note_known(struct cache *cache, uint64_t page)
{
	page_set_put(&cache->known, page, tells_the_file(cache, page));
}

void slot_init_free(struct cache *cache, uint32_t index)
{
	publish(cache, index, SLOT_FREE);
	list_add(cache, ON_FREE, index);
}

void slot_init_page(struct cache *cache, uint32_t index, uint64_t page)
{
	hash_add(cache, index, page);
}

/* The page has no slot any more. Not while the slot is being written or fetched. */
static void make_free(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	assert(!slot->writing && !slot->fetching && since_of(slot) == 0 && rewritten_of(slot) == 0);
	publish(cache, index, SLOT_FREE);
	hash_drop(cache, index);
	if (slot->read_ahead)
		cache->wasted++;
	slot->read_ahead = slot->was_read = slot->in_commit = slot->overtaken = false;
	list_move(cache, ON_FREE, index);
}

static void release(struct cache *cache, uint32_t index)
{
	make_free(cache, index);
	note_known(cache, cache->slots[index].page);
	cache->changed = true;
}

uint32_t slot_take(struct cache *cache, uint64_t page)
{
	uint32_t index;

	if (cache->lists[ON_FREE].head == NO_SLOT) {
		if (cache->lists[ON_CLEAN].head == NO_SLOT)
			return NO_SLOT;
		make_free(cache, cache->lists[ON_CLEAN].head); /* the NAS has its page as before */
	}
	index = cache->lists[ON_FREE].head;
	list_drop(cache, index);
	hash_add(cache, index, page);
	return index;
}

void slot_overwrite(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	if (slot->list == ON_CLEAN)
		publish(cache, index, SLOT_FREE); /* if killed while copying: the NAS has the old bytes */
	if (slot->fetching)
		cache->changed = true;
	slot->fetching = false;
}

void slot_used(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	if (slot->read_ahead)
		cache->used++;
	slot->read_ahead = false;
	slot->was_read = true;
	if (slot->list == ON_CLEAN)
		list_clean(cache, index);
}

static bool is_held(const struct cache *cache, uint64_t page)
{
	for (unsigned i = 0; i < cache->hold_count; i++)
		if (page - cache->holds[i].first_page < cache->holds[i].count)
			return true;
	return false;
}

static void queue(struct cache *cache, uint32_t index)
{
	list_move(cache, is_held(cache, cache->slots[index].page) ? ON_HELD : ON_DIRTY, index);
}

void slot_became_dirty(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	assert(cache->sequence > 0 && !slot->fetching);
	publish(cache, index, SLOT_DIRTY);
	page_set_put(&cache->known, slot->page, false);
	slot->in_commit = false;
	slot->read_ahead = slot->was_read = false;
	if (slot->writing) {
		if (rewritten_of(slot) == 0)
			unstable_add(cache, index, !slot->oldest);
		return;
	}
	if (since_of(slot) == 0)
		unstable_add(cache, index, slot->oldest);
	if (slot->list == ON_UNCOMMITTED)
		slot->overtaken = true;
	if (slot->list != ON_DIRTY && slot->list != ON_HELD)
		queue(cache, index);
}

/* The NAS has the slot's bytes, stably. */
static void became_clean(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	assert(!slot->writing && !slot->fetching && rewritten_of(slot) == 0);
	unstable_drop(cache, index, slot->oldest);
	slot->in_commit = slot->overtaken = false;
	publish(cache, index, SLOT_CLEAN);
	list_clean(cache, index);
	note_known(cache, slot->page);
	cache->changed = true;
}

void slot_forget(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	slot->fetching = slot->in_commit = slot->overtaken = false;
	unstable_drop(cache, index, 0);
	unstable_drop(cache, index, 1);
	if (slot->writing)
		publish(cache, index, SLOT_FREE);
	else
		release(cache, index);
}

void slot_begin_write(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	assert(slot->list == ON_DIRTY && !slot->writing && since_of(slot) != 0 && rewritten_of(slot) == 0);
	list_drop(cache, index);
	slot->writing = true;
	cache->writing_count++;
}

void slot_end_write(struct cache *cache, uint32_t index, enum write_end end, uint64_t verifier)
{
	struct slot *slot = &cache->slots[index];

	assert(index < cache->region->slot_count && slot->writing && cache->writing_count > 0);
	slot->writing = false;
	cache->writing_count--;
	if (rewritten_of(slot) != 0) {
		/* where the older write is not stable, it remains the oldest: the newer one may not be stable either */
		bool is_older_unstable = since_of(slot) != 0 && end != WRITE_STABLE;

		unstable_drop(cache, index, is_older_unstable ? !slot->oldest : slot->oldest);
		slot->overtaken = is_older_unstable;
		if (!is_older_unstable)
			slot->oldest = !slot->oldest;
		queue(cache, index);
	} else if (since_of(slot) == 0) {
		release(cache, index); /* trimmed or filled meanwhile */
	} else if (end == WRITE_STABLE) {
		became_clean(cache, index);
	} else if (end == WRITE_UNCOMMITTED) {
		slot->verifier = verifier;
		list_add(cache, ON_UNCOMMITTED, index);
	} else {
		queue(cache, index);
	}
}

void slot_committed(struct cache *cache, uint32_t index)
{
	assert(cache->slots[index].list == ON_UNCOMMITTED);
	became_clean(cache, index);
}

void slot_lost(struct cache *cache, uint32_t index)
{
	assert(cache->slots[index].list == ON_UNCOMMITTED);
	cache->slots[index].in_commit = false;
	queue(cache, index);
}

void slot_hold(struct cache *cache, uint32_t index)
{
	if (cache->slots[index].list == ON_DIRTY)
		list_move(cache, ON_HELD, index);
}

void slot_unhold(struct cache *cache, uint32_t index)
{
	assert(cache->slots[index].list == ON_HELD);
	if (is_held(cache, cache->slots[index].page))
		return;
	list_drop(cache, index);
	list_link(cache, ON_DIRTY, index, NO_SLOT, cache->lists[ON_DIRTY].head); /* older than most */
}

void slot_begin_fetch(struct cache *cache, uint32_t index, uint64_t fetch)
{
	struct slot *slot = &cache->slots[index];

	assert(slot->list == ON_NONE && !slot->writing && since_of(slot) == 0);
	slot->fetching = true;
	slot->fetch = fetch;
}

void slot_end_fetch(struct cache *cache, uint32_t index, bool has_bytes)
{
	struct slot *slot = &cache->slots[index];

	assert(slot->fetching);
	slot->fetching = false;
	slot->read_ahead = has_bytes;
	if (has_bytes)
		became_clean(cache, index);
	else
		release(cache, index);
}
