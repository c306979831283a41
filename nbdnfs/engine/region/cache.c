/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "region/cache.h"

#include <stdlib.h>
#include <string.h>

#include "base/crc32c.h"

/*
 * What a slot is, beyond what the region says of it. The lists: FREE and CLEAN slots are on one each (CLEAN in
 * the order of their last use), DIRTY ones that are not under way on another, oldest first. A slot whose page
 * is under way (`writing`) or being fetched is on none, unless it is DIRTY again or UNCOMMITTED.
 */
enum list_name { ON_NONE, ON_FREE, ON_CLEAN, ON_DIRTY, ON_UNCOMMITTED, LIST_COUNT };

struct slot {
	uint32_t prev, next;    /* of its list */
	uint32_t hash_next;
	uint8_t list;
	bool hashed;            /* page is found under its number */
	bool writing;           /* a run with it is under way */
	bool fetching;
	bool read_ahead;        /* fetched, and nobody has read it yet */
	bool in_commit;         /* the commit under way covers it */
	uint64_t page;
	uint64_t fetch;         /* which fetch, while fetching */
	uint64_t verifier;      /* while UNCOMMITTED */
	uint64_t since;         /* the oldest write that the NAS may not have, 0 when it has all */
	uint64_t rewritten;     /* the oldest write since the run under way was copied, 0 for none */
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

/* ------------------------------------------------------------------ lists and hash ---------------------- */

static void list_add(struct cache *cache, enum list_name name, uint32_t index)
{
	struct list *list = &cache->lists[name];
	struct slot *slot = &cache->slots[index];

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

static void list_drop(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];
	struct list *list = &cache->lists[slot->list];

	if (slot->list == ON_NONE)
		return;
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

static void list_move(struct cache *cache, enum list_name name, uint32_t index)
{
	list_drop(cache, index);
	if (name != ON_NONE)
		list_add(cache, name, index);
}

static uint32_t *bucket_of(const struct cache *cache, uint64_t page)
{
	return &cache->buckets[(page * 0x9e3779b97f4a7c15u >> 32) & cache->bucket_mask];
}

static uint32_t find(const struct cache *cache, uint64_t page)
{
	uint32_t index = *bucket_of(cache, page);

	while (index != NO_SLOT && cache->slots[index].page != page)
		index = cache->slots[index].hash_next;
	return index;
}

static void hash_add(struct cache *cache, uint32_t index, uint64_t page)
{
	uint32_t *bucket = bucket_of(cache, page);

	cache->slots[index].page = page;
	cache->slots[index].hashed = true;
	cache->slots[index].hash_next = *bucket;
	*bucket = index;
}

static void hash_drop(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];
	uint32_t *link = bucket_of(cache, slot->page);

	if (!slot->hashed)
		return;
	while (*link != index)
		link = &cache->slots[*link].hash_next;
	*link = slot->hash_next;
	slot->hashed = false;
}

/* ------------------------------------------------------------------ the region's tables ----------------- */

static uint8_t *data_of(const struct cache *cache, uint32_t index)
{
	return cache->region->data + (size_t)index * PAGE_BYTES;
}

static void publish(struct cache *cache, uint32_t index, enum slot_content content)
{
	/* the bytes must be there before the word that says so, for whoever maps the region after a kill */
	atomic_store_explicit(&cache->region->slots[index], slot_value(cache->slots[index].page, content),
			      memory_order_release);
}

static bool is_filled(const struct cache *cache, uint64_t page)
{
	return atomic_load_explicit(&cache->region->filled[page / 64], memory_order_relaxed) >> (page % 64) & 1;
}

static void set_filled(struct cache *cache, uint64_t page, bool filled)
{
	uint64_t bit = (uint64_t)1 << (page % 64);

	if (filled)
		atomic_fetch_or_explicit(&cache->region->filled[page / 64], bit, memory_order_release);
	else
		atomic_fetch_and_explicit(&cache->region->filled[page / 64], ~bit, memory_order_release);
}

static void set_word(struct cache *cache, uint64_t page, uint32_t word)
{
	atomic_store_explicit(&cache->region->page_table[page], word, memory_order_release);
}

static uint32_t word_of(const struct cache *cache, uint64_t page)
{
	return atomic_load_explicit(&cache->region->page_table[page], memory_order_relaxed);
}

/* 0 means "unknown" in the table; a checksum that happens to be 0 is not checked. */
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
		index = find(cache, candidate);
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

static void fill(uint8_t *data, uint32_t word)
{
	for (size_t at = 0; at < PAGE_BYTES; at += 4)
		memcpy(data + at, &word, 4);
}

/* ------------------------------------------------------------------ life of a slot ---------------------- */

/* The page has no slot any more. Not while a run or a fetch with the slot is under way. */
static void release(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	publish(cache, index, SLOT_FREE);
	hash_drop(cache, index);
	if (slot->read_ahead)
		cache->wasted++;
	slot->read_ahead = false;
	slot->since = 0;
	list_move(cache, ON_FREE, index);
}

/* A slot for `page`, on no list and hashed: a free one, or the clean one that was used longest ago. */
static uint32_t take_slot(struct cache *cache, uint64_t page)
{
	if (cache->lists[ON_FREE].head == NO_SLOT) {
		if (cache->lists[ON_CLEAN].head == NO_SLOT)
			return NO_SLOT;
		release(cache, cache->lists[ON_CLEAN].head);
	}
	uint32_t index = cache->lists[ON_FREE].head;

	list_drop(cache, index);
	hash_add(cache, index, page);
	return index;
}

/* The slot's bytes have changed by write number cache->sequence. */
static void became_dirty(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	publish(cache, index, SLOT_DIRTY);
	slot->in_commit = false;
	slot->read_ahead = false;
	if (slot->writing) {
		if (slot->rewritten == 0)
			slot->rewritten = cache->sequence;
	} else {
		if (slot->since == 0)
			slot->since = cache->sequence;
		if (slot->list != ON_DIRTY)
			list_move(cache, ON_DIRTY, index);
	}
}

/* The NAS has all that the slot holds. */
static void became_clean(struct cache *cache, uint32_t index)
{
	cache->slots[index].since = 0;
	cache->slots[index].in_commit = false;
	publish(cache, index, SLOT_CLEAN);
	list_move(cache, ON_CLEAN, index);
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

		/* a clean slot is only a saving: its page may have been on the way to its next owner */
		if (slot_content(value) != SLOT_DIRTY || page >= region->page_count || find(cache, page) != NO_SLOT) {
			publish(cache, index, SLOT_FREE);
			list_add(cache, ON_FREE, index);
			continue;
		}
		/* the slot wins over what its maker may not have got to */
		set_filled(cache, page, false);
		set_word(cache, page, crc32c(data_of(cache, index), PAGE_BYTES));
		cache->sequence++;
		hash_add(cache, index, page);
		became_dirty(cache, index);
	}
	return cache;
}

void cache_destroy(struct cache *cache)
{
	free(cache->slots);
	free(cache->buckets);
	free(cache);
}

/* ------------------------------------------------------------------ requests ---------------------------- */

/* False when a page was trimmed while its write is under way: the slot is only waiting for the end of that. */
static bool has_bytes(const struct slot *slot)
{
	return slot->list == ON_CLEAN || slot->since != 0 || slot->rewritten != 0;
}

enum cache_lookup cache_read(struct cache *cache, uint64_t page, uint8_t *data)
{
	uint32_t index = find(cache, page);
	struct slot *slot = index != NO_SLOT ? &cache->slots[index] : NULL;

	if (slot != NULL && slot->fetching)
		return CACHE_WAIT;
	if (slot != NULL && has_bytes(slot)) {
		memcpy(data, data_of(cache, index), PAGE_BYTES);
		if (slot->read_ahead)
			cache->used++;
		slot->read_ahead = false;
		if (slot->list == ON_CLEAN)
			list_move(cache, ON_CLEAN, index); /* to the end: used last */
		return CACHE_HIT;
	}
	if (is_filled(cache, page)) {
		fill(data, word_of(cache, page));
		return CACHE_HIT;
	}
	return CACHE_MISS;
}

/* Take the page off its slot, if it has one; a run that is under way keeps the slot until it is done. */
static void forget(struct cache *cache, uint64_t page)
{
	uint32_t index = find(cache, page);

	if (index == NO_SLOT)
		return;
	struct slot *slot = &cache->slots[index];

	slot->fetching = false;
	slot->in_commit = false;
	slot->rewritten = 0;
	slot->since = 0;
	if (slot->writing) {
		publish(cache, index, SLOT_FREE);
		list_move(cache, ON_NONE, index);
	} else {
		release(cache, index);
	}
}

/* Put bytes into the page's slot, or a new one. False: there is none. */
static bool store(struct cache *cache, uint64_t page, const uint8_t *data, uint32_t crc)
{
	uint32_t index = find(cache, page);

	if (index == NO_SLOT) {
		index = take_slot(cache, page);
		if (index == NO_SLOT)
			return false;
	} else if (cache->slots[index].list == ON_CLEAN) {
		publish(cache, index, SLOT_FREE); /* killed while copying, the NAS still has what was there */
	}
	cache->slots[index].fetching = false;
	memcpy(data_of(cache, index), data, PAGE_BYTES);
	became_dirty(cache, index);
	/* killed in between, the slot wins: see cache_create() */
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
	/* killed after the first of these, the NAS's page does not match and is an error, not wrong bytes */
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
	uint32_t index = find(cache, page);

	return index == NO_SLOT || slot_is_stable(&cache->slots[index], sequence);
}

bool cache_materialise(struct cache *cache, uint64_t *page)
{
	uint8_t data[PAGE_BYTES];

	for (; *page < cache->region->page_count; (*page)++) {
		if (*page % 64 == 0 && atomic_load_explicit(&cache->region->filled[*page / 64], memory_order_relaxed) == 0) {
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

/* ------------------------------------------------------------------ writing back ------------------------ */

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

/* The slot of the oldest dirty page that may travel; NO_SLOT for none. */
static uint32_t oldest_takable(const struct cache *cache)
{
	uint32_t index = cache->lists[ON_DIRTY].head;

	while (index != NO_SLOT && is_held(cache, cache->slots[index].page))
		index = cache->slots[index].next;
	return index;
}

static bool is_takable(const struct cache *cache, uint64_t page)
{
	uint32_t index = find(cache, page);

	return index != NO_SLOT && cache->slots[index].list == ON_DIRTY && !is_held(cache, page);
}

/* The run around the oldest dirty page: its first page, and how many; 0 when nothing is dirty that could be taken. */
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

uint32_t cache_next_run(const struct cache *cache, uint32_t most)
{
	uint64_t first;

	return find_run(cache, most, &first);
}

bool cache_take_run(struct cache *cache, struct cache_run *run, uint32_t most, uint8_t *data)
{
	run->count = find_run(cache, most, &run->first_page);
	if (run->count == 0)
		return false;
	for (uint32_t i = 0; i < run->count; i++) {
		uint32_t index = find(cache, run->first_page + i);

		list_drop(cache, index);
		cache->slots[index].writing = true;
		cache->slots[index].rewritten = 0;
		memcpy(data + (size_t)i * PAGE_BYTES, data_of(cache, index), PAGE_BYTES);
		run->slots[i] = index;
	}
	cache->writing_count += run->count;
	return true;
}

/* A run's page has come back. True when nothing has happened to it meanwhile: what is next is the caller's. */
static bool came_back(struct cache *cache, uint32_t index)
{
	struct slot *slot = &cache->slots[index];

	slot->writing = false;
	cache->writing_count--;
	if (slot->rewritten != 0) {
		slot->since = slot->rewritten;
		slot->rewritten = 0;
		list_move(cache, ON_DIRTY, index);
		return false;
	}
	if (slot->since == 0) {
		release(cache, index);
		return false;
	}
	return true;
}

void cache_run_stable(struct cache *cache, const struct cache_run *run)
{
	for (uint32_t i = 0; i < run->count; i++)
		if (came_back(cache, run->slots[i]))
			became_clean(cache, run->slots[i]);
}

void cache_run_uncommitted(struct cache *cache, const struct cache_run *run, uint64_t verifier)
{
	for (uint32_t i = 0; i < run->count; i++) {
		if (!came_back(cache, run->slots[i]))
			continue;
		cache->slots[run->slots[i]].verifier = verifier;
		list_add(cache, ON_UNCOMMITTED, run->slots[i]);
	}
}

void cache_run_failed(struct cache *cache, const struct cache_run *run)
{
	for (uint32_t i = 0; i < run->count; i++) {
		struct slot *slot = &cache->slots[run->slots[i]];
		uint64_t since = slot->since;

		if (came_back(cache, run->slots[i]))
			list_add(cache, ON_DIRTY, run->slots[i]);
		else if (since != 0 && slot->list == ON_DIRTY)
			slot->since = since; /* what was written first did not arrive either */
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
	uint32_t lost = 0, next;

	for (uint32_t index = cache->lists[ON_UNCOMMITTED].head; index != NO_SLOT; index = next) {
		struct slot *slot = &cache->slots[index];

		next = slot->next;
		if (!slot->in_commit)
			continue;
		if (slot->verifier == verifier) {
			became_clean(cache, index);
		} else {
			slot->in_commit = false;
			list_move(cache, ON_DIRTY, index);
			lost++;
		}
	}
	return lost;
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

/* ------------------------------------------------------------------ reading ahead ----------------------- */

uint32_t cache_fetch_begin(struct cache *cache, uint64_t first_page, uint32_t count, uint64_t fetch)
{
	uint32_t taken;

	for (taken = 0; taken < count; taken++) {
		uint64_t page = first_page + taken;
		uint32_t index;

		if (page >= cache->region->page_count || find(cache, page) != NO_SLOT || is_filled(cache, page))
			break;
		index = take_slot(cache, page);
		if (index == NO_SLOT)
			break;
		cache->slots[index].fetching = true;
		cache->slots[index].fetch = fetch;
	}
	return taken;
}

void cache_fetch_done(struct cache *cache, uint64_t first_page, uint32_t count, uint64_t fetch, const uint8_t *data,
		      const uint32_t *crcs)
{
	for (uint32_t i = 0; i < count; i++) {
		uint32_t index = find(cache, first_page + i);
		uint32_t wanted;

		if (index == NO_SLOT || !cache->slots[index].fetching || cache->slots[index].fetch != fetch)
			continue; /* written or trimmed meanwhile */
		cache->slots[index].fetching = false;
		wanted = word_of(cache, first_page + i);
		if (data == NULL || (wanted != 0 && wanted != crcs[i])) {
			release(cache, index);
			continue;
		}
		memcpy(data_of(cache, index), data + (size_t)i * PAGE_BYTES, PAGE_BYTES);
		cache->slots[index].read_ahead = true;
		became_clean(cache, index);
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
