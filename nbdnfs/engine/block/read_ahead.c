/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Read-ahead: fetch into slots what streams.h expects a reader to want next. */
#include "block/internal.h"

static void fetch_done(struct nfsio_req *req)
{
	struct fetch *fetch = (struct fetch *)req;
	struct engine *engine = fetch->engine;
	bool ok = req->error == 0 && req->moved_bytes == req->length_bytes &&
		  req->offset_bytes + req->length_bytes <= file_truncated_bytes(engine);
	bool are_right[FETCH_PAGES];

	count_duration(counters(engine)->nfs_read_us, now_us() - fetch->started_us);
	for (uint32_t i = 0; ok && i < fetch->count; i++)
		are_right[i] = proof_open(&engine->region, fetch->first_page + i, fetch->proofs[i],
					  fetch->data + (size_t)i * SLOT_BYTES);
	engine_lock(engine);
	cache_fetch_done(engine->cache, fetch->first_page, fetch->count, fetch->number, ok ? fetch->data : NULL,
			 are_right);
	assert(fetch->busy && engine->spare_count < LONG_BUFFERS);
	fetch->busy = false;
	engine->spare[engine->spare_count++] = fetch->data;
	count(&counters(engine)->nfs_in_flight, (uint64_t)-1);
	engine_unlock(engine);
}

/* NULL when all are in flight. Lock held. */
static struct fetch *free_fetch(struct engine *engine)
{
	for (struct fetch *fetch = engine->fetches; fetch < engine->fetches + FETCHES; fetch++)
		if (!fetch->busy)
			return fetch;
	return NULL;
}

/*
 * Fetch pages into slots, as far as there is room for them. Returns how many are left. Lock held; dropped while a
 * request is submitted.
 */
static uint32_t fetch_pages(struct engine *engine, uint64_t first_page, uint32_t pages)
{
	while (pages > 0) {
		struct fetch *fetch = free_fetch(engine);
		uint32_t most = pages_at_once(engine, pages < FETCH_PAGES ? pages : FETCH_PAGES);

		/* it must not take slots that writes will need soon */
		if (fetch == NULL || engine->spare_count == 0 ||
		    cache_unstable_count(engine->cache) >= engine->region.slot_count * 3 / 4)
			return pages;
		fetch->number = ++engine->fetch_number;
		fetch->count = cache_fetch_begin(engine->cache, first_page, most, fetch->number, fetch->proofs);
		assert(fetch->count <= most);
		if (fetch->count == 0) {
			first_page++; /* the cache has it: go on after it */
			pages--;
			continue;
		}
		fetch->busy = true;
		fetch->data = engine->spare[--engine->spare_count];
		fetch->first_page = first_page;
		fetch->started_us = now_us();
		fetch->req = (struct nfsio_req){
			.op = NFSIO_READ,
			.offset_bytes = first_page * SLOT_BYTES,
			.length_bytes = fetch->count * SLOT_BYTES,
			.data = fetch->data,
			.done = fetch_done,
		};
		first_page += fetch->count;
		pages -= fetch->count;
		count(&counters(engine)->read_ahead_pages, fetch->count);
		count(&counters(engine)->nfs_reads, 1);
		count(&counters(engine)->nfs_read_bytes, fetch->req.length_bytes);
		count(&counters(engine)->nfs_in_flight, 1);
		engine_unlock(engine);
		nfsio_submit(engine->ios[0], &fetch->req);
		engine_lock(engine);
	}
	return 0;
}

void readahead_follow(struct engine *engine, uint64_t page, uint32_t pages)
{
	struct prefetch prefetch;
	uint32_t used, wasted;

	engine_lock(engine);
	used = cache_take_used(engine->cache);
	wasted = cache_take_wasted(engine->cache);
	streams_judge(&engine->streams, used, wasted);
	if (streams_note(&engine->streams, page, pages, engine->region.page_count, &prefetch))
		for (uint32_t i = 0; i < prefetch.times; i++) {
			uint64_t first = prefetch.first + (uint64_t)(prefetch.step * (int64_t)i);
			uint32_t left = fetch_pages(engine, first, prefetch.count);

			if (left > 0)
				streams_not_fetched(&engine->streams, &prefetch, left);
		}
	engine_unlock(engine);
	count(&counters(engine)->read_ahead_hits, used);
	count(&counters(engine)->read_ahead_wasted, wasted);
}
